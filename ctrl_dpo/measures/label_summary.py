"""What relabelling made of a dataset, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ctrl_dpo._validation import check_columns
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import FloatArray, Ragged, read_floats
from ctrl_dpo.measures.tables import table
from ctrl_dpo.measures.uniformity import calibration_error

if TYPE_CHECKING:
    from datasets import Dataset

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_BATCH = 10_000


@dataclass(frozen=True)
class LabelSummary:
    """Counts and distributions of a relabelled dataset.

    Parameters
    ----------
    groups, responses : int
        How many there are.
    kolmogorov_smirnov, cramer_von_mises : float
        Distance of the calibrated rewards from uniform,
        see :func:`ctrl_dpo.evaluate.calibration_error`.
    tied_share : float
        Share of pairs within groups whose transformed rewards are equal.
    margin_quantiles : dict of str to float
        Absolute differences of transformed rewards within groups, in units of the transformed
        reward: at 5, 25, 50, 75 and 95 %.
    margin_nats : float
        Median difference in log-ratio that training aims at, margin over beta, nats.
    """

    groups: int
    responses: int
    kolmogorov_smirnov: float
    cramer_von_mises: float
    tied_share: float
    margin_quantiles: dict[str, float]
    margin_nats: float

    def to_dict(self) -> dict[str, float]:
        """Return one flat mapping of numbers, for JSON."""
        flat = asdict(self)
        quantiles = flat.pop("margin_quantiles")
        return flat | {f"margin_{name}": value for name, value in quantiles.items()}

    def __str__(self) -> str:
        """Write a table."""
        return table(["", "value"], [[k, f"{v:.4g}"] for k, v in self.to_dict().items()])


def summarise_labels(relabelled: Dataset) -> LabelSummary:
    """Describe what :func:`ctrl_dpo.relabel` made.

    Parameters
    ----------
    relabelled : Dataset
        Groups with ``calibrated_rewards``, ``transformed_rewards`` and ``beta``.

    Returns
    -------
    LabelSummary
        Counts, distance from uniform, ties and margins. Of more than 10,000 groups, margins are
        those of evenly spaced ones.

    Raises
    ------
    ValueError
        If a column is missing.

    Examples
    --------
    >>> from datasets import Dataset
    >>> from ctrl_dpo.relabel import relabel
    >>> groups = Dataset.from_dict(
    ...     {"prompt": ["Hi"], "responses": [["a", "b", "c"]], "rewards": [[0.1, 0.9, 0.4]]}
    ... )
    >>> made = relabel(groups, procedure="single_draw", transformation="identity", beta=0.5)
    >>> summarise_labels(made).margin_quantiles["50%"]
    0.25
    """
    needed = [columns.CALIBRATED_REWARDS, columns.TRANSFORMED_REWARDS, columns.BETA]
    check_columns(relabelled.column_names, needed, "Call relabel first.")
    calibrated, transformed = _lists(relabelled)
    step = max(1, transformed.lengths.size // _BATCH)
    margins, tied = _margins(transformed.padded()[::step])
    error = calibration_error(calibrated.values)
    values = np.quantile(margins, _QUANTILES) if margins.size else np.zeros(len(_QUANTILES))
    quantiles = {f"{q:.0%}": float(v) for q, v in zip(_QUANTILES, values, strict=True)}
    return LabelSummary(
        groups=len(relabelled),
        responses=transformed.values.size,
        kolmogorov_smirnov=error.kolmogorov_smirnov,
        cramer_von_mises=error.cramer_von_mises,
        tied_share=tied,
        margin_quantiles=quantiles,
        margin_nats=quantiles["50%"] / float(relabelled[0][columns.BETA]),
    )


def _lists(relabelled: Dataset) -> tuple[Ragged, Ragged]:
    """Return calibrated and transformed rewards of all rows."""
    names = (columns.CALIBRATED_REWARDS, columns.TRANSFORMED_REWARDS)
    tables = relabelled.select_columns(names).with_format("arrow").iter(batch_size=_BATCH)
    parts = [
        [read_floats(batch, name, list(range(len(batch)))) for name in names] for batch in tables
    ]
    joined = [
        Ragged(np.concatenate([p.values for p in made]), np.concatenate([p.lengths for p in made]))
        for made in zip(*parts, strict=True)
    ]
    return joined[0], joined[1]


def _margins(rows: FloatArray) -> tuple[FloatArray, float]:
    """Return all differences within groups, and the share that are 0."""
    first, second = np.triu_indices(rows.shape[1], 1)
    found = np.abs(rows[:, first] - rows[:, second]).ravel()
    found = found[np.isfinite(found)]
    return found, float(np.mean(found == 0)) if found.size else 0.0
