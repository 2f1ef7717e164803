"""Calibrated rewards from few draws: a prompt's CDF shrunk toward the one all prompts share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_LARGEST_STRENGTH = 1e4
_DIGITS = 9  # of standardised rewards
_PAIRS = 64  # left-out pairs of draws that the shrinkage is estimated from


@dataclass(frozen=True)
class Population:
    r"""Location and scale of prompts' rewards, and how they vary between prompts.

    .. math:: r_{ij} = \mu_i + \sigma_i z_{ij}, \qquad \mu_i \sim (\mu_0, \tau^2), \qquad
              \sigma_i^2 \approx \sigma_0^2 \text{ with } \nu_0 \text{ degrees of freedom}

    Parameters
    ----------
    mean, between : float
        Mean mu_0 and variance tau^2 of the prompts' means.
    within : float
        Mean variance sigma_0^2 within a prompt.
    degrees : float
        Weight nu_0 of sigma_0^2 against a prompt's own variance, in draws.
    """

    mean: float
    between: float
    within: float
    degrees: float

    def predict(
        self, count: NDArray[np.int64], total: FloatArray, squares: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return location and scale of a further draw, given count, sum and sum of squares.

        Parameters
        ----------
        count, total, squares : ndarray
            Of the known draws of each prompt; count may be 0.

        Returns
        -------
        location, scale : ndarray
            Posterior mean of mu, and the root of sigma^2 plus the posterior variance of mu.
        """
        n = np.maximum(count, 1)
        spread = np.maximum(squares - total**2 / n, 0.0)
        own = np.maximum(count - 1, 0)
        variance = (self.degrees * self.within + spread) / (self.degrees + own)
        kept = self.between / np.maximum(self.between + variance / n, 1e-300) * (count > 0)
        location = self.mean + kept * (total / n - self.mean)
        scale = np.sqrt(variance + self.between * (1 - kept))
        return location, np.where(scale > 0, scale, 1.0)


def estimate_population(rewards: FloatArray) -> Population:
    """Estimate a population by moments from draws, NaN where a prompt has fewer.

    Parameters
    ----------
    rewards : (n_prompts, k) ndarray
        Rewards of reference draws.

    Returns
    -------
    Population
        Moments.
    """
    count, total, squares = moments(rewards)
    some, several = count > 0, count > 1
    means = total[some] / count[some]
    own = count[several] - 1
    spread = np.maximum(squares[several] - total[several] ** 2 / count[several], 0.0)
    within = float(spread.sum() / own.sum()) if several.any() else float(means.var())
    between = (
        float(means.var(ddof=1) - within * (1 / count[some]).mean()) if len(means) > 1 else 0.0
    )
    degrees = _LARGEST_STRENGTH
    if within > 0 and several.any():
        # the relative variance of a sample variance is 2/own, and more where scales differ
        relative = float(np.average((spread / own / within - 1) ** 2, weights=own))
        excess = relative - float(np.average(2 / own, weights=own))
        degrees = float(np.clip(2 / max(excess, 1e-9) + 4, 1.0, _LARGEST_STRENGTH))
    return Population(float(means.mean()), max(between, 0.0), within, degrees)


def leave_one_out_residuals(rewards: FloatArray, population: Population) -> FloatArray:
    """Return each draw's distance from what the prompt's other draws predict, sorted, in scales.

    Parameters
    ----------
    rewards : (n_prompts, k) ndarray
        Rewards, NaN where there is none.
    population : Population
        Moments.

    Returns
    -------
    (n_draws,) ndarray
        Sorted residuals: their distribution is the CDF that all prompts share.
    """
    location, scale = leave_out(rewards, population)
    residuals = (rewards - location) / scale
    return np.sort(residuals[np.isfinite(rewards)])


