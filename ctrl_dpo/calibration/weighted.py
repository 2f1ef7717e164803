"""Calibrated rewards from responses that another policy drew, by importance weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def normalised_weights(log_weights: FloatArray) -> FloatArray:
    r"""Return self-normalised importance weights of each row, 0 for NaN.

    .. math:: w_i \propto \exp(\log \pi_\mathrm{ref}(z_i|x) - \log \pi_b(z_i|x))

    Parameters
    ----------
    log_weights : (n_prompts, k) ndarray
        Log-probability under the reference policy minus that under the policy that drew, nats.

    Returns
    -------
    (n_prompts, k) ndarray
        Sums to 1 in each row.
    """
    known = np.isfinite(log_weights)
    clean = np.where(known, log_weights, -np.inf)
    top = clean.max(axis=1, keepdims=True)
    weights = np.exp(clean - np.where(np.isfinite(top), top, 0.0))
    return np.asarray(weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300))


def effective_sample_size(weights: FloatArray) -> FloatArray:
    r"""Return :math:`(\sum w)^2 / \sum w^2` of each row: how many equal weights it is worth.

    Parameters
    ----------
    weights : (n_prompts, k) ndarray
        Weights >= 0.

    Returns
    -------
    (n_prompts,) ndarray
        Between 1 and k.

    Examples
    --------
    >>> effective_sample_size(np.array([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    array([4., 1.])
    """
    return np.asarray(weights.sum(axis=1) ** 2 / np.maximum((weights**2).sum(axis=1), 1e-300))


def weighted_midranks(
    rewards: FloatArray, reference: FloatArray, weights: FloatArray, inside: bool
) -> FloatArray:
    """Return weighted mid-ranks; a response that is itself a draw leaves its own weight out.

    Parameters
    ----------
    rewards : (n_prompts, m) ndarray
        Rewards; where ``inside``, those of the draws in their order.
    reference, weights : (n_prompts, k) ndarray
        Rewards of the draws and their weights.
    inside : bool
        Whether the rewards are the draws' own.

    Returns
    -------
    (n_prompts, m) ndarray
        Calibrated rewards in [0, 1]; 1/2 where no other draw has weight.
    """
    lower = (reference[:, None, :] < rewards[:, :, None]).astype(np.float64)
    lower += 0.5 * (reference[:, None, :] == rewards[:, :, None])
    spread = np.broadcast_to(weights[:, None, :], lower.shape).copy()
    if inside:
        places = np.arange(rewards.shape[1])
        spread[:, places, places] = 0.0
    mass = spread.sum(axis=2)
    ranked = (lower * spread).sum(axis=2)
    return np.where(mass > 0, ranked / np.where(mass > 0, mass, 1.0), 0.5)
