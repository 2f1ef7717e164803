"""What relabelling made of a dataset, in numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ctrl_dpo._validation import check_columns
from ctrl_dpo.calibrate import RewardCalibrator
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import FloatArray, read_floats
from ctrl_dpo.measures.tables import figures, table
from ctrl_dpo.measures.uniformity import CalibrationError, held_out_error

if TYPE_CHECKING:
    from datasets import Dataset

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_GROUPS = 10_000
_BATCH = 10_000
_BINS = 20


@dataclass(frozen=True)
class LabelSummary:
    """What went in, what came out, and how it is distributed.

    Parameters
    ----------
    reading, pairs : mapping
        What became of the rows, see :class:`ctrl_dpo.data.layout_report.LayoutReport`, and of the
        candidates for pairs, see :func:`ctrl_dpo.relabel.count_pairs`; empty where not known.
    groups, responses : int
        How many were relabelled.
    beta : float
        Strength of the KL penalty of the labels.
    calibration : str
        Method of calibration.
    calibration_error : CalibrationError, optional
        Distance from uniform of one half of every prompt's reference draws, calibrated by the
        other half; None where no prompt has two, or what weights them is not known.
    effective_sample_size : mapping of str to float
        ``minimum`` and ``median`` over prompts, in draws; of weighted calibration.
    tied_share, flipped_share : float
        Shares of pairs within groups whose transformed rewards are equal, and whose calibrated
        rewards are in another order than the rewards.
    margin_quantiles : dict of str to float
        Absolute differences of transformed rewards within groups, in units of the transformed
        reward: at 5, 25, 50, 75 and 95 %.
    margin_nats : float
        Median difference in log-ratio that training aims at, margin over beta, nats.
    histograms : dict of str to dict
        ``held_out`` calibrated rewards and ``margins`` in nats: ``edges`` and ``counts``.
    """

    groups: int
    responses: int
    beta: float
    calibration: str
    calibration_error: CalibrationError | None
    tied_share: float
    flipped_share: float
    margin_quantiles: dict[str, float]
    margin_nats: float
    histograms: dict[str, dict[str, list[float]]]
    effective_sample_size: dict[str, float] = field(default_factory=dict)
    reading: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return one flat mapping of numbers and texts, and ``histograms``, for JSON."""
        error = self.calibration_error
        numbers = {} if error is None else vars(error) | {"held_out_draws": error.n}
        numbers.pop("n", None)
        return {
            **self.reading,
            "groups": self.groups,
            "responses": self.responses,
            "beta": self.beta,
            "calibration": self.calibration,
            **numbers,
            **{f"effective_sample_size_{k}": v for k, v in self.effective_sample_size.items()},
            "tied_share": self.tied_share,
            "flipped_share": self.flipped_share,
            "margin_nats": self.margin_nats,
            **{f"margin_{name}": value for name, value in self.margin_quantiles.items()},
            **self.pairs,
            "histograms": self.histograms,
        }

    def __str__(self) -> str:
        """Write a table."""
        return table(["", "value"], figures(self.to_dict()))

    def save(self, path: str | Path) -> None:
        """Write the summary as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def summarise_labels(
    relabelled: Dataset,
    calibration: str = "empirical",
    *,
    draws: Dataset | None = None,
    reading: Mapping[str, Any] | None = None,
    pairs: Mapping[str, int] | None = None,
) -> LabelSummary:
    """Describe what :func:`ctrl_dpo.relabel` made.

    Parameters
    ----------
    relabelled : Dataset
        Groups with ``rewards``, ``calibrated_rewards``, ``transformed_rewards`` and ``beta``.
    calibration : {"empirical", "pooled", "weighted"}
        What calibrated them.
    draws : Dataset, optional
        The groups before they were relabelled, whose draws tell the calibration error; by default
        the relabelled ones, of which weighted calibration leaves too little for that.
    reading, pairs : mapping, optional
        Counts of reading and of pairs, to be told along.

    Returns
    -------
    LabelSummary
        Counts, calibration error, ties, flips and margins. Of more than 10,000 groups, all but the
        counts are of evenly spaced ones.

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
    lists = [columns.REWARDS, columns.CALIBRATED_REWARDS, columns.TRANSFORMED_REWARDS]
    check_columns(relabelled.column_names, [*lists, columns.BETA], "Call relabel first.")
    some = _spaced(relabelled)
    beta = float(relabelled[0][columns.BETA])
    rewards, calibrated, phi = (_padded(some, name) for name in lists)
    margins, tied, flipped = _margins(rewards, calibrated, phi)
    values = np.quantile(margins, _QUANTILES) if margins.size else np.zeros(len(_QUANTILES))
    quantiles = {f"{q:.0%}": float(v) for q, v in zip(_QUANTILES, values, strict=True)}
    held_out = _held_out(some if draws is None else _spaced(draws), calibration)
    return LabelSummary(
        groups=len(relabelled),
        responses=_responses(relabelled),
        beta=beta,
        calibration=calibration,
        calibration_error=None if held_out is None else held_out[0],
        tied_share=tied,
        flipped_share=flipped,
        margin_quantiles=quantiles,
        margin_nats=quantiles["50%"] / beta,
        histograms={
            "held_out": _histogram([] if held_out is None else held_out[1], 1.0),
            "margins": _histogram(margins / beta, float(margins.max(initial=0.0)) / beta or 1.0),
        },
        effective_sample_size=_sample_sizes(relabelled),
        reading=reading or {},
        pairs=pairs or {},
    )