def pooled_cdf(
    rewards: FloatArray, location: FloatArray, scale: FloatArray, residuals: FloatArray
) -> FloatArray:
    """Return the mid-rank of standardised rewards among the shared residuals, in (0, 1).

    Parameters
    ----------
    rewards, location, scale : ndarray
        Of one shape.
    residuals : (n,) ndarray
        Sorted.

    Returns
    -------
    ndarray
        Never 0 or 1: a half draw is added on each side. Linear between the mid-ranks of residuals.
    """
    # interpolated between rounded values, so that rounding decides no tie
    levels, counts = np.unique(np.round(residuals, _DIGITS), return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    places = np.concatenate(([levels[0] - 1], levels, [levels[-1] + 1]))
    ranks = np.concatenate(([0.0], middle, [counts.sum()]))
    standard = np.round((rewards - location) / scale, _DIGITS)
    return np.asarray((np.interp(standard, places, ranks) + 0.5) / (counts.sum() + 1))


def estimate_strength(
    rewards: FloatArray, population: Population, residuals: FloatArray, seed: int = 0
) -> float:
    r"""Choose how many draws the shared CDF is worth, by prediction of left-out comparisons.

    For two draws y, z of one prompt, :math:`\mathbf 1[r_z < r_y]` is an unbiased observation of
    y's calibrated reward. The mixture of the other draws' CDF with weight k and the shared one with
    weight alpha is chosen to predict it with least squared error.

    Parameters
    ----------
    rewards : (n_prompts, k) ndarray
        Rewards, NaN where there is none.
    population : Population
        Moments.
    residuals : (n,) ndarray
        From :func:`leave_one_out_residuals`.
    seed : int
        Of the pairs of draws that are left out.

    Returns
    -------
    float
        alpha >= 0; where no prompt has three draws, 4.
    """
    k = rewards.shape[1]
    if k < 3 or not (np.isfinite(rewards).sum(axis=1) >= 3).any():
        return 4.0
    generator = np.random.default_rng(seed)
    ordered = [(y, z) for y in range(k) for z in range(k) if y != z]
    chosen = generator.permutation(len(ordered))[:_PAIRS]
    parts = [_comparison(rewards, ordered[i], population, residuals) for i in chosen]
    count, own, shared, seen = (np.concatenate(p) for p in zip(*parts, strict=True))

    def loss(alpha: float) -> float:
        weight = alpha / (count + alpha)
        return float(np.mean((own + weight * (shared - own) - seen) ** 2))

    grid = np.concatenate(([0.0], np.geomspace(0.05, _LARGEST_STRENGTH, 61)))
    return float(min(grid, key=loss))


def _comparison(
    rewards: FloatArray, pair: tuple[int, int], population: Population, residuals: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Predict draw y's comparison with draw z from the others of each prompt that has three."""
    y, z = pair
    usable = np.isfinite(rewards[:, [y, z]]).all(axis=1) & (np.isfinite(rewards).sum(axis=1) >= 3)
    rows = rewards[usable]
    mine, theirs = rows[:, y], rows[:, z]
    others = np.delete(rows, [y, z], axis=1)
    count, total, squares = moments(others)
    location, scale = population.predict(count, total, squares)
    own = midranks(mine[:, None], others)[:, 0]
    shared = pooled_cdf(mine, location, scale, residuals)
    seen = (theirs < mine) + 0.5 * (theirs == mine)
    return count.astype(np.float64), own, shared, seen


def midranks(rewards: FloatArray, reference: FloatArray) -> FloatArray:
    """Return mid-ranks in [0, 1] among each row's draws, NaN ones left out; 1/2 without draws."""
    below = (reference[:, None, :] < rewards[:, :, None]).sum(axis=2)
    tied = (reference[:, None, :] == rewards[:, :, None]).sum(axis=2)
    count = np.isfinite(reference).sum(axis=1)[:, None]
    return np.where(count > 0, (below + tied / 2) / np.maximum(count, 1), 0.5)


def moments(rewards: FloatArray) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """Return count, sum and sum of squares of each row's finite entries."""
    known = np.isfinite(rewards)
    clean = np.where(known, rewards, 0.0)
    return known.sum(axis=1), clean.sum(axis=1), (clean**2).sum(axis=1)


def leave_out(rewards: FloatArray, population: Population) -> tuple[FloatArray, FloatArray]:
    """Return location and scale predicted for each draw from the prompt's other draws."""
    count, total, squares = moments(rewards)
    clean = np.where(np.isfinite(rewards), rewards, 0.0)
    known = np.isfinite(rewards)
    rest = count[:, None] - known, total[:, None] - clean, squares[:, None] - clean**2
    return population.predict(*rest)
