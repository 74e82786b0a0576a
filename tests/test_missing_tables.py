"""Missing tables: their contents, which depend on their description alone, and how they are saved."""

import hashlib
import itertools
import logging
import pickle
import random
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.shares import part_of
from tests.archives import Touch
from tests.conftest import Patch
from tests.data_files import at_once
from tests.interrupted import files_up_to
from vilt.datasets.specs import DATASETS, SPLITS, Modality, Split
from vilt.missing_tables import MissingPattern, counts_text, draw_missing_table, load_missing_table
from vilt.missing_types import available_shares, code_of, is_missing, missing_types, pattern_type, type_names

ROOT = Path(__file__).parents[1]
BOTH = MissingPattern("both", 0.7, 0.5, 0)

# Drawn once and recorded here: a seed must give the same table for ever.
DRAWN: list[tuple[str, Split, MissingPattern, str]] = [
    ("mmimdb", "train", MissingPattern("both", 0.7, 0.5, 0), "2011112021202120102020012011122000122211"),
    ("mmimdb", "train", MissingPattern("both", 0.3, 0.5, 0), "0010010021000000002000010010002000022210"),
    ("mmimdb", "val", MissingPattern("text", 0.5, 0.5, 0), "1001001110001000111101100010100101100111"),
    ("food101", "test", MissingPattern("image", 0.9, 0.5, 1), "2202222222222220222222222222222220202222"),
    ("hatememes", "train", MissingPattern("both", 0.65, 0.25, 7), "1121211121102011101112000011000110120001"),
]

SAVED_NAME = "mmimdb_dev_missing_both_0.7_both_ratio_0.5_seed_0_of_10.txt"
SAVED_HEADER = "# missing table: dataset=mmimdb split=dev type=both ratio=0.7 both_ratio=0.5 seed=0 samples=10"


def digits(table: np.ndarray) -> str:
    return "".join(map(str, table.tolist()))


def exact(count: int, ratio: float) -> int:
    """The share of `count`, rounded down, with the ratio in decimal digits."""
    return int(count * Decimal(repr(float(ratio))))


def slow_table(dataset: str, split: Split, pattern: MissingPattern, samples: int) -> list[int]:
    """The same table row by row: in the order of their random numbers, rows lose a modality until enough have."""
    key = hashlib.sha256(f"{dataset}/{DATASETS[dataset].file_splits[split]}/{pattern.seed}".encode()).hexdigest()
    numbers = np.random.PCG64(int(key, 16)).random_raw(samples).tolist()
    table, images_lost = [0] * samples, 0
    order = [row for _, row in sorted((number, row) for row, number in enumerate(numbers))]
    for lost, row in enumerate(order[: exact(samples, pattern.ratio)], start=1):
        loses_image = pattern.missing_type == "image" or (
            pattern.missing_type == "both" and exact(lost, pattern.both_ratio) > images_lost
        )
        images_lost += loses_image
        table[row] = 2 if loses_image else 1
    return table


def random_cases(n: int) -> list[tuple[int, float, float, int]]:
    """(samples, ratio, both_ratio, seed) of all sizes, awkward ratios included."""
    draw = random.Random(20)
    awkward = [0.0, 1.0, 0.1, 0.29, 0.57, 0.7, 0.9, 1 / 3, 2 / 3, 1e-9, 1 - 2**-53]
    cases = [(samples, 0.5, 0.5, 0) for samples in (1, 2, 3)]
    while len(cases) < n:
        ratio, both_ratio = (draw.choice(awkward) if draw.random() < 0.6 else draw.random() for _ in "ab")
        cases.append((draw.choice([1, 2, 7, 100, 999, draw.randrange(1, 3000)]), ratio, both_ratio, draw.randrange(99)))
    return cases


@pytest.mark.parametrize(("dataset", "split", "pattern", "expected"), DRAWN)
def test_drawn_tables_never_change(dataset, split, pattern, expected):
    table = draw_missing_table(dataset, split, pattern, 40)
    assert table.dtype == np.int8
    assert digits(table) == expected


