"""MM-IMDb: posters, plots and genres of 25,959 films. One row per film, with all its plots."""

from functools import partial
from pathlib import Path

from vilt.datasets.specs import DATASETS, MMIMDB_GENRES
from vilt.utils import raw_data
from vilt.utils.raw_data import BadSampleError, RawDataset, RawSplit, Row

LAYOUT = """\
RAW/
  split.json          {"train": [ID, ...], "dev": [ID, ...], "test": [ID, ...]}
  images/ID.jpeg      the poster
  labels/ID.json      {"plot": [TEXT, ...], "genres": [GENRE, ...], ...}
"""


def read_film(raw: Path, name: str) -> Row:
    """Columns image, plots, label (0/1 over the 23 genres), genres (all of them, as given), image_id.

    Raises BadSampleError.
    """
    file = f"labels/{name}.json"
    record = raw_data.read_record(raw_data.read_file(raw, file, raw_data.MAX_RECORD_BYTES), file)
    plots, genres = (raw_data.texts_of(record, key, file) for key in ("plot", "genres"))
    if not any(plot.strip() for plot in plots):
        raise BadSampleError(raw_data.INCOMPLETE_JSON, file, "no plot")
    return {
        "image": raw_data.read_image(raw, f"images/{name}.jpeg"),
        "plots": plots,
        "label": [int(genre in genres) for genre in MMIMDB_GENRES],
        "genres": genres,
        "image_id": name,
    }


def open_raw(raw: Path) -> RawDataset:
    """MM-IMDb in `raw`, with split.json read and checked. Raises DataError."""
    spec = DATASETS["mmimdb"]
    raw_data.require_layout(raw, ("split.json", "images", "labels"), LAYOUT)
    splits = []
    for split, names in raw_data.read_split_file(raw / "split.json", spec).items():
        samples = [(row, partial(read_film, raw, name)) for row, name in enumerate(names, 1)]
        splits.append(RawSplit(split, "split.json", samples))
    return RawDataset(spec, MMIMDB_GENRES, tuple(splits))
