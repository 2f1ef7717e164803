"""Labels of discrete rewards: binary verifiers, integer ratings, many ties."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ctrl_dpo.data.ragged import FloatArray, Ragged


def level_labels(
    transformation: Any, rewards: Ragged, reference: Ragged, beta: float
) -> tuple[FloatArray, FloatArray]:
    r"""Return transformed rewards and each prompt's log normaliser, tied rewards as one level.

    .. math:: \log Z = \log \sum_l \hat q_l \, e^{\Phi_l / \beta}

    with the share of a prompt's reference draws at each level as its mass.

    Parameters
    ----------
    transformation : Transformation
        Its ``on_levels`` is the exact discrete form of the optimum.
    rewards, reference : Ragged
        Rewards of the responses and of the reference draws, one row a prompt.
    beta : float
        Strength of the KL penalty.

    Returns
    -------
    values : (n,) ndarray
        Phi of each response.
    log_normalisers : (n_rows,) ndarray
        log Z of each prompt.
    """
    values = np.empty(rewards.values.size)
    normalisers = np.empty(rewards.lengths.size)
    ours, theirs = rewards.offsets, reference.offsets
    for row in range(normalisers.size):
        mine = rewards.values[ours[row] : ours[row + 1]]
        draws = reference.values[theirs[row] : theirs[row + 1]]
        levels = np.unique(np.concatenate((mine, draws)))
        counts = np.bincount(np.searchsorted(levels, draws), minlength=levels.size)
        by_level, normalisers[row] = _on_counts(transformation, tuple(counts.tolist()), beta)
        values[ours[row] : ours[row + 1]] = by_level[np.searchsorted(levels, mine)]
    return values, normalisers


@lru_cache(maxsize=65536)
def _on_counts(
    transformation: Any, counts: tuple[int, ...], beta: float
) -> tuple[FloatArray, float]:
    """Solve one prompt; with few draws and levels, prompts repeat one another's counts."""
    masses = np.array(counts, dtype=np.float64) / sum(counts)
    values, normaliser = transformation.on_levels(masses, np.arange(len(counts)), beta)
    return values, float(normaliser)
