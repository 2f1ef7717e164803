"""What a policy reaches that is fitted to ranks among K draws, by how the ranks are labelled.

A regression on targets by rank fits, with many prompts, the targets smoothed by Bernstein's kernel.
This computes the inference-time win rate and KL of that smoothed policy, exactly: with the penalty
of the exact optimum, and with the penalty at which the smoothed policy itself pays the budget, so
that win rates compare at equal KL. A contrastive loss (anchor 0) fits k / (k - 1) times the
smoothed targets, which `relabel` takes into account: its policy is that of the last column.

    python benchmarks/rank_targets.py [PROCEDURE] [KL]
"""

from __future__ import annotations

import sys

import numpy as np
from recording import append_rows
from scipy import integrate, optimize

from ctrl_dpo import Optimal, match_kl, optimal_policy
from ctrl_dpo.theory.procedures import parse_procedure
from ctrl_dpo.theory.rank_targets import RankOptimal, expected_log_density
from ctrl_dpo.transform import transformed_rewards

DRAWS = (2, 4, 8, 16, 32, 64)


def fitted(targets: np.ndarray, procedure: str) -> tuple[float, float]:
    """Win rate and KL of the policy that a regression on the targets fits."""
    served = parse_procedure(procedure)
    u = np.linspace(0, 1, 20001)
    log_density = expected_log_density(targets, u)
    log_density -= log_density.max()
    log_density -= np.log(integrate.simpson(np.exp(log_density), x=u))
    density = np.exp(log_density)
    cdf = np.clip(integrate.cumulative_simpson(density, x=u, initial=0), 0, 1)
    win = 1 - integrate.simpson(served.distortion(cdf) * served.density(u), x=u)
    return float(win), float(integrate.simpson(density * log_density, x=u))


def at_budget(targets: np.ndarray, procedure: str, kl: float) -> np.ndarray:
    """Scale targets until the policy that a regression on them fits has this KL."""

    def gap(log_scale: float) -> float:
        return float(np.log(fitted(targets * np.exp(log_scale), procedure)[1] / kl))

    return np.asarray(targets * np.exp(optimize.brentq(gap, -3.0, 6.0, xtol=1e-6)))


def main(procedure: str = "best_of_4", kl: float = 1.0) -> None:
    """Print a table and append it to the results."""
    served = parse_procedure(procedure)
    beta = match_kl("optimal", served, kl)
    optimum, rows = optimal_policy(served, beta).win_rate, []
    for k in DRAWS:
        ranks = np.arange(k), np.ones(k, dtype=int)
        targets = {
            name: transformed_rewards(Optimal(served, beta), *ranks, k, True, name) / beta
            for name in ("plug_in", "posterior")
        }
        targets |= {
            f"{name}, at budget": at_budget(t, procedure, kl) for name, t in targets.items()
        }
        targets["rank_optimal"] = RankOptimal(served, served, beta, kl, 1.0).targets(k, True).values
        contrastive = RankOptimal(served, served, beta, kl, 0.0).targets(k, True).values
        targets["rank_optimal, anchor 0"] = contrastive * k / (k - 1)
        for name, values in targets.items():
            win, reached = fitted(values, procedure)
            row = {"procedure": procedure, "budget_kl": kl, "k": k, "estimator": name}
            rows.append(row | {"win_rate": round(win, 4), "kl": round(reached, 4)})
    print(f"{procedure}, budget {kl:g} nat: the exact optimum wins {optimum:.3f}\n")
    print(
        "| draws a prompt | plug-in | posterior mean | plug-in, at the budget "
        "| posterior mean, at the budget | rank targets | rank targets of anchor 0, by its loss |"
    )
    print("|" + "---|" * 7)
    for k in DRAWS:
        cells = [f"{r['win_rate']:.3f} at {r['kl']:.2f} nat" for r in rows if r["k"] == k]
        print(f"| {k} | " + " | ".join(cells) + " |")
    append_rows("rank_targets", rows)


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(float, sys.argv[2:3]))
