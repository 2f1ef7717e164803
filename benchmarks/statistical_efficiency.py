"""How much data does a transformation need, before its better shape pays? A model without a model.

    python benchmarks/statistical_efficiency.py [--repeats 5]

Responses are standard normal vectors; the reward is one coordinate plus a part that no feature
shows, so that ranks, targets and optimum are exact. A policy is a ridge regression of log-ratios
on the coordinates and random Fourier features, fitted to the targets of `n` prompts with 16 draws
each, its penalty chosen on validation prompts, then scaled to the KL at which all are compared;
KL and win rate are exact up to 40,000 fresh responses. The efficiency printed is the squared
correlation of the targets with the normal scores of the ranks: the share of the prompts that
counts while only the direction is being learned.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from recording import append_rows
from scipy import optimize, stats

from ctrl_dpo import match_kl
from ctrl_dpo.measures.tables import table
from ctrl_dpo.theory.policies import frontier
from ctrl_dpo.theory.procedures import parse_procedure
from ctrl_dpo.theory.rank_targets import match_rank_kl, rank_targets
from ctrl_dpo.transform import parse_transformation, transformed_rewards

FloatArray = NDArray[np.float64]

DRAWS, DIMENSION, FEATURES, FRESH = 16, 24, 200, 40_000
PENALTIES = np.geomspace(1e-1, 1e5, 13)
KL, BUDGET = 0.5, 0.5
PROCEDURES = ("best_of_4", "worst_of_4")
METHODS = ("optimal", "exponential", "identity", "normal_quantile", "log", "best_worst")


def targets_by_rank(method: str, procedure: str, budget: float = BUDGET) -> FloatArray:
    """Return the target log-ratio of each rank; only differences matter."""
    if method == "best_worst":
        return np.eye(DRAWS)[-1] - np.eye(DRAWS)[0]
    if method == "optimal":
        return rank_targets(procedure, DRAWS, match_rank_kl(procedure, DRAWS, budget)).values
    rate = 10 if procedure.startswith("best") else -10
    name = f"exponential:{rate}" if method == "exponential" else method
    transformation = parse_transformation(name)
    beta = match_kl(transformation, procedure, budget)
    ranks, alone = np.arange(DRAWS), np.ones(DRAWS, dtype=np.int64)
    return transformed_rewards(transformation, ranks, alone, DRAWS, True, "posterior") / beta


def efficiency(targets: FloatArray) -> float:
    """Return the squared correlation of targets with the expected normal scores of the ranks."""
    levels = (np.arange(DRAWS) + 1 - 0.375) / (DRAWS + 0.25)  # Blom (1958)
    return float(np.corrcoef(targets, stats.norm.ppf(levels))[0, 1] ** 2)


class World:
    """Responses, their features and rewards."""

    def __init__(self, hidden: float, rng: np.random.Generator) -> None:
        self.hidden, self.rng = hidden, rng
        self.frequencies = rng.normal(size=(DIMENSION, FEATURES)) / np.sqrt(DIMENSION)
        self.phases = rng.uniform(0, 2 * np.pi, size=FEATURES)

    def draw(self, n: int) -> tuple[FloatArray, FloatArray]:
        """Return features and rewards of n responses."""
        x = self.rng.normal(size=(n, DIMENSION))
        waves = np.sqrt(2) * np.cos(x @ self.frequencies + self.phases)
        noise = np.sqrt(self.hidden) * self.rng.normal(size=n)
        return np.hstack([x, waves]), np.sqrt(1 - self.hidden) * x[:, 0] + noise

    def groups(self, n: int, targets: FloatArray, pair: bool) -> tuple[FloatArray, FloatArray]:
        """Return features and targets of n groups, centred in each: the contrastive regression."""
        features, rewards = self.draw(n * DRAWS)
        order = rewards.reshape(n, DRAWS).argsort(axis=1)
        sorted_features = np.take_along_axis(
            features.reshape(n, DRAWS, -1), order[..., None], axis=1
        )
        labels = np.broadcast_to(targets, (n, DRAWS))
        if pair:
            sorted_features, labels = sorted_features[:, [0, -1]], labels[:, [0, -1]]
        centred = sorted_features - sorted_features.mean(axis=1, keepdims=True)
        labels = labels - labels.mean(axis=1, keepdims=True)
        return centred.reshape(-1, features.shape[1]), labels.ravel()


def fitted(world: World, n: int, targets: FloatArray, pair: bool) -> FloatArray:
    """Return the weights of the ridge regression whose penalty predicts other prompts best."""
    features, labels = world.groups(n, targets, pair)
    others, truth = world.groups(max(64, n // 4), targets, pair)
    values, vectors = np.linalg.eigh(features.T @ features)
    projected = vectors.T @ (features.T @ labels)
    found = [vectors @ (projected / (np.maximum(values, 0) + p)) for p in PENALTIES]
    return min(found, key=lambda w: float(np.square(others @ w - truth).mean()))


def measured(logratios: FloatArray, rewards: FloatArray, procedure: str) -> float:
    """Return the win rate of reference responses weighted to a KL of ``KL``."""
    unit = (logratios - logratios.mean()) / max(float(logratios.std()), 1e-12)

    def weights(scale: float) -> FloatArray:
        raw = np.exp(scale * unit - np.max(scale * unit))
        return raw / raw.sum()

    def kl(scale: float) -> float:
        p = weights(scale)
        return float(p @ np.log(np.maximum(p * p.size, 1e-300)))

    policy = weights(optimize.brentq(lambda s: kl(s) - KL, 0.0, 20.0))
    order = rewards.argsort()
    served = parse_procedure(procedure)
    below = np.minimum(np.concatenate(([0.0], np.cumsum(policy[order]))), 1.0)  # rounding
    mine = np.diff(served.distortion(below))
    theirs = served.distortion(np.arange(rewards.size + 1) / rewards.size)
    return float(mine @ (theirs[1:] + theirs[:-1]) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 256, 1024, 4096])
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for hidden, procedure in itertools.product((0.0, 0.5), PROCEDURES):
        (best,) = frontier(procedure, ["optimal"], [KL])
        for method in METHODS:
            targets = targets_by_rank(method, procedure)
            row: dict[str, Any] = {
                "procedure": procedure,
                "hidden_share": hidden,
                "method": method,
                "kl": KL,
                "repeats": args.repeats,
                "efficiency": round(efficiency(targets), 3),
                "optimum": round(best.win_rate, 4),
            }
            for n in args.prompts:
                rates = []
                for repeat in range(args.repeats):
                    world = World(hidden, np.random.default_rng([repeat, n]))
                    weights = fitted(world, n, targets, method == "best_worst")
                    features, rewards = world.draw(FRESH)
                    rates.append(measured(features @ weights, rewards, procedure))
                row[f"win_rate_{n}"] = round(float(np.mean(rates)), 4)
                row[f"error_{n}"] = round(float(stats.sem(rates)), 4)
            rows.append(row)
            print(row, flush=True)
    shown = ["procedure", "hidden_share", "method", "efficiency", "optimum"]
    shown += [f"win_rate_{n}" for n in args.prompts]
    print(table(shown, [[str(row[key]) for key in shown] for row in rows]))
    append_rows("statistical_efficiency", rows)


if __name__ == "__main__":
    main()
