"""A batch of scored groups -> calibrated and transformed rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ctrl_dpo.calibration.ranks import count_below_and_tied
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import FloatArray, IntArray, Ragged, lengths_of, read_floats, to_lists
from ctrl_dpo.labels.levels import level_labels
from ctrl_dpo.theory.rank_targets import RankOptimal
from ctrl_dpo.transform import transformed_rewards

LEVELS = "levels"
RAW = "raw"
ADDED = (
    columns.CALIBRATED_REWARDS,
    columns.TRANSFORMED_REWARDS,
    columns.LOG_NORMALISER,
    columns.BETA,
    columns.PROCEDURE,
    columns.TRANSFORMATION,
    columns.ANCHOR,
    columns.EFFECTIVE_SAMPLE_SIZE,
)


def relabel_batch(
    table: pa.Table,
    indices: list[int],
    *,
    transformation: Any,
    procedure: str,
    beta: float,
    estimator: str | RankOptimal,
) -> pa.Table:
    """Return the new columns of a batch of groups.

    Parameters
    ----------
    table : pyarrow.Table
        ``responses``, ``rewards`` and, where there are any, ``reference_rewards`` or
        ``draw_rewards``.
    indices : list of int
        Row numbers, for errors.
    transformation, procedure, beta, estimator
        What :func:`relabel` settled.

    Returns
    -------
    pyarrow.Table
        The columns :data:`ADDED`, but for the last, which weighted calibration has, and without
        ``anchor`` where the labels are the same for any.

    Raises
    ------
    ValueError
        If a reward is not finite, missing or not among the group's draws, or a prompt has no
        reference reward.
    """
    rewards = read_floats(table, columns.REWARDS, indices)
    check_lengths(columns.REWARDS, rewards, lengths_of(table, columns.RESPONSES, indices), indices)
    reference, inside = read_reference(table, rewards, indices)
    _check_reference(reference, inside, indices)
    log_normaliser: float | FloatArray | None
    counts = count_below_and_tied(rewards.padded(), reference.padded())
    below, tied = counts[0][rewards.mask], counts[1][rewards.mask]
    if inside:
        check_drawn(rewards, tied, indices)
    k = np.repeat(reference.lengths, rewards.lengths)
    if isinstance(estimator, RankOptimal):
        # these targets are log-ratios already, of normaliser 1
        transformed = beta * _rank_optimal(estimator, below, tied, k, inside)
        log_normaliser = 0.0
    elif estimator == RAW:
        # the normaliser of a raw reward is not known
        transformed, log_normaliser = rewards.values, None
    elif estimator == LEVELS:
        transformed, log_normaliser = level_labels(transformation, rewards, reference, beta)
    else:
        transformed = _transformed(transformation, below, tied, k, inside, estimator)
        log_normaliser = transformation.log_normaliser(beta)
    made = {
        columns.CALIBRATED_REWARDS: _calibrated(below, tied, k, inside),
        columns.TRANSFORMED_REWARDS: transformed,
    }
    lists = {name: to_lists(values, rewards.lengths) for name, values in made.items()}
    n = len(indices)
    constant = {
        columns.LOG_NORMALISER: pa.nulls(n, pa.float64())
        if log_normaliser is None
        else pa.array(np.broadcast_to(log_normaliser, n).copy()),
        columns.BETA: pa.array(np.full(n, beta)),
        columns.PROCEDURE: pa.array([procedure] * n),
        columns.TRANSFORMATION: pa.array([str(transformation)] * n),
    }
    if anchor_of(estimator) is not None:
        constant[columns.ANCHOR] = pa.array(np.full(n, anchor_of(estimator)))
    return pa.table(lists | constant)


def anchor_of(estimator: str | RankOptimal) -> float | None:
    """Return the anchor of the loss that the labels are meant for, if they are for one."""
    return estimator.anchor if isinstance(estimator, RankOptimal) else None


def read_reference(table: pa.Table, rewards: Ragged, indices: list[int]) -> tuple[Ragged, bool]:
    """Read the rewards of the draws that calibrate the responses.

    Parameters
    ----------
    table : pyarrow.Table
        Perhaps ``reference_rewards`` or ``draw_rewards``.
    rewards : Ragged
        Of the responses.
    indices : list of int
        Row numbers, for errors.

    Returns
    -------
    reference : Ragged
        Rewards of the draws.
    inside : bool
        Whether the responses are themselves among the draws.
    """
    name = columns.compared_with(table.column_names)
    reference = rewards if name == columns.REWARDS else read_floats(table, name, indices)
    return reference, name != columns.REFERENCE_REWARDS


def check_drawn(rewards: Ragged, tied: IntArray, indices: list[int]) -> None:
    """Check that responses are among the draws that they are compared with.

    Parameters
    ----------
    rewards : Ragged
        Of the responses.
    tied : (n,) ndarray of int
        Draws with the same reward, of each response.
    indices : list of int
        Row numbers, for the error.

    Raises
    ------
    ValueError
        If a response has a reward that no draw has.
    """
    if not tied.all():
        bad = int(np.argmin(tied))
        row, place = rewards.locate(bad)
        raise ValueError(
            f"rewards must be among a prompt's {columns.DRAW_REWARDS}, those of all its draws; got "
            f"{rewards.values[bad]} at row {indices[row]}, response {place}. Score and relabel the "
            "whole groups."
        )


def check_lengths(name: str, values: Ragged, responses: IntArray, indices: list[int]) -> None:
    """Check that every response of a row has an entry.

    Parameters
    ----------
    name : str
        The column.
    values : Ragged
        What it holds.
    responses : (n_rows,) ndarray of int
        Responses of each row.
    indices : list of int
        Row numbers, for the error.

    Raises
    ------
    ValueError
        If a row has more or fewer entries than responses.
    """
    unequal = values.lengths != responses
    if unequal.any():
        i = int(np.argmax(unequal))
        raise ValueError(
            f"{name} must have one entry per response; got {values.lengths[i]} for "
            f"{responses[i]} responses at row {indices[i]}. Mend that row or drop it."
        )


def _check_reference(reference: Ragged, inside: bool, indices: list[int]) -> None:
    """Raise unless every prompt has a reference reward to be calibrated by."""
    if (reference.lengths == 0).any():
        row = indices[int(np.argmin(reference.lengths))]
        name = columns.REWARDS if inside else columns.REFERENCE_REWARDS
        raise ValueError(
            f"{name} must hold at least one reward; got none at row {row}. Draw from the reference "
            "policy first, drop that row, or use calibration='pooled'."
        )


def _calibrated(below: IntArray, tied: IntArray, k: IntArray, inside: bool) -> FloatArray:
    """Return mid-ranks among the reference draws, among the other ones for a draw itself."""
    if not inside:
        return np.asarray((below + tied / 2) / k)
    alone = k == 1
    middle = (below + (tied - 1) / 2) / np.where(alone, 1, k - 1)
    return np.where(alone, 0.5, middle)


def _transformed(
    transformation: Any,
    below: IntArray,
    tied: IntArray,
    k: IntArray,
    inside: bool,
    estimator: str,
) -> FloatArray:
    """Return transformed rewards, prompts with the same number of reference draws together."""
    values = np.empty(below.size)
    for count in np.unique(k):
        chosen = k == count
        values[chosen] = transformed_rewards(
            transformation, below[chosen], tied[chosen], int(count), inside, estimator
        )
    return values


def _rank_optimal(
    wanted: RankOptimal, below: IntArray, tied: IntArray, k: IntArray, inside: bool
) -> FloatArray:
    """Return target log-ratios, prompts with the same number of reference draws together."""
    values = np.empty(below.size)
    for count in np.unique(k):
        chosen = k == count
        targets = wanted.targets(int(count), inside)
        values[chosen] = targets.at(below[chosen], tied[chosen], inside)
    return values
