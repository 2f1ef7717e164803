"""Markdown tables that also read as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table with aligned columns.

    Parameters
    ----------
    header : sequence of str
        Names of the columns.
    rows : sequence of sequence of str
        Cells.

    Returns
    -------
    str
        Markdown.

    Examples
    --------
    >>> print(table(["a", "b"], [["1", "long"]]))
    | a | b    |
    |---|------|
    | 1 | long |
    """
    cells = [[text.replace("|", "\\|") for text in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def cell(numbers: Mapping[str, float] | None, form: str) -> str:
    """Write a value with its interval, or a dash.

    Parameters
    ----------
    numbers : mapping or None
        ``value``, ``low`` and ``high``.
    form : str
        Format of each, such as ``"{:.1%}"``.

    Returns
    -------
    str
        Text of the cell.

    Examples
    --------
    >>> cell({"value": 0.75, "low": 0.7, "high": 0.8}, "{:.0%}"), cell(None, "{}")
    ('75% (70% to 80%)', '-')
    """
    if numbers is None:
        return "-"
    value, low, high = (form.format(numbers[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def percent(share: float) -> str:
    """Write a share as a percentage with the digits it has, six at most.

    Parameters
    ----------
    share : float
        Such as the confidence of an interval.

    Returns
    -------
    str
        Percentage.

    Examples
    --------
    >>> percent(0.95), percent(0.995)
    ('95%', '99.5%')
    """
    return f"{100 * share:g}%"


def figures(summary: Mapping[str, Any]) -> list[list[str]]:
    """Write a summary as rows of name and value, four digits of each float.

    Parameters
    ----------
    summary : mapping
        Numbers and texts; nested values, such as histograms, are left out.

    Returns
    -------
    list of [name, value]
        For :func:`table`.

    Examples
    --------
    >>> figures({"groups": 2, "share": 0.123456, "histogram": {"counts": []}})
    [['groups', '2'], ['share', '0.1235']]
    """
    flat = {name: value for name, value in summary.items() if not isinstance(value, Mapping)}
    return [[n, f"{v:.4g}" if isinstance(v, float) else str(v)] for n, v in flat.items()]
