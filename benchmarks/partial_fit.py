"""What is left of a method's advantage when a policy sees only a part of the reward? Exactly.

    python benchmarks/partial_fit.py [--kl 1.0]

A response has a reward z (standard normal under the reference policy) and a feature s with
correlation sqrt(r2): a policy can reweight responses by s alone, as one that has learned a share
r2 of the reward. Each method's log-ratio is the regression of its targets on s, E[target | s],
times the number at which it pays the KL (for the optimum, the best of several budgets); `bound`
is the best of all reweightings by s: no method wins more, whatever its loss. At r2 = 1 that is
the frontier of the theory. Nothing is sampled: sums over fine grids of s and z.
"""

from __future__ import annotations

import argparse
import functools

import numpy as np
from numpy.typing import NDArray
from recording import append_rows
from scipy import optimize, special, stats

from ctrl_dpo import match_kl
from ctrl_dpo.measures.tables import table
from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.procedures import Procedure, parse_procedure

FloatArray = NDArray[np.float64]

_STEEPEST = 50.0
DRAWS = 16  # of which DPO takes the best and the worst
BUDGETS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # nats the optimum's targets are made for
GRID = np.linspace(-7, 7, 1401)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PROCEDURES = ("best_of_4", "worst_of_4")
METHODS = ("optimal", "dpo", "qrpo_log", "rebel", "identity")


class PartialView:
    """Policies that see a share of the reward, on grids of the feature and the reward."""

    def __init__(self, share: float, procedure: Procedure) -> None:
        self.procedure = procedure
        mass = stats.norm.pdf(GRID)
        self.q = mass / mass.sum()
        centre, spread = np.sqrt(share) * GRID, np.sqrt(1 - share)
        edges = (GRID[1:] + GRID[:-1]) / 2  # between rewards, so that r2 = 1 is s itself
        if share == 1:
            self.below = (GRID[None, :] < edges[:, None]).astype(float)
        else:
            self.below = stats.norm.cdf((edges[:, None] - centre[None, :]) / spread)
        # P(z in cell | s), cells down, s across
        self.conditional = np.diff(self.below, axis=0, prepend=0.0, append=1.0)
        self.served = procedure.distortion(self._edges(self.q))

    def _edges(self, p: FloatArray) -> FloatArray:
        return np.concatenate(([0.0], np.clip(self.below @ p, 0, 1), [1.0]))

    def win_rate(self, p: FloatArray) -> float:
        """Return the rate at which the served draw beats the reference's, ties one half."""
        mine = np.diff(self.procedure.distortion(self._edges(p)))
        return float(mine @ (self.served[1:] + self.served[:-1]) / 2)

    def kl(self, p: FloatArray) -> float:
        """Return the KL from the reference policy in nats."""
        return float(special.rel_entr(p, self.q).sum())

    def tilted(self, log_ratio: FloatArray, scale: float = 1.0) -> FloatArray:
        """Return the policy proportional to the reference's times exp(scale x log-ratio)."""
        logs = np.log(self.q) + scale * log_ratio
        return special.softmax(logs)

    def paying(self, log_ratio: FloatArray, kl: float) -> FloatArray | None:
        """Return the tilted policy of a given KL; None where no scale pays it."""
        centred = log_ratio - self.q @ log_ratio
        unit = centred / np.sqrt(self.q @ np.square(centred))
        if self.kl(self.tilted(unit, _STEEPEST)) < kl:  # flat on top
            return None
        scale = optimize.brentq(lambda c: self.kl(self.tilted(unit, c)) - kl, 0.0, _STEEPEST)
        return self.tilted(unit, scale)

    def best(self, fits: list[FloatArray], kl: float) -> float:
        """Return the largest win rate that one of the log-ratios reaches at a KL."""
        policies = [self.paying(fit, kl) for fit in fits]
        return max(self.win_rate(p) for p in policies if p is not None)

    def seen(self, targets: FloatArray) -> FloatArray:
        """Return E[target | s], the targets one a cell of the reward."""
        return targets @ self.conditional

    def bound(self, kl: float) -> float:
        """Return the largest win rate of a KL: linearise, solve on the KL ball, search the line."""
        p = self.paying(GRID, kl)
        rate = self.win_rate(p)
        rise = (self.served[2:] - self.served[:-2]) / 2
        for _ in range(200):
            slope = self.procedure.density(self._edges(p)[1:-1])
            corner = self.paying(-(slope * rise) @ self.below, kl)
            if corner is None:
                break
            step = functools.partial(self._between, p, corner)
            found = optimize.minimize_scalar(step, bounds=(0, 1), method="bounded")
            if -found.fun - rate < 1e-9:
                break
            p, rate = (1 - found.x) * p + found.x * corner, float(-found.fun)
        return rate

    def _between(self, p: FloatArray, corner: FloatArray, share: float) -> float:
        return -self.win_rate((1 - share) * p + share * corner)


def population_fits(method: str, view: PartialView) -> list[FloatArray]:
    """Return the log-ratios a method's fit tends to, up to a scale: one for each of its budgets."""
    edges = (GRID[1:] + GRID[:-1]) / 2
    cdf = np.concatenate(([0.0], stats.norm.cdf(edges), [1.0]))
    u = (cdf[1:] + cdf[:-1]) / 2
    if method == "optimal":
        betas = [match_kl("optimal", view.procedure, budget) for budget in BUDGETS]
        solved = [optimal_policy(view.procedure, beta) for beta in betas]
        return [view.seen(policy.log_density(u)) for policy in solved]
    if method == "dpo":  # the log-odds of s among the best and among the worst of K draws
        chosen, rejected = view.seen(u ** (DRAWS - 1)), view.seen((1 - u) ** (DRAWS - 1))
        tiny = np.finfo(float).tiny
        return [np.log(chosen + tiny) - np.log(rejected + tiny)]
    targets = {"qrpo_log": np.log(u), "rebel": GRID, "identity": u}[method]
    return [view.seen(targets)]


def rates(name: str, share: float, kl: float) -> dict[str, object]:
    """Return a row: win rates of the bound and of every method at a share and a KL."""
    view = PartialView(share, parse_procedure(name))
    row: dict[str, object] = {"procedure": name, "kl": kl, "share_seen": share}
    row["bound"] = round(view.bound(kl), 4)
    for method in METHODS:
        row[method] = round(view.best(population_fits(method, view), kl), 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kl", type=float, default=1.0)
    args = parser.parse_args()
    rows = [rates(name, share, args.kl) for name in PROCEDURES for share in SHARES]
    append_rows("partial_fit", rows)
    print(table(list(rows[0]), [[str(v) for v in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
