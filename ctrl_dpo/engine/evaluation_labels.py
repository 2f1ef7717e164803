"""Whether data to evaluate on has the labels that a policy is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctrl_dpo.config import HARD_LABEL_LOSSES, CTRLDPOConfig
from ctrl_dpo.data import columns

if TYPE_CHECKING:
    from datasets import Dataset


def labels_of_training(dataset: Dataset, config: CTRLDPOConfig, beta: float) -> dict[str, Any]:
    """Return what the labels of training were made for, by column.

    Parameters
    ----------
    dataset : Dataset
        Training data, from :func:`ctrl_dpo.engine.labelling.labelled`.
    config : CTRLDPOConfig
        Its loss and anchor.
    beta : float
        From :func:`ctrl_dpo.engine.labelling.resolve_beta`.

    Returns
    -------
    dict of str to str or float
        ``beta``, ``anchor`` and, where the dataset tells, ``procedure`` and ``transformation``;
        empty for losses that use only the order of rewards, and with ``accept_other_labels``.
    """
    if config.loss in HARD_LABEL_LOSSES or config.accept_other_labels:
        return {}
    told = [c for c in (columns.PROCEDURE, columns.TRANSFORMATION) if c in dataset.column_names]
    found = {column: dataset[0][column] for column in told}
    return {**found, columns.BETA: beta, columns.ANCHOR: config.anchor}


def check_labels(dataset: Dataset, wanted: Mapping[str, Any], name: str) -> None:
    """Raise where data to evaluate on was labelled for something else than training.

    Parameters
    ----------
    dataset : Dataset
        Data to evaluate on, labelled; of a column that it lacks nothing is known.
    wanted : mapping of str to str or float
        From :func:`labels_of_training`.
    name : str
        The argument that the dataset came as, for the error.

    Raises
    ------
    ValueError
        If a procedure, transformation, beta or anchor differs.
    """
    for column in (name for name in wanted if name in dataset.column_names):
        others = [v for v in dataset.unique(column) if not _same(v, wanted[column])]
        if others:
            raise ValueError(
                f"{column} of {name} must be that of the training labels, "
                f"{wanted[column]!r}; got {others[0]!r} at row "
                f"{list(dataset[column]).index(others[0])}. Relabel its scored groups with the "
                "settings of the training data: losses against other targets tell nothing."
            )


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)
