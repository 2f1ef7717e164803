"""Rows of measurements: one CSV per question, each row with versions, commit and machine."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl_dpo.data.folders import installed_versions

RESULTS = Path(__file__).parent / "results"


def append_rows(question: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Append measurements to ``results/QUESTION.csv``; columns are fixed by the first row ever."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}.csv"
    full = [{**row, **circumstances()} for row in rows]
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != list(full[0]):
            raise ValueError(
                f"columns must be {header}; got {list(full[0])}. Name another question."
            )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(full[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(full)
    return path


def merge_rows(question: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> Path:
    """Write measurements that hold their own circumstances; one of the same key is replaced."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}.csv"
    kept: dict[tuple[str, ...], Mapping[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            kept = {tuple(row[k] for k in key): row for row in csv.DictReader(file)}
    kept |= {tuple(str(row[k]) for k in key): row for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[name] for name in sorted(kept))
    return path


def circumstances() -> dict[str, str]:
    """Return versions, commit, machine and date of a measurement."""
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=here,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": json.dumps(installed_versions(), sort_keys=True),
        "commit": commit,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
