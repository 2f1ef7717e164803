"""Ranks of rewards among the draws of their prompt, counted in blocks of bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

COMPARISONS = 1 << 22  # pairs of rewards compared at once: bounds memory, stays in cache


def count_below_and_tied(
    rewards: FloatArray, reference_rewards: FloatArray
) -> tuple[IntArray, IntArray]:
    """Count the reference rewards below and tied with each reward; NaN cells count nowhere.

    Parameters
    ----------
    rewards : (n_prompts, n_responses) ndarray
        Rewards.
    reference_rewards : (n_prompts, k) ndarray
        Reference rewards.

    Returns
    -------
    tuple of (n_prompts, n_responses) ndarray of int
        Counts below and tied.
    """
    n_prompts, n_responses = rewards.shape
    below = np.zeros(rewards.shape, dtype=np.int64)
    tied = np.zeros(rewards.shape, dtype=np.int64)
    cells = max(1, n_responses * reference_rewards.shape[1])
    step = max(1, COMPARISONS // cells)
    for start in range(0, n_prompts, step):
        block = slice(start, start + step)
        ours, theirs = rewards[block, :, None], reference_rewards[block, None, :]
        below[block] = np.count_nonzero(theirs < ours, axis=2)
        tied[block] = np.count_nonzero(theirs == ours, axis=2)
    return below, tied