def _spaced(dataset: Dataset) -> Dataset:
    return dataset.select(range(0, len(dataset), -(-len(dataset) // _GROUPS)))


def _padded(dataset: Dataset, name: str) -> FloatArray:
    """Return a list column as a matrix filled up with NaN."""
    rows = dataset.select_columns([name]).with_format("arrow")[:]
    return read_floats(rows, name, list(range(len(rows)))).padded()


def _responses(relabelled: Dataset) -> int:
    name = columns.REWARDS
    tables = relabelled.select_columns([name]).with_format("arrow").iter(batch_size=_BATCH)
    return sum(read_floats(t, name, list(range(len(t)))).values.size for t in tables)


def _margins(
    rewards: FloatArray, calibrated: FloatArray, phi: FloatArray
) -> tuple[FloatArray, float, float]:
    """Return all differences within groups, and the shares that are 0 and turned round."""
    first, second = np.triu_indices(phi.shape[1], 1)
    known = np.isfinite(phi[:, first]) & np.isfinite(phi[:, second])
    found, before, after = ((m[:, first] - m[:, second])[known] for m in (phi, rewards, calibrated))
    if not found.size:
        return found, 0.0, 0.0
    turned = np.sign(before) * np.sign(after) < 0
    return np.abs(found), float(np.mean(found == 0)), float(turned.mean())


def _held_out(some: Dataset, method: str) -> tuple[CalibrationError, FloatArray] | None:
    """Return the calibration error on the reference draws of some groups."""
    name = columns.compared_with(some.column_names)
    weights, features = None, None
    if method == "weighted":
        # of extremes the draws are known, but not the weights of those left out
        needed = {columns.REFERENCE_LOGPS, columns.SAMPLER_LOGPS}
        if name != columns.REWARDS or not needed.issubset(some.column_names):
            return None
        rows = zip(some[columns.REFERENCE_LOGPS], some[columns.SAMPLER_LOGPS], strict=True)
        weights = [np.subtract(ours, theirs) for ours, theirs in rows]
    elif method == "pooled" and columns.PROMPT_FEATURES in some.column_names:
        features = np.array(some[columns.PROMPT_FEATURES][:], dtype=np.float64)
    draws: list[ArrayLike] = [row[np.isfinite(row)] for row in _padded(some, name)]
    return held_out_error(RewardCalibrator(method), draws, weights, features)


def _sample_sizes(relabelled: Dataset) -> dict[str, float]:
    if columns.EFFECTIVE_SAMPLE_SIZE not in relabelled.column_names:
        return {}
    sizes = np.array(relabelled[columns.EFFECTIVE_SAMPLE_SIZE][:])
    return {"minimum": float(sizes.min()), "median": float(np.median(sizes))}


def _histogram(values: ArrayLike, end: float) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, _BINS, (0.0, end))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
