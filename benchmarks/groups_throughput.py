"""How much faster are all pairs of groups of K responses than TRL on the expanded pairs.

    python benchmarks/groups_throughput.py MODEL_FOLDER [--sizes 2 4 8 16] [--threads 2]

A step holds one group: K responses for us, K (K - 1) / 2 pairs for TRL, the same loss. TRL has to
hold all pairs of a step at once or accumulate over them; it gets the faster: 8 pairs at a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from contestants import run
from recording import append_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--prompt", type=int, default=118)
    parser.add_argument("--response", type=int, default=40)
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl", default="trl_bf16_ckpt")
    parser.add_argument("--dtype", default="bfloat16", help="of ours")
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        pairs = size * (size - 1) // 2
        workload = {"kind": "groups", "prompt": args.prompt, "response": args.response}
        workload |= {
            "dtype": args.dtype,
            "size": size,
            "rows": args.groups,
            "per_step": 1,
            "pairs_per_group": min(pairs, 8),
        }
        seconds: dict[str, list[float]] = {"ours": [], args.trl: []}
        flops: dict[str, float] = {}
        for _ in range(args.repeats):
            for side in seconds:
                found: dict[str, Any] = run(
                    args.model, side, args.threads, **workload, flops=side not in flops
                )
                print(json.dumps(found), flush=True)
                # the first step warms up; a step of TRL's holds 8 pairs
                steps = found["steps_cpu_s"][1:]
                units = pairs / min(pairs, 8) if side == args.trl else 1
                seconds[side].append(statistics.mean(steps) * units)
                if "flops" in found:
                    flops[side] = found["flops"] * units
        ratios = [t / o for t, o in zip(seconds[args.trl], seconds["ours"], strict=True)]
        row = {
            "k": size,
            "ours_cpu_s_per_group": round(statistics.median(seconds["ours"]), 3),
            "trl_cpu_s_per_group": round(statistics.median(seconds[args.trl]), 3),
            "ratio_median": round(statistics.median(ratios), 2),
            "ratio_low": round(min(ratios), 2),
            "ratio_high": round(max(ratios), 2),
            "flops_ratio": round(flops[args.trl] / flops["ours"], 2),
            "settings": json.dumps({"trl": args.trl, "threads": args.threads, **workload}),
        }
        print(row, flush=True)
        rows.append(row)
    append_rows("groups_throughput", rows)


if __name__ == "__main__":
    main()
