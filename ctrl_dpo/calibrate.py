"""Rewards -> calibrated rewards: where a response stands among draws of the reference policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrl_dpo._validation import check_choice, check_finite, check_positive
from ctrl_dpo.calibration.padding import padded_rows
from ctrl_dpo.calibration.pooled import (
    Population,
    estimate_population,
    estimate_strength,
    leave_one_out_residuals,
    leave_out,
    midranks,
    moments,
    pooled_cdf,
)
from ctrl_dpo.calibration.ranks import COMPARISONS, count_below_and_tied
from ctrl_dpo.calibration.weighted import (
    effective_sample_size,
    normalised_weights,
    weighted_midranks,
)

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

# of more draws the shared CDF is estimated from a sample of prompts this large: its standard error
# of 0.001 is far below that of any prompt's own CDF
_POOL_DRAWS = 200_000
METHODS = ("empirical", "pooled", "weighted")


def rank_counts(rewards: ArrayLike, reference_rewards: ArrayLike) -> tuple[IntArray, IntArray]:
    r"""Count the reference rewards below and tied with each reward of the same prompt.

    .. math:: b = \sum_{i=1}^{k} \mathbf 1[r(z_i) < r(y)], \qquad
              t = \sum_{i=1}^{k} \mathbf 1[r(z_i) = r(y)]

    Parameters
    ----------
    rewards : (n_prompts, n_responses) array_like
        Finite rewards, any unit: only their order matters.
    reference_rewards : (n_prompts, k) array_like
        Rewards of ``k >= 1`` responses drawn from the reference policy, one row a prompt.

    Returns
    -------
    tuple of (n_prompts, n_responses) ndarray of int
        Counts below and tied; a response that is one of the draws counts itself as tied.

    Notes
    -----
    Cost is O(n_prompts * n_responses * k) time, in blocks of bounded memory.

    Examples
    --------
    >>> below, tied = rank_counts([[0.4, 1.0]], [[0.1, 0.4, 0.4, 0.9]])
    >>> below.tolist(), tied.tolist()
    ([[1, 4]], [[2, 0]])
    """
    values, reference = _checked(rewards, reference_rewards)
    return count_below_and_tied(values, reference)


def calibrated_reward(rewards: ArrayLike, reference_rewards: ArrayLike) -> FloatArray:
    r"""Map each reward to its mid-rank CDF value under the reference policy.

    For a prompt :math:`x` with :math:`k` reference responses :math:`z_1 \dots z_k`,

    .. math::

        \hat C(x, y) = \frac{1}{k} \sum_{i=1}^{k}
            \left( \mathbf 1[r(y) > r(z_i)] + \tfrac12 \mathbf 1[r(y) = r(z_i)] \right).

    Parameters
    ----------
    rewards : (n_prompts, n_responses) array_like
        Finite rewards, any unit: only their order matters.
    reference_rewards : (n_prompts, k) array_like
        Rewards of ``k >= 1`` responses drawn from the reference policy, one row a prompt.

    Returns
    -------
    (n_prompts, n_responses) ndarray of float64
        Calibrated rewards in [0, 1]; 0.5 is a response as good as the median one.

    Notes
    -----
    Ties count one half, so the mean over the reference draws themselves is exactly 1/2, negating
    every reward maps c to 1 - c, and a strictly increasing map of the rewards changes nothing.

    References
    ----------
    .. [1] Balashankar et al., "InfAlign", arXiv:2412.19792v5, section 4.

    Examples
    --------
    >>> calibrated_reward([[0.4, 1.0, 0.0]], [[0.1, 0.4, 0.4, 0.9]])
    array([[0.5, 1. , 0. ]])
    """
    values, reference = _checked(rewards, reference_rewards)
    below, tied = count_below_and_tied(values, reference)
    return np.asarray((below + tied / 2) / reference.shape[1])


def _checked(rewards: ArrayLike, reference_rewards: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return both as finite matrices with a row for each prompt, at least one reference each."""
    values = check_finite("rewards", rewards, ndim=2)
    reference = check_finite("reference_rewards", reference_rewards, ndim=2)
    if len(values) != len(reference):
        raise ValueError(
            f"rewards must have one row per prompt; got {len(values)} for {len(reference)}."
        )
    if reference.shape[1] == 0:
        raise ValueError(
            f"reference_rewards must hold k >= 1 draws a prompt; got shape {reference.shape}. "
            "Draw from the reference policy first, or use the pooled calibrator."
        )
    return values, reference


