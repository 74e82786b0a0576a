"""The report's files and page, also in a browser; hostile texts."""

import csv
import itertools
import json
import re
import shlex
import shutil
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import DataError, UserError
from runs.report.lines import by_dataset
from runs.report.page import make_report
from runs.report.parts import _results_parts
from runs.report.results import read_report_runs
from runs.report.text import excerpt, without_home
from tests.conftest import Patch, call, read_json
from tests.report_files import HOSTILE, TestSet, edit_json, write_run

VOID = {"meta", "link", "img", "br", "hr", "input"}
ROOT_HOME = "/root"
ROBUSTNESS, LOGITS = "robustness/robustness.json", "robustness/logits.arrow"
TASKS = ("mmimdb", "food101", "hatememes")


class Page(HTMLParser):
    """A parsed page; fails on mismatched tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))
        self.close()
        self.text = " ".join(self.text.split())
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}>, line {self.getpos()[0]}"

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self.open else f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(report_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on all runs."""
    out = tmp_path_factory.mktemp("out") / "report"
    assert make_report([report_runs / "others", report_runs / "mmimdb"], out) == out / "index.html"
    return out


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report / "index.html")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_has_all_its_files(report: Path, report_runs: Path, tmp_path: Path) -> None:
    found = contents(report)
    each = ("matrix", "published", "rivals", "ours", "confidence", "samples")
    tables = [f"{name}_{task}" for name in each for task in TASKS]
    tables += ["runs", "confusions_food101"]
    drawn = [f"{name}_{task}" for name in ("curves", "train_loss") for task in TASKS]
    drawn += ["per_class_mmimdb", "roc_hatememes", "val_f1_macro_mmimdb", "val_accuracy_food101", "val_auroc_hatememes"]
    assert found.keys() == {
        *("index.html", "report.md", "report.json"),
        *(f"tables/{name}.csv" for name in tables),
        *(f"figures/{name}.{ending}" for name in drawn for ending in ("png", "svg")),
        *(f"thumbnails/mmimdb_{rank:02}.jpg" for rank in range(1, 25)),
    }
    for name in drawn:
        assert ET.fromstring(found[f"figures/{name}.svg"]).tag.endswith("svg")
        assert b"<image" not in found[f"figures/{name}.svg"], "drawn as shapes"
        with Image.open(report / "figures" / f"{name}.png") as image:
            image.load()
            n_panels = 3 if name.startswith(("curves", "roc")) else 2 if "_f1_" in name or "loss_mm" in name else 1
            assert image.width == 480 * n_panels
    make_report([report_runs / "others", report_runs / "mmimdb"], tmp_path / "again")
    again = contents(tmp_path / "again")
    again = {name: data.replace(str(tmp_path / "again").encode(), str(report).encode()) for name, data in again.items()}
    assert [name for name in found if again[name] != found[name]] == [], "the same runs give the same files"


def test_the_markdown_file_agrees_with_the_page(report: Path, page: Page, report_runs: Path) -> None:
    markdown = (report / "report.md").read_text("utf-8")
    pictures = re.findall(r"!\[.*?\]\(((?:figures|thumbnails)/[^)]*)\)", markdown)
    assert "&#39;" not in markdown, "quotes are not HTML entities here"
    assert len(pictures) == 11 + 24 and all((report / path).is_file() for path in pictures)
    headings = re.findall(r"^#+ (.*)", markdown.replace("\\", ""), re.MULTILINE)
    assert all(heading in page.text for heading in headings) and "Training curves" in headings
    for name in ("published_mmimdb", "matrix_food101", "confidence_hatememes"):
        for cell in itertools.chain(*csv.reader((report / "tables" / f"{name}.csv").open(encoding="utf-8"))):
            if re.fullmatch(r"\d\d\.\d{4}", cell):
                shown = f"{float(cell):.{2 if name == 'published_mmimdb' else 0}f}"
                assert shown in markdown and shown in page.text
    tables = [block for block in re.split(r"\n\n+", markdown) if block.startswith("|")]
    assert len(tables) == len(page.all("table")) + 3, "the samples are tables too"
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().splitlines()}) == 1
    assert "    python run.py with task_finetune_mmimdb data_root=/home/somebody/films\n" in markdown
    named = re.search(r"^    (python run\.py report with .*)", markdown, re.MULTILINE)
    assert named and shlex.split(named[1])[-2:] == [
        f"runs=[{report_runs / 'others'},{report_runs / 'mmimdb'}]",
        f"out={report}",
    ]
    assert '"packages.torch": "2.13.0"' in markdown and "**52.31**" in markdown


