"""Writing the report: one HTML page, the same as Markdown, and tables and figures as files."""

import base64
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from common.errors import DataError, reason_of
from common.files import check_replaceable, whole_folder
from report.collect import Run, read_runs
from report.parts import options_table, report_command, run_details, section_of, versions_table
from report.samples import INPUT_TITLES, SampleCard, SampleGrid, samples_table
from report.search_section import search_section
from report.searches import Search, read_searches
from report.series import by_dataset
from report.tables import runs_table
from report.text import counted, day, listed

MARKER = "report.json"
"""File that says that a folder is a report, so that a later one may replace it."""
MAKER = "`python run.py report`"
TEMPLATES = Path(__file__).with_name("templates")
_MARKDOWN_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*_[]|~$"})


def make_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes a report of `runs` into the folder `out`, whole or not at all.

    Args:
        runs: run folders, or folders with run folders below them.
        out: a folder that does not exist, is empty, or is an earlier report, which is replaced.

    Returns:
        The page, `out/index.html`.

    Raises:
        UserError: a folder is no run, a file is damaged or belongs to another run, or `out` is not to be replaced.
    """
    check_replaceable(out, MARKER, MAKER)  # now, not after minutes of drawing
    read = read_runs(runs)
    searches = read_searches(runs, read)
    trials = {run for search in searches for run in search.runs}
    datasets = by_dataset([run for run in read if run not in trials])
    sections = [section_of(dataset) for dataset in datasets]
    title = f"Robustness to missing modalities: {listed([section.title for section in sections])}"
    sections += [search_section(search, number) for number, search in enumerate(searches, start=1)]
    # Of a search's trials, whose values its section has, the best one's run stands for all.
    best = {_best_run(search) for search in searches}
    shown = [run for run in read if run not in trials or run in best]
    content: dict[str, Any] = {
        "title": title if datasets else listed([section.title for section in sections]),
        "date": day(datetime.now()),
        "n_runs": counted(len(read), "run"),
        "sections": sections,
        "runs_table": runs_table(read, datasets),
        "options_table": options_table(shown),
        "versions_table": versions_table(shown),
        "details": [run_details(run) for run in shown],
        "report_command": report_command(runs),
    }
    files = _files(content)
    try:
        with whole_folder(out, MARKER, MAKER) as folder:
            for name, data in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
    except OSError as error:
        raise DataError(f"out={out}: cannot be written: {reason_of(error)}") from error
    return out / "index.html"


def _best_run(search: Search) -> Run | None:
    """The best trial's; the first where no trial is known to be complete."""
    return search.run_of(search.ranked[0][0]) if search.ranked else search.runs[0]


def _files(content: dict[str, Any]) -> dict[str, bytes]:
    """All files of the report by their path in the folder."""
    html = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html.filters |= {"data_uri": _data_uri, "unbroken": _unbroken}
    html.globals |= {"input_titles": INPUT_TITLES, "thumbnail_name": thumbnail_name}
    markdown = html.overlay(finalize=_markdown_text)
    markdown.filters["indented"] = _indented
    markdown.filters["verbatim"] = Markup  # names of our own files
    files = {
        "index.html": html.get_template("page.html.j2").render(content).encode(errors="replace"),
        "report.md": markdown.get_template("report.md.j2").render(content).encode(errors="replace"),
    }
    tables, drawn = [content["runs_table"], content["options_table"], content["versions_table"]], []
    for part in (part for section in content["sections"] for part in section.parts):
        tables += [*part.tables, *part.folded_tables]
        drawn += [*part.figures, *part.folded_figures]
        if part.grid is not None:
            tables.append(samples_table(part.grid))
            files |= {
                thumbnail_name(part.grid, card): card.thumbnail
                for card in part.grid.cards
                if card.thumbnail is not None
            }
    files |= {f"tables/{table.name}.csv": table.csv().encode(errors="replace") for table in tables}
    files |= {f"figures/{figure.name}.svg": figure.svg.encode() for figure in drawn}
    files |= {f"figures/{figure.name}.png": figure.png for figure in drawn}
    return files


def thumbnail_name(grid: SampleGrid, card: SampleCard) -> str:
    """Path of a sample's picture in the report's folder."""
    return f"thumbnails/{grid.run.task}_{card.rank:02}.jpg"


def _data_uri(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def _unbroken(text: str) -> str:
    """`text` with no line end within `MM-IMDb` and `61.02 ± 0.45 %`."""
    text = text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")
    return text.replace("-", "-\N{WORD JOINER}")


def _markdown_text(value: Any) -> Any:
    """Texts of others as they are to be read, on one line: neither HTML nor Markdown in them has an effect."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return escape(re.sub(r"\s+", " ", value).translate(_MARKDOWN_SPECIAL))
    return value


def _indented(text: str) -> Markup:
    """A code block: nothing within it is interpreted."""
    return Markup("\n".join(f"    {line}" for line in text.splitlines()))
