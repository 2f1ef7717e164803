"""Scored draws of any source -> columns by prompt: lists, or one draw a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ctrl_dpo._validation import check_choice, check_columns
from ctrl_dpo.data.columns import POLICY_LOGPS, PROMPT, REFERENCE_LOGPS, RESPONSE_IDS, REWARDS
from ctrl_dpo.data.messages import is_messages, prompt_key

LENGTH = "length"
_PER_DRAW = (REWARDS, POLICY_LOGPS, REFERENCE_LOGPS, LENGTH)
READ = (PROMPT, RESPONSE_IDS, *_PER_DRAW)


def gather_draws(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> dict[str, dict[str, list[Any]]]:
    """Gather the columns of the draws by prompt, in the order in which prompts first appear.

    Parameters
    ----------
    rows : iterable of mapping
        ``prompt`` and ``rewards``: a list with a number for each draw, or one number where a row is
        one draw. ``policy_logps``, ``reference_logps`` (nats) and ``length`` (tokens) alike;
        ``response_ids`` give the lengths too. Other columns are not read.
    columns : mapping of str to str, optional
        Our name to the rows', such as ``{"rewards": "score"}``.

    Returns
    -------
    dict of str to dict of str to list
        The columns that every row has, by prompt.

    Raises
    ------
    ValueError
        If there is no row, a column is missing, or rows or columns do not fit together.

    Examples
    --------
    >>> rows = [{"prompt": "a", "score": 0.1}, {"prompt": "a", "score": 0.7}]
    >>> list(gather_draws(rows, {"rewards": "score"}).values())
    [{'rewards': [0.1, 0.7]}]
    """
    theirs = {name: (columns or {}).get(name, name) for name in READ}
    for name in columns or {}:
        check_choice("columns key", name, READ)
    gathered: dict[str, dict[str, list[Any]]] = {}
    for number, row in enumerate(rows):
        required = [theirs[PROMPT], theirs[REWARDS]]
        check_columns(row, required, "Run `ctrl-dpo score` first, or map your columns.")
        found = _columns_of(row, theirs, number)
        draws = gathered.setdefault(prompt_key(row[theirs[PROMPT]]), {n: [] for n in found})
        first = next(iter(gathered.values()))
        if found.keys() != first.keys():
            raise ValueError(
                f"rows must have the same columns; got {sorted(found)} at row {number}, "
                f"{sorted(first)} at row 0."
            )
        for name, values in found.items():
            draws[name].extend(values)
    if not gathered:
        raise ValueError("policy and reference must hold at least one row; got 0.")
    return gathered


def _columns_of(
    row: Mapping[str, Any], theirs: Mapping[str, str], number: int
) -> dict[str, list[Any]]:
    """Return the lists of one row, one entry a draw."""
    found = {n: _listed(row[theirs[n]]) for n in _PER_DRAW if row.get(theirs[n]) is not None}
    if row.get(theirs[RESPONSE_IDS]) is not None:
        ids = row[theirs[RESPONSE_IDS]]
        one = not is_messages(row[theirs[REWARDS]])
        found[LENGTH] = [len(ids)] if one else [len(each) for each in ids]
    sizes = {name: len(values) for name, values in found.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"columns must hold one entry a draw; got {sizes} at row {number}.")
    return found


def _listed(values: Any) -> list[Any]:
    """Return a list as it is, and one number as a list of one draw."""
    return list(values) if is_messages(values) else [values]
