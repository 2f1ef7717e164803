"""Dataset -> labelled dataset: which labels train, and whether they are those configured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ctrl_dpo._validation import check_columns, check_positive
from ctrl_dpo.config import HARD_LABEL_LOSSES, CTRLDPOConfig
from ctrl_dpo.data import columns
from ctrl_dpo.data.inputs import check_dataset
from ctrl_dpo.data.layouts import to_groups
from ctrl_dpo.labels.groups import RAW
from ctrl_dpo.relabel import relabel
from ctrl_dpo.theory.procedures import Procedure, parse_procedure

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_RELABEL = "Run `ctrl-dpo relabel` first, or set procedure and target_kl in the configuration."


def labelled(dataset: Dataset, config: CTRLDPOConfig, name: str = "train_dataset") -> Dataset:
    """Return the dataset with targets, relabelling scored groups by the configuration.

    Parameters
    ----------
    dataset : Dataset
        Relabelled groups, scored groups, unpaired scored responses (``prompt, response, reward``),
        pairs with ``margin``, or plain pairs; pairs with explicit or implicit prompt.
    config : CTRLDPOConfig
        Its ``procedure``, ``transformation``, ``calibration``, ``beta`` and ``target_kl`` relabel
        scored groups; for the losses ``dpo`` and ``ipo`` their raw rewards are the labels.
    name : str
        The argument that the dataset came as, for errors.

    Returns
    -------
    Dataset
        Groups with ``transformed_rewards``, or pairs.

    Raises
    ------
    TypeError
        If it is no ``datasets.Dataset``.
    ValueError
        If the dataset is empty, of no known form, or lacks what the loss needs, if a column such as
        ``tools`` would not be rendered, a margin is not a finite number >= 0, or if it has its
        labels and the configuration says how to make them.
    """
    dataset = check_dataset(name, dataset)
    names = dataset.column_names
    are_pairs = columns.CHOSEN in names and columns.REJECTED in names
    if are_pairs:
        _check_pairs(dataset, config, name)
    if are_pairs or columns.TRANSFORMED_REWARDS in names:
        _check_unused(names, config, name)
        return dataset
    if columns.RESPONSE in names and columns.REWARD in names:
        dataset = _groups_of_one(dataset, config, name)
        names = dataset.column_names
    if columns.RESPONSES not in names or columns.REWARDS not in names:
        raise ValueError(
            f"{name} must hold groups (prompt, responses, rewards), pairs (prompt, chosen, "
            f"rejected) or single responses (prompt, response, reward); got {sorted(names)}. Score "
            "responses that have no rewards (`ctrl-dpo score`); other layouts of the README's data "
            "format are read by to_groups and `ctrl-dpo relabel`."
        )
    # a transformation may tie rewards, of which a hard-label loss uses the order
    hard = config.loss in HARD_LABEL_LOSSES
    procedure, transformation = config.procedure, RAW if hard else config.transformation
    if procedure is None and transformation == RAW:
        procedure = "single_draw"  # as those who proposed these losses used them
    if procedure is None:
        raise ValueError(f"procedure must be given for unlabelled groups; got None. {_RELABEL}")
    return relabel(
        dataset,
        procedure=procedure,
        transformation=transformation or "optimal",
        beta=config.beta,
        target_kl=config.target_kl,
        calibration=config.calibration or "empirical",
        anchor=config.anchor,
    )


def _check_unused(names: list[str], config: CTRLDPOConfig, dataset: str) -> None:
    """Raise where a setting says how to label a dataset that has its labels."""
    # what the dataset tells of them is compared by resolve_beta
    unused = ["target_kl", "calibration"]
    if columns.TRANSFORMATION not in names:
        unused.append("transformation")
    for name in unused:
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} must be left out for a dataset that has its labels; got "
                f"{getattr(config, name)!r} with {sorted(names)} of {dataset}. Nothing would use "
                "it: give scored groups (prompt, responses, rewards), or relabel the data for it."
            )


def _check_pairs(dataset: Dataset, config: CTRLDPOConfig, name: str) -> None:
    """Raise where pairs lack what the loss needs."""
    names = dataset.column_names
    if columns.CHOSEN_IDS in names:  # sides without a prompt of their own are split as texts
        check_columns(names, [columns.PROMPT], f"{name} has tokens of responses without it.")
    if columns.MARGIN not in names and config.loss not in HARD_LABEL_LOSSES:
        raise ValueError(
            f"{name}'s pairs must have a column 'margin' for loss={config.loss!r}; got "
            f"{sorted(names)}. Relabel scored groups and export pairs, or use loss='dpo'."
        )
    if config.anchor > 0:
        raise ValueError(
            f"anchor must be 0 for pairs, whose margin is a difference; got {config.anchor!r}. "
            "Train on the relabelled groups themselves."
        )
    if columns.MARGIN in names:
        _check_margins(dataset.select_columns([columns.MARGIN]).with_format("arrow")[:], name)


def _check_margins(table: pa.Table, name: str) -> None:
    """Raise unless every pair has a margin, and one that keeps its responses' places."""
    values = table[columns.MARGIN].to_numpy()
    good = np.zeros(len(values), dtype=bool)
    if values.dtype.kind in "fiu":
        good = np.isfinite(values) & (values >= 0)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(
            f"{name}'s margin must be a finite number >= 0; got "
            f"{table[columns.MARGIN][row].as_py()!r} at row {row}, the first of {(~good).sum()} "
            f"of {len(good)}. Drop those rows, swap chosen and rejected where it is negative, or "
            "remove the column for loss='dpo'."
        )


