"""Labels from a calibrator that looks at all prompts or at importance weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ctrl_dpo.calibrate import RewardCalibrator
from ctrl_dpo.calibration.ranks import count_below_and_tied
from ctrl_dpo.data import columns
from ctrl_dpo.data.ragged import FloatArray, IntArray, Ragged, read_floats, to_lists
from ctrl_dpo.labels.groups import check_drawn, check_lengths, read_reference


def calibrated_columns(
    table: pa.Table, responses: IntArray, calibrator: RewardCalibrator, transformation: Any
) -> pa.Table:
    """Return calibrated and transformed rewards of a whole dataset.

    Parameters
    ----------
    table : pyarrow.Table
        ``rewards``; ``reference_rewards`` where the responses are not the draws, ``draw_rewards``
        where they are some of them; for ``weighted``
        ``reference_logps`` and ``sampler_logps``, nats; for ``pooled`` perhaps ``prompt_features``.
    responses : (n_rows,) ndarray of int
        Responses of each row.
    calibrator : RewardCalibrator
        Of method ``pooled`` or ``weighted``; a copy of it is fitted.
    transformation : Transformation
        Applied to the calibrated rewards as they are.

    Returns
    -------
    pyarrow.Table
        ``calibrated_rewards`` and ``transformed_rewards``; for ``weighted`` also
        ``effective_sample_size``.

    Raises
    ------
    ValueError
        If a transformed reward is infinite, a row has not as many rewards or log-probabilities as
        responses, or features differ in number between prompts.
    """
    rows = list(range(len(table)))
    rewards = read_floats(table, columns.REWARDS, rows)
    check_lengths(columns.REWARDS, rewards, responses, rows)
    reference, inside = read_reference(table, rewards, rows)
    weights, features = None, None
    if calibrator.method == "weighted":
        names = columns.REFERENCE_LOGPS, columns.SAMPLER_LOGPS
        logs = [read_floats(table, name, rows) for name in names]
        for name, values in zip(names, logs, strict=True):
            check_lengths(name, values, responses, rows)
        weights = _rows(Ragged(logs[0].values - logs[1].values, rewards.lengths))
    elif columns.PROMPT_FEATURES in table.column_names:
        features = _matrix(read_floats(table, columns.PROMPT_FEATURES, rows))
    fitted = RewardCalibrator(**calibrator.get_params()).fit(_rows(reference), weights, features)
    if inside and reference is not rewards:
        calibrated = _of_some(rewards, reference, fitted.transform(_rows(reference), inside))
    else:
        calibrated = fitted.transform(_rows(rewards), inside)[rewards.mask]
    transformed = transformation(calibrated)
    if not np.isfinite(transformed).all():
        bad = int(np.argmin(np.isfinite(transformed)))
        row, place = rewards.locate(bad)
        raise ValueError(
            f"transformed rewards must be finite; got {transformed[bad]} for a calibrated reward "
            f"of {calibrated[bad]} at row {row}, response {place}. Use calibration='pooled', or a "
            "bounded transformation."
        )
    made = {
        columns.CALIBRATED_REWARDS: to_lists(calibrated, rewards.lengths),
        columns.TRANSFORMED_REWARDS: to_lists(transformed, rewards.lengths),
    }
    if weights is not None:
        made[columns.EFFECTIVE_SAMPLE_SIZE] = pa.array(fitted.effective_sample_size_)
    return pa.table(made)


def _of_some(rewards: Ragged, draws: Ragged, calibrated: FloatArray) -> FloatArray:
    """Return what draws of these rewards are calibrated to; draws of equal rewards are alike."""
    padded = draws.padded()
    below, tied = (c[rewards.mask] for c in count_below_and_tied(rewards.padded(), padded))
    check_drawn(rewards, tied, list(range(len(padded))))
    order = np.argsort(padded, axis=1)  # what fills rows up, NaN, comes last
    return np.asarray(calibrated[rewards.rows, order[rewards.rows, below]])


def _matrix(features: Ragged) -> Any:
    """Return features as a matrix, or raise where a prompt has more or fewer."""
    width = int(features.lengths[0])
    if (features.lengths != width).any():
        row = int(np.argmax(features.lengths != width))
        raise ValueError(
            f"prompt_features must be as many for every prompt; got {features.lengths[row]} at row "
            f"{row}, {width} at row 0. Mend or remove the column."
        )
    return features.values.reshape(-1, width)


def _rows(values: Ragged) -> list[Any]:
    return np.split(values.values, values.offsets[1:-1])
