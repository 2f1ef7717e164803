"""Rewards -> calibrated rewards: where a response stands among draws of the reference policy."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrl_dpo._validation import check_finite
from ctrl_dpo.calibration.calibrator import METHODS, RewardCalibrator
from ctrl_dpo.calibration.ranks import count_below_and_tied

__all__ = ["METHODS", "RewardCalibrator", "calibrated_reward", "rank_counts"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


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
