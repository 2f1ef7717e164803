"""List columns as arrays: the values of all rows in one array, and how many each row has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after the other.

    Parameters
    ----------
    values : (n,) ndarray
        The entries of all rows.
    lengths : (n_rows,) ndarray of int
        Entries of each row; sums to n.
    """

    values: NDArray[Any]
    lengths: IntArray

    @property
    def offsets(self) -> IntArray:
        """Where each row starts, and the total at the end."""
        return np.concatenate(([0], np.cumsum(self.lengths)))

    @property
    def rows(self) -> IntArray:
        """Row of each entry."""
        return np.repeat(np.arange(self.lengths.size), self.lengths)

    @property
    def positions(self) -> IntArray:
        """Place of each entry within its row."""
        return np.arange(self.values.size) - np.repeat(self.offsets[:-1], self.lengths)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Which cells of :meth:`padded` hold an entry, row by row in the order of the values."""
        width = int(self.lengths.max(initial=0))
        return np.asarray(np.arange(width) < self.lengths[:, None])

    def padded(self) -> FloatArray:
        """Return a matrix with one row each, filled up with NaN, which compares with nothing."""
        matrix = np.full(self.mask.shape, np.nan)
        matrix[self.mask] = self.values
        return matrix

    def locate(self, index: int) -> tuple[int, int]:
        """Return row and place within it of entry ``index``."""
        return int(self.rows[index]), int(self.positions[index])


def lengths_of(table: pa.Table, name: str, indices: list[int]) -> IntArray:
    """Return the number of entries of each row of a list column.

    Parameters
    ----------
    table : pyarrow.Table
        A batch of rows.
    name : str
        The column.
    indices : list of int
        Row numbers in the dataset, for errors.

    Returns
    -------
    (n_rows,) ndarray of int
        The lengths.

    Raises
    ------
    TypeError
        If the column does not hold lists.
    ValueError
        If a row holds no list.
    """
    column = one_array(table, name)
    if not _is_list(column.type):
        raise TypeError(f"column {name!r} must hold lists; got {column.type}. Use to_groups first.")
    if column.null_count:
        row = indices[int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))]
        raise ValueError(f"{name} must be a list; got None at row {row}. Drop that row.")
    return np.asarray(pc.list_value_length(column).to_numpy(zero_copy_only=False), dtype=np.int64)


def read_floats(table: pa.Table, name: str, indices: list[int]) -> Ragged:
    """Read a column of lists of finite numbers.

    Parameters
    ----------
    table : pyarrow.Table
        A batch of rows.
    name : str
        The column: lists of integers, floats of any width, decimals or booleans.
    indices : list of int
        Row numbers in the dataset, for errors.

    Returns
    -------
    Ragged
        float64 values.

    Raises
    ------
    TypeError
        If the entries are not numbers.
    ValueError
        If a row is null, or an entry is null, NaN or infinite.
    """
    lengths = lengths_of(table, name, indices)
    flat = pc.list_flatten(one_array(table, name))
    if not (_is_number(flat.type) or pa.types.is_null(flat.type)):
        shown = flat[0].as_py() if len(flat) else None
        raise TypeError(
            f"{name} must hold numbers; got {shown!r} of type {flat.type} at row {indices[0]}. "
            "Use to_groups first."
        )
    values = np.array(flat.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)
    ragged = Ragged(values, lengths)
    bad = ~np.isfinite(values)
    if bad.any():
        row, place = ragged.locate(int(np.argmax(bad)))
        raise ValueError(
            f"{name} must be finite; got {values[bad][0]} at row {indices[row]}, response {place}. "
            "Drop or re-score that row (to_groups(..., invalid='drop') drops and counts)."
        )
    return ragged


def to_lists(values: Any, lengths: IntArray) -> pa.Array:
    """Return a list column from the entries of all rows.

    Parameters
    ----------
    values : array_like or pyarrow.Array
        Entries, one row after the other.
    lengths : (n_rows,) ndarray of int
        Entries of each row.

    Returns
    -------
    pyarrow.Array
        One list a row.
    """
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    entries = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets), entries)


def one_array(table: pa.Table, name: str) -> Any:
    """Return a column as one array, whatever chunks it came in."""
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def is_text(kind: Any) -> bool:
    """Tell whether an Arrow type is text, which pandas stores as ``large_string``."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _is_number(kind: Any) -> bool:
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(check(kind) for check in checks)
