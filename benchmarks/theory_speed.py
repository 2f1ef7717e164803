"""How long the exact optimum, a frontier and relabelling take, on one core.

Usage: OMP_NUM_THREADS=1 python benchmarks/theory_speed.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from datasets import Dataset
from recording import append_rows

from ctrl_dpo import Exponential, Identity, Log, NormalQuantile, frontier, optimal_policy, relabel
from ctrl_dpo.theory import optimum, rank_targets
from ctrl_dpo.theory.procedures import parse_procedure
from ctrl_dpo.theory.rank_targets import RankOptimal

REPEATS = 5


def one_optimum(procedure: str, beta: float) -> Callable[[], object]:
    """Solve without the cache."""

    def run() -> object:
        optimum._optimal.cache_clear()
        return optimal_policy(procedure, beta)

    return run


def whole_frontier() -> object:
    """50 points of five transformations."""
    optimum._optimal.cache_clear()
    transformations = ["optimal", Exponential(10.0), Identity(), Log(), NormalQuantile()]
    return frontier("best_of_8", transformations, np.geomspace(0.02, 3, 50).tolist())


def targets(k: int) -> Callable[[], object]:
    """Rank targets at a budget, without the caches."""

    def run() -> object:
        optimum._optimal.cache_clear()
        rank_targets._solve.cache_clear()
        rank_targets._of_budget.cache_clear()
        served = parse_procedure("best_of_4")
        return RankOptimal(served, served, 0.08, 1.0).targets(k, True)

    return run


def relabelling(groups: int, k: int) -> Callable[[], object]:
    """Relabel groups of k scored draws; the caches of datasets are not used."""
    rng = np.random.default_rng(0)
    data = Dataset.from_dict(
        {
            "prompt": ["q"] * groups,
            "responses": [["a"] * k] * groups,
            "rewards": rng.normal(size=(groups, k)).tolist(),
        }
    )
    options = {"load_from_cache_file": False}
    return lambda: relabel(data, procedure="best_of_4", target_kl=1.0, **options)


def main() -> None:
    """Print medians with their range and append them to the results."""
    tasks = {
        f"optimum {name} at beta {beta}": one_optimum(name, beta)
        for name in (
            "best_of_4",
            "best_of_64",
            "worst_of_4",
            "worst_of_64",
            "2nd_best_of_4",
            "32nd_best_of_64",
            "0.5*single_draw+0.5*best_of_8",
        )
        for beta in (0.01, 0.1, 1.0)
    }
    tasks["frontier of five transformations, 50 points"] = whole_frontier
    tasks |= {f"rank targets of {k} draws at a budget": targets(k) for k in (4, 8, 16, 32)}
    tasks["relabel 100,000 groups of 8"] = relabelling(100_000, 8)
    rows = []
    for name, task in tasks.items():
        task()
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            task()
            times.append(1000 * (time.perf_counter() - start))
        row = {"task": name, "median_ms": round(statistics.median(times), 2)}
        rows.append(row | {"low_ms": round(min(times), 2), "high_ms": round(max(times), 2)})
        print(f"{name}: {row['median_ms']} ms ({min(times):.2f} to {max(times):.2f})")
    append_rows("theory_speed", rows)


if __name__ == "__main__":
    main()
