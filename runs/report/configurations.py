"""Configurations and versions of a report's runs: what all share, once, and for each run what it has beyond that."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from runs.report.results import ReportRun
from runs.report.text import without_home


class Configuration(NamedTuple):
    """Options, and versions with machine and commit, as JSON; empty where there are none."""

    title: str
    texts: list[str]
    note: str = ""


def configurations(runs: Sequence[ReportRun]) -> list[Configuration]:
    """The part that all runs share, then each run's own, unless it has none."""
    versions = [run.versions for run in runs if run.versions is not None]
    shared, shared_versions = common_part([run.config for run in runs]), common_part(versions)
    which = f"of {runs[0].title}" if len(runs) == 1 else "that all runs share"
    found = [Configuration(f"Configuration and versions {which}", _texts(shared, shared_versions))]
    for run in runs:
        texts = _texts(own_part(run.config, shared), own_part(run.versions or {}, shared_versions))
        note = "" if run.versions else "Versions are unknown, since environment.json is missing."
        found.append(Configuration(f"Beyond that, {run.title}", texts, note))
    return [each for each in found if each.texts or each.note]


def _texts(*parts: dict[str, Any]) -> list[str]:
    return [without_home(json.dumps(part, indent=2)) for part in parts if part]


def common_part(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all records have, and in dictionaries among these, the entries that all of them have."""
    common: dict[str, Any] = {}
    for name, value in records[0].items() if records else ():
        values = [record[name] for record in records if name in record]
        if len(values) == len(records) and all(each == value for each in values):
            common[name] = value
        elif len(values) == len(records) and all(isinstance(each, dict) for each in values):
            common |= {name: part} if (part := common_part(values)) else {}
    return common


def own_part(record: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """The entries of a record beyond those of `common`, which is the common part of it and others."""
    own: dict[str, Any] = {}
    for name, value in record.items():
        if name not in common:
            own[name] = value
        elif value != common[name]:
            own[name] = own_part(value, common[name])
    return own
