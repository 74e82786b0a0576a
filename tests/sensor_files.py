"""Made-up sensor datasets in the layout that make_arrow.py reads."""

from pathlib import Path

import numpy as np

MODALITIES = ("acc", "gyr", "lig")
RATE, ROWS = 10, 60
"""Sampling rate in Hz, and rows of a recording, which lasts 6 s."""
SPEC = "name: made_up\nsample: 1\ninterval: 0.4\ninterval_overlap: 0.5\n"
"""Samples of 10 values: 4 intervals of 4 values, starting 2 apart."""


def write_set(folder: Path, recordings: int = 12, modalities: tuple[str, ...] = MODALITIES) -> Path:
    """Writes one recording per subject, of one of two classes that every modality reveals; splits of 8, 2 and 2."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(4)
    widths = {"acc": 2, "gyr": 2, "lig": 1}
    labels = np.repeat(np.arange(recordings) % 2, ROWS)
    wave = np.sin(np.arange(recordings * ROWS) * np.where(labels, 2.5, 0.8))
    columns = [(name, axis) for name in modalities for axis in range(widths[name])]
    noisy = [100 * wave * (axis + 1) + draw.normal(0, 20, len(wave)) for _, axis in columns]
    np.save(folder / "signals.npy", np.stack(noisy, axis=1).round().astype(np.int16))
    np.save(folder / "labels.npy", labels.astype(np.int8))
    (folder / "classes.txt").write_text("slow\nfast\n")
    lines = [f"{number},{name},{axis},g,{RATE},0.01" for number, (name, axis) in enumerate(columns)]
    (folder / "channels.csv").write_text("\n".join(["column,modality,axis,unit,rate_hz,scale", *lines, ""]))
    splits = ["train"] * (recordings - 4) + ["val"] * 2 + ["test"] * 2
    lines = [f"r{row},s{row},{split},{ROWS * row},{ROWS}" for row, split in enumerate(splits)]
    (folder / "recordings.csv").write_text("\n".join(["recording,subject,split,start,length", *lines, ""]))
    (folder / "spec.yaml").write_text(SPEC)
    return folder
