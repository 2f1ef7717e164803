"""Scored groups -> groups with calibrated and transformed rewards, and pairs with margins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ctrl_dpo._validation import check_choice, check_columns, check_one_of, check_positive
from ctrl_dpo.calibrate import count_below_and_tied
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import FloatArray, IntArray, Ragged, lengths_of, read_floats, to_lists
from ctrl_dpo.theory.policies import match_kl
from ctrl_dpo.theory.procedures import Procedure, parse_procedure
from ctrl_dpo.transform import parse_transformation, transformed_rewards

if TYPE_CHECKING:
    from datasets import Dataset

CALIBRATIONS = ("empirical",)
ESTIMATORS = ("posterior", "plug_in")
ADDED = (
    columns.CALIBRATED_REWARDS,
    columns.TRANSFORMED_REWARDS,
    columns.LOG_NORMALISER,
    columns.BETA,
    columns.PROCEDURE,
    columns.TRANSFORMATION,
)
_LISTS = (columns.CALIBRATED_REWARDS, columns.TRANSFORMED_REWARDS)
_TEXTS = (columns.PROCEDURE, columns.TRANSFORMATION)


def relabel(
    groups: Dataset,
    *,
    procedure: str | Procedure,
    transformation: Any = "optimal",
    beta: float | None = None,
    target_kl: float | None = None,
    calibration: str = "empirical",
    estimator: str = "posterior",
    against: str | Procedure | None = None,
    **map_options: Any,
) -> Dataset:
    r"""Add calibrated and transformed rewards to scored groups.

    .. math:: C = \hat C(x, y), \qquad \hat\Phi = E[\Phi(U) \mid \text{rank of } y]

    The target of training is then :math:`\log \pi / \pi_\mathrm{ref} = \hat\Phi/\beta - \log Z`.

    Parameters
    ----------
    groups : Dataset or IterableDataset
        Rows with ``responses`` and ``rewards``, lists of one length; ``reference_rewards`` where
        the responses are not themselves the draws of the reference policy. Other columns are kept.
    procedure : str or Procedure
        How the trained policy will be used: ``"best_of_4"``, ``"worst_of_8"``, ``"single_draw"``.
    transformation : str or Transformation
        ``"optimal"``, ``"identity"``, ``"log"``, ``"normal_quantile"``, ``"exponential:5"``.
    beta : float, optional
        Strength of the KL penalty, > 0. Give this or ``target_kl``.
    target_kl : float, optional
        KL budget in nats per response, from which beta follows.
    calibration : str
        How calibrated rewards are estimated: ``"empirical"``.
    estimator : {"posterior", "plug_in"}
        See :func:`ctrl_dpo.transform.transformed_rewards`.
    against : str or Procedure, optional
        Procedure on the reference policy's side; by default the same.
    **map_options
        For ``datasets.map``, such as ``num_proc=4`` or ``batch_size=1000``.

    Returns
    -------
    Dataset or IterableDataset
        The rows in their order with ``calibrated_rewards`` and ``transformed_rewards`` (lists),
        ``log_normaliser``, ``beta``, ``procedure`` and ``transformation``.

    Raises
    ------
    ValueError
        If there is no row, a column is missing, a reward is not finite, list lengths differ, or not
        exactly one of ``beta`` and ``target_kl`` is given.

    Notes
    -----
    A response that is itself a reference draw is compared with the other draws (leave one out),
    the only one of its prompt is given 1/2. A relabelled dataset can be relabelled again.

    Examples
    --------
    >>> from datasets import Dataset
    >>> groups = Dataset.from_dict(
    ...     {"prompt": ["Hi"], "responses": [["a", "b", "c"]], "rewards": [[0.1, 0.9, 0.4]]}
    ... )
    >>> relabel(groups, procedure="best_of_4", beta=0.1)["calibrated_rewards"][0]
    [0.0, 1.0, 0.5]
    """
    found = groups.column_names or list(next(iter(groups)))
    check_columns(found, [columns.RESPONSES], "Use to_groups first.")
    check_columns(found, [columns.REWARDS], "Run `ctrl-dpo score` first.")
    settings = _settings(procedure, transformation, beta, target_kl, against)
    settings["estimator"] = check_choice("estimator", estimator, ESTIMATORS)
    settings["calibration"] = check_choice("calibration", calibration, CALIBRATIONS)
    read = [
        n for n in (columns.RESPONSES, columns.REWARDS, columns.REFERENCE_REWARDS) if n in found
    ]
    return _add_columns(groups, found, read, settings, map_options)


def _settings(
    procedure: str | Procedure,
    transformation: Any,
    beta: float | None,
    target_kl: float | None,
    against: str | Procedure | None,
) -> dict[str, Any]:
    """Return what decides the transformed rewards, beta solved for, as plain values if possible."""
    served = parse_procedure(procedure)
    opponent = None if against is None else parse_procedure(against)
    if check_one_of(beta=beta, target_kl=target_kl) == "beta":
        beta = check_positive("beta", beta)
    else:
        budget = check_positive("target_kl", target_kl)
        given = transformation
        if transformation != "optimal":
            given = parse_transformation(transformation)
        beta = match_kl(given, served, budget, against=opponent)
    return {
        "transformation": parse_transformation(transformation, served, beta, opponent),
        "procedure": str(served),
        "beta": beta,
    }


def _add_columns(
    groups: Any, found: list[str], read: list[str], settings: dict[str, Any], options: Any
) -> Any:
    """Compute the new columns from the numeric ones, in Arrow batches, and set them beside."""
    from datasets import Dataset, Features, Value, concatenate_datasets
    from datasets import List as ListOf

    features = Features(
        {name: ListOf(Value("float64")) for name in _LISTS}
        | {name: Value("float64") for name in (columns.LOG_NORMALISER, columns.BETA)}
        | {name: Value("string") for name in _TEXTS}
    )
    groups = groups.remove_columns([name for name in ADDED if name in found])
    if not isinstance(groups, Dataset):
        return _add_to_stream(groups, features, settings)
    if len(groups) == 0:
        raise ValueError("groups must have at least one row; got 0. Check the file and filters.")
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
    return concatenate_datasets([groups, made.with_format(None)], axis=1)


def _add_to_stream(groups: Any, features: Any, settings: dict[str, Any]) -> Any:
    """Add the columns to a stream, as its rows pass."""
    known = None if groups.features is None else type(features)({**groups.features, **features})
    made = groups.with_format("arrow").map(
        relabel_batch, batched=True, with_indices=True, fn_kwargs=settings, features=known
    )
    return made.with_format(None)


def relabel_batch(
    table: pa.Table,
    indices: list[int],
    *,
    transformation: Any,
    procedure: str,
    beta: float,
    estimator: str,
    calibration: str,
) -> pa.Table:
    """Return the new columns of a batch of groups.

    Parameters
    ----------
    table : pyarrow.Table
        ``responses``, ``rewards`` and, where there are any, ``reference_rewards``.
    indices : list of int
        Row numbers, for errors.
    transformation, procedure, beta, estimator, calibration
        What :func:`relabel` settled.

    Returns
    -------
    pyarrow.Table
        The columns :data:`ADDED`.
    """
    rewards = read_floats(table, columns.REWARDS, indices)
    _check_lengths(rewards, lengths_of(table, columns.RESPONSES, indices), indices)
    inside = columns.REFERENCE_REWARDS not in table.column_names
    reference = rewards if inside else read_floats(table, columns.REFERENCE_REWARDS, indices)
    if (reference.lengths == 0).any():
        row = indices[int(np.argmin(reference.lengths))]
        name = columns.REWARDS if inside else columns.REFERENCE_REWARDS
        raise ValueError(
            f"{name} must hold at least one reward; got none at row {row}. Draw from the reference "
            "policy first, drop that row, or use calibration='pooled'."
        )
    counts = count_below_and_tied(rewards.padded(), reference.padded())
    below, tied = counts[0][rewards.mask], counts[1][rewards.mask]
    k = np.repeat(reference.lengths, rewards.lengths)
    made = {
        columns.CALIBRATED_REWARDS: _calibrated(below, tied, k, inside),
        columns.TRANSFORMED_REWARDS: _transformed(
            transformation, below, tied, k, inside, estimator
        ),
    }
    lists = {name: to_lists(values, rewards.lengths) for name, values in made.items()}
    n = len(indices)
    constant = {
        columns.LOG_NORMALISER: pa.array(np.full(n, transformation.log_normaliser(beta))),
        columns.BETA: pa.array(np.full(n, beta)),
        columns.PROCEDURE: pa.array([procedure] * n),
        columns.TRANSFORMATION: pa.array([str(transformation)] * n),
    }
    return pa.table(lists | constant)


def _check_lengths(rewards: Ragged, responses: IntArray, indices: list[int]) -> None:
    """Raise unless every response of a row has a reward."""
    unequal = rewards.lengths != responses
    if unequal.any():
        i = int(np.argmax(unequal))
        raise ValueError(
            f"rewards must have one entry per response; got {rewards.lengths[i]} for "
            f"{responses[i]} responses at row {indices[i]}. Score that row again or drop it."
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
