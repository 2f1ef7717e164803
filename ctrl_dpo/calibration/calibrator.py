"""Estimator of calibrated rewards, by the contract of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrl_dpo._validation import check_choice, check_finite, check_positive
from ctrl_dpo.calibration.features import predict_locations
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
from ctrl_dpo.calibration.ranks import COMPARISONS
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


class RewardCalibrator:
    r"""Estimator of calibrated rewards, by the contract of scikit-learn.

    ``empirical`` is the mid-rank among the prompt's own reference draws. ``pooled`` shrinks it
    toward a CDF that all prompts share once location and scale are taken out,

    .. math::

        \hat C = \frac{k \, \hat C_\mathrm{own} + \alpha \, G((r - \mu) / \sigma)}{k + \alpha},

    with the population's moments, G and alpha estimated from the data, so that prompts with few
    draws, or none, get a value; features of the prompts, if given, predict their locations first.
    ``weighted`` corrects draws of another policy by self-normalised
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
    population_, residuals_, strength_, trend_
        Of ``pooled``: moments of the population, sorted residuals that make G, alpha, and what the
        features of each prompt predict of its location (0 without features).

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

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return what the constructor was given, for ``sklearn.base.clone`` and searches."""
        return {
            "method": self.method,
            "min_effective_sample_size": self.min_effective_sample_size,
        }

    def set_params(self, **params: Any) -> RewardCalibrator:
        """Change what the constructor was given.

        Parameters
        ----------
        **params
            Arguments of the constructor.

        Returns
        -------
        RewardCalibrator
            Itself.
        """
        made = type(self)(**{**self.get_params(), **params})
        vars(self).update(made.get_params())
        return self

    def fit(
        self,
        reference_rewards: Sequence[ArrayLike],
        log_weights: Sequence[ArrayLike] | None = None,
        prompt_features: ArrayLike | None = None,
    ) -> RewardCalibrator:
        """Learn from reference draws.

        Parameters
        ----------
        reference_rewards : one sequence of floats a prompt
            Rewards of its draws; of any number for ``pooled``, at least one otherwise.
        log_weights : one sequence of floats a prompt, optional
            For ``weighted``: log-probability under the reference policy minus that under the policy
            that drew the response, nats.
        prompt_features : (n_prompts, n_features) array_like, optional
            For ``pooled``: numbers that tell prompts apart, such as their length or an embedding.
            A ridge regression of the prompts' mean rewards on them, each prompt left out of its
            own prediction, takes the place of the population's one mean.

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
        if prompt_features is not None and self.method != "pooled":
            raise ValueError(
                f"prompt_features must be for method='pooled' only; got method={self.method!r}."
            )
        if self.method == "pooled":
            self._fit_pool(counts, prompt_features)
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

    def _fit_pool(self, counts: IntArray, prompt_features: ArrayLike | None) -> None:
        """Set the trend, the population, the shared residuals and their weight."""
        if counts.sum() < 2:
            raise ValueError(
                f"reference_rewards must hold two draws at least; got {int(counts.sum())}."
            )
        self.trend_ = np.zeros(len(counts))
        if prompt_features is not None:
            features = check_finite("prompt_features", prompt_features, ndim=2)
            self.trend_ = predict_locations(features, self.reference_)
        some = self.reference_ - self.trend_[:, None]
        self.population_ = estimate_population(some)
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
        trend = self.trend_[rows, None]
        shared = self._shared(values - trend, reference - trend, inside)
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
