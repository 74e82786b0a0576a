"""`python run.py sweep with …`: checks the options, locks and records the sweep's folder, and starts the runs."""

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip.modules.registry import PRETRAINING
from common.errors import ConfigError, SweepError
from common.locks import locked
from common.messages import quoted
from common.signals import Stopped
from common.strict_json import read_json, write_json
from config import DATA, MODEL, NAMED_CONFIGS, OPTIONS, TRAINING, Options
from runs.check_options import check
from runs.command_line import is_of_sweep, option_of
from runs.run_reader import as_written_by_run
from runs.sweep.grid import Grid, options_of, variant_name, variants
from runs.sweep.jobs import command_line_of
from runs.sweep.launchers import CLUSTERS, make_launcher
from vilt.datasets.open_spec import open_spec
from vilt.datasets.specs import SPLITS, DatasetSpec

log = logging.getLogger("rep")

FORMAT = 1
GRID = ("sweep_types", "sweep_ratios", "sweep_seeds", "sweep_over")
SET_BY_GRID = {
    **dict.fromkeys(("missing_type", "test_type"), "sweep_types"),
    **dict.fromkeys(("missing_ratio", "test_ratio"), "sweep_ratios"),
    "seed": "sweep_seeds",
}
SET_BY_SWEEP = ("test_exp_name", "test_only", "test_after_fit", "fast_dev_run", "resume_from")
COMPARED = (
    *(name for name, option in OPTIONS.items() if option.kind in (DATA, MODEL, TRAINING)),
    *("data_root", "test_ratio", "test_type"),
)
"""Options that must not change when a sweep is resumed."""


def run_sweep(config: Mapping[str, Any], updates: Sequence[str], chosen: Sequence[str]) -> None:
    """Runs the configured grid or search, or the rest of it.

    Args:
        config: the complete configuration.
        updates: options and named configs as typed on the command line; the runs get all except the sweep's own.
        chosen: names of the options that the user has set.

    Raises:
        ConfigError: an option is invalid or contradicts another.
        DataError: the arrow files of a custom dataset do not name its metric.
        SweepError: runs failed, or the folder has a sweep with other options or one that is running.
    """
    options = check_sweep(config, chosen)
    spec = open_spec(options.task, options.data_root, options.splits)
    folder = options.log_dir / options.sweep_name
    busy = f"sweep_name={options.sweep_name}: another sweep of this name is running in {options.log_dir}"
    with locked(folder / ".lock", busy):
        try:
            commands = options.sweep_launcher == "commands"
            launch = make_launcher("local" if commands else options.sweep_launcher, options, folder / "submitit")
            record(options, spec, config, folder)
            given = words_of_runs(updates, folder)
            if options.search:
                from runs.sweep.search import Search

                Search(options, spec.monitor, given, folder).run(launch)
            elif commands:
                Grid(options, spec, given, folder).write_commands()
            else:
                Grid(options, spec, given, folder).run(launch)
        except (KeyboardInterrupt, Stopped):
            log.info("stopped; the same command resumes: %s", shlex.join(command_line_of("sweep", "with", *updates)))
            raise


def words_of_runs(words: Sequence[str], folder: Path) -> list[str]:
    """The words of the command line that the runs get: all but the sweep's own options.

    A named config or .json file that sets any of these is replaced by a file in `folder` with its other options.
    """
    given = []
    for index, word in enumerate(words):
        if "=" in word:
            given += [] if is_of_sweep(option_of(word)) else [word]
            continue
        content = NAMED_CONFIGS[word] if word in NAMED_CONFIGS else read_json(Path(word))
        others = {name: value for name, value in content.items() if not is_of_sweep(option_of(name))}
        if others == content:
            given.append(word)
        elif others:
            given.append(str(folder / f"options_{index}.json"))
            write_json(Path(given[-1]), others)
    return given


