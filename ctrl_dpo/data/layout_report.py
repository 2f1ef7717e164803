"""What reading a dataset made of its rows, and what in them a user should know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from ctrl_dpo.data import columns as names

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 5
# further from the median than any smooth distribution of rewards reaches: 20 standard deviations of
# a normal one with the same median absolute deviation
_OUTLIER = 20.0
# UltraFeedback's overall_score goes to 10 and its fine-grained_score to 5; completions scored 10
# that meant 1 differ by about 8
_DISAGREEMENT = 4.0


@dataclass
class LayoutReport:
    """What :func:`ctrl_dpo.data.layouts.read_groups` made of a dataset.

    Parameters
    ----------
    layout : str
        The layout that was read.
    rows, groups : int
        Rows in and groups out.
    dropped : dict of str to list of int
        Row numbers by reason.
    noted : dict of str to list of int
        Groups to look at: ``outlier_rewards`` (far from all others), ``suspect_scores``
        (UltraFeedback: the overall score contradicts the fine-grained one). They are kept.
    counts : dict of str to int
        What else was seen: ``merged_rows`` (rows added to an earlier one of the same prompt),
        ``reordered_pairs`` (the rejected response has the higher reward), ``duplicate_responses``,
        ``single_response_groups``, ``empty_responses``, ``whitespace_only_responses``,
        ``unscored_groups``.
    """

    layout: str
    rows: int
    groups: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return counts as one flat mapping, reasons with the first row numbers."""
        lost = {f"dropped: {reason}": _shown(rows) for reason, rows in self.dropped.items()}
        noted = {name: _shown(rows) for name, rows in self.noted.items() if rows}
        seen = {name: count for name, count in self.counts.items() if count}
        named = {"layout": self.layout, "rows": self.rows, "groups": self.groups}
        return named | seen | noted | lost

    def count_texts(self, groups: Iterable[Sequence[str]]) -> None:
        """Add what can be told from the texts of some groups.

        Parameters
        ----------
        groups : iterable of sequence of str
            Responses of each group.
        """
        found = dict.fromkeys(
            (
                "duplicate_responses",
                "single_response_groups",
                "empty_responses",
                "whitespace_only_responses",
            ),
            0,
        )
        for texts in groups:
            found["duplicate_responses"] += len(texts) - len(set(texts))
            found["single_response_groups"] += len(texts) == 1
            found["empty_responses"] += sum(not text for text in texts)
            found["whitespace_only_responses"] += sum(text.isspace() for text in texts)
        for name, count in found.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def count_rewards(self, groups: Dataset, paired: bool) -> None:
        """Add what can be told from the rewards of all groups.

        Parameters
        ----------
        groups : Dataset
            ``rewards``, if they are known.
        paired : bool
            Whether the first response of a group was preferred to the second.
        """
        known = names.REWARDS in groups.column_names
        rewards = groups[names.REWARDS] if known else [None] * len(groups)
        self.counts["unscored_groups"] = sum(values is None for values in rewards)
        if paired:
            self.counts["reordered_pairs"] = sum(
                r is not None and len(r) == 2 and r[0] < r[1] for r in rewards
            )
        self.noted["outlier_rewards"] = outlying_rows(rewards)


def outlying_rows(rewards: Iterable[Sequence[float] | None]) -> list[int]:
    """Return the groups that hold a reward far from all others.

    Parameters
    ----------
    rewards : iterable of sequence of float
        Rewards of each group.

    Returns
    -------
    list of int
        Their numbers.

    Examples
    --------
    >>> outlying_rows([[1.0, 2.0, 3.0], [2.0, 1e9]])
    [1]
    """
    rows = [np.asarray(values if values is not None else [], dtype=float) for values in rewards]
    flat = np.concatenate(rows) if rows else np.empty(0)
    if flat.size == 0:
        return []
    middle = np.median(flat)
    spread = stats.median_abs_deviation(flat, scale="normal")
    if spread == 0:
        return []
    return [i for i, r in enumerate(rows) if (np.abs(r - middle) > _OUTLIER * spread).any()]


def suspect_completions(row: Mapping[str, Any]) -> bool:
    """Tell whether an overall score of UltraFeedback contradicts the fine-grained one.

    Parameters
    ----------
    row : mapping
        ``completions``, each with ``overall_score`` (1 to 10) and perhaps ``fine-grained_score``
        (1 to 5).

    Returns
    -------
    bool
        True for the known fault of 10 written where 1 was meant.
    """
    for completion in row["completions"]:
        fine = completion.get("fine-grained_score")
        if fine is None:
            continue
        if abs(float(completion["overall_score"]) - 2 * float(fine)) > _DISAGREEMENT:
            return True
    return False


def _shown(rows: Sequence[int]) -> str:
    return f"{len(rows)}, first at rows {list(rows[:_SHOWN])}"
