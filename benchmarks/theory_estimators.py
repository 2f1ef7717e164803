"""Posterior mean or plug-in, and which estimates transformed rewards and pair margins better.

Uniform calibrated rewards are ranked among K draws; the estimate from the rank is compared with the
truth. Usage: python benchmarks/theory_estimators.py
"""

from __future__ import annotations

import numpy as np
from recording import append_rows

from ctrl_dpo import Exponential, Identity, Log, NormalQuantile, Optimal
from ctrl_dpo.transform import transformed_rewards

DRAWS = (2, 4, 8, 16, 64)
SAMPLES = 400_000
TRANSFORMATIONS = (
    Identity(),
    Log(),
    NormalQuantile(),
    Exponential(5.0),
    Exponential(-5.0),
    Optimal("best_of_4", 0.08),
    Optimal("worst_of_4", 0.08),
)


def errors(transformation: object, k: int, estimator: str) -> tuple[float, float]:
    """Mean squared errors of the transformed reward and of the margin between two draws."""
    rng = np.random.default_rng(k)
    u = rng.random((SAMPLES // k, k))
    rank = u.argsort(axis=1).argsort(axis=1)
    tied = np.ones_like(rank)
    estimate = transformed_rewards(transformation, rank, tied, k, True, estimator)
    miss = estimate - transformation(u)  # type: ignore[operator]
    return float(np.mean(miss**2)), float(np.mean((miss[:, 0] - miss[:, 1]) ** 2))


def main() -> None:
    """Print a table and append it to the results."""
    rows = []
    print("| transformation | K | reward: posterior | plug-in | margin: posterior | plug-in |")
    print("|---|---|---|---|---|---|")
    for each in TRANSFORMATIONS:
        name = f"optimal, {each.procedure}" if isinstance(each, Optimal) else str(each)
        for k in DRAWS:
            found = {e: errors(each, k, e) for e in ("posterior", "plug_in")}
            for estimator, (reward, margin) in found.items():
                row = {"transformation": name, "k": k, "estimator": estimator}
                rows.append(row | {"mse_reward": f"{reward:.4g}", "mse_margin": f"{margin:.4g}"})
            (a, b), (c, d) = found["posterior"], found["plug_in"]
            print(f"| {name} | {k} | {a:.4g} | {c:.4g} | {b:.4g} | {d:.4g} |")
    append_rows("theory_estimators", rows)


if __name__ == "__main__":
    main()
