"""Checks with one error grammar: ``<name> must <rule>; got <value>[ at <where>]. <remedy>``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def check_positive(name: str, value: object) -> float:
    """Return ``value`` as a float, or raise unless it is finite and above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number > 0; got {value!r}.")
    if not (math.isfinite(value) and float(value) > 0):
        raise ValueError(f"{name} must be finite and > 0; got {value!r}.")
    return float(value)


def check_weight(name: str, value: object) -> float:
    """Return ``value`` as a float, or raise unless it is finite and at least zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number >= 0; got {value!r}.")
    if not (math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} must be finite and >= 0; got {value!r}.")
    return float(value)


def check_integer(name: str, value: object, minimum: int, owner: str = "") -> int:
    """Return ``value`` as an int, or raise unless it is an integer of at least ``minimum``."""
    suffix = f" for {owner}" if owner else ""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}{suffix}; got {value!r}.")
    return int(value)


def check_source(name: str, value: str | Path) -> None:
    """Raise where a name is empty (the working directory's), or a path that is not there."""
    rule = f"{name} must be a file, a folder or a hub name; got {str(value)!r}"
    if not value:
        raise ValueError(f"{rule}. Name it.")
    path = Path(value)
    # names of the hub have two parts at most
    is_path = path.is_absolute() or str(value).startswith((".", "~")) or len(path.parts) > 2
    if is_path and not path.exists():
        raise ValueError(f"{rule}: no such file or folder. Name one that is there.")


def check_choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """Return ``value``, or raise unless it is one of ``allowed``."""
    options = list(allowed)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {options}; got {value!r}.")
    return value


def check_finite(name: str, values: ArrayLike, ndim: int | None = None) -> NDArray[np.float64]:
    """Return ``values`` as a float64 array, or raise naming the first entry that is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {array.shape}.")
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        where = f" at index {first[0] if len(first) == 1 else first}" if first else ""
        raise ValueError(
            f"{name} must be finite; got {int(bad.sum())} non-finite of {array.size}, "
            f"first {float(array[first])!r}{where}. Drop or re-score those rows."
        )
    return array


def missing_column(column: str, found: Iterable[str], remedy: str) -> ValueError:
    """Build the error for an absent dataset column."""
    return ValueError(
        f"column {column!r} is missing from the dataset; found {sorted(found)}. {remedy}"
    )


def check_columns(found: Iterable[str], required: Iterable[str], remedy: str) -> None:
    """Raise unless every required column is among those found."""
    names = list(found)
    for column in required:
        if column not in names:
            raise missing_column(column, names, remedy)


def check_one_of(**options: Any) -> str:
    """Return the name of the only option that is not None, or raise."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of {sorted(options)} must be given; got {given or 'none of them'}."
        )
    return given[0]