@pytest.mark.parametrize("missing_type", ["text", "image", "both"])
def test_tables_equal_the_slow_version_and_have_exact_counts(missing_type):
    for samples, ratio, both_ratio, seed in random_cases(150):
        pattern = MissingPattern(missing_type, ratio, both_ratio, seed)
        table = draw_missing_table("food101", "val", pattern, samples)
        assert table.tolist() == slow_table("food101", "val", pattern, samples), (samples, pattern)
        missing = exact(samples, ratio)
        images = {"text": 0, "image": missing, "both": exact(missing, both_ratio)}[missing_type]
        assert [(table == value).sum() for value in range(3)] == [samples - missing, missing - images, images]


@pytest.mark.parametrize(
    ("samples", "ratio", "count"), [(90, 0.7, 63), (170, 0.7, 119), (100, 0.29, 29), (100, 0.57, 57), (3, 1 / 3, 0)]
)
def test_counts_follow_from_the_decimal_digits_of_the_ratio(samples, ratio, count):
    pattern = MissingPattern("text", ratio, 0.5, 0)
    assert (draw_missing_table("mmimdb", "test", pattern, samples) > 0).sum() == count
    both = draw_missing_table("mmimdb", "test", MissingPattern("both", 1, ratio, 0), samples)
    assert (both == 2).sum() == count
    as_published = draw_missing_table("mmimdb", "train", replace(pattern, drawing="published"), samples)
    assert (as_published > 0).sum() == int(samples * ratio)  # in binary, as the published code


def test_counts_at_published_sizes_equal_the_published_ones():
    sizes = {rows for spec in DATASETS.values() for per_split in spec.published_rows.values() for rows in per_split}
    assert 61142 in sizes
    for rows, ratio in itertools.product(sizes, [number / 100 for number in range(101)]):
        assert part_of(rows, ratio) == int(rows * ratio)


def test_global_random_states_are_neither_used_nor_advanced(tmp_path):
    def states() -> bytes:
        return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    tables = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = states()
        tables.append(load_missing_table(tmp_path / str(seed), "mmimdb", "train", BOTH, 300))
        assert states() == before
    assert np.array_equal(tables[0], tables[1])


NAMES = ("text", "sound", "depth", "light")
OF_FOUR = ["complete", "light missing", "depth missing", "depth, light missing", "sound missing"]


@pytest.fixture
def names(request: pytest.FixtureRequest, monkeypatch: Patch) -> tuple[str, ...]:
    """Modality names of a dataset `more`; the parameter is their number."""
    found = NAMES[: request.param]
    modalities = {name: Modality("array", name, (1,)) for name in found}
    monkeypatch.setitem(DATASETS, "more", replace(DATASETS["hatememes"], name="more", modalities=modalities))
    return found


def test_missing_types_are_named_in_binary_order() -> None:
    assert [*type_names(NAMES)[:5], type_names(NAMES)[14]] == [*OF_FOUR, "text, sound, depth missing"]
    assert len(type_names(NAMES)) == 15
    assert missing_types(NAMES) == ("light", "depth", "sound", "text", "any", "some")
    assert missing_types(("image", "text")) == ("text", "image", "both")