def test_a_report_is_replaced_and_a_foreign_folder_is_not(tmp_path: Path, monkeypatch: Patch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out" / "report"
    out.mkdir(parents=True)
    make_report([run], out)  # empty
    before = contents(out)
    (out / "tables" / "old.csv").write_text("of an earlier report")
    make_report([run], out)
    assert contents(out) == before

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    def stuck(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "No space left on device")
        return renamed(path, target)

    renamed = Path.replace
    for method, failing in (("write_bytes", full), ("replace", stuck)):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, failing)
            with pytest.raises(DataError, match="report: cannot be written: No space left on device"):
                make_report([run], out)
        assert contents(out) == before and [path.name for path in out.parent.iterdir()] == ["report"]
    (out / "report.json").unlink()
    (tmp_path / "file").write_text("")
    for foreign, why in ((out, "no report"), (tmp_path / "file", "a file")):
        with pytest.raises(UserError, match=rf"{foreign.name} exists and was not written by .* \({why}"):
            make_report([run], foreign)
    del before["report.json"]
    assert contents(out) == before


def test_the_page_is_self_contained_and_valid(page: Page, report: Path) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            target = attributes.get(name) or "data:"
            assert target.startswith("data:") or (target.startswith("#") and target[1:] in ids), (tag, target)
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("aria-labelledby") is None or attributes["aria-labelledby"] in ids
        for reference in re.findall(r"url\(#([^)]*)\)", " ".join(filter(None, attributes.values()))):
            assert reference in ids
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    images = page.all("img")
    drawings = [image for image in images if str(image["src"]).startswith("data:image/svg")]
    assert len(drawings) == 3 * 3 + 1 + 3 + 2 * 4 and len(images) == len(drawings) + 24
    assert all(image["alt"] and str(image["src"]).startswith("data:image/") for image in images)
    assert page.all("html")[0]["lang"] == "en"
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes["scope"] == "col" for attributes in page.all("th"))
    assert len(page.all("table")) == len(page.all("thead"))


def test_sections_and_their_parts_are_in_order(page: Page, report: Path) -> None:
    html = (report / "index.html").read_text("utf-8")
    headings = [re.sub(r"<.*?>", "", heading) for heading in re.findall(r"<h[123][^>]*>(.*?)</h[123]>", html)]
    names = [f"{name} format, other data" for name in ("MM-IMDb", "UPMC Food-101", "Hateful Memes")]
    expected = [f"Robustness to missing modalities: {names[0]}, {names[1]} and {names[2]}"]
    for name, by_class in zip(names, ("Results by genre", "Most frequent confusions", "ROC curves"), strict=True):
        expected += [name, "Robustness curves", "Missing type × missing ratio", "Published results and ours"]
        expected += ["Training curves", by_class, "Confidence intervals", "Test samples that change the most"]
    expected += ["Runs and configurations", "How to reproduce this"]
    assert headings[: len(expected)] == expected
    assert "5 runs" in page.text
    assert "2 of 3 trained runs with robustness results, on 30 test samples." in page.text
    ids = [str(attributes.get("id")) for attributes in page.all("h3")]
    assert all(any(name.startswith(f"reproduce-r{number}-") for name in ids) for number in (1, 5))


def test_missing_files_are_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bare_seed0" / "version_0", tested=None, data_root="films")
    (run / "environment.json").unlink()
    (run / "metrics.csv").unlink()
    page = Page(make_report([tmp_path / "bare_seed0"], tmp_path / "report")).text
    markdown = (tmp_path / "report" / "report.md").read_text("utf-8").replace("\\", "")
    command = f"python run.py robustness with load_path={run}/best.ckpt task_finetune_mmimdb data_root=films"
    for fact in (
        *("1 run, none of them with robustness", without_home(command)),
        "R1 (bare_seed0/version_0): no robustness results",
        *("command is unknown", "Versions are unknown"),
        "Missing for R1: metrics.csv does not exist or has no val/f1_macro",
    ):
        assert fact in page and fact in markdown, fact
    assert not (tmp_path / "report" / "figures").exists()


