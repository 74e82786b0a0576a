"""Random forests to compare runs on sensors with: same arrow files, and same missing tables in training and test.

    pip install scikit-learn==1.9.1
    python -m benchmarks.forest result/rep_seed0/version_0 …

The runs must have a robustness matrix, whose cells are tested: accuracy and macro F1, mean and standard deviation over
the runs. One forest gets the mean of the training samples in place of missing features; others are trained for each
pattern of present modalities, on the training samples that have them.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import f1_score

from vilt.datasets.arrow_dataset import ArrowDataset
from vilt.datasets.open_spec import open_spec
from vilt.missing_tables import MissingPattern, draw_missing_table
from vilt.missing_types import is_missing

TREES, BANDS = 100, 8


def features(dataset: ArrowDataset, modality: str) -> np.ndarray:
    """(N, F): mean, standard deviation, extremes and log power in bands, for each channel and for their norm."""
    step = dataset.spec.modalities[modality].step or None  # less than an interval if intervals overlap
    x_NcIS = np.stack([np.asarray(dataset.kinds[modality].read(row, row)) for row in range(dataset.n_rows)])
    x_NcT = np.concatenate([x_NcIS[:, :, :-1, :step].reshape(*x_NcIS.shape[:2], -1), x_NcIS[:, :, -1]], axis=2)
    x_NcT = np.concatenate([x_NcT, np.linalg.norm(x_NcT, axis=1, keepdims=True)], axis=1)
    power = np.abs(np.fft.rfft(x_NcT - x_NcT.mean(axis=2, keepdims=True)))[..., 1:] ** 2
    starts = np.unique(np.geomspace(1, power.shape[2] + 1, BANDS + 1).astype(int))[:-1] - 1
    bands = np.log(np.add.reduceat(power, starts, axis=2) + 1e-6).reshape(len(x_NcT), -1)
    return np.concatenate([*(of(x_NcT, axis=2) for of in (np.mean, np.std, np.min, np.max)), bands], axis=1)


def predictions(config: dict[str, Any], train: ArrowDataset, test: ArrowDataset) -> dict[str, np.ndarray]:
    """Predictions (missing types, N) for the test split, keyed by forest."""
    names, seed = list(train.spec.modalities), config["seed"]
    x_train, x_test = ([features(dataset, name) for name in names] for dataset in (train, test))
    lost = config["missing_type"]["train"], config["missing_ratio"]["train"], config["both_ratio"], seed
    type_N = draw_missing_table(train.spec.table_name, "train", MissingPattern(*lost), train.n_rows)
    has = [np.logical_not(is_missing(names, name, type_N)) for name in names]
    mean = [x[has_N].mean(axis=0) for x, has_N in zip(x_train, has, strict=True)]

    def predicted(rows: np.ndarray, of_train: Sequence[np.ndarray], of_test: Sequence[np.ndarray]) -> np.ndarray:
        forest = RandomForestClassifier(TREES, random_state=seed)
        forest.fit(np.concatenate(of_train, axis=1)[rows], train.labels[rows])
        return np.asarray(forest.predict(np.concatenate(of_test, axis=1)))

    given, own = [], []
    for code in range(2 ** len(names) - 1):
        there = [m for m, name in enumerate(names) if not is_missing(names, name, code)]
        rows = np.all([has[m] for m in there], axis=0)
        own.append(predicted(rows, [x_train[m] for m in there], [x_test[m] for m in there]))
        given.append([x if m in there else np.broadcast_to(mean[m], x.shape) for m, x in enumerate(x_test)])
    filled = [np.where(has[m][:, None], x, mean[m]) for m, x in enumerate(x_train)]
    one = predicted(np.ones_like(has[0]), filled, [np.concatenate(x) for x in zip(*given, strict=True)])
    return {"one": one.reshape(len(own), -1), "one for each pattern": np.stack(own)}


def table(runs: Sequence[Path]) -> Iterator[str]:
    """Yields the lines of the Markdown table."""
    scores = defaultdict(list)
    for run in runs:
        config, tested = (
            json.loads((run / at).read_text("utf-8")) for at in ("config.json", "robustness/robustness.json")
        )
        spec = open_spec(config["task"], root := Path(config["data_root"]), ["train", "test"])
        train, test = ArrowDataset(spec, root, "train"), ArrowDataset(spec, root, "test")
        for forest, predicted in predictions(config, train, test).items():
            for cell in tested["cells"]:
                cell_key, found = (cell["missing_type"], cell["ratio"]), []
                for seed in tested["table_seeds"]:
                    pattern = MissingPattern(*cell_key, cell["both_ratio"] or 0.5, seed)
                    type_N = draw_missing_table(spec.table_name, "test", pattern, test.n_rows)
                    chosen, true = predicted[type_N, np.arange(test.n_rows)], test.labels
                    found.append((np.mean(chosen == true), f1_score(true, chosen, average="macro")))
                scores[forest, *cell_key].append(100 * np.mean(found, axis=0))
    yield "| forest | missing | ratio | accuracy | macro F1 |\n| --- | --- | --- | --- | --- |"
    for key, of_runs in scores.items():
        each = [f"{mean:.1f}" for mean in np.mean(of_runs, axis=0)]
        if len(of_runs) > 1:
            each = [f"{mean} ± {by:.1f}" for mean, by in zip(each, np.std(of_runs, axis=0, ddof=1), strict=True)]
        yield f"| {' | '.join(map(str, [*key, *each]))} |"


if __name__ == "__main__":
    print("\n".join(table([Path(argument) for argument in sys.argv[1:]])))
