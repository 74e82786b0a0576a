"""Converts MM-IMDb: posters, plots and genres of 25,959 films. One row per film, with all its plots."""

from functools import partial
from pathlib import Path

from vilt.datasets.specs import DATASETS, MMIMDB_GENRES
from vilt.utils import raw_data
from vilt.utils.names import look
from vilt.utils.raw_data import BadSampleError, RawDataset, RawSplit, Row

LAYOUT = """\
RAW/
  split.json          {"train": [ID, ...], "dev": [ID, ...], "test": [ID, ...]}
  images/ID.jpeg      the poster
  labels/ID.json      {"plot": [TEXT, ...], "genres": [GENRE, ...], ...}
"""


def read_film(raw: Path, allow_missing: bool, name: str) -> Row:
    """Columns image, plots, label (0/1 over the 23 genres), genres (all of them, as given), image_id.

    Raises BadSampleError.
    """
    file = f"labels/{name}.json"
    record = raw_data.read_record(raw_data.read_file(raw, file, raw_data.MAX_RECORD_BYTES), file)
    if allow_missing and record.get("plot") is None:
        record["plot"] = []
    plots, genres = (raw_data.texts_of(record, key, file) for key in ("plot", "genres"))
    has_plot = any(plot.strip() for plot in plots)
    if not has_plot and not allow_missing:
        raise BadSampleError(raw_data.INCOMPLETE_JSON, file, "no plot")
    known = {look(genre).casefold() for genre in genres}
    return {
        "image": raw_data.read_image(raw, f"images/{name}.jpeg", allow_missing),
        "plots": plots if has_plot else None,
        "label": [int(look(genre).casefold() in known) for genre in MMIMDB_GENRES],
        "genres": genres,
        "image_id": name,
    }


def open_raw(raw: Path, allow_missing: bool = False) -> RawDataset:
    """Opens MM-IMDb in `raw`: reads and checks split.json. Raises DataError.

    Args:
        allow_missing: keep films without poster or plots, as naturally missing; otherwise they are bad samples.
    """
    spec = DATASETS["mmimdb"]
    raw_data.require_layout(raw, ("split.json", "images", "labels"), LAYOUT)
    splits = []
    for split, names in raw_data.read_split_file(raw / "split.json", spec).items():
        samples = [(row, partial(read_film, raw, allow_missing, name)) for row, name in enumerate(names, 1)]
        splits.append(RawSplit(split, "split.json", samples))
    return RawDataset(spec, MMIMDB_GENRES, tuple(splits))
