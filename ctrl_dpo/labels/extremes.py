"""The responses of a group that say most for their cost: the best and the worst."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctrl_dpo.data import columns


def keep_extremes(group: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return a relabelled group with only its highest- and lowest-ranked responses.

    Parameters
    ----------
    group : mapping
        A row of :func:`ctrl_dpo.relabel.relabel`.
    count : int
        Responses kept at either end of the ranking.

    Returns
    -------
    dict
        The row, every list of one entry per response cut alike, in the old order. The rewards of
        all draws stay in ``draw_rewards``, so that it remains known what the ranks mean; not where
        ``reference_rewards`` tell it.

    Examples
    --------
    >>> group = {"responses": list("abcd"), "rewards": [3, 1, 2, 4]}
    >>> keep_extremes(group, 1)["responses"]
    ['b', 'd']
    """
    size = len(group[columns.RESPONSES])
    order = sorted(range(size), key=group[columns.REWARDS].__getitem__)
    kept = sorted({*order[:count], *order[-count:]})
    cut = {
        name: [values[i] for i in kept]
        for name, values in group.items()
        if name in columns.PER_RESPONSE and values is not None
    }
    if columns.REFERENCE_REWARDS not in group:
        cut[columns.DRAW_REWARDS] = group.get(columns.DRAW_REWARDS) or list(group[columns.REWARDS])
    return {**group, **cut}
