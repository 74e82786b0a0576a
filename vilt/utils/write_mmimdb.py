"""MM-IMDb: posters, plots and genres of 25,959 films. One row per film, with all its plots."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vilt.datasets.specs import DATASETS, MMIMDB_GENRES
from vilt.utils.raw_data import (
    INCOMPLETE_JSON,
    MAX_RECORD_BYTES,
    BadSampleError,
    RawDataset,
    RawSplit,
    Row,
    Sample,
    check_texts,
    read_file,
    read_image,
    read_record,
    read_split_file,
    require_layout,
)

LAYOUT = """\
RAW/
  split.json          {"train": [ID, ...], "dev": [ID, ...], "test": [ID, ...]}
  images/ID.jpeg      the poster
  labels/ID.json      {"plot": [TEXT, ...], "genres": [GENRE, ...], ...}
"""


@dataclass(frozen=True)
class Film:
    """One film of split.json."""

    raw: Path
    name: str

    def read(self) -> Row:
        """Columns image, plots, label (0/1 over the 23 genres), genres (all of them, as given), image_id.

        Raises BadSampleError.
        """
        label_file = f"labels/{self.name}.json"
        record = read_record(read_file(self.raw, label_file, MAX_RECORD_BYTES), label_file)
        plots = check_texts(record, "plot", label_file)
        if not any(plot.strip() for plot in plots):
            raise BadSampleError(INCOMPLETE_JSON, label_file, "no plot")
        genres = check_texts(record, "genres", label_file)
        return {
            "image": read_image(self.raw, f"images/{self.name}.jpeg"),
            "plots": plots,
            "label": [int(genre in genres) for genre in MMIMDB_GENRES],
            "genres": genres,
            "image_id": self.name,
        }


def _films(raw: Path, names: list[str]) -> Iterator[tuple[int, Sample]]:
    for row, name in enumerate(names, 1):
        yield row, Film(raw, name)


def open_raw(raw: Path) -> RawDataset:
    """MM-IMDb in `raw`, with split.json read and checked. Raises DataError."""
    spec = DATASETS["mmimdb"]
    require_layout(raw, ("split.json", "images/", "labels/"), LAYOUT)
    splits = read_split_file(raw / "split.json", spec)
    return RawDataset(
        spec,
        MMIMDB_GENRES,
        tuple(RawSplit(split, "split.json", len(names), _films(raw, names)) for split, names in splits.items()),
    )
