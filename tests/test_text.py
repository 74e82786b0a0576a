"""Numbers, names and tables in human-readable form."""

import math

import pytest

from common.text import Estimate, duration, estimate, natural_key, per_cent, terminal_table
from tests.conftest import Patch


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (90061, "25 h 1 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_shares_as_percentages() -> None:
    assert per_cent(0.1 * 7) == "70 %"


def test_numbers_in_names_sort_as_numbers() -> None:
    names = ["²", "version_10b", "version_9", "version_10", "a"]
    assert sorted(("a01", "a1"), key=natural_key) == sorted(("a1", "a01"), key=natural_key), "in any order"
    assert sorted(names, key=natural_key) == ["a", "version_9", "version_10", "version_10b", "²"]


def test_mean_and_deviation_equal_values_computed_by_hand() -> None:
    assert estimate([1.0, 2.0, 6.0]) == Estimate(3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)), 3)  # type: ignore[arg-type]
    assert estimate([0.1] * 7) == Estimate(0.1, 0.0, 7), "exact for equal values"
    assert estimate([0.25]) == Estimate(0.25, 0.0, 1) and estimate([]) is None
    assert Estimate(0.5, 0.25, 2).text(2, 100) == "50.00 ± 25.00" and Estimate(0.5, 0.0, 1).text() == "0.5000"


def test_a_table_in_a_pipe_has_one_line_per_row(monkeypatch: Patch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = [("long " * 60, "1"), None, ("[red]x[/red] :smile:", "1000")]
    lines = terminal_table(("a", "bb"), rows, "<>").splitlines()
    assert len(lines) == 5 and lines[3].strip() == "", "a separating line"
    assert lines[2].rstrip().endswith("1") and lines[2].startswith("long " * 60)
    assert lines[4].startswith("[red]x[/red] :smile: ") and lines[4].endswith("  1000")
    assert {len(lines[number]) for number in (0, 2, 4)} == {len(lines[4])}


def test_long_words_are_broken_between_their_parts(monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    row = ["search/trial_10_seed0/version_0", "none head=linear_by_type"]
    lines = terminal_table(("folder", "method"), [row], "<<").splitlines()[2:]
    folders, methods = zip(*((line[:15].strip(), line[15:].strip()) for line in lines), strict=True)
    assert folders == ("search/trial_", "10_seed0/", "version_0") and methods == ("none", "head=linear_", "by_type")


def test_words_are_broken_only_if_wrapping_between_them_is_not_enough(monkeypatch: Patch) -> None:
    """Words in narrow columns stay whole, at the expense of the column with the most text."""
    monkeypatch.setenv("COLUMNS", "40")
    row = ["sweep/sweep_both_0.7_seed0", "2026-11-27 05:49", "finished", "0.0985"]
    lines = terminal_table(("folder", "date", "state", "test"), [row], "<<<>").splitlines()[2:]
    assert [line.split() for line in lines] == [
        ["sweep/", "2026-11-27", "finished", "0.0985"],
        ["sweep_", "05:49"],
        ["both_"],
        ["0.7_"],
        ["seed0"],
    ]


def test_a_table_with_too_many_columns_continues_below(monkeypatch: Patch) -> None:
    heads, figures = ["missing", "", *"abcde"], [f"0.{number}234 ± 0.0000" for number in range(5)]
    monkeypatch.setenv("COLUMNS", "60")
    text = terminal_table(heads, [["text", "70 %", *figures], None, ["both", "70 %", *figures]], "<>>>>>>", repeated=2)
    assert max(map(len, text.splitlines())) <= 60
    parts = [part.splitlines()[0].split() for part in text.split("\n\n") if "missing" in part]
    assert parts == [["missing", *"ab"], ["missing", *"cd"], ["missing", "e"]]
    assert all(text.count(figure) == 2 for figure in figures) and text.count("text  ") == 3


def test_a_table_on_a_narrow_terminal_is_wrapped_without_loss(monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cell = "".join(f"{number:02}" for number in range(40))
    lines = terminal_table(("first", "second", "n"), [(cell, f"x{cell}", "7")], "<<>").splitlines()
    assert max(map(len, lines)) <= 40
    second, third = lines[0].index("second"), lines[0].index("n", lines[0].index("second") + 6)
    assert "".join(line[:second].strip() for line in lines[2:]) == cell
    assert "".join(line[second : third - 1].strip() for line in lines[2:]) == f"x{cell}"
