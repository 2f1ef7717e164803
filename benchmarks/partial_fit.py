"""What is left of a method's advantage when a policy sees only a part of the reward? A model of it.

    python benchmarks/partial_fit.py

A response has a reward z and a feature s, standard normal under the reference policy and with
correlation sqrt(r2); a policy can reweight responses by s alone, as one that has learned a share
r2 of the reward. `bound` is the best reweighting of a KL of 1 nat. For best-of-N it is global (the
win rate is concave in the policy); for worst-of-N, where it is convex, it is a stationary point,
at r2 = 1 the proved optimum. Each method is what its loss tends to with ever more prompts of 16
draws, times the number at which it pays the KL: `kept` says whether all draws are trained on or the
two best and the two worst; DPO takes the best against the worst, QRPO regresses each response
alone. Nothing is sampled: sums over grids of s and z, joint laws of order statistics.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from numpy.typing import NDArray
from recording import append_rows
from scipy import optimize, special, stats
from statistical_efficiency import DRAWS, targets_by_rank

from ctrl_dpo.measures.tables import table
from ctrl_dpo.theory.procedures import OrderStatistic, Procedure, parse_procedure

FloatArray = NDArray[np.float64]
Targets = dict[int, FloatArray | float]  # by rank from below, as functions of the reward

KL = 1.0
EVERYTHING = tuple(range(1, DRAWS + 1))
EXTREMES = (1, 2, 15, 16)  # ranks, from below, of the draws that are kept
BUDGETS = (0.1, 0.25, 0.5, 1.0, 2.0)  # nats the optimum's targets are made for
GRID = np.linspace(-7, 7, 701)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PROCEDURES = ("best_of_4", "worst_of_4")
METHODS = ("optimal", "dpo", "qrpo_log", "rebel")
_STEEPEST = 1e4  # exponent of a standard deviation
_RIDGE = 1e-12


class PartialView:
    """Policies that see a share of the reward, on grids of the feature and the reward."""

    def __init__(self, share: float, procedure: Procedure) -> None:
        self.procedure = procedure
        mass = stats.norm.pdf(GRID)
        self.q = mass / mass.sum()
        edges = (GRID[1:] + GRID[:-1]) / 2
        if share == 1:
            self.below = (GRID[None, :] < edges[:, None]).astype(float)
        else:
            centre = np.sqrt(share) * GRID[None, :]
            self.below = stats.norm.cdf((edges[:, None] - centre) / np.sqrt(1 - share))
        # P(reward in cell | s), cells down, s across
        rewards = np.diff(self.below, axis=0, prepend=0.0, append=1.0)
        self.cdf = self._edges(self.q)
        own = np.maximum(np.diff(self.cdf), np.finfo(float).tiny)
        self.features = rewards * self.q / own[:, None]  # P(s | reward in cell)
        self.served = procedure.distortion(self.cdf)

    def _edges(self, p: FloatArray) -> FloatArray:
        return np.concatenate(([0.0], np.clip(self.below @ p, 0, 1), [1.0]))

    def win_rate(self, p: FloatArray) -> float:
        """Return the rate at which the served draw beats the reference's, ties one half."""
        mine = np.diff(self.procedure.distortion(self._edges(p)))
        return float(mine @ (self.served[1:] + self.served[:-1]) / 2)

    def kl(self, p: FloatArray) -> float:
        """Return the KL from the reference policy in nats."""
        return float(special.rel_entr(p, self.q).sum())

    def paying(self, log_ratio: FloatArray, kl: float) -> FloatArray:
        """Return the reference times exp(c log-ratio) that pays the KL, or is the steepest."""
        centred = log_ratio - self.q @ log_ratio
        unit = centred / np.sqrt(self.q @ np.square(centred))

        def tilted(scale: float) -> FloatArray:
            return special.softmax(np.log(self.q) + scale * unit)

        if self.kl(tilted(_STEEPEST)) < kl:  # flat on top
            return tilted(_STEEPEST)
        return tilted(optimize.brentq(lambda c: self.kl(tilted(c)) - kl, 0.0, _STEEPEST))

    def best(self, fits: list[FloatArray], kl: float) -> float:
        """Return the largest win rate that one of the log-ratios reaches within a KL."""
        return self.win_rate(self.paying(self.best_fit(fits, kl), kl))

    def best_fit(self, fits: list[FloatArray], kl: float) -> FloatArray:
        """Return the log-ratio that wins most within a KL."""
        return max(fits, key=lambda fit: self.win_rate(self.paying(fit, kl)))

    def bound(self, kl: float, start: FloatArray = GRID) -> float:
        """Return the largest win rate of a KL: linearise, solve on the KL ball, search the line."""
        p = self.paying(start, kl)
        rate = self.win_rate(p)
        rise = (self.served[2:] - self.served[:-2]) / 2
        for _ in range(500):
            slope = self.procedure.density(self._edges(p)[1:-1])
            corner = self.paying(-(slope * rise) @ self.below, kl)
            step = functools.partial(self._between, p, corner)
            found = optimize.minimize_scalar(step, bounds=(0, 1), method="bounded")
            if -found.fun - rate < 1e-9:
                break
            p, rate = (1 - found.x) * p + found.x * corner, float(-found.fun)
        return rate

    def _between(self, p: FloatArray, corner: FloatArray, share: float) -> float:
        return -self.win_rate((1 - share) * p + share * corner)


