"""Rows of a layout, read one by one, or a whole batch at once where nothing in it can be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrl_dpo.data import columns as names
from ctrl_dpo.data.inputs import check_unread, unread_columns
from ctrl_dpo.data.layout_rows import FLOATS, DroppedRow, Group, checked_group
from ctrl_dpo.data.ragged import is_text, lengths_of, one_array, read_floats, to_lists

REASON = "dropped_reason"
# datasets keys its cache by the name of a function of ours, not by its code: raise this number when
# rows are read differently, or an older version's rows come back
READING = 4


class RowReader:
    """Read rows one by one; a picklable function for worker processes.

    Parameters
    ----------
    read : callable
        Row to group, of the layout.
    invalid : {"error", "drop"}
        What happens to a row that breaks the rules.
    passed : iterable of str
        Columns that are taken over as they are.
    empty_prompts : {"error", "keep"}
        Whether a prompt may be empty.
    empty_responses : {"keep", "drop"}
        Whether responses without text are taken out of their groups.
    """

    def __init__(
        self,
        read: Callable[..., Group],
        invalid: str,
        passed: Iterable[str],
        empty_prompts: str = "error",
        empty_responses: str = "keep",
    ) -> None:
        self.read, self.invalid, self.passed = read, invalid, sorted(passed)
        self.empty_prompts, self.empty_responses = empty_prompts, empty_responses
        self.reading = READING

    def __call__(self, row: Mapping[str, Any], index: int) -> Group:
        """Return the group of a row."""
        group = self._group(row)
        return {name: values for name, values in group.items() if name not in FLOATS}

    def _group(self, row: Mapping[str, Any]) -> Group:
        check_unread(row)
        group = {name: row[name] for name in self.passed} | self.read(row)
        made = checked_group(group, self.empty_prompts == "keep")
        return without_empty_responses(made) if self.empty_responses == "drop" else made

    def judge(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return a row's numbers, or why it is dropped, or raise."""
        try:
            group = self._group(row)
        except DroppedRow as reason:
            return {REASON: str(reason), **dict.fromkeys(FLOATS)}
        except (ValueError, TypeError, KeyError) as error:
            if self.invalid == "drop":
                return {REASON: str(error).partition(";")[0], **dict.fromkeys(FLOATS)}
            raise ValueError(
                f"row {index}: {error} (invalid='drop' drops such rows and counts them)"
            ) from error
        return {REASON: None, **{name: group.get(name) for name in FLOATS}}

    def judge_canonical(self, table: pa.Table, indices: list[int]) -> pa.Table:
        """Judge a batch of canonical groups: at once where it is clean, else row by row."""
        lists = clean_numbers(table, indices) if self.empty_responses == "keep" else None
        if lists is not None:
            nothing = pa.nulls(len(table))
            made = {REASON: nothing.cast(pa.string())}
            kind = pa.list_(pa.float64())
            return pa.table(made | {n: lists.get(n, nothing.cast(kind)) for n in FLOATS})
        rows = zip(table.to_pylist(), indices, strict=True)
        types = [pa.field(REASON, pa.string())]
        types += [pa.field(name, pa.list_(pa.float64())) for name in FLOATS]
        return pa.Table.from_pylist([self.judge(*row) for row in rows], schema=pa.schema(types))


def without_empty_responses(group: Group) -> Group:
    """Return a group without the responses that have no text, and what belongs to them."""
    kept = [i for i, text in enumerate(group[names.RESPONSES]) if text]
    if not kept:
        raise DroppedRow("all responses are empty")
    return {
        name: [values[i] for i in kept]
        if name in names.PER_RESPONSE and values is not None
        else values
        for name, values in group.items()
    }


def clean_numbers(table: pa.Table, indices: list[int]) -> dict[str, pa.Array] | None:
    """Return the numbers of a batch of canonical groups as float64 lists, where all rows are clean.

    Parameters
    ----------
    table : pyarrow.Table
        ``prompt`` and ``responses``, and other columns of canonical groups.
    indices : list of int
        Row numbers, for errors.

    Returns
    -------
    dict of str to pyarrow.Array, or None
        The columns of :data:`FLOATS` that there are. None where a prompt is no text, or anything
        could break a rule, as any column that nothing renders could: what is wrong, and in
        which row, is then for :meth:`RowReader.judge`.
    """
    if unread_columns(table):
        return None
    prompt, texts = one_array(table, names.PROMPT), one_array(table, names.RESPONSES)
    if not is_text(prompt.type) or prompt.null_count or not _shortest(prompt):
        return None
    try:
        lengths = lengths_of(table, names.RESPONSES, indices)
        flat = pc.list_flatten(texts)
        if not is_text(flat.type) or flat.null_count or not lengths.all():
            return None
        for name in set(names.PER_RESPONSE).intersection(table.column_names):
            if not np.array_equal(lengths_of(table, name, indices), lengths):
                return None
        numeric = [n for n in (*FLOATS, names.REFERENCE_LOGPS) if n in table.column_names]
        numbers = {name: read_floats(table, name, indices) for name in numeric}
    except (TypeError, ValueError):
        return None
    reference = numbers.get(names.REFERENCE_REWARDS)
    if reference is not None and not reference.lengths.all():
        return None
    return {n: to_lists(v.values, v.lengths) for n, v in numbers.items() if n in FLOATS}


def _shortest(texts: Any) -> int:
    """Return the length of the shortest text in bytes; 1 where there is none."""
    found = pc.min(pc.binary_length(texts)).as_py()
    return 1 if found is None else int(found)
