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
    full = [{**row, **_circumstances()} for row in rows]
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


def _circumstances() -> dict[str, str]:
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
