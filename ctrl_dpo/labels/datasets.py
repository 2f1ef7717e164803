"""Labels as columns of a dataset: in batches, over a stream, or from all rows at once."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ctrl_dpo._validation import check_columns
from ctrl_dpo.calibrate import RewardCalibrator
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import IntArray, lengths_of
from ctrl_dpo.labels.calibrated import calibrated_columns
from ctrl_dpo.labels.groups import ADDED, anchor_of, relabel_batch

logger = logging.getLogger(__name__)

_LISTS = (columns.CALIBRATED_REWARDS, columns.TRANSFORMED_REWARDS)
_LOGPS = (columns.REFERENCE_LOGPS, columns.SAMPLER_LOGPS)
_TEXTS = (columns.PROCEDURE, columns.TRANSFORMATION)


def add_calibrated(
    groups: Any, found: list[str], calibrator: RewardCalibrator, settings: dict[str, Any]
) -> Any:
    """Compute the new columns from all rows at once, since they share what is learned.

    Parameters
    ----------
    groups : Dataset
        Scored groups.
    found : list of str
        Their columns.
    calibrator : RewardCalibrator
        Of method ``pooled`` or ``weighted``.
    settings : dict
        ``transformation``, ``beta`` and ``procedure``.

    Returns
    -------
    Dataset
        The groups with the new columns; after ``weighted`` without what it has taken account of:
        ``sampled_from``, and ``reference_logps`` that no ``reference_computed`` vouches for, so
        that training would not use them.

    Raises
    ------
    TypeError
        If the groups are a stream.
    ValueError
        If there is no row, ``weighted`` meets rewards of other draws than those that its weights
        are of, or ``pooled`` meets weighted labels.
    """
    from datasets import Dataset, concatenate_datasets

    method = calibrator.method
    _check_draws(found, method)
    if not isinstance(groups, Dataset):
        raise TypeError(
            f"groups must be a Dataset for calibration={method!r}; got {type(groups).__name__}."
        )
    _check_not_empty(groups)
    groups = groups.remove_columns([name for name in ADDED if name in found])
    numbers = (*columns.COMPARED_WITH, *_LOGPS, columns.PROMPT_FEATURES)
    table = groups.select_columns([n for n in numbers if n in found]).with_format("arrow")[:]
    responses = _count_responses(groups)
    made = calibrated_columns(table, responses, calibrator, settings["transformation"])
    beta = settings["beta"]
    constant = {
        columns.LOG_NORMALISER: settings["transformation"].log_normaliser(beta),
        columns.BETA: beta,
        columns.PROCEDURE: settings["procedure"],
        columns.TRANSFORMATION: str(settings["transformation"]),
    }
    for name, value in constant.items():
        made = made.append_column(name, [[value] * len(groups)])
    if method == "weighted":
        spent = {columns.SAMPLED_FROM}
        spent |= set() if columns.REFERENCE_COMPUTED in found else {columns.REFERENCE_LOGPS}
        groups = groups.remove_columns(sorted(spent.intersection(found)))
    return concatenate_datasets([groups, Dataset(made)], axis=1)


def _check_draws(found: list[str], method: str) -> None:
    """Raise where the method is not for the draws that the columns tell of."""
    if method == "weighted":
        check_columns(found, _LOGPS, "Weights need the log-probabilities of both policies.")
        name = columns.compared_with(found)
        if name != columns.REWARDS:
            raise ValueError(
                f"{name} must be absent for calibration='weighted', whose draws are the responses; "
                f"got columns {sorted(found)}. Give the groups as they were drawn, or use another "
                "calibration."
            )
    elif columns.EFFECTIVE_SAMPLE_SIZE in found:
        raise ValueError(
            "calibration must be 'weighted' for groups with weighted labels, whose responses are "
            f"another policy's; got {method!r} and the column {columns.EFFECTIVE_SAMPLE_SIZE!r}. "
            "Relabel the scored groups that they were made of."
        )


def _check_not_empty(groups: Any) -> None:
    if len(groups) == 0:
        raise ValueError("groups must have at least one row; got 0. Check the file and filters.")


def _count_responses(groups: Any) -> IntArray:
    """Return the number of responses of each row, without all their texts in memory."""
    lengths, start = [], 0
    for table in groups.select_columns([columns.RESPONSES]).with_format("arrow").iter(1000):
        lengths.append(lengths_of(table, columns.RESPONSES, list(range(start, start + len(table)))))
        start += len(table)
    return np.concatenate(lengths)


def add_columns(groups: Any, found: list[str], settings: dict[str, Any], options: Any) -> Any:
    """Compute the new columns from the numeric ones, in Arrow batches, and set them beside.

    Parameters
    ----------
    groups : Dataset or IterableDataset
        Scored groups.
    found : list of str
        Their columns.
    settings : dict
        Arguments of :func:`ctrl_dpo.labels.groups.relabel_batch`.
    options : dict
        For ``datasets.map``.

    Returns
    -------
    Dataset or IterableDataset
        The groups with the new columns.

    Raises
    ------
    ValueError
        If there is no row, or the groups have weighted labels.
    """
    from datasets import Dataset, Features, Value, concatenate_datasets
    from datasets import List as ListOf

    _check_draws(found, "empirical")
    features = Features(
        {name: ListOf(Value("float64")) for name in _LISTS}
        | {name: Value("float64") for name in (columns.LOG_NORMALISER, columns.BETA)}
        | {name: Value("string") for name in _TEXTS}
    )
    if anchor_of(settings["estimator"]) is not None:
        features[columns.ANCHOR] = Value("float64")
    groups = groups.remove_columns([name for name in ADDED if name in found])
    if not isinstance(groups, Dataset):
        return _add_to_stream(groups, features, settings)
    _check_not_empty(groups)
    read = [n for n in (columns.RESPONSES, *columns.COMPARED_WITH) if n in found]
    numbers = groups.select_columns(read)
    made = numbers.with_format("arrow").map(
        relabel_batch,
        batched=True,
        with_indices=True,
        fn_kwargs=settings,
        remove_columns=read,
        features=features,
        **{"desc": "relabel", **options},
    )
    _warn_of_few_draws(numbers)
    return concatenate_datasets([groups, made.with_format(None)], axis=1)


def _warn_of_few_draws(numbers: Any) -> None:
    """Warn of prompts whose responses are compared with one reference draw, or none."""
    name = columns.compared_with(numbers.column_names)
    least = 2 if name == columns.REFERENCE_REWARDS else 3  # a draw is not compared with itself
    table = numbers.select_columns([name]).with_format("arrow")[:]
    lengths = pc.fill_null(pc.list_value_length(table[name]), least).to_numpy()
    few = np.flatnonzero(lengths < least)
    if few.size:
        logger.warning(
            "%d of %d prompts have one reference draw to compare with at most, so that their "
            "calibrated rewards are 0, 1/2 or 1; first at row %d. Draw more, or use "
            "calibration='pooled'.",
            few.size,
            lengths.size,
            few[0],
        )


def _add_to_stream(groups: Any, features: Any, settings: dict[str, Any]) -> Any:
    """Add the columns to a stream, as its rows pass."""
    known = None if groups.features is None else type(features)({**groups.features, **features})

    def add(table: Any, indices: list[int]) -> Any:
        # what a function on Arrow batches of a stream returns is all that the stream keeps
        made = relabel_batch(table, indices, **settings)
        for name in made.column_names:
            table = table.append_column(name, made.column(name))
        return table

    made = groups.with_format("arrow").map(add, batched=True, with_indices=True, features=known)
    return made.with_format(None)
