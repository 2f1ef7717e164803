"""Whether a run that is killed at any point ends with the same bits when it is run again.

    PYTHONPATH=.:tests python benchmarks/kill_resume.py --points 50

``ctrl-dpo train`` on a tiny Llama, int8 base, LoRA with dropout, 8-bit AdamW, accumulation 2, a
checkpoint every update. Half of the points are events on files, half are times; both are seeded.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from recording import append_rows
from run_interrupted import kills, write_inputs

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        os.environ["CTRL_DPO_CACHE"] = str(Path(name) / "cache")
        model, data = write_inputs(Path(name))
        rows = []
        for row in kills(Path(name), model, data, options.points, options.seed):
            append_rows("kill_resume", [row])
            rows.append(row)
            print(row, flush=True)
    killed = [row for row in rows if row["killed"]]
    print(f"killed {len(killed)}, of these inside a save {sum(r['inside_a_save'] for r in killed)}")
    print(f"resumed {sum(r['resumed'] for r in killed)}, equal {sum(r['equal'] for r in killed)}")
