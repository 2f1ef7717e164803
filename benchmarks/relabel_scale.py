"""How long and how much memory calibrating and relabelling take at scale.

``relabel`` is the function on stored groups. ``ctrl-dpo relabel`` is the whole command in a process
of its own: reading a file, checking every row, merging, relabelling, the summary, and writing.
Usage: python benchmarks/relabel_scale.py [GROUPS], by default 1,000,000 of 8, 32 reference rewards
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from recording import append_rows

from ctrl_dpo import RewardCalibrator, relabel
from ctrl_dpo.data.folders import read_rows

RESPONSES, REFERENCE, BATCH = 8, 32, 50_000


def write(path: Path, groups: int) -> None:
    """Write scored groups in batches, so that making them takes no memory."""
    rng, writer = np.random.default_rng(0), None
    for start in range(0, groups, BATCH):
        n = min(BATCH, groups - start)
        texts = pa.array([f"response {i}" for i in range(n * RESPONSES)])
        lists = {
            "responses": (texts, RESPONSES),
            "rewards": (pa.array(rng.normal(size=n * RESPONSES)), RESPONSES),
            "reference_rewards": (pa.array(rng.normal(size=n * REFERENCE)), REFERENCE),
        }
        made = {
            name: pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32) * width, values)
            for name, (values, width) in lists.items()
        }
        table = pa.table({"prompt": [f"prompt {start + i}" for i in range(n)]} | made)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()  # type: ignore[union-attr]


def command(path: Path, output: Path, groups: int, processes: int) -> dict[str, object]:
    """Run the whole command, and return its seconds and its largest resident memory."""
    words = [sys.executable, "-c", "from ctrl_dpo.cli import main; main()", "relabel", str(path)]
    words += ["--output", str(output), "--target-kl", "1", "--num-proc", str(processes)]
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    return _row(f"ctrl-dpo relabel, {processes} processes", groups, seconds, peak)


def main() -> None:
    """Print seconds and the largest resident memory, and append them to the results."""
    groups = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "groups.parquet"
        write(path, groups)
        os.environ["HF_DATASETS_CACHE"] = folder
        for processes in (1, 2):
            rows.append(command(path, Path(folder) / f"out{processes}", groups, processes))
        data = read_rows(path)
        for processes in (1, 2):
            start = time.perf_counter()
            made = relabel(
                data,
                procedure="best_of_4",
                target_kl=1.0,
                num_proc=processes if processes > 1 else None,
            )
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            rows.append(_row(f"relabel, {processes} processes", len(made), seconds, peak))
    rng = np.random.default_rng(0)
    reference, new = rng.normal(size=(100_000, 64)), rng.normal(size=(100_000, 8))
    for method in ("empirical", "pooled"):
        start = time.perf_counter()
        RewardCalibrator(method).fit(reference).transform(new)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(_row(f"calibrate, {method}", 100_000, time.perf_counter() - start, peak))
    for row in rows:
        print(row)
    append_rows("relabel_scale", rows)


def _row(what: str, groups: int, seconds: float, peak: float) -> dict[str, object]:
    return {
        "what": what,
        "groups": groups,
        "seconds": round(seconds, 1),
        "peak_gib": round(peak, 2),
    }


if __name__ == "__main__":
    main()
