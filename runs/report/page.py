"""Writes the report: an HTML page, the same as Markdown, and its tables and figures as files."""

import base64
import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.files import check_replaceable, whole_folder, writing
from common.text import counted
from runs.report.figures import Figure
from runs.report.lines import by_dataset
from runs.report.parts import commands_section, runs_section, section_of
from runs.report.results import ReportRun, read_report_runs
from runs.report.search import search_section
from runs.report.table import Table
from runs.report.text import in_words
from runs.sweep.jobs import search_of

MARKER = "report.json"
"""File that marks a folder as a report, which a later report may replace."""
MAKER = "`python run.py report`"
TEMPLATES = FileSystemLoader(Path(__file__).with_name("templates"))
_MARKDOWN_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*_[]|~$"})


def make_report(places: Sequence[Path], out: Path) -> Path:
    """Writes a report to the folder `out`, replacing an earlier one only once the new one is complete.

    Args:
        places: run folders, or folders with run folders below them.
        out: a folder that does not exist, is empty, or contains an earlier report, which is replaced.

    Returns:
        The page, `out/index.html`.

    Raises:
        UserError: a folder contains no run, a file is damaged or belongs to another run, or `out` must not be replaced.
    """
    check_replaceable(out, MARKER, MAKER)  # fail now, not after minutes of drawing
    runs = read_report_runs(places)
    trials: dict[Path, list[ReportRun]] = {}
    for run in runs:
        if (sweep := search_of(run.folder)) and any(sweep.is_relative_to(place) for place in places):
            trials.setdefault(sweep, []).append(run)
    in_searches, now = [run for trial_runs in trials.values() for run in trial_runs], datetime.now()
    others = [run for run in runs if run not in in_searches]
    datasets = by_dataset(others)
    sections = [section_of(dataset) for dataset in datasets]
    about = "Robustness to missing modalities: " if datasets else ""
    sections += [
        *(search_section(sweep, of_search, n) for n, (sweep, of_search) in enumerate(trials.items(), start=1)),
        runs_section(runs, datasets, others),
        commands_section(others, places, out),
    ]
    titles = [section.title for section in sections[: len(datasets)] or sections[: len(trials)]]
    content = {"title": about + in_words(titles), "sections": sections}
    files = _files(content | {"date": f"{now.day} {now:%B %Y}", "n_runs": counted(len(runs), "run")})
    with writing(f"out={out}"), whole_folder(out, MARKER, MAKER) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
    return out / "index.html"


def _files(content: dict[str, Any]) -> dict[str, bytes]:
    """All files of the report, keyed by their path in the folder."""
    html = Environment(
        loader=TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html.filters |= {"b64": lambda data: base64.b64encode(data).decode(), "verbatim": Markup}
    html.filters["anchor"] = lambda title: re.sub(r"\W+", "-", title.lower())
    markdown = html.overlay(finalize=_markdown_text)
    texts = {"index.html": html.get_template("page.html.j2"), "report.md": markdown.get_template("report.md.j2")}
    files = {name: template.render(content).encode(errors="replace") for name, template in texts.items()}
    parts = [part for section in content["sections"] for part in section.parts]
    for item in (item for part in parts for item in (*part.shown, *part.folded.values())):
        if isinstance(item, Figure):
            files |= {f"figures/{item.name}.svg": item.svg.encode(), f"figures/{item.name}.png": item.png}
        elif isinstance(item, Table) and item.rows:
            files |= {name: data for name, data in item.pictures.items() if data is not None}
            files[f"tables/{item.name}.csv"] = item.csv().encode(errors="replace")
    return files


def _markdown_text(value: Any) -> Any:
    """Escapes text, so that HTML or Markdown in it has no effect, and puts it on one line."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return Markup(escape(re.sub(r"\s+", " ", value).translate(_MARKDOWN_SPECIAL), quote=False))
    return value
