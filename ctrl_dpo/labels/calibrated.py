"""Labels from a calibrator that looks at all prompts or at importance weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ctrl_dpo.calibrate import RewardCalibrator
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import Ragged, read_floats, to_lists


def calibrated_columns(table: pa.Table, method: str, transformation: Any) -> pa.Table:
    """Return calibrated and transformed rewards of a whole dataset.

    Parameters
    ----------
    table : pyarrow.Table
        ``rewards``; ``reference_rewards`` where the responses are not the draws; for ``weighted``
        ``reference_logps`` and ``sampler_logps``, nats.
    method : {"pooled", "weighted"}
        Of :class:`ctrl_dpo.calibrate.RewardCalibrator`.
    transformation : Transformation
        Applied to the calibrated rewards as they are.

    Returns
    -------
    pyarrow.Table
        ``calibrated_rewards`` and ``transformed_rewards``.

    Raises
    ------
    ValueError
        If a transformed reward is infinite.
    """
    rows = list(range(len(table)))
    rewards = read_floats(table, columns.REWARDS, rows)
    inside = columns.REFERENCE_REWARDS not in table.column_names
    reference = rewards if inside else read_floats(table, columns.REFERENCE_REWARDS, rows)
    weights = None
    if method == "weighted":
        logs = [
            read_floats(table, name, rows).values
            for name in (columns.REFERENCE_LOGPS, columns.SAMPLER_LOGPS)
        ]
        weights = _rows(Ragged(logs[0] - logs[1], reference.lengths))
    calibrator = RewardCalibrator(method).fit(_rows(reference), weights)
    calibrated = calibrator.transform(_rows(rewards), inside)[rewards.mask]
    transformed = transformation(calibrated)
    if not np.isfinite(transformed).all():
        bad = int(np.argmin(np.isfinite(transformed)))
        row, place = rewards.locate(bad)
        raise ValueError(
            f"transformed rewards must be finite; got {transformed[bad]} for a calibrated reward "
            f"of {calibrated[bad]} at row {row}, response {place}. Use calibration='pooled', or a "
            "bounded transformation."
        )
    return pa.table(
        {
            columns.CALIBRATED_REWARDS: to_lists(calibrated, rewards.lengths),
            columns.TRANSFORMED_REWARDS: to_lists(transformed, rewards.lengths),
        }
    )


def _rows(values: Ragged) -> list[Any]:
    return np.split(values.values, values.offsets[1:-1])
