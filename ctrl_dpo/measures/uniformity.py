"""How far calibrated rewards are from the uniform distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrl_dpo._validation import check_finite
from ctrl_dpo.calibrate import RewardCalibrator
from ctrl_dpo.calibration.padding import padded_rows
from ctrl_dpo.calibration.weighted import normalised_weights

FloatArray = NDArray[np.float64]

_ANY_SIZE = 0.5  # effective sample sizes are 1 at least


@dataclass(frozen=True)
class CalibrationError:
    """Distances of calibrated rewards from the uniform distribution.

    Parameters
    ----------
    kolmogorov_smirnov : float
        Largest distance of the two cumulative distributions, in [0, 1].
    cramer_von_mises : float
        Mean squared distance of the two, the integral of (F_n(u) - u)^2 over [0, 1].
    mean_absolute_deviation : float
        Mean distance of the two, the integral of |F_n(u) - u| over [0, 1].
    n : int
        Number of calibrated rewards.
    """

    kolmogorov_smirnov: float
    cramer_von_mises: float
    mean_absolute_deviation: float
    n: int


def calibration_error(
    calibrated_rewards: ArrayLike, weights: ArrayLike | None = None
) -> CalibrationError:
    r"""Compare the calibrated rewards of held-out reference draws with the uniform distribution.

    .. math:: \sup_u |F_n(u) - u|, \qquad \int_0^1 (F_n(u) - u)^2 \, du, \qquad
              \int_0^1 |F_n(u) - u| \, du

    Parameters
    ----------
    calibrated_rewards : array_like
        Calibrated rewards in [0, 1] of reference draws not used for calibration; any shape.
    weights : array_like, optional
        Weight >= 0 of each, for draws of another policy; equal by default.

    Returns
    -------
    CalibrationError
        The three distances.

    Raises
    ------
    ValueError
        If there is no value, one outside [0, 1], or the weights do not fit or are all 0.

    Notes
    -----
    With k reference rewards a prompt, calibrated rewards are multiples of 1/(2k), so no
    distance reaches 0 however many prompts there are: perfect calibration without ties puts mass
    1/(k + 1) on each of the k + 1 values, at a distance of 1/(k + 1). Draws of one prompt share
    their reference rewards, so no p-value is offered.

    Examples
    --------
    >>> calibration_error([0.5, 1.0])
    CalibrationError(kolmogorov_smirnov=0.5, cramer_von_mises=0.08333333333333333,
                     mean_absolute_deviation=0.25, n=2)
    """
    values = check_finite("calibrated_rewards", np.ravel(np.asarray(calibrated_rewards)), ndim=1)
    if values.size == 0 or values.min() < 0 or values.max() > 1:
        span = (float(values.min()), float(values.max())) if values.size else "no value"
        raise ValueError(f"calibrated_rewards must be in [0, 1]; got {span}.")
    mass = np.ones(values.size) if weights is None else check_finite("weights", np.ravel(weights))
    if mass.size != values.size or mass.min() < 0 or not mass.any():
        raise ValueError(
            "weights must be >= 0, not all 0, and one per calibrated reward; got "
            f"{mass.size} of sum {mass.sum()} for {values.size}."
        )
    order = np.argsort(values)
    # F_n is constant between neighbouring values, so each piece is integrated exactly
    knots = np.concatenate(([0.0], values[order], [1.0]))
    steps = np.concatenate(([0.0], np.cumsum(mass[order]) / mass.sum()))
    left, right = knots[:-1] - steps, knots[1:] - steps
    return CalibrationError(
        kolmogorov_smirnov=float(np.maximum(abs(left), abs(right)).max()),
        cramer_von_mises=float(np.sum(right**3 - left**3) / 3),
        mean_absolute_deviation=float(np.sum(right * abs(right) - left * abs(left)) / 2),
        n=values.size,
    )


def held_out_error(
    calibrator: RewardCalibrator,
    reference_rewards: Sequence[ArrayLike],
    log_weights: Sequence[ArrayLike] | None = None,
    prompt_features: ArrayLike | None = None,
) -> tuple[CalibrationError, FloatArray] | None:
    """Calibrate one half of every prompt's reference draws by the other half, drawn by lot.

    Parameters
    ----------
    calibrator : RewardCalibrator
        Whose method is judged; a copy is fitted to the smaller half of each prompt.
    reference_rewards, log_weights, prompt_features
        As for :meth:`ctrl_dpo.calibrate.RewardCalibrator.fit`.

    Returns
    -------
    error : CalibrationError
        Distance of the held-out draws' calibrated rewards from uniform.
    calibrated_rewards : (n,) ndarray
        Those.
        Instead of both, None where no prompt has two draws.

    Examples
    --------
    >>> from ctrl_dpo.calibrate import RewardCalibrator
    >>> error, values = held_out_error(RewardCalibrator(), [[2.0, 2.0, 2.0, 2.0], [3.0]])
    >>> values
    array([0.5, 0.5])
    """
    rows = [i for i, row in enumerate(reference_rewards) if len(np.atleast_1d(row)) > 1]
    if not rows:
        return None
    # by lot: datasets list responses from the best to the worst
    halves = [_halves(reference_rewards[i], i) for i in rows]
    weights = None if log_weights is None else [_halves(log_weights[i], i) for i in rows]
    features = None if prompt_features is None else np.asarray(prompt_features)[rows]
    fitted = RewardCalibrator(calibrator.method, _ANY_SIZE).fit(
        [first for first, _ in halves],
        None if weights is None else [first for first, _ in weights],
        features,
    )
    made = fitted.transform([second for _, second in halves])
    values = made[np.isfinite(made)]
    if weights is None:
        return calibration_error(values), values
    # draws of another policy: each counts as often as the reference policy would draw it
    second = normalised_weights(padded_rows("log_weights", [b for _, b in weights]))
    return calibration_error(values, second[np.isfinite(made)]), values


def _halves(row: ArrayLike, seed: int) -> tuple[FloatArray, FloatArray]:
    values = np.random.default_rng(seed).permutation(np.asarray(row, dtype=np.float64))
    return values[: values.size // 2], values[values.size // 2 :]