def check_sweep(config: Mapping[str, Any], names: Sequence[str]) -> Options:
    """Checks the options of a sweep.

    Raises:
        ConfigError: one line that names the option, what was expected and what was found.
    """
    # Runs on other machines check these themselves when they start there.
    elsewhere = {"num_gpus": None, "precision": None} if config["sweep_launcher"] in ("slurm", "commands") else {}
    options = check({**config, **elsewhere})
    refused = dict.fromkeys(SET_BY_SWEEP, "contradicts a sweep, which trains and evaluates its runs itself")
    refused["exp_name"] = "runs of a sweep get their names from it; expected sweep_name"
    if options.search:
        refused |= dict.fromkeys(GRID, "is for a grid; a search has one missing_type, missing_ratio and seed")
    else:
        refused |= {
            name: f"differs between the cells of a sweep; expected {grid}" for name, grid in SET_BY_GRID.items()
        }
        refused["search_trials"] = "expected options to search, as in search.learning_rate=[1e-4,1e-1]"
    for name in names:
        if name in refused:
            raise ConfigError(f"{name}: {refused[name]}")
    varied = {**options.sweep_over, **options.search}.get("prompt_type", (options.prompt_type,))
    if found := next((name for name in varied if name in PRETRAINING), None):
        raise ConfigError(f"prompt_type: expected methods that can be tested, found {found}, which pretrains")
    if options.sweep_slurm and options.sweep_launcher not in CLUSTERS:
        launchers = " or ".join(CLUSTERS)
        raise ConfigError(f"sweep_slurm: expected sweep_launcher={launchers}, found {options.sweep_launcher}")
    if options.sweep_parallel > 1 and (options.search or options.sweep_launcher != "local"):
        found = "a search" if options.search else f"sweep_launcher={options.sweep_launcher}"
        raise ConfigError(f"sweep_parallel: is for the runs of a grid with sweep_launcher=local, found {found}")
    if options.num_nodes > 1 and options.sweep_launcher != "commands":
        raise ConfigError(
            f"num_nodes: expected 1, since a sweep starts each run on a single machine, or sweep_launcher=commands; "
            f"found {options.num_nodes}"
        )
    if options.search:
        if options.sweep_launcher == "commands":
            raise ConfigError("sweep_launcher: expected local, slurm or submitit_local, since a search needs results")
        from runs.sweep.search import check_values  # Optuna imports pandas, which nothing else needs

        check_values(options, {**config, **elsewhere})
    else:
        check_variants(options, {**config, **elsewhere})
    return options


def check_variants(options: Options, config: Mapping[str, Any]) -> None:
    """Raises ConfigError for values of `sweep_over` that do not go together or would get the same folder name."""
    named: dict[str, dict[str, Any]] = {}
    for variant in variants(options):
        try:
            check({**config, **options_of(variant)})
        except ConfigError as error:
            raise ConfigError(f"sweep_over: {variant} is not possible: {error}") from error
        other = named.setdefault(variant_name(variant), variant)
        if other is not variant:
            raise ConfigError(f"sweep_over: {variant} and {other} would have the same folder, {variant_name(variant)}")


def record(options: Options, spec: DatasetSpec, config: Mapping[str, Any], folder: Path) -> None:
    """Writes `sweep.json`, which describes the sweep. An existing one must have the same options; cells may be added.

    Raises:
        DataError: the existing file is damaged.
        SweepError: the existing file describes a sweep with other options.
    """
    path, grid = folder / "sweep.json", None
    if not options.search:
        grid = {name: getattr(options, name) for name in GRID if name != "sweep_over"}
        grid |= {f"sweep_over.{name}": values for name, values in options.sweep_over.items()}
    same = {name: config[name] for name in COMPARED if grid is None or name not in SET_BY_GRID}
    same |= {"search": options.search, **_contents(options, spec)}
    sweep_facts = {"name": options.sweep_name, "task": options.task, "metric": spec.monitor}
    new = json.loads(json.dumps({"format": FORMAT, **sweep_facts, "grid": grid, "options": same}, default=str))
    if path.is_file():
        existing = read_json(path)
        with as_written_by_run(path):
            if existing["format"] != FORMAT:
                raise ValueError(f"expected format {FORMAT}, found {quoted(existing['format'])}")
            theirs = dict(existing["options"])
        if other := [name for name, value in new["options"].items() if theirs.get(name) != value]:
            ours = new["options"]
            shown = ", ".join(f"{name} (there {quoted(theirs.get(name))}, here {quoted(ours[name])})" for name in other)
            raise SweepError(
                f"sweep_name={options.sweep_name}: {path} describes a sweep with other options: {shown}; expected the "
                f"same options, or another sweep_name"
            )
    write_json(path, new)


def _contents(options: Options, spec: DatasetSpec) -> dict[str, str]:
    """SHA-256 of the files named by the options, keyed by option and file: a sweep is tied to their contents."""
    from engine.contents import contents_of_files

    assert options.data_root is not None
    paths = {f"data_root/{spec.file_name(split)}": options.data_root / spec.file_name(split) for split in SPLITS}
    published = sorted(options.missing_table_root.glob(f"{spec.table_name}_*_missing_*.pt"))
    paths |= {f"missing_table_root/{path.name}": path for path in published}
    named = {"vit": options.vit, "tokenizer": options.tokenizer, "teacher": options.teacher}
    named["load_path"] = next(iter(options.load_paths), None)
    paths |= {f"{name} (contents)": Path(path) for name, path in named.items() if path is not None}
    return contents_of_files(paths)
