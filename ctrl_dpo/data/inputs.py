"""What a dataset is refused for as a whole: its type, and columns that nothing here renders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# TRL hands these to the chat template or the processor, and datasets of instructions keep the
# system message apart: without them the prompt is another one
UNREAD = ("tools", "chat_template_kwargs", "images", "image", "system")


def check_dataset(name: str, dataset: object) -> Dataset:
    """Return a dataset without its output format, or raise.

    Parameters
    ----------
    name : str
        The argument, as errors call it.
    dataset : object
        The candidate.

    Returns
    -------
    Dataset
        The same rows, read as Python objects.

    Raises
    ------
    TypeError
        If it is no ``datasets.Dataset``: several splits, a stream, a list.
    ValueError
        If it has no row, or a column of :data:`UNREAD` holds anything.
    """
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, Dataset):
        remedy = "Make one with Dataset.from_list(rows)."
        if isinstance(dataset, dict):
            remedy = f"Choose a split of {list(dataset)}."
        elif isinstance(dataset, IterableDataset):
            remedy = "Read the stream: Dataset.from_list(list(stream))."
        raise TypeError(
            f"{name} must be a datasets.Dataset; got {type(dataset).__name__}. {remedy}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} must have at least one row; got 0. Check the file and filters.")
    plain = dataset.with_format(None)
    found = unread_columns(plain.data.table)
    for index, row in enumerate(plain.select_columns(found) if found else ()):
        check_unread(row, f" at row {index} of {name}")
    return plain


def unread_columns(table: pa.Table) -> list[str]:
    """Return the columns of :data:`UNREAD` that hold more than nulls."""
    return [
        name
        for name in UNREAD
        if name in table.column_names and table[name].null_count < len(table)
    ]


def check_unread(row: Mapping[str, Any], where: str = "") -> None:
    """Raise where a row says something about its prompt that nothing here renders.

    Parameters
    ----------
    row : mapping of str to Any
        Columns to values.
    where : str
        Place in the data, such as ``" at row 3"``.

    Raises
    ------
    ValueError
        If a column of :data:`UNREAD` is there and not empty.
    """
    for column in UNREAD:
        if not is_blank(row.get(column)):
            raise ValueError(
                f"{column} must be empty, since nothing renders that column; got "
                f"{row[column]!r}{where}. Render it into the prompt, or remove the column."
            )


def is_blank(value: object) -> bool:
    """Tell whether a value is null or empty, or holds nothing else.

    Parameters
    ----------
    value : object
        A field of a dataset.

    Returns
    -------
    bool
        False for all numbers.

    Examples
    --------
    >>> is_blank({"enable_thinking": None, "tools": []}), is_blank(False)
    (True, False)
    """
    if isinstance(value, Mapping):
        return all(map(is_blank, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_blank, value))
    return value is None or (isinstance(value, str) and not value)