def _groups_of_one(dataset: Dataset, config: CTRLDPOConfig, name: str) -> Dataset:
    """Return unpaired responses as groups, or raise where there is nothing to rank them among."""
    if config.anchor == 0 or config.transformation == RAW:
        raise ValueError(
            f"anchor must be > 0 for unpaired responses; got {config.anchor!r}. A contrastive loss "
            "compares responses of one prompt: set anchor=1, or give groups."
        )
    if columns.REFERENCE_REWARDS not in dataset.column_names and config.calibration != "pooled":
        raise ValueError(
            f"{name}'s unpaired responses must have a column 'reference_rewards', rewards of draws "
            f"of the reference policy; got {sorted(dataset.column_names)}. Draw and score some, or "
            "set calibration='pooled'."
        )
    return to_groups(dataset, "unpaired", same_prompt="keep")


def resolve_beta(dataset: Dataset, config: CTRLDPOConfig) -> float:
    """Return the one beta of dataset and configuration, or raise where their labels differ.

    Parameters
    ----------
    dataset : Dataset
        From :func:`labelled`.
    config : CTRLDPOConfig
        May name ``beta``, ``procedure`` and ``transformation``.

    Returns
    -------
    float
        Strength of the KL penalty.

    Raises
    ------
    ValueError
        If the dataset was relabelled for several betas, procedures or transformations, or for
        another one than the configuration names.
    """
    hard = config.loss in HARD_LABEL_LOSSES
    if hard and config.beta is not None:
        return config.beta  # the baseline's own; only the order of its pairs is used
    settled = columns.PROCEDURE, columns.TRANSFORMATION, columns.BETA, columns.ANCHOR
    for column in settled:
        wanted = getattr(config, column)
        found = dataset.unique(column) if column in dataset.column_names else []
        if len(found) > 1:
            raise ValueError(
                f"{column} must be one for the whole dataset; got {sorted(found)[:4]}. Relabel it."
            )
        same = not found or wanted is None or found[0] == wanted or config.accept_other_labels
        if isinstance(wanted, float) and found:
            same = same or abs(found[0] - wanted) <= 1e-6 * wanted
        if not same:
            raise ValueError(
                f"{column} must be that of the relabelled dataset, {found[0]!r}; got {wanted!r}. "
                "Relabel the data for it, leave it out of the configuration, or set "
                "accept_other_labels."
            )
    if columns.BETA in dataset.column_names and not config.accept_other_labels:
        return check_positive("beta", float(dataset[0][columns.BETA]))
    if config.beta is None:
        raise ValueError("beta must be given, since the dataset has no column 'beta'; got None.")
    return config.beta


def resolve_procedure(dataset: Dataset, config: CTRLDPOConfig) -> Procedure | None:
    """Return how the policy will be used, for the predicted win rate; None where nobody says.

    Parameters
    ----------
    dataset : Dataset
        From :func:`labelled`.
    config : CTRLDPOConfig
        Its ``procedure`` comes first.

    Returns
    -------
    Procedure or None
        The configuration's, else the dataset's.
    """
    if config.procedure is not None:
        return parse_procedure(config.procedure)
    if columns.PROCEDURE not in dataset.column_names:
        return None
    return parse_procedure(dataset[0][columns.PROCEDURE])
