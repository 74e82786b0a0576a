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
from common.messages import first_line
from common.signals import Stopped, end_loaders, stopping_on_signals
from engine.ending import DONE, INTERRUPTED, end_with_our_fault, end_with_signal, end_with_user_error
from runs.check_options import check, read_load_paths, read_options, read_prediction
from runs.command_line import is_of_sweep, read_command_line
from runs.experiment import EX, run_command
from runs.help import described_options, help_on

# torch and Lightning take seconds to import, so each command imports what it needs only after checking the options.


@EX.main
def main(_config: dict[str, Any], _run: Any, network: Any) -> dict[str, float]:
    """Trains a model, or evaluates one if test_only=True; returns the test metrics."""
    # Sacred only lets entries be added to `network` if it is an argument; its value is read from `_config`.
    options, given = check(_config), given_options(_run)
    if sweep_options := sorted(filter(is_of_sweep, _run.meta_info["options"]["CHOSEN"])):
        raise ConfigError(f"{sweep_options[0]}: is for sweeps; expected `python run.py sweep with …`")
    from runs.evaluation import evaluate
    from runs.training import train

    set_up_logging()
    return evaluate(options, given) if options.test_only else train(options, given)


@EX.command
def robustness(_config: dict[str, Any], _run: Any) -> None:
    """Evaluates load_path at all robustness_types and robustness_ratios, with one test pass per missing type."""
    read_load_paths(_config)
    from runs.robustness_text import measure_all

    set_up_logging()
    if found := measure_all(_config, given_options(_run)):
        print(f"\n{found}\n")


@EX.command(unobserved=True)
def features(_config: dict[str, Any], _run: Any, network: Any) -> None:
    """Runs the frozen towers on every input of all splits and caches the features for later training runs."""
    options = check(_config)
    from runs.training import compute_features

    set_up_logging()
    compute_features(options, given_options(_run))


@EX.command(unobserved=True)
def print_config(_config: dict[str, Any]) -> None:
    """Prints all options with their values and help."""
    print_safely(described_options(_config))


@EX.command(unobserved=True)
def runs(_config: dict[str, Any]) -> None:
    """Prints the table of all runs below log_dir, sorted by runs_sort, and writes it to log_dir/runs.csv."""
    options = read_options(_config, ["log_dir", "runs_sort"])
    from runs.run_table import describe_runs, list_runs, sort_runs, write_runs

    log_dir = options["log_dir"]
    rows = sort_runs(list_runs(log_dir), options["runs_sort"])
    write_runs(rows, log_dir / "runs.csv")
    print_safely(f"\n{describe_runs(rows, log_dir)}\nwritten to {log_dir / 'runs.csv'}\n")


@EX.command(unobserved=True)
def compare(_config: dict[str, Any], _run: Any) -> None:
    """Prints which methods differ significantly, from the logits that robustness stored in `runs`; also writes JSON."""
    from runs.compare_text import compare_places

    set_up_logging()
    print(compare_places(_config, given_options(_run)))


@EX.command(unobserved=True)
def report(_config: dict[str, Any]) -> None:
    """Writes a page with tables and figures about the runs in and below the folders `runs` to the folder `out`."""
    options = read_options(_config, ["runs", "out"])
    from runs.report import make_report

    set_up_logging()
    print(f"\nwritten to {make_report(options['runs'], options['out'] or Path('report'))}\n")


@EX.command(unobserved=True)
def predict(_config: dict[str, Any], _run: Any) -> None:
    """Predicts the samples listed in `input` with load_path, and writes the predictions to `output`."""
    options = read_prediction(_config, "predict", "input")
    from runs.prediction import predict_file

    set_up_logging()
    print(f"\n{predict_file(options, given_options(_run))}\n")


@EX.command(unobserved=True)
def embed(_config: dict[str, Any], _run: Any) -> None:
    """Writes the features that load_path computes for the samples in `input`, or for a `split`, to `output`."""
    options = read_prediction(_config, "embed", "input", "split")
    from runs.prediction import embed_file

    set_up_logging()
    print(f"\n{embed_file(_config, options, given_options(_run))}\n")


@EX.command(unobserved=True)
def export(_config: dict[str, Any]) -> None:
    """Writes the model of load_path to the folder `out` in Hugging Face's layout, with a model card."""
    from runs.export import export

    print(export(**read_options(_config, ["load_path", "out"])))


@EX.command(unobserved=True)
def doctor(_config: dict[str, Any], _run: Any, network: Any) -> None:
    """Checks installation, machine, dataset, weights and a training step; prints a line for each: ok, warn or FAIL."""
    from runs.doctor import check_all

    set_up_logging()
    check_all(_config, given_options(_run))


@EX.command
def sweep(_config: dict[str, Any], _run: Any, network: Any, search: Any, sweep_over: Any, sweep_slurm: Any) -> None:
    """Trains and evaluates a grid of missing patterns and seeds, or searches for good option values."""
    # Sacred only lets entries be added to options that are arguments; their values are read from `_config`.
    from runs.sweep.command import run_sweep

    set_up_logging()
    asked = _run.meta_info["options"]
    run_sweep(_config, asked["UPDATE"], asked["CHOSEN"])


def given_options(sacred_run: Any) -> set[str]:
    """Names of the options set on the command line or in the .json files it names."""
    return set(sacred_run.meta_info["options"]["GIVEN"])


def command_line(argv: list[str]) -> int:
    """Runs a command and returns its exit status; if that is not 0, prints a line to standard error first."""
    EX.current_run = None  # may be left over from an earlier call in this process
    print_anywhere()
    try:
        check_system()
        check_launcher()
        asked = read_command_line(argv[1:], EX.commands)
        if asked.help:
            print_safely(help_on(asked.command if asked.command in argv else None, EX.commands, __doc__ or ""))
            return DONE
        if asked.command in ("main", "robustness", "predict", "embed", "doctor", "features"):
            settle_threads()
            keep_freed_memory()
        with stopping_on_signals():
            run_command(asked)
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
        if EX.current_run is None:  # Sacred failed while reading the command line
            return end_with_user_error(error, None, f"command line: {first_line(error)}")
        if (refusal := machine_error(error, run_folder())) is not None:
            return end_with_user_error(error, run_folder(), str(refusal))
        return end_with_our_fault(error, run_folder())
    return DONE


def run_folder() -> Path | None:
    """The run folder that this call has created, if any."""
    folder = EX.current_run.info.get("folder") if EX.current_run is not None else None
    return Path(folder) if folder is not None else None


if __name__ == "__main__":
    sys.exit(command_line(sys.argv))
