"""A batch of relabelled groups -> pairs with margins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrl_dpo._validation import check_choice, check_integer
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import FloatArray, IntArray, is_text, one_array, read_floats

STRATEGIES = ("best_worst", "adjacent", "all", "random:N", "margin:T")
TIES = ("drop", "keep")
_CONSTANT = (columns.BETA, columns.PROCEDURE, columns.TRANSFORMATION)
_PER_RESPONSE = {
    columns.RESPONSE_IDS: (columns.CHOSEN_IDS, columns.REJECTED_IDS),
    columns.FINISHED: (columns.CHOSEN_FINISHED, columns.REJECTED_FINISHED),
}


@dataclass(frozen=True)
class PairStrategy:
    """Which pairs of a group to make.

    Parameters
    ----------
    name : str
        ``best_worst``, ``adjacent``, ``all``, ``random`` or ``margin``.
    count : int, optional
        Pairs of each group, for ``random``.
    threshold : float
        Least margin, for ``margin``, in the unit of the transformed reward.
    """

    name: str
    count: int | None = None
    threshold: float = 0.0


def parse_strategy(text: str) -> PairStrategy:
    """Read ``best_worst``, ``adjacent``, ``all``, ``random:4`` or ``margin:0.5``.

    Parameters
    ----------
    text : str
        The strategy.

    Returns
    -------
    PairStrategy
        What it means.

    Raises
    ------
    ValueError
        If it is none of these, or its number does not fit.

    Examples
    --------
    >>> parse_strategy("random:4")
    PairStrategy(name='random', count=4, threshold=0.0)
    """
    name, colon, number = str(text).partition(":")
    try:
        if name == "random" and colon:
            return PairStrategy(name, count=check_integer("N of random:N", int(number), 1))
        if name == "margin" and colon and float(number) >= 0:
            return PairStrategy(name, threshold=float(number))
    except ValueError:
        pass  # reported below, with every form that is allowed
    return PairStrategy(check_choice("strategy", text, STRATEGIES[:3] if colon else STRATEGIES))


@dataclass(frozen=True)
class Selection:
    """Pairs of a batch of groups, and the candidates that were left out.

    Parameters
    ----------
    row, chosen, rejected : (n_pairs,) ndarray of int
        Place of the group in the batch, and of both responses in the group.
    margin : (n_pairs,) ndarray
        Phi of the chosen response minus Phi of the rejected one, >= 0.
    ties, duplicates, flips : int
        Candidates with margin 0; candidates whose two responses are the same text, all dropped;
        pairs whose chosen response has the lower reward.
    """

    row: IntArray
    chosen: IntArray
    rejected: IntArray
    margin: FloatArray
    ties: int
    duplicates: int
    flips: int


def select_pairs(
    table: pa.Table, indices: list[int], strategy: PairStrategy, ties: str, seed: int
) -> Selection:
    """Choose pairs within each group of a batch.

    Parameters
    ----------
    table : pyarrow.Table
        ``responses``, ``transformed_rewards`` and ``calibrated_rewards``, which order responses of
        equal transformed rewards; ``rewards``, where flips are to be counted.
    indices : list of int
        Row numbers in the dataset: they seed ``random:N``, so that batching changes nothing.
    strategy : PairStrategy
        Which pairs.
    ties : {"drop", "keep"}
        What happens to pairs of margin 0.
    seed : int
        Seed of ``random:N``.

    Returns
    -------
    Selection
        Pairs ordered by row.
    """
    phi = read_floats(table, columns.TRANSFORMED_REWARDS, indices)
    finer = read_floats(table, columns.CALIBRATED_REWARDS, indices).values
    # equal codes are equal texts, so comparing them needs no Python string
    texts = pc.list_flatten(one_array(table, columns.RESPONSES)).dictionary_encode()
    codes = texts.indices.to_numpy(zero_copy_only=False)
    parts = []
    for size in np.unique(phi.lengths[phi.lengths > 1]):
        rows = np.flatnonzero(phi.lengths == size)
        cells = phi.offsets[rows][:, None] + np.arange(size)
        order = np.lexsort((finer[cells], phi.values[cells]), axis=1)
        low, high = _candidates(int(size), strategy.name)
        chosen, rejected = order[:, high], order[:, low]
        start = phi.offsets[rows][:, None]
        margin = phi.values[start + chosen] - phi.values[start + rejected]
        same = codes[start + chosen] == codes[start + rejected]
        where = np.broadcast_to(rows[:, None], margin.shape)
        parts.append([a.ravel() for a in (where, chosen, rejected, margin, same)])
    if not parts:
        nothing = np.empty(0, dtype=np.int64)
        return Selection(nothing, nothing, nothing, np.empty(0), 0, 0, 0)
    row, chosen, rejected, margin, same = (np.concatenate(a) for a in zip(*parts, strict=True))
    tied = ~same & (margin == 0)
    kept = ~same & (margin >= strategy.threshold) & ((ties == "keep") | ~tied)
    kept = np.flatnonzero(kept)[np.argsort(row[kept], kind="stable")]
    if strategy.count is not None:
        kept = kept[_random(row[kept], indices, strategy.count, seed)]
    made = row[kept], chosen[kept], rejected[kept], margin[kept]
    flips = 0
    if columns.REWARDS in table.column_names:
        rewards, start = read_floats(table, columns.REWARDS, indices).values, phi.offsets[made[0]]
        flips = int((rewards[start + made[1]] < rewards[start + made[2]]).sum())
    return Selection(*made, int(tied.sum()), int(same.sum()), flips)


def _candidates(size: int, name: str) -> tuple[IntArray, IntArray]:
    """Return the ranks, from 0 for the worst, of the lower and the higher response of each pair."""
    if name == "best_worst":
        return np.array([0]), np.array([size - 1])
    if name == "adjacent":
        return np.arange(size - 1), np.arange(1, size)
    low, high = np.triu_indices(size, 1)
    return low, high


def _random(row: IntArray, indices: list[int], count: int, seed: int) -> IntArray:
    """Return places of ``count`` random pairs of each row, or of all where there are fewer."""
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    picked = []
    for start, size in zip(starts, np.diff(starts, append=row.size), strict=True):
        generator = np.random.default_rng([seed, indices[row[start]]])
        chosen = generator.choice(size, min(count, size), replace=False)
        picked.append(start + np.sort(chosen))
    return np.concatenate(picked) if picked else row


def pair_batch(
    table: pa.Table, indices: list[int], *, strategy: PairStrategy, ties: str, seed: int
) -> pa.Table:
    """Return the pairs of a batch of relabelled groups.

    Parameters
    ----------
    table : pyarrow.Table
        Relabelled groups.
    indices : list of int
        Row numbers in the dataset.
    strategy, ties, seed
        See :func:`select_pairs`.

    Returns
    -------
    pyarrow.Table
        ``prompt, chosen, rejected, margin``, the labels' settings, and tokens as drawn where known.
    """
    pairs = select_pairs(table, indices, strategy, ties, seed)
    prompt = one_array(table, columns.PROMPT).take(pa.array(pairs.row))
    conversational = not is_text(prompt.type)
    sides = pairs.chosen, pairs.rejected
    made = {columns.PROMPT: prompt}
    for name, side in zip((columns.CHOSEN, columns.REJECTED), sides, strict=True):
        text = _entries(table, columns.RESPONSES, pairs.row, side)
        made[name] = _messages(text) if conversational else text
    made[columns.MARGIN] = pa.array(pairs.margin)
    for name in (*_CONSTANT, columns.SAMPLED_FROM, columns.WEIGHT):
        if name not in table.column_names:
            continue
        made[name] = one_array(table, name).take(pa.array(pairs.row))
    for name, names in _PER_RESPONSE.items():
        if name in table.column_names:
            for new, side in zip(names, sides, strict=True):
                made[new] = _entries(table, name, pairs.row, side)
    return pa.table(made)


def _entries(table: pa.Table, name: str, row: IntArray, place: IntArray) -> Any:
    """Return one entry of each named row of a list column."""
    column = one_array(table, name)
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    return pc.list_flatten(column).take(pa.array(offsets[row] + place))


def _messages(texts: Any) -> Any:
    """Return each text as a conversation of one assistant message."""
    roles = pa.array(["assistant"] * len(texts), pa.string())
    turns = pa.StructArray.from_arrays([roles, texts], ["role", "content"])
    return pa.ListArray.from_arrays(pa.array(np.arange(len(texts) + 1, dtype=np.int32)), turns)
