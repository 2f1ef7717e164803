"""How well calibrated rewards are estimated, per method and number of reference draws.

Simulated rewards with known truth: the mean squared error of the calibrated reward of held-out
reference draws, and the distance of their calibrated rewards from uniform. ``empirical`` and
``pooled`` calibrate by draws of the reference policy, ``weighted`` by those of a policy that
prefers high rewards (a response of calibrated reward u is e^(2u) times as likely, but for a
constant), and ``unweighted`` is what these would give without their weights. Scored draws have no
known truth: theirs is the rank among the prompt's other held-out draws, less its variance.
Usage: python benchmarks/calibration_error.py [SCORED_DRAWS_FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import numpy as np
from recording import append_rows
from scipy import stats

from ctrl_dpo import RewardCalibrator
from ctrl_dpo.data.folders import read_rows
from ctrl_dpo.evaluate import calibration_error

DRAWS = (2, 4, 8, 16, 32, 64)
PROMPTS, NEW, REPEATS = 500, 8, 5
SIMULATED = ("empirical", "pooled", "weighted", "unweighted")
TILT = 2.0  # of the other policy: its density on the calibrated scale is proportional to e^(2u)
NUMBERS = ("mse", "kolmogorov_smirnov", "cramer_von_mises", "mean_absolute_deviation")


def gaussian(rng: np.random.Generator, n: int) -> tuple[Callable, Callable]:
    """Rewards of prompts whose means differ as much as their draws."""
    return _located(rng, n, stats.norm())


def heavy_tailed(rng: np.random.Generator, n: int) -> tuple[Callable, Callable]:
    """Student's t with 3 degrees of freedom."""
    return _located(rng, n, stats.t(3))


def bimodal(rng: np.random.Generator, n: int) -> tuple[Callable, Callable]:
    """Good and bad responses, in shares that differ between prompts."""
    centre, share = rng.normal(size=(n, 1)), rng.beta(2, 2, size=(n, 1))

    def draw(k: int) -> np.ndarray:
        good = rng.random((n, k)) < share
        return centre + np.where(good, 2.0, -2.0) + 0.7 * rng.normal(size=(n, k))

    def cdf(r: np.ndarray) -> np.ndarray:
        z = (r - centre) / 0.7
        return share * stats.norm.cdf(z - 2 / 0.7) + (1 - share) * stats.norm.cdf(z + 2 / 0.7)

    return draw, cdf


def discrete(rng: np.random.Generator, n: int) -> tuple[Callable, Callable]:
    """Ratings from 1 to 5 around a quality that differs between prompts."""
    quality = rng.beta(2, 2, size=(n, 1))

    def draw(k: int) -> np.ndarray:
        return 1.0 + rng.binomial(4, np.broadcast_to(quality, (n, k)))

    def cdf(r: np.ndarray) -> np.ndarray:
        law = stats.binom(4, quality)
        return law.cdf(r - 1) - 0.5 * law.pmf(r - 1)

    return draw, cdf


def _located(rng: np.random.Generator, n: int, law: object) -> tuple[Callable, Callable]:
    centre, scale = rng.normal(size=(n, 1)), np.exp(0.3 * rng.normal(size=(n, 1)))

    def draw(k: int) -> np.ndarray:
        return centre + scale * law.rvs((n, k), random_state=rng)  # type: ignore[attr-defined]

    return draw, lambda r: law.cdf((r - centre) / scale)  # type: ignore[attr-defined]


def tilted(draw: Callable, cdf: Callable, rng: np.random.Generator, k: int) -> tuple:
    """Draw from the other policy by rejection; return rewards and log-weights up to a constant."""
    made = draw(k)
    accepted = np.zeros(made.shape, dtype=bool)
    while not accepted.all():
        proposed = draw(k)
        taken = ~accepted & (rng.random(made.shape) < np.exp(TILT * (cdf(proposed) - 1)))
        made, accepted = np.where(taken, proposed, made), accepted | taken
    return made, -TILT * cdf(made)


def simulate() -> list[dict[str, object]]:
    """Return one row per distribution, number of draws and method."""
    rows = []
    for law in (gaussian, heavy_tailed, bimodal, discrete):
        for k in DRAWS:
            found: dict[str, list[tuple[float, ...]]] = {method: [] for method in SIMULATED}
            for seed in range(REPEATS):
                rng = np.random.default_rng(seed)
                draw, cdf = law(rng, PROMPTS)
                reference, new = draw(k), draw(NEW)
                others, log_weights = tilted(draw, cdf, rng, k)
                fitted = {
                    "empirical": RewardCalibrator().fit(reference),
                    "pooled": RewardCalibrator("pooled").fit(reference),
                    "weighted": RewardCalibrator("weighted", 0.5).fit(others, log_weights),
                    "unweighted": RewardCalibrator().fit(others),
                }
                for method, calibrator in fitted.items():
                    made = calibrator.transform(new)
                    found[method].append(_numbers(made, float(np.mean((made - cdf(new)) ** 2))))
            for method, errors in found.items():
                mean, spread = np.mean(errors, axis=0), np.std(errors, axis=0)
                rows.append(_row(law.__name__, k, method, mean, spread[0]))
    return rows


def measure(folder: str) -> list[dict[str, object]]:
    """Return the same for scored draws, over random splits of every prompt's draws in halves."""
    scored, rows = np.array(read_rows(folder)["rewards"]), []
    half = scored.shape[1] // 2
    for k in (k for k in DRAWS if k <= half):
        found: dict[str, list[tuple[float, ...]]] = {"empirical": [], "pooled": []}
        for seed in range(REPEATS):
            shuffled = np.random.default_rng(seed).permuted(scored, axis=1)
            new = shuffled[:, half:]
            # an unbiased estimate of the truth, whose variance is that of a mean of half - 1 draws
            rank = RewardCalibrator().fit(new).transform(new, inside=True)
            noise = float(np.mean(rank * (1 - rank)) / (half - 2))
            for method, errors in found.items():
                made = RewardCalibrator(method).fit(shuffled[:, :k]).transform(new)
                errors.append(_numbers(made, float(np.mean((made - rank) ** 2)) - noise))
        for method, errors in found.items():
            mean, spread = np.mean(errors, axis=0), np.std(errors, axis=0)
            rows.append(_row("scored draws", k, method, mean, spread[0]))
    return rows


def _numbers(calibrated: np.ndarray, mse: float) -> tuple[float, ...]:
    distance = calibration_error(calibrated)
    return mse, *(getattr(distance, name) for name in NUMBERS[1:])


def _row(law: str, k: int, method: str, numbers: Iterable[float], spread: float) -> dict:
    row = {"rewards": law, "k": k, "method": method, "mse_spread": round(spread, 5)}
    return row | {name: round(float(x), 5) for name, x in zip(NUMBERS, numbers, strict=True)}


def main() -> None:
    """Print a table and append it to the results."""
    rows = simulate()
    for folder in sys.argv[1:2]:
        rows += measure(folder)
    print("| rewards | draws | method | MSE | (spread) | KS | CvM | mean abs. deviation |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["rewards"], row["k"], row["method"], row["mse"], row["mse_spread"]]
        print("| " + " | ".join(map(str, cells + [row[name] for name in NUMBERS[1:]])) + " |")
    append_rows("calibration_by_method", rows)


if __name__ == "__main__":
    main()
