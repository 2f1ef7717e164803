"""How much faster and smaller a training step is than TRL's, on real preference pairs.

    python benchmarks/train_throughput.py MODEL_FOLDER [--steps 4] [--repeats 3] [--threads 2]

Both train LoRA (rank 16, all linear layers) on the same pairs in the same order with the hard-label
loss, 8 pairs a step, references computed before. Every run is a process of its own; sides take
turns. TRL's configurations are all run, and its fastest is compared. Seconds are by the clock and
of the processor: the second are those to trust on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from contestants import SIDES, run
from flops import matmul_ceiling
from recording import append_rows

from ctrl_dpo.engine.models import DTYPES

# products of a decoder layer of SmolLM2-135M at the median length of a row
SHAPES = [(240, k, n) for k, n in ((576, 576), (576, 192), (576, 1536), (1536, 576))]


def summary(side: str, runs: list[dict[str, Any]], per_step: int) -> dict[str, Any]:
    """Take medians over the steps of all runs but each run's first, which warms up."""
    step, cpu = ([s for r in runs for s in r[name][1:]] for name in ("steps_s", "steps_cpu_s"))
    ready = statistics.median(r["ready_cpu_s"] for r in runs)
    return {
        "side": side,
        "step_s": round(statistics.median(step), 2),
        "step_low": round(min(step), 2),
        "step_high": round(max(step), 2),
        "step_cpu_s": round(statistics.median(cpu), 2),
        "cpu_low": round(min(cpu), 2),
        "cpu_high": round(max(cpu), 2),
        "pairs_per_s": round(per_step / statistics.median(step), 2),
        "ready_cpu_s": round(ready, 1),
        "total_cpu_s": round(statistics.median(r["total_cpu_s"] for r in runs), 1),
        "peak_mib": round(max(r["peak_mib"] for r in runs)),
        "weight_mib": round(runs[0]["weight_mib"], 1),
        "tflop": round(runs[0]["flops"] / 1e12, 3),
        "ideal_tflop": round(runs[0].get("ideal_flops", 0) / 1e12, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--per-step", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of ours")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    workload = {"kind": "hh", "rows": args.steps * args.per_step, "per_step": args.per_step}
    workload["dtype"] = args.dtype
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    ceilings = []
    for repeat in range(args.repeats):
        for side in args.sides:
            ceilings.append(matmul_ceiling(SHAPES, DTYPES[args.dtype]))
            found = run(args.model, side, args.threads, **workload, flops=repeat == 0)
            print(json.dumps(found), flush=True)
            if "failed" not in found:
                runs[side].append(found)
    ceiling = {k: statistics.median(c[k] for c in ceilings) for k in ceilings[0]}
    rows = [summary(side, found, args.per_step) for side, found in runs.items() if found]
    ours = next(row for row in rows if row["side"] == "ours")
    others = [row for row in rows if row["side"].startswith("trl")]
    for row in rows:
        row["ceiling_per_cpu_s"] = round(ceiling["square_per_cpu_s"] / 1e12, 3)
        row["model_shapes_per_cpu_s"] = round(ceiling["model_per_cpu_s"] / 1e12, 3)
        row["share_of_ceiling"] = round(
            row["tflop"] / row["step_cpu_s"] / row["ceiling_per_cpu_s"], 3
        )
        row["times_ours"] = round(row["step_cpu_s"] / ours["step_cpu_s"], 2)
        row["total_times_ours"] = round(row["total_cpu_s"] / ours["total_cpu_s"], 2)
        row["peak_of_ours"] = round(row["peak_mib"] / ours["peak_mib"], 2)
        row["settings"] = json.dumps(
            {
                "data": runs["ours"][0]["data"],
                **workload,
                "repeats": args.repeats,
                "threads": args.threads,
            }
        )
        print(row)
    if others:
        best = min(others, key=lambda row: row["step_cpu_s"])
        print(
            f"ours against {best['side']}: {best['times_ours']} times the speed, "
            f"{best['peak_of_ours']} times less memory"
        )
    append_rows("train_throughput", rows)


if __name__ == "__main__":
    main()
