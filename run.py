"""Trains and evaluates REP: `python run.py with task_finetune_mmimdb data_root=… exp_name=…`.

Other commands are named before `with`, as in `python run.py robustness with load_path=…`.
Exit status: 0 success, 1 an error in the program, 2 an error the user can correct, 130 Ctrl-C, 143 SIGTERM.
"""

import sys
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from common.errors import ConfigError, OtherProcessError, UserError, machine_error
from common.launcher import check_launcher
from common.logs import set_up_logging
from common.machine import check_system, keep_freed_memory, print_anywhere, print_safely, settle_threads
from common.signals import Stopped, end_loaders, stopping_on_signals
from engine.ending import DONE, INTERRUPTED, end_with_our_fault, end_with_signal, end_with_user_error
from runs.check_options import check, read_load_paths, read_options, read_prediction
from runs.command_line import CommandLine, is_of_sweep, read_command_line
from runs.help import described_options, help_on
from runs.record import NOTED, Command, run_command

# torch and Lightning take seconds to import, so each command imports what it needs only after checking the options.


def main(config: dict[str, Any], asked: CommandLine) -> dict[str, float]:
    """Trains a model, or evaluates one if test_only=True; returns the test metrics."""
    options = check(config)
    if sweep_options := sorted(filter(is_of_sweep, asked.chosen)):
        raise ConfigError(f"{sweep_options[0]}: is for sweeps; expected `python run.py sweep with …`")
    from runs.evaluation import evaluate
    from runs.training import train

    set_up_logging()
    return evaluate(options, asked.given) if options.test_only else train(options, asked.given)


def robustness(config: dict[str, Any], asked: CommandLine) -> None:
    """Evaluates load_path at all robustness_types and robustness_ratios, with one test pass per missing type."""
    read_load_paths(config)
    from runs.robustness import measure_all

    set_up_logging()
    if found := measure_all(config, asked.given):
        print(f"\n{found}\n")


def features(config: dict[str, Any], asked: CommandLine) -> None:
    """Runs the frozen towers on every input of all splits and caches the features for later training runs."""
    options = check(config)
    from runs.training import compute_features

    set_up_logging()
    compute_features(options, asked.given)


def print_config(config: dict[str, Any], asked: CommandLine) -> None:
    """Prints all options with their values and help."""
    print_safely(described_options(config))


def runs(config: dict[str, Any], asked: CommandLine) -> None:
    """Prints the table of all runs below log_dir, sorted by runs_sort, and writes it to log_dir/runs.csv."""
    options = read_options(config, ["log_dir", "runs_sort"])
    from runs.run_table import describe_runs, list_runs, sort_runs, write_runs

    log_dir = options["log_dir"]
    rows = sort_runs(list_runs(log_dir), options["runs_sort"])
    write_runs(rows, log_dir / "runs.csv")
    print_safely(f"\n{describe_runs(rows, log_dir)}\nwritten to {log_dir / 'runs.csv'}\n")


def compare(config: dict[str, Any], asked: CommandLine) -> None:
    """Prints which methods differ significantly, from the logits that robustness stored in `runs`; also writes JSON."""
    from runs.compare import compare_places

    set_up_logging()
    print(compare_places(config, asked.given))


def report(config: dict[str, Any], asked: CommandLine) -> None:
    """Writes a page with tables and figures about the runs in and below the folders `runs` to the folder `out`."""
    options = read_options(config, ["runs", "out"])
    from runs.report.page import make_report

    set_up_logging()
    print(f"\nwritten to {make_report(options['runs'], options['out'] or Path('report'))}\n")


def predict(config: dict[str, Any], asked: CommandLine) -> None:
    """Predicts the samples listed in `input` with load_path, and writes the predictions to `output`."""
    options = read_prediction(config, "predict", "input")
    from runs.prediction import predict_file

    set_up_logging()
    print(f"\n{predict_file(options, asked.given)}\n")


def embed(config: dict[str, Any], asked: CommandLine) -> None:
    """Writes the features that load_path computes for the samples in `input`, or for a `split`, to `output`."""
    options = read_prediction(config, "embed", "input", "split")
    from runs.prediction import embed_file

    set_up_logging()
    print(f"\n{embed_file(config, options, asked.given)}\n")


def export(config: dict[str, Any], asked: CommandLine) -> None:
    """Writes the model of load_path to the folder `out` in Hugging Face's layout, with a model card."""
    from runs.export import export

    print(export(**read_options(config, ["load_path", "out"])))


def doctor(config: dict[str, Any], asked: CommandLine) -> None:
    """Checks installation, machine, dataset, weights and a training step; prints a line for each: ok, warn or FAIL."""
    from runs.doctor import check_all

    set_up_logging()
    check_all(config, asked.given)


def sweep(config: dict[str, Any], asked: CommandLine) -> None:
    """Trains and evaluates a grid of missing patterns and seeds, or searches for good option values."""
    from runs.sweep.command import run_sweep

    set_up_logging()
    run_sweep(config, asked.words, sorted(asked.chosen))


ALL = (main, robustness, features, print_config, runs, compare, report, predict, embed, export, doctor, sweep)
COMMANDS: dict[str, Command] = {command.__name__: command for command in ALL}


def command_line(argv: list[str]) -> int:
    """Runs a command and returns its exit status; if that is not 0, prints a line to standard error first."""
    NOTED.clear()  # left over from an earlier call in this process
    print_anywhere()
    try:
        check_system()
        check_launcher()
        asked = read_command_line(argv[1:], COMMANDS)
        if asked.help:
            print_safely(help_on(asked.command if asked.command in argv else None, COMMANDS, __doc__ or ""))
            return DONE
        if asked.command in ("main", "robustness", "predict", "embed", "doctor", "features"):
            settle_threads()
            keep_freed_memory()
        with stopping_on_signals():
            run_command(COMMANDS[asked.command], asked)
    except UserError as error:
        return end_with_user_error(error, run_folder())
    except OtherProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except Stopped as stop:
        end_loaders()
        # If another process ends with a status other than 0, Lightning takes it for an error and kills the first one.
        return DONE if getattr(rank_zero_only, "rank", 0) else end_with_signal(int(str(stop.code)), run_folder())
    except KeyboardInterrupt:
        return end_with_signal(INTERRUPTED, run_folder())
    except Exception as error:
        if (refusal := machine_error(error, run_folder())) is not None:
            return end_with_user_error(error, run_folder(), str(refusal))
        return end_with_our_fault(error, run_folder())
    return DONE


def run_folder() -> Path | None:
    """The run folder that this call has created, if any."""
    return Path(NOTED["folder"]) if "folder" in NOTED else None


if __name__ == "__main__":
    sys.exit(command_line(sys.argv))
