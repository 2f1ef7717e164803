"""Rows of measurements: one CSV per question, each row with versions, commit and machine."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ctrl_dpo.data.folders import installed_versions, write_atomically

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
    """Write measurements that hold their own circumstances; one of the same key is replaced.

    A column that either side lacks is left empty there. Several processes may write.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{question}.csv"
    with FileLock(path.with_suffix(".lock")):
        kept: dict[tuple[str, ...], Mapping[str, Any]] = {}
        if path.exists():
            with path.open(newline="") as file:
                kept = {tuple(row[k] for k in key): row for row in csv.DictReader(file)}
        columns = dict.fromkeys([*rows[0], *next(iter(kept.values()), {})])
        kept |= {tuple(str(row[k]) for k in key): row for row in rows}
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept[name] for name in sorted(kept))
        write_atomically(path, text.getvalue().encode("utf-8"))
    return path


def _git(*words: str) -> str:
    run = subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def circumstances() -> dict[str, str]:
    """Return versions, commit, machine and date of a measurement.

    Results that were written since the commit do not make it `-dirty`: they change no number.
    """
    import torch  # here, not above: it would count as memory of benchmarks that do without it

    units = getattr(torch.cpu, "get_capabilities", dict)()  # later than the oldest torch
    kind = next((name for name in ("amx_bf16", "avx512_bf16", "avx512_f") if units.get(name)), "")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
    commit = _git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    return {
        "machine": ", ".join(filter(None, (platform.machine(), f"{os.cpu_count()} cores", kind))),
        "versions": json.dumps(installed_versions(), sort_keys=True),
        "commit": commit,
        "date": datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
