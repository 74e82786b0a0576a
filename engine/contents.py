"""Hashes of the files a run reads: a file replaced under the same path counts as different, a moved one as the same."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.hashing import file_sha256
from vilt.datamodules import MissingModalityData

CONTENTS_FILE = "contents.json"
"""File in a run folder with the hashes of the files its run read."""
WEIGHTS = (".json", ".txt", ".gz", ".safetensors", ".bin", ".pt", ".model")
OF_TEST = ("data of test", "missing table of test")


def contents_of_data(data: MissingModalityData) -> dict[str, str]:
    """SHA-256 of each split's arrow file and of the missing table used with it."""
    with ThreadPoolExecutor() as threads:
        files = threads.map(file_sha256, [dataset.path for dataset in data.datasets.values()])
        contents = {f"data of {split}": sha256 for split, sha256 in zip(data.datasets, files, strict=True)}
    for split, dataset in data.datasets.items():
        contents[f"missing table of {split}"] = hashlib.sha256(dataset.missing_table.tobytes()).hexdigest()
    return contents


def contents_of_files(paths: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each file, or of all files of weights and settings in a folder; missing paths are left out."""
    contents = {}
    for name, path in paths.items():
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
            listing = json.dumps([(file.name, file_sha256(file)) for file in files])
            contents[name] = hashlib.sha256(listing.encode()).hexdigest()
        elif path.is_file():
            contents[name] = file_sha256(path)
    return contents


def other_contents(theirs: Mapping[str, str], ours: Mapping[str, str], *left_out: str) -> list[str]:
    """Descriptions of what differs between two runs, with both digests."""
    return [
        f"{name} (there {_short(theirs.get(name))}, here {_short(ours.get(name))})"
        for name in sorted(theirs.keys() | ours.keys())
        if name not in left_out and theirs.get(name) != ours.get(name)
    ]


def _short(sha256: object) -> str:
    return "none" if sha256 is None else f"sha256 {str(sha256)[:12]}…"