@pytest.mark.parametrize(
    ("program", "shown"), [("/code/run.py", "python run.py"), ("/site/bin/rep", "rep"), ("-m", "python -m")]
)
def test_the_command_of_a_run(tmp_path: Path, program: str, shown: str) -> None:
    run = write_run(tmp_path / "a_seed0" / "version_0")
    edit_json(run, "environment.json", command=[program, "train", "with", "seed=1"])
    [found] = read_report_runs([tmp_path])
    assert found.command == f"{shown} train with seed=1"


def test_a_failed_run_is_said_to_have_failed(tmp_path: Path) -> None:
    """No command evaluates a run without a checkpoint."""
    run = write_run(tmp_path / "a_seed0" / "version_0", tested=None)
    (run / "best.ckpt").unlink()
    (run / "error.txt").write_text("Traceback:\ncommon.errors.DataError: no films\n")
    page = Page(make_report([tmp_path], tmp_path / "report")).text
    assert "R1 (a_seed0/version_0) failed: DataError: no films" in page and "run.py robustness" not in page


def test_what_all_runs_share_is_shown_once(tmp_path: Path) -> None:
    """The rest for each run, also single entries of dictionaries; without a difference, no more than its command."""
    runs = [write_run(tmp_path / "runs" / f"{seed}", seed=seed, exp_name="same") for seed in (0, 1, 2)]
    edit_json(runs[1], "config.json", missing_ratio={"train": 0.7, "val": 0.7, "test": 0.9})
    edit_json(runs[1], "environment.json", packages={"torch": "2.13.1", "numpy": "2.4.6"})
    (runs[2] / "environment.json").unlink()
    make_report([tmp_path / "runs"], tmp_path / "report")
    markdown = (tmp_path / "report" / "report.md").read_text("utf-8")
    page = " ".join((tmp_path / "report" / "index.html").read_text("utf-8").replace("&#34;", '"').split())
    for said in (" ".join(markdown.replace("\\", "").split()), re.sub(r"<.*?>", "", page)):
        said = said[said.index("that all runs share") :]
        assert [said.count(entry) for entry in ('"exp_name"', '.numpy"', '"python"', '_ratio.val": 0.7')] == [1] * 4
        assert [said.count(f'"seed": {seed}') for seed in (0, 1, 2)] == [1] * 3
        assert '{ "seed": 1, "missing_ratio.test": 0.9 }' in said
        assert '{ "packages.torch": "2.13.1" }' in said and said.count("Versions are unknown") == 1
    make_report([runs[0]], tmp_path / "one")
    markdown = (tmp_path / "one" / "report.md").read_text("utf-8")
    assert markdown.count("Configuration and versions of R1: runs/0") == 1 and "Beyond that" not in markdown


def test_configurations_left_out_of_the_bars_are_counted(tmp_path: Path) -> None:
    for number in range(4):
        TestSet().write(write_run(tmp_path / f"{number}", memory_length=6 * number + 6))
    [dataset] = by_dataset(read_report_runs([tmp_path]))
    by_class = _results_parts(dataset)[0]
    assert len(by_class.shown[0].panels) == 3  # type: ignore[union-attr]
    assert "1 other configuration" in by_class.shown[1].text  # type: ignore[union-attr]


def test_hostile_texts_have_no_effect(page: Page, report: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "run", tokenizer=HOSTILE)
    write_run(tmp_path / "runs" / "other", tokenizer="$\\frac{$")
    TestSet().write(run)
    (run / ROBUSTNESS).write_text((run / ROBUSTNESS).read_text().replace(json.dumps("Drama"), json.dumps(HOSTILE)))
    in_figures = Page(make_report([tmp_path / "runs"], tmp_path / "report"))
    for path in (tmp_path / "report" / "figures").glob("*.svg"):
        ET.parse(path)
    assert all(str(image["src"]).startswith("data:image/svg") for image in in_figures.all("img"))
    assert page.text.count(" ".join(HOSTILE.split())) >= 1, "as a plot"
    for folder, shown in ((report, page), (tmp_path / "report", in_figures)):
        markdown = (folder / "report.md").read_text("utf-8")
        outside_code = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
        assert "<script" not in outside_code and "<img src=x" not in outside_code
        assert "`code`" not in outside_code.replace(r"\`", "") and "](http://b)" not in outside_code.replace(r"\]", "")
        assert " ".join(HOSTILE.split()) in shown.text and "script" not in [tag for tag, _ in shown.tags]


