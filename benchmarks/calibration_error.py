"""How well calibrated rewards are estimated, per method and number of reference draws.

Simulated rewards with known truth: the mean squared error of the calibrated reward of new
responses, and the distance of calibrated held-out draws from uniform.
Usage: python benchmarks/calibration_error.py [SCORED_DRAWS_FOLDER]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from recording import append_rows
from scipy import stats

from ctrl_dpo import RewardCalibrator
from ctrl_dpo.data.folders import read_rows
from ctrl_dpo.evaluate import calibration_error

DRAWS = (2, 4, 8, 16, 32, 64)
PROMPTS, NEW, REPEATS = 500, 8, 5


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


def simulate() -> list[dict[str, object]]:
    """Return one row per distribution, number of draws and method."""
    rows = []
    for law in (gaussian, heavy_tailed, bimodal, discrete):
        for k in DRAWS:
            found: dict[str, list[tuple[float, float, float]]] = {"empirical": [], "pooled": []}
            for seed in range(REPEATS):
                draw, cdf = law(np.random.default_rng(seed), PROMPTS)
                reference, new = draw(k), draw(NEW)
                for method, errors in found.items():
                    made = RewardCalibrator(method).fit(reference).transform(new)
                    distance = calibration_error(made)
                    mse = float(np.mean((made - cdf(new)) ** 2))
                    errors.append((mse, distance.kolmogorov_smirnov, distance.cramer_von_mises))
            for method, errors in found.items():
                mean, spread = np.mean(errors, axis=0), np.std(errors, axis=0)
                rows.append(_row(law.__name__, k, method, mean, spread[0]))
    return rows


def measure(folder: str) -> list[dict[str, object]]:
    """Return the same for scored draws, the truth being the ranks among the other draws."""
    scored = np.array(read_rows(folder)["rewards"])
    half, rows = scored.shape[1] // 2, []
    new, truth = scored[:, half:], RewardCalibrator().fit(scored[:, half:])
    exact = truth.transform(new, inside=True)
    for k in (k for k in DRAWS if k <= half):
        for method in ("empirical", "pooled"):
            made = RewardCalibrator(method).fit(scored[:, :k]).transform(new)
            distance = calibration_error(made)
            numbers = (
                float(np.mean((made - exact) ** 2)),
                distance.kolmogorov_smirnov,
                distance.cramer_von_mises,
            )
            rows.append(_row("scored draws", k, method, numbers, 0.0))
    return rows


def _row(law: str, k: int, method: str, numbers: object, spread: float) -> dict[str, object]:
    mse, ks, cvm = (round(float(x), 5) for x in numbers)  # type: ignore[attr-defined]
    row = {"rewards": law, "k": k, "method": method, "mse": mse, "mse_spread": round(spread, 5)}
    return row | {"kolmogorov_smirnov": ks, "cramer_von_mises": cvm}


def main() -> None:
    """Print a table and append it to the results."""
    rows = simulate()
    for folder in sys.argv[1:2]:
        rows += measure(folder)
    print("| rewards | draws | empirical | pooled | KS empirical | KS pooled |")
    print("|---|---|---|---|---|---|")
    for a, b in zip(rows[::2], rows[1::2], strict=True):
        cells = [a["rewards"], a["k"], a["mse"], b["mse"]]
        cells += [a["kolmogorov_smirnov"], b["kolmogorov_smirnov"]]
        print("| " + " | ".join(map(str, cells)) + " |")
    append_rows("calibration_error", rows)


if __name__ == "__main__":
    main()
