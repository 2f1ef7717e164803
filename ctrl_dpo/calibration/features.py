"""What features of a prompt predict of the location of its rewards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# of the ridge, in units of the largest squared singular value: from nearly least squares to nearly
# the mean alone
_PENALTIES = np.geomspace(1e-8, 1e4, 49)


def predict_locations(features: FloatArray, rewards: FloatArray) -> FloatArray:
    r"""Predict each prompt's mean reward from its features, without its own rewards.

    .. math:: \hat\mu_i = \bar r + x_i^\top
              \arg\min_b \sum_{j \ne i} (\bar r_j - \bar r - x_j^\top b)^2 + \lambda \|b\|^2

    with standardised features, and :math:`\lambda` the one whose predictions of left-out
    prompts have the least squared error.

    Parameters
    ----------
    features : (n_prompts, n_features) ndarray
        Finite numbers.
    rewards : (n_prompts, k) ndarray
        Rewards of reference draws, NaN where there is none.

    Returns
    -------
    (n_prompts,) ndarray
        Predictions; of prompts without draws too.

    Raises
    ------
    ValueError
        If the features are of another number of prompts.

    Notes
    -----
    A prompt's own residual is taken out in closed form, through the diagonal of the hat matrix, at
    the cost of one singular value decomposition; mean and scale of the features stay.
    """
    if len(features) != len(rewards):
        raise ValueError(
            f"prompt_features must have one row per prompt; got {len(features)} for {len(rewards)}."
        )
    known = np.isfinite(rewards).any(axis=1)
    means = np.nanmean(rewards[known], axis=1)
    scale = features[known].std(axis=0)
    x = (features - features[known].mean(axis=0)) / np.where(scale > 0, scale, 1.0)
    u, s, vt = np.linalg.svd(x[known], full_matrices=False)
    if not s.any() or known.sum() < 3:
        return np.full(len(features), means.mean())
    centred = means - means.mean()
    projected = u.T @ centred
    best, predicted, coefficients = np.inf, means, np.zeros(x.shape[1])
    for penalty in _PENALTIES * s[0] ** 2:
        shrink = s**2 / (s**2 + penalty)
        hat = (u**2 * shrink).sum(axis=1) + 1 / known.sum()
        residual = (centred - u @ (shrink * projected)) / np.maximum(1 - hat, 1e-9)
        error = float(np.mean(residual**2))
        if error < best:
            best, predicted = error, means - residual
            coefficients = vt.T @ (projected * s / (s**2 + penalty))
    made = means.mean() + x @ coefficients
    made[known] = predicted
    return np.asarray(made)
