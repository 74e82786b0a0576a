"""The table of datasets: files, columns, label type and classes. Adding a dataset is adding a row."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vilt.datasets.custom import CUSTOM, CustomData

MMIMDB_GENRES = (
    "Drama",
    "Comedy",
    "Romance",
    "Thriller",
    "Crime",
    "Action",
    "Adventure",
    "Horror",
    "Documentary",
    "Mystery",
    "Sci-Fi",
    "Fantasy",
    "Family",
    "Biography",
    "War",
    "History",
    "Music",
    "Animation",
    "Musical",
    "Western",
    "Sport",
    "Short",
    "Film-Noir",
)
"""The 23 genres in the order of the published label vectors."""

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset as its converter writes it and the loader reads it."""

    name: str
    """Prefix of the arrow files: `NAME_SPLIT.arrow`."""
    file_splits: dict[Split, str]
    """What each split is called in the file names (`dev` for validation in two of the three datasets)."""
    text_column: str
    """Column with the list of texts of a sample; each text is a training sample of its own."""
    id_column: str | None
    """Column naming the sample, where the published files have one."""
    multilabel: bool
    """True: the label column holds a 0/1 vector over classes; False: a class number."""
    n_classes: int
    class_names: tuple[str, ...] | None
    """None where the names are read from the data (Food-101's class_idx.json)."""
    make_arrow_name: str
    """Name of the dataset on the command line of make_arrow.py."""
    custom: CustomData | None = None
    """What the arrow files say of a dataset of one's own."""
    published_rows: dict[Split, tuple[int, ...]] = field(default_factory=dict)
    """Rows of the published splits; Hateful Memes has two for the test, seen and unseen (DATA.md)."""

    def file_name(self, split: Split) -> str:
        """Name of the arrow file of `split`, for example `mmimdb_dev.arrow` for `val`."""
        return f"{self.name}_{self.file_splits[split]}.arrow"

    def replacing_mark(self, root: Path) -> Path:
        """A file that is in `root` from before the first to after the last of the arrow files is replaced."""
        return root / f".{self.name}_replacing"

    def how_to_make(self, folder: Path) -> str:
        """For messages about files that are not in `folder`."""
        return f"make it with `python make_arrow.py --dataset {self.make_arrow_name} --root RAW --target {folder}`"


DATASETS: dict[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="mmimdb",
            file_splits={"train": "train", "val": "dev", "test": "test"},
            text_column="plots",
            id_column="image_id",
            multilabel=True,
            n_classes=23,
            class_names=MMIMDB_GENRES,
            make_arrow_name="mmimdb",
            published_rows={"train": (15552,), "val": (2608,), "test": (7799,)},
        ),
        DatasetSpec(
            name="food101",
            file_splits={"train": "train", "val": "val", "test": "test"},
            text_column="text",
            id_column="image_id",
            multilabel=False,
            n_classes=101,
            class_names=None,
            make_arrow_name="food101",
            published_rows={"train": (61142,), "val": (6846,), "test": (22716,)},
        ),
        DatasetSpec(
            name="hatememes",
            file_splits={"train": "train", "val": "dev", "test": "test"},
            text_column="text",
            id_column=None,
            multilabel=False,
            n_classes=2,
            class_names=("not hateful", "hateful"),
            make_arrow_name="hateful_memes",
            published_rows={"train": (8500,), "val": (500,), "test": (1000, 2000)},
        ),
    )
}

EVERY_DATASET: dict[str, DatasetSpec] = {
    **DATASETS,
    CUSTOM: DatasetSpec(
        name=CUSTOM,
        file_splits={"train": "train", "val": "val", "test": "test"},
        text_column="text",
        id_column="image_id",
        multilabel=False,
        n_classes=0,
        class_names=None,
        make_arrow_name=CUSTOM,
    ),
}
"""With the row of one's own data, which has files and columns; `custom_spec` fills in the labels."""


def custom_spec(custom: CustomData) -> DatasetSpec:
    """The whole row of a dataset of one's own."""
    return replace(
        EVERY_DATASET[CUSTOM],
        multilabel=custom.labels == "multi",
        n_classes=custom.n_classes,
        class_names=custom.class_names,
        custom=custom,
    )
