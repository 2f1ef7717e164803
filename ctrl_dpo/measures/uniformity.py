"""How far calibrated rewards are from the uniform distribution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ctrl_dpo._validation import check_finite


@dataclass(frozen=True)
class CalibrationError:
    """Distances of calibrated rewards from the uniform distribution.

    Parameters
    ----------
    kolmogorov_smirnov : float
        Largest distance of the two cumulative distributions, in [0, 1].
    cramer_von_mises : float
        Mean squared distance of the two, the integral of (F_n(u) - u)^2 over [0, 1].
    n : int
        Number of calibrated rewards.
    """

    kolmogorov_smirnov: float
    cramer_von_mises: float
    n: int


def calibration_error(calibrated_rewards: ArrayLike) -> CalibrationError:
    r"""Compare the calibrated rewards of held-out reference draws with the uniform distribution.

    .. math:: \sup_u |F_n(u) - u|, \qquad \int_0^1 (F_n(u) - u)^2 \, du

    Parameters
    ----------
    calibrated_rewards : array_like
        Calibrated rewards in [0, 1] of reference draws not used for calibration; any shape.

    Returns
    -------
    CalibrationError
        Both distances.

    Raises
    ------
    ValueError
        If there is no value, or one outside [0, 1].

    Notes
    -----
    With k reference rewards a prompt, calibrated rewards are multiples of 1/(2k), so neither
    distance reaches 0 however many prompts there are: perfect calibration without ties puts mass
    1/(k + 1) on each of the k + 1 values, at a distance of 1/(k + 1). Draws of one prompt share
    their reference rewards, so no p-value is offered.

    Examples
    --------
    >>> calibration_error([0.5, 1.0])
    CalibrationError(kolmogorov_smirnov=0.5, cramer_von_mises=0.08333333333333333, n=2)
    """
    values = check_finite("calibrated_rewards", np.ravel(np.asarray(calibrated_rewards)), ndim=1)
    if values.size == 0 or values.min() < 0 or values.max() > 1:
        span = (float(values.min()), float(values.max())) if values.size else "no value"
        raise ValueError(f"calibrated_rewards must be in [0, 1]; got {span}.")
    n = values.size
    ordered = np.sort(values)
    steps = np.arange(1, n + 1) / n
    largest = max((steps - ordered).max(), (ordered - steps + 1 / n).max())
    mean_square = np.mean((ordered - steps + 0.5 / n) ** 2) + 1 / (12 * n**2)
    return CalibrationError(float(largest), float(mean_square), n)