def test_home_folders_are_not_disclosed(report: Path, tmp_path: Path) -> None:
    html = (report / "index.html").read_text("utf-8")
    assert "python run.py with task_finetune_mmimdb data_root=/home/somebody/films" in html, "as it was given"
    assert "0123456789abcdef0123" in html and "NVIDIA H100" in html and "secret" not in html
    assert set(re.findall(r"/home/\w+(?:/\w+)?", html)) == {"/home/somebody/films"}
    text = f'x=/home/a.b/data,/Users/c {ROOT_HOME}/d "/home/e", /data/home/f'
    assert without_home(text) == 'x=~/data,~ ~/d "~", /data/home/f'
    assert without_home(r"C:\\Users\\me\\films /rooted") == r"~\\films /rooted"
    places: dict[str, Any] = {
        "data_root": "/home/alice/films",
        "vit": "/home/alice/clip",
        "log_dir": f"{ROOT_HOME}/result",
    }
    for name, options in (("a", places), ("b", {"vit": "/Users/alice/other"})):
        run = write_run(tmp_path / "runs" / name, **options)
        edit_json(run, "environment.json", command=["run.py", "with"])
    make_report([tmp_path / "runs"], tmp_path / "report")
    for name, content in contents(tmp_path / "report").items():
        said = content.decode(errors="ignore").replace(str(tmp_path), "")
        assert name.endswith(".png") or not re.findall(r"/home/|/Users/|/root\b", said), name
    assert "~/clip" in (tmp_path / "report" / "index.html").read_text()


def test_excerpts_end_at_a_word() -> None:
    assert excerpt("one  two\nthree", 13) == "one two three"
    assert excerpt("one two three", 12) == "one two…"
    assert excerpt("x" * 20, 10) == "x" * 9 + "…"


@pytest.mark.parametrize("bootstrap", [0, 20])
def test_a_real_run_can_be_reported(fitted: Path, tmp_path: Path, bootstrap: int) -> None:
    """The files of run.py itself are read, so the names in these tests' made-up files are the real ones."""
    folder = Path(shutil.copytree(fitted, tmp_path / "fitted_seed0" / "version_0"))
    wanted = ("robustness_ratios=[0.0,0.7,1.0]", "robustness_seeds=[0,1]", f"bootstrap={bootstrap}")
    best = f"load_path={folder / 'best.ckpt'}"
    assert call("robustness", best, *wanted, "precision=32", "num_workers=0", "per_gpu_batchsize=4") == 0
    assert call("report", f"runs={tmp_path}", f"out={tmp_path / 'report'}") == 0
    page = Page(tmp_path / "report" / "index.html")
    results = read_json(folder / "test_results.json")
    assert f"{100 * results['metrics']['f1_macro']:.0f}" in page.text and "70 % both" in page.text
    assert "Robustness curves" in page.text
    assert ("intervals for R1: evaluated with bootstrap=0" in page.text) == (not bootstrap)
    assert any("default-src 'none'" in str(meta.get("content")) for meta in page.all("meta"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium: Playwright's own or the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    system = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_loads_nothing_in_a_browser(report: Path, browser: Any, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 800})
    said: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    address = (report / "index.html").as_uri()
    tab.goto(address)
    assert said == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    pictures = tab.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert pictures.count(88) == 24 and min(pictures) > 0
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing overflows sideways"
    plots = "[...document.querySelectorAll('.panels img')]"
    assert tab.evaluate(f"{plots}.filter(plot => plot.getBoundingClientRect().height > 50).length") == 13 + 2 * 4
    cut = tab.evaluate(
        "[...document.querySelectorAll('p, li, figcaption, h1, h2, h3, dd')]"
        ".filter(element => element.scrollWidth > element.clientWidth + 1 && element.clientWidth > 0)"
        ".map(element => element.textContent)"
    )
    assert cut == [], "no text is cut off"
    tab.close()