@pytest.mark.parametrize("names", [3, 4], indirect=True)
@pytest.mark.parametrize("drawing", ["nested", "published"])
@pytest.mark.parametrize("kind", ["any", "some", "text", "sound"])
def test_all_types_that_a_pattern_allows_occur_equally_often(names, drawing, kind):
    samples = 14 * 12 * len(names)
    table = draw_missing_table("more", "train", MissingPattern(kind, 0.5, 0.5, 3, drawing), samples)
    missing_sets = [{name for name in names if is_missing(names, name, code)} for code in range(len(type_names(names)))]
    fits = {"any": lambda missing: len(missing) == 1, "some": bool}.get(kind, {kind}.__eq__)
    allowed = [code for code, missing in enumerate(missing_sets) if fits(missing)]
    counts = np.bincount(table, minlength=len(missing_sets))
    assert counts[0] == samples / 2 and set(np.flatnonzero(counts)) == {0, *allowed}
    assert {counts[code] for code in allowed} == {samples // 2 // len(allowed)}
    shares = available_shares(names, kind, 0.5, 0.5)
    for name in names:
        assert shares[name] == pytest.approx(1 - np.mean(is_missing(names, name, table)))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        *((2, kind) for kind in ("both", "text", "sound")),
        *((n, kind) for n in (3, 4) for kind in ("any", "some", "sound")),
    ],
    indirect=["names"],
)
def test_missing_inputs_stay_missing_at_a_higher_ratio(names, kind):
    for samples, _, both_ratio, seed in random_cases(60):
        patterns = [MissingPattern(kind, ratio, both_ratio, seed) for ratio in (0, 0.05, 0.29, 0.3, 0.5, 0.65, 0.9, 1)]
        tables = [draw_missing_table("more", "train", pattern, samples) for pattern in patterns]
        for lower, higher in itertools.pairwise(tables):
            assert np.array_equal(higher[lower > 0], lower[lower > 0]), "missing, and in the same way"


@pytest.mark.parametrize("names", [4], indirect=True)
def test_tables_of_more_modalities_are_saved_too(names, tmp_path):
    pattern = MissingPattern("some", 1, 0.5, 0)
    drawn = load_missing_table(tmp_path, "more", "val", pattern, 40)
    (path,) = tmp_path.iterdir()
    header, meaning, digits = path.read_text().splitlines()
    assert "dataset=more split=dev type=some ratio=1.0" in header
    assert meaning.startswith("# 0=complete 1=light_missing") and meaning.endswith("e=text,_sound,_depth_missing")
    assert digits == "".join(f"{code:x}" for code in drawn) and "e" in digits
    assert np.array_equal(load_missing_table(tmp_path, "more", "val", pattern, 40), drawn)


def test_a_saved_table_is_a_small_self_explanatory_file(tmp_path):
    root = tmp_path / "not" / "there" / "yet"
    assert not load_missing_table(root, "mmimdb", "train", MissingPattern("both", 0, 0.5, 0), 7).any()
    assert not root.exists(), "nothing is saved if nothing is missing"
    table = load_missing_table(root, "mmimdb", "val", BOTH, 10)
    assert [path.name for path in root.iterdir()] == [SAVED_NAME]
    assert (root / SAVED_NAME).read_text() == (
        f"{SAVED_HEADER}\n# 0=complete 1=text_missing 2=image_missing\n{digits(table)}\n"
    )
    drawn = load_missing_table(tmp_path / "long", "mmimdb", "train", BOTH, 15552)
    (path,) = (tmp_path / "long").iterdir()
    lines = path.read_text().splitlines()
    assert {len(line) for line in lines[2:-1]} == {100} and len(lines[-1]) == 52
    again = load_missing_table(tmp_path / "long", "mmimdb", "train", BOTH, 15552)
    assert again.dtype == drawn.dtype == np.int8 and np.array_equal(again, drawn)


def test_each_table_is_saved_under_its_own_name(tmp_path):
    patterns = [
        MissingPattern(kind, ratio, both_ratio, seed)
        for kind in ("text", "image", "both")
        for ratio in (0.5, 0.05)
        for both_ratio in (0.5, 0.25)
        for seed in (0, 10)
    ]
    cases = [
        (d, split, p, n) for d in ("mmimdb", "food101") for split in SPLITS[:2] for p in patterns for n in (20, 30)
    ]
    first = [load_missing_table(tmp_path, *case) for case in cases]
    assert len(list(tmp_path.iterdir())) == len(cases)
    for case, table in zip(cases, first, strict=True):
        assert np.array_equal(load_missing_table(tmp_path, *case), table)
        assert np.array_equal(draw_missing_table(*case), table)