def order_statistic(view: PartialView, rank: int) -> FloatArray:
    """Return the law of a rank's reward among the draws, on the cells."""
    return np.diff(OrderStatistic(DRAWS - rank + 1, DRAWS).distortion(view.cdf))


def joint(view: PartialView, low: int, high: int) -> FloatArray:
    """Return the joint law of two ranks' rewards, the lower down and the higher across."""
    own, u = np.diff(view.cdf), (view.cdf[1:] + view.cdf[:-1]) / 2
    gap = np.maximum(u[None, :] - u[:, None], 0.0)
    between = gap ** (high - low - 1) if high - low > 1 else (gap > 0) + np.eye(len(u)) / 2
    law = np.outer(own * u ** (low - 1), own * (1 - u) ** (DRAWS - high)) * between
    return np.asarray(law / law.sum())


@functools.cache
def targets(method: str, procedure: Procedure) -> list[Targets]:
    """Return the targets of a method, one set a budget."""
    if method == "rebel":
        return [dict.fromkeys(EVERYTHING, GRID)]
    # the budget only scales the logarithm
    name, budgets = ("log", (KL,)) if method == "qrpo_log" else (method, BUDGETS)
    found = [targets_by_rank(name, str(procedure), budget) for budget in budgets]
    return [dict(zip(EVERYTHING, values, strict=True)) for values in found]


def pointwise(view: PartialView, wanted: list[Targets], kept: tuple[int, ...]) -> list[FloatArray]:
    """Return E[target | s] over the kept draws."""
    laws = {rank: order_statistic(view, rank) for rank in kept}
    mass = sum(laws.values()) @ view.features + _RIDGE
    return [sum(laws[r] * each[r] for r in kept) @ view.features / mass for each in wanted]


def centred(view: PartialView, wanted: list[Targets], kept: tuple[int, ...]) -> list[FloatArray]:
    """Return the minimisers of the squared error within groups of the kept draws."""
    others = np.zeros((len(GRID), len(GRID)))  # joint law of s of two of the kept, either order
    right = np.zeros((len(wanted), len(GRID)))
    flat = np.ones(len(GRID))
    for low, high in itertools.combinations(kept, 2):
        law = joint(view, low, high)
        seen = view.features.T @ law @ view.features
        others += seen + seen.T
        for this, mine, that in ((law, low, high), (law.T, high, low)):
            pulls = [this.sum(axis=1) * each[mine] - this @ (each[that] * flat) for each in wanted]
            right += np.array(pulls) @ view.features
    system = np.diag(others.sum(axis=1) + _RIDGE) - others
    return list(np.linalg.lstsq(system, right.T, rcond=None)[0].T)


def bradley_terry(view: PartialView) -> FloatArray:
    """Return the minimiser of DPO's loss on the best against the worst draw, by Newton's method."""
    law = view.features.T @ joint(view, 1, DRAWS) @ view.features  # rejected down, chosen across
    tiny = np.finfo(float).tiny
    # exact if best and worst were independent; what is left far out, where neither is ever seen
    fit = np.log(law.sum(axis=0) + tiny) - np.log(law.sum(axis=1) + tiny)
    for _ in range(100):
        chance = special.expit(fit[:, None] - fit[None, :])  # that the rejected one is preferred
        pull = law * chance
        gradient = pull.sum(axis=0) - pull.sum(axis=1)
        bent = pull * (1 - chance)
        bent = bent + bent.T
        hessian = np.diag(bent.sum(axis=1) + _RIDGE) - bent
        step = np.linalg.solve(hessian, gradient)
        fit = fit + step * min(1.0, 5.0 / np.abs(step).max())
        if np.abs(gradient).max() < 1e-12:
            break
    return fit


def population_fits(
    method: str, view: PartialView, kept: tuple[int, ...] = EXTREMES
) -> list[FloatArray]:
    """Return the log-ratios a method's fit tends to, up to a scale: one for each of its budgets."""
    if method == "dpo":
        return [bradley_terry(view)]
    # all draws do not depend on one another: there too the fit is that of every response alone
    alone = method == "qrpo_log" or kept == EVERYTHING
    return (pointwise if alone else centred)(view, targets(method, view.procedure), kept)


def rates(name: str, share: float, kept: tuple[int, ...]) -> dict[str, object]:
    """Return a row: win rates of the bound and of every method."""
    view = PartialView(share, parse_procedure(name))
    few = "2+2" if kept == EXTREMES else str(len(kept))
    row: dict[str, object] = {"procedure": name, "kl": KL, "kept": few, "share_seen": share}
    row["bound"] = round(view.bound(KL), 4)
    for method in METHODS:
        # where all of the reward is seen no pair is ever the other way round: no finite fit
        if (method, share) == ("dpo", 1.0):
            row[method] = ""
        else:
            row[method] = round(view.best(population_fits(method, view, kept), KL), 4)
    return row


def main() -> None:
    grid = itertools.product(PROCEDURES, (EVERYTHING, EXTREMES), SHARES)
    rows = [rates(name, share, kept) for name, kept, share in grid]
    append_rows("partial_fit", rows)
    print(table(list(rows[0]), [[str(v) for v in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