class RewardCalibrator:
    r"""Estimator of calibrated rewards, by the contract of scikit-learn.

    ``empirical`` is the mid-rank among the prompt's own reference draws. ``pooled`` shrinks it
    toward a CDF that all prompts share once location and scale are taken out,

    .. math::

        \hat C = \frac{k \, \hat C_\mathrm{own} + \alpha \, G((r - \mu) / \sigma)}{k + \alpha},

    with the population's moments, G and alpha estimated from the data, so that prompts with few
    draws, or none, get a value. ``weighted`` corrects draws of another policy by self-normalised
    importance weights.

    Parameters
    ----------
    method : {"empirical", "pooled", "weighted"}
        How to calibrate.
    min_effective_sample_size : float
        ``weighted`` refuses prompts whose weights are worth fewer draws.

    Attributes
    ----------
    reference_ : (n_prompts, k) ndarray
        Rewards fitted, NaN where a prompt has fewer than k.
    weights_ : (n_prompts, k) ndarray
        Of ``weighted``; its ``effective_sample_size_`` has one number a prompt.
    population_, residuals_, strength_
        Of ``pooled``: moments of the population, sorted residuals that make G, and alpha.

    Examples
    --------
    >>> draws = [[0.1, 0.4, 0.4, 0.9], [3.0, 5.0, 4.0]]
    >>> RewardCalibrator().fit(draws).transform([[0.4, 1.0], [3.5, 2.0]])
    array([[0.5       , 1.        ],
           [0.33333333, 0.        ]])
    """

    def __init__(self, method: str = "empirical", min_effective_sample_size: float = 2.0) -> None:
        self.method = check_choice("method", method, METHODS)
        self.min_effective_sample_size = check_positive(
            "min_effective_sample_size", min_effective_sample_size
        )

    def fit(
        self, reference_rewards: Sequence[ArrayLike], log_weights: Sequence[ArrayLike] | None = None
    ) -> RewardCalibrator:
        """Learn from reference draws.

        Parameters
        ----------
        reference_rewards : one sequence of floats a prompt
            Rewards of its draws; of any number for ``pooled``, at least one otherwise.
        log_weights : one sequence of floats a prompt, optional
            For ``weighted``: log-probability under the reference policy minus that under the policy
            that drew the response, nats.

        Returns
        -------
        RewardCalibrator
            Itself.

        Raises
        ------
        ValueError
            If there is no prompt or draw, a value is not finite, ``log_weights`` are missing or do
            not fit, or a prompt's effective sample size is below the minimum.
        """
        self.reference_ = padded_rows("reference_rewards", reference_rewards)
        counts = np.isfinite(self.reference_).sum(axis=1)
        if self.method != "pooled" and (counts == 0).any():
            raise ValueError(
                "reference_rewards must hold a draw for every prompt; got none at row "
                f"{int(np.argmin(counts))}. Draw from the reference policy, or use method='pooled'."
            )
        if (log_weights is None) == (self.method == "weighted"):
            raise ValueError(
                f"log_weights must be given for method='weighted' only; got {log_weights!r} for "
                f"method={self.method!r}."
            )
        if log_weights is not None:
            self._fit_weights(padded_rows("log_weights", log_weights))
        if self.method == "pooled":
            self._fit_pool(counts)
        return self

    def _fit_weights(self, log_weights: FloatArray) -> None:
        """Set weights and effective sample sizes, or raise."""
        if not np.array_equal(np.isfinite(log_weights), np.isfinite(self.reference_)):
            raise ValueError(
                "log_weights must have one entry per reference reward; got shapes "
                f"{log_weights.shape} and {self.reference_.shape}, or other lengths of rows."
            )
        self.weights_ = normalised_weights(log_weights)
        self.effective_sample_size_ = effective_sample_size(self.weights_)
        worst = int(np.argmin(self.effective_sample_size_))
        found = float(self.effective_sample_size_[worst])
        if found < self.min_effective_sample_size:
            raise ValueError(
                f"effective sample size must be >= {self.min_effective_sample_size}; got "
                f"{found:.3g} at row {worst}. Draw from the reference policy, drop that row, or "
                "lower min_effective_sample_size."
            )

    def _fit_pool(self, counts: IntArray) -> None:
        """Set the population, the shared residuals and their weight."""
        if counts.sum() < 2:
            raise ValueError(
                f"reference_rewards must hold two draws at least; got {int(counts.sum())}."
            )
        self.population_ = estimate_population(self.reference_)
        some = self.reference_
        if counts.sum() > _POOL_DRAWS:
            share = np.random.default_rng(0).random(len(some)) < _POOL_DRAWS / counts.sum()
            some = some[share]
        self.residuals_ = leave_one_out_residuals(some, self.population_)
        self.strength_ = estimate_strength(some, self.population_, self.residuals_)

    def transform(self, rewards: Sequence[ArrayLike], inside: bool = False) -> FloatArray:
        """Calibrate rewards of the fitted prompts, row by row.

        Parameters
        ----------
        rewards : one sequence of floats a prompt
            Rewards of its responses.
        inside : bool
            Whether these are the reference draws themselves: each is then compared with the others.

        Returns
        -------
        (n_prompts, m) ndarray
            Calibrated rewards in [0, 1], NaN where a prompt has fewer than m responses.

        Raises
        ------
        ValueError
            If nothing was fitted, or the prompts are not those fitted.
        """
        if not hasattr(self, "reference_"):
            raise ValueError(f"calibrator must be fitted first; got method={self.method!r}.")
        values = padded_rows("rewards", rewards)
        if len(values) != len(self.reference_) or (
            inside and not np.array_equal(values, self.reference_, equal_nan=True)
        ):
            raise ValueError(
                f"rewards must be of the fitted prompts; got {len(values)} rows for "
                f"{len(self.reference_)}, inside={inside}."
            )
        step = max(1, COMPARISONS // max(1, values.shape[1] * self.reference_.shape[1]))
        blocks = [
            self._calibrate(values[i : i + step], slice(i, i + step), inside)
            for i in range(0, len(values), step)
        ]
        return np.where(np.isfinite(values), np.concatenate(blocks), np.nan)

    def _calibrate(self, values: FloatArray, rows: slice, inside: bool) -> FloatArray:
        """Calibrate a block of prompts."""
        reference = self.reference_[rows]
        if self.method == "weighted":
            return weighted_midranks(values, reference, self.weights_[rows], inside)
        # a draw counts itself as half a tie, which is taken out again
        count = np.isfinite(reference).sum(axis=1, keepdims=True) - inside
        own = midranks(values, reference) * (count + inside) - 0.5 * inside
        if self.method == "empirical":
            return np.where(count > 0, own / np.maximum(count, 1), 0.5)
        shared = self._shared(values, reference, inside)
        return np.asarray(
            (own + self.strength_ * shared) / np.maximum(count + self.strength_, 1e-9)
        )

    def _shared(self, values: FloatArray, reference: FloatArray, inside: bool) -> FloatArray:
        """Return the pooled CDF at each reward."""
        if inside:
            location, scale = leave_out(reference, self.population_)
        else:
            location, scale = self.population_.predict(*moments(reference))
            location, scale = location[:, None], scale[:, None]
        known = np.where(np.isfinite(values), values, 0.0)
        return pooled_cdf(known, location, scale, self.residuals_)

    def save(self, path: str | Path) -> None:
        """Write the state as arrays, without pickle.

        Parameters
        ----------
        path : str or Path
            File, by custom ``.npz``.
        """
        state: dict[str, Any] = {"method": self.method, "minimum": self.min_effective_sample_size}
        for name, value in vars(self).items():
            if name.endswith("_"):
                state[name] = astuple(value) if isinstance(value, Population) else value
        with Path(path).open("wb") as file:
            np.savez(file, **state)

    @classmethod
    def load(cls, path: str | Path) -> RewardCalibrator:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : str or Path
            File.

        Returns
        -------
        RewardCalibrator
            Fitted.
        """
        with np.load(path, allow_pickle=False) as state:
            made = cls(str(state["method"]), float(state["minimum"]))
            for name in state.files:
                if name.endswith("_"):
                    setattr(made, name, state[name])
        if made.method == "pooled":
            made.population_ = Population(*map(float, made.population_))  # type: ignore[call-overload]
            made.strength_ = float(made.strength_)
        return made