def test_racing_processes_get_the_same_table_and_leave_one_file(tmp_path):
    for seed in range(5):
        pattern = replace(BOTH, seed=seed)
        expected = draw_missing_table("mmimdb", "train", pattern, 2000)

        def ask(pattern: MissingPattern = pattern, expected: np.ndarray = expected) -> None:
            assert np.array_equal(load_missing_table(tmp_path, "mmimdb", "train", pattern, 2000), expected)

        at_once(4, ask)
    assert len(list(tmp_path.iterdir())) == 5, "one file each, and nothing temporary"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (r"ratio=0\.7", "ratio=0.5", "line 1: expected '# missing table: dataset=mmimdb split=dev"),
        (r"#.*\n", "", "line 1: "),
        (r"(?s).*", "", "line 1: "),
        (r"\d{10}\n", "", "line 3: "),
        (r"(\d{4})\d(\d{5})\n", r"\g<1>3\2\n", "line 3: "),
        (r"(\d{9})\d\n", r"\1\n", "line 3: "),
        (r"\Z", "0", "line 4: expected '', "),
        (r"(?s).*", "\udcff", "not readable as a missing table"),
    ],
)
def test_a_damaged_saved_table_is_an_error_and_stays_unchanged(tmp_path, old, new, found):
    load_missing_table(tmp_path, "mmimdb", "val", BOTH, 10)
    path = tmp_path / SAVED_NAME
    damaged = re.sub(old, new, path.read_text(), count=1).encode(errors="surrogateescape")
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(DataError) as raised:
        load_missing_table(tmp_path, "mmimdb", "val", BOTH, 10)
    assert str(raised.value).startswith(f"{path}: {found}") and "delete the file" in str(raised.value)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("root", ["file", "file/folder", "x" * 300, "taken"])
def test_an_unusable_root_is_an_error(tmp_path, root):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "taken" / SAVED_NAME).mkdir(parents=True)
    with pytest.raises(DataError) as raised:
        load_missing_table(tmp_path / root, "mmimdb", "val", BOTH, 10)
    fact = "File name too long" if len(root) == 300 else f"cannot write {SAVED_NAME}"
    assert f"missing_table_root={tmp_path / root}: " in str(raised.value) and fact in str(raised.value)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    with files_up_to(100), pytest.raises(DataError, match=f"cannot write {SAVED_NAME}: File too large; .* bytes free"):
        load_missing_table(tmp_path, "mmimdb", "val", BOTH, 10)
    assert list(tmp_path.iterdir()) == []


def published(root: Path, name: str, values: object, **options: bool) -> Path:
    torch.save(values, root / name, **options)
    return root / name


