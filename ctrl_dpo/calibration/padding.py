"""One sequence of numbers a prompt -> a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrl_dpo._validation import check_finite


def padded_rows(name: str, rows: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Return rows of different lengths as one matrix filled up with NaN, or raise.

    Parameters
    ----------
    name : str
        What the error calls them.
    rows : sequence of array_like
        Finite numbers, one sequence a prompt.

    Returns
    -------
    (n_prompts, longest) ndarray
        float64.

    Raises
    ------
    ValueError
        If there is no row, or an entry is not finite.
    """
    arrays = [np.asarray(row, dtype=np.float64) for row in rows]
    if not arrays:
        raise ValueError(f"{name} must hold at least one prompt; got {rows!r}.")
    flat = all(array.ndim == 1 for array in arrays)
    if not flat or not np.isfinite(values := np.concatenate(arrays)).all():
        for i, array in enumerate(arrays):
            check_finite(f"{name} at row {i}", array, ndim=1)
    lengths = np.array([len(array) for array in arrays])
    matrix = np.full((len(arrays), int(lengths.max())), np.nan)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = values
    return matrix
