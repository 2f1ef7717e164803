"""What reading a dataset made of its rows, and what in them a user should know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import stats

from ctrl_dpo.data import columns as names
from ctrl_dpo.data.ragged import one_array

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 5
_BATCH = 10_000
_LABELS = ("labelled_pairs", "flipped_labels", "equal_labels")
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
        What else was seen: ``merged_rows`` (rows added to an earlier one of the same prompt);
        ``labelled_pairs`` of rows that came as pairs, and of these ``flipped_labels`` (the rejected
        response has the higher reward) and ``equal_labels``; ``duplicate_responses``,
        ``single_response_groups``, ``empty_responses``, ``whitespace_only_responses``,
        ``unscored_groups``.
    weights : dict of str to float
        Of HelpSteer2: what one reward was made of.
    """

    layout: str
    rows: int = 0
    groups: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    noted: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return counts as one flat mapping, reasons with the first row numbers."""
        lost = {f"dropped: {reason}": _shown(rows) for reason, rows in self.dropped.items()}
        noted = {name: _shown(rows) for name, rows in self.noted.items() if rows}
        seen = {name: count for name, count in self.counts.items() if count}
        stated = {f"weight of {name}": weight for name, weight in self.weights.items()}
        named = {"layout": self.layout, "rows": self.rows, "groups": self.groups}
        return named | stated | seen | noted | lost

    def count_dropped(self, reasons: pa.ChunkedArray) -> list[int]:
        """Add dropped rows by reason, and return the numbers of the others."""
        for row in np.flatnonzero(pc.is_valid(reasons).to_numpy(zero_copy_only=False)).tolist():
            self.dropped.setdefault(reasons[row].as_py(), []).append(row)
        kept: list[int] = np.flatnonzero(pc.is_null(reasons).to_numpy()).tolist()
        return kept

    def count_labels(self, judged: Dataset) -> None:
        """Add how the rewards of incoming pairs agree with which response was the chosen one."""
        pairs = judged[names.REWARDS]
        self._add(sum(map(_agreement, pairs), np.zeros(3, dtype=int)), _LABELS)

    def count_row(self, group: Mapping[str, Any], paired: bool) -> None:
        """Add what can be told from one group of a stream."""
        self._count_texts(pa.array([group[names.RESPONSES]], pa.list_(pa.string())))
        rewards = group.get(names.REWARDS)
        self._add([rewards is None], ["unscored_groups"])
        if paired:
            self._add(_agreement(rewards), _LABELS)

    def count_groups(self, groups: Dataset) -> None:
        """Add what can be told from the texts and rewards of all groups."""
        for table in groups.with_format("arrow").iter(batch_size=_BATCH):
            self._count_texts(one_array(table, names.RESPONSES))
        if names.REWARDS not in groups.column_names:
            self.counts["unscored_groups"] = len(groups)
            return
        tables = groups.select_columns([names.REWARDS]).with_format("arrow").iter(_BATCH)
        rewards = [one_array(table, names.REWARDS) for table in tables]
        self.counts["unscored_groups"] = sum(part.null_count for part in rewards)
        sizes = [pc.fill_null(pc.list_value_length(part), 0).to_numpy() for part in rewards]
        values = [pc.list_flatten(part).to_numpy(zero_copy_only=False) for part in rewards]
        rows = np.repeat(np.arange(len(groups)), np.concatenate(sizes))
        self.noted["outlier_rewards"] = outlying_rows(np.concatenate(values), rows)

    def _count_texts(self, texts: pa.ListArray) -> None:
        """Add what can be told from the responses of some groups."""
        sizes = pc.list_value_length(texts).to_numpy(zero_copy_only=False)
        flat = pc.list_flatten(texts)
        # equal codes are equal texts, so comparing them needs no Python string
        codes = flat.dictionary_encode().indices.to_numpy(zero_copy_only=False)
        named = np.repeat(np.arange(sizes.size), sizes) * len(flat) + codes
        found = {
            "duplicate_responses": named.size - np.unique(named).size,
            "single_response_groups": int((sizes == 1).sum()),
            "empty_responses": int((pc.binary_length(flat).to_numpy() == 0).sum()),
            "whitespace_only_responses": pc.sum(pc.utf8_is_space(flat)).as_py() or 0,
        }
        self._add(list(found.values()), list(found))

    def _add(self, found: Sequence[int] | NDArray[np.int64], called: Sequence[str]) -> None:
        for name, count in zip(called, found, strict=True):
            self.counts[name] = self.counts.get(name, 0) + int(count)


def _agreement(rewards: Sequence[float] | None) -> NDArray[np.int64]:
    """Tell of a pair, the chosen response first, whether it is scored, flipped and equal."""
    if rewards is None or len(rewards) != 2:
        return np.zeros(3, dtype=int)
    return np.array([1, rewards[0] < rewards[1], rewards[0] == rewards[1]], dtype=int)


def outlying_rows(values: NDArray[np.float64], rows: NDArray[np.int64]) -> list[int]:
    """Return the groups that hold a reward far from all others.

    Parameters
    ----------
    values, rows : (n,) ndarray
        Rewards, and the number of the group that each is of.

    Returns
    -------
    list of int
        Their numbers.

    Examples
    --------
    >>> outlying_rows(np.array([1.0, 2.0, 3.0, 2.0, 1e9]), np.array([0, 0, 0, 1, 1]))
    [1]
    """
    if values.size == 0:
        return []
    middle = np.median(values)
    spread = stats.median_abs_deviation(values, scale="normal")
    if spread == 0:
        return []
    found: list[int] = np.unique(rows[np.abs(values - middle) > _OUTLIER * spread]).tolist()
    return found


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