@pytest.mark.parametrize(
    ("dataset", "split", "pattern", "name"),
    [
        ("mmimdb", "train", BOTH, "mmimdb_train_missing_both_07.pt"),
        ("mmimdb", "val", MissingPattern("text", 0.9, 0.5, 3), "mmimdb_dev_missing_text_09.pt"),
        ("food101", "val", MissingPattern("image", 0.65, 0.5, 0), "food101_val_missing_image_065.pt"),
        ("hatememes", "test", MissingPattern("both", 1, 0.5, 0), "hatememes_test_missing_both_10.pt"),
        ("hatememes", "test", MissingPattern("both", 1.0, 0.5, 0), "hatememes_test_missing_both_1.pt"),
        ("mmimdb", "test", MissingPattern("both", 0, 0.5, 0), "mmimdb_test_missing_both_00.pt"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_published_table_is_used_and_the_log_says_so(tmp_path, caplog, dataset, split, pattern, name, zipped):
    path = published(tmp_path, name, torch.tensor([0.0, 2, 1, 1, 0, 2]), _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.INFO):
        table = load_missing_table(tmp_path, dataset, split, pattern, 6)
    assert table.dtype == np.int8
    assert table.tolist() == [0, 2, 1, 1, 0, 2]
    assert [(record.levelname, str(path) in record.getMessage()) for record in caplog.records] == [("INFO", True)]
    assert list(tmp_path.iterdir()) == [path], "it is not copied"


def test_a_published_table_takes_precedence_for_its_own_pattern_only(tmp_path, caplog):
    saved = load_missing_table(tmp_path, "mmimdb", "train", BOTH, 10)
    published(tmp_path, "mmimdb_train_missing_both_07.pt", torch.ones(10))
    assert saved.tolist() != [1] * 10
    assert load_missing_table(tmp_path, "mmimdb", "train", BOTH, 10).tolist() == [1] * 10
    caplog.clear()
    others: list[tuple[str, Split, MissingPattern]] = [("mmimdb", "val", BOTH), ("food101", "train", BOTH)]
    others += [("mmimdb", "train", replace(BOTH, **other)) for other in ({"ratio": 0.5}, {"missing_type": "image"})]
    for dataset, split, pattern in others:
        table = load_missing_table(tmp_path, dataset, split, pattern, 10)
        assert np.array_equal(table, draw_missing_table(dataset, split, pattern, 10))
    assert not caplog.records


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(9), r"expected a tensor of 10 entries, one per row of the split, found \(9,\)"),
        (torch.zeros(11), r"expected a tensor of 10 entries, one per row of the split, found \(11,\)"),
        (torch.zeros(10, 1), r"found \(10, 1\)"),
        ([0.0] * 10, "expected a tensor of 10 entries, one per row of the split, found list"),
        (torch.tensor([0, 1, 2, 0, 3.0, 0, 0, 0, 0, 9]), r"expected only numbers 0 to 2, found 3\.0 for row 4"),
        (torch.tensor([0.5] + [0] * 9), r"found 0\.5 for row 0"),
        (torch.tensor([0] * 9 + [float("nan")]), "found nan for row 9"),
        (torch.tensor([0] * 9 + [-1]), r"found -1\.0 for row 9"),
        (torch.zeros(10).to_sparse(), "not readable as a published missing table"),
        (Touch(Path("executed_by_torch_load")), "not readable as a published missing table"),
    ],
)
def test_a_published_table_that_does_not_fit_is_an_error(tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    path = published(tmp_path, "mmimdb_train_missing_both_07.pt", values)
    with pytest.raises(DataError, match=message) as raised:
        load_missing_table(tmp_path, "mmimdb", "train", BOTH, 10)
    assert str(raised.value).startswith(f"{path}: ")
    assert list(tmp_path.iterdir()) == [path], "no code in the file is executed, and no table is drawn in its place"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *((name, name) for name in ("text", "any", "some")),
        ("vision+text", "text+vision"),
        *((name, None) for name in ("both", "text+audio+vision", "text+text", "text+image", "image", "", "+")),
    ],
)
def test_patterns_may_name_several_missing_modalities(given: str, expected: str | None) -> None:
    modalities = ("text", "audio", "vision")
    assert pattern_type(modalities, given) == expected
    assert pattern_type(("image", "text"), "image+text") is None, "never both of two modalities"
    if expected == "text+vision":
        shares = available_shares(modalities, expected, 0.7, 0.5)
        assert shares == pytest.approx({"text": 0.3, "audio": 1, "vision": 0.3})
        table = draw_missing_table("mosi", "test", MissingPattern(expected, 0.7, 0.5, 0), 20)
        assert table.tolist().count(code_of(modalities, "text") + code_of(modalities, "vision")) == 14


def test_if_there_are_many_types_only_those_that_occur_are_listed() -> None:
    assert counts_text({"complete": 3, "text missing": 0, "image missing": 1_000})[1:] == [
        "0 text missing",
        "1,000 image missing",
    ]
    four = dict(zip(type_names(["hum", "acc", "gyr", "lig"]), [5, 0, 0, 2, *[0] * 11], strict=True))
    assert counts_text(four) == ["5 complete", "2 gyr, lig missing"]
