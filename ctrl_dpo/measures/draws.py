"""Scored draws of any source -> columns by prompt: lists, or one draw a row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from ctrl_dpo._validation import check_choice, check_columns
from ctrl_dpo.data.columns import (
    POLICY_LOGPS,
    PROMPT,
    REFERENCE_LOGPS,
    RESPONSE_IDS,
    REWARDS,
    SAMPLED_FROM,
    UNCHANGED_SAMPLER,
)
from ctrl_dpo.data.messages import check_prompt, is_messages, prompt_key

LENGTH = "length"
_PER_DRAW = (REWARDS, POLICY_LOGPS, REFERENCE_LOGPS, LENGTH)
READ = (PROMPT, RESPONSE_IDS, *_PER_DRAW)
_SHOWN = 60  # characters of a prompt in an error


def gather_draws(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    name: str = "draws",
) -> dict[str, dict[str, list[Any]]]:
    """Gather the columns of the draws by prompt, in the order in which prompts first appear.

    Parameters
    ----------
    rows : iterable of mapping
        ``prompt`` and ``rewards``: a list with a number for each draw, or one number where a row is
        one draw. ``policy_logps``, ``reference_logps`` (nats) and ``length`` (tokens) alike;
        ``response_ids`` give the lengths too. Lists may be arrays; numbers may be decimals. Other
        columns are not read.
    columns : mapping of str to str, optional
        Our name to the rows', such as ``{"rewards": "score"}``.
    name : str
        What errors call the rows.

    Returns
    -------
    dict of str to dict of str to list
        The columns that every row has, by prompt.

    Raises
    ------
    ValueError
        If there is no row, a column is missing, a reward or log-probability is no finite number,
        rows or columns do not fit together, or lengths are not those of the tokens.
    TypeError
        If a row is no mapping, or a prompt is neither text nor a list of messages.

    Examples
    --------
    >>> rows = [{"prompt": "a", "score": 0.1}, {"prompt": "a", "score": 0.7}]
    >>> list(gather_draws(rows, {"rewards": "score"}).values())
    [{'rewards': [0.1, 0.7]}]
    """
    theirs = {column: (columns or {}).get(column, column) for column in READ}
    for column in columns or {}:
        check_choice("columns key", column, READ)
    gathered: dict[str, dict[str, list[Any]]] = {}
    for number, row in enumerate(rows):
        where = f" at row {number} of {name}"
        _check_row(row, where)
        required = [theirs[PROMPT], theirs[REWARDS]]
        remedy = f"That is{where}. Run `ctrl-dpo score` first, or map your columns."
        check_columns(row, required, remedy)
        found = _columns_of(row, theirs, where)
        prompt = check_prompt(row[theirs[PROMPT]], where, allow_empty=True)
        draws = gathered.setdefault(prompt_key(prompt), {n: [] for n in found})
        first = next(iter(gathered.values()))
        if found.keys() != first.keys():
            raise ValueError(
                f"rows must have the same columns; got {sorted(found)} at row {number}, "
                f"{sorted(first)} at row 0 of {name}."
            )
        for column, values in found.items():
            draws[column].extend(values)
    if not gathered:
        raise ValueError(f"{name} must hold at least one row; got 0.")
    return gathered


def named(prompt: str) -> str:
    """Return what errors call a prompt, a key of :func:`gather_draws`: its beginning."""
    shown = json.dumps(json.loads(prompt), ensure_ascii=False)  # the key itself is ASCII
    return f"prompt {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}"


def having_columns(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], name: str
) -> Iterator[Mapping[str, Any]]:
    """Yield rows as they are, and raise at the first without a value in a mapped column.

    Parameters
    ----------
    rows : iterable of mapping
        The rows.
    columns : mapping of str to str
        Our name to the rows'.
    name : str
        What errors call the rows.

    Yields
    ------
    mapping
        Each row.

    Raises
    ------
    ValueError
        If a column is not there.
    """
    for number, row in enumerate(rows):
        _check_row(row, f" at row {number} of {name}")
        absent = sorted(ours for ours, theirs in columns.items() if row.get(theirs) is None)
        if absent:
            raise ValueError(
                f"columns must map to columns of the {name}'s rows; got {dict(columns)!r}, and no "
                f"{absent[0]!r} there at row {number}. Correct the name, or add that column."
            )
        yield row


def noting_origins(
    rows: Iterable[Mapping[str, Any]], origins: set[str]
) -> Iterator[Mapping[str, Any]]:
    """Yield rows as they are, and collect what ``sampled_from`` says in those that have it."""
    for row in rows:
        if row.get(SAMPLED_FROM) is not None:
            origins.add(str(row[SAMPLED_FROM]))
        yield row


def check_origins(policy: set[str], reference: set[str], has_kl: bool) -> None:
    """Raise where draws were not made alike, or do not give the KL, as far as they tell.

    Parameters
    ----------
    policy, reference : set of str
        From :func:`noting_origins`; an empty one tells nothing.
    has_kl : bool
        Whether the policy's draws have log-probabilities.

    Raises
    ------
    ValueError
        If a sampler's setting or the template is not the same for all draws, or log-probabilities
        are of draws at another temperature than 1, with ``top_k`` or with ``top_p``.
    """
    sides = [[_origin(text) for text in sorted(side)] for side in (policy, reference)]
    for name in (*UNCHANGED_SAMPLER, "template"):
        mine, theirs = ({origin.get(name) for origin in side} for side in sides)
        if len(mine | theirs) > 1:
            raise ValueError(
                f"policy and reference must be drawn with the same {name}; got "
                f"{sorted(mine, key=str)} for the policy and {sorted(theirs, key=str)} for the "
                "reference. Draw again, with one sampler and template for both."
            )
        value = UNCHANGED_SAMPLER.get(name)
        if has_kl and value is not None and mine - {value, None}:
            raise ValueError(
                f"{POLICY_LOGPS} must be of draws with {name} {value:g} to give the KL; got "
                f"{mine.pop()!r}. Remove {POLICY_LOGPS} from the policy's rows for win rates, and "
                "draw with an unchanged sampler for the KL."
            )


def _origin(text: str) -> dict[str, Any]:
    """Read one value of ``sampled_from``."""
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise ValueError(
            f"column {SAMPLED_FROM!r} must hold what `ctrl-dpo sample` writes there; got "
            f"{text!r}. Remove the column."
        ) from None


def _check_row(row: object, where: str) -> None:
    """Raise where a row is none: frames and dictionaries of splits yield names."""
    if not isinstance(row, Mapping):
        raise TypeError(
            f"rows must be mappings of column to value; got {row!r}{where}. Take one split of a "
            "DatasetDict, or `frame.to_dict('records')` of a DataFrame."
        )


def _columns_of(
    row: Mapping[str, Any], theirs: Mapping[str, str], where: str
) -> dict[str, list[Any]]:
    """Return the lists of one row, one entry a draw."""
    if row.get(theirs[REWARDS]) is None:
        raise ValueError(
            f"column {theirs[REWARDS]!r} must hold rewards; got None{where}. Score or drop that "
            "row."
        )
    given = {name: row.get(theirs[name]) for name in _PER_DRAW}
    found = {n: _numbers(v, theirs[n], where) for n, v in given.items() if v is not None}
    ids = _listed(row.get(theirs[RESPONSE_IDS]))
    if ids is not None:
        several = is_messages(_listed(row[theirs[REWARDS]])) and is_messages(ids)
        counted = _token_counts(ids if several else [ids], theirs[RESPONSE_IDS], where)
        if found.setdefault(LENGTH, counted) != counted:
            raise ValueError(
                f"columns {theirs[LENGTH]!r} and {theirs[RESPONSE_IDS]!r} must tell the same "
                f"lengths; got {found[LENGTH]} and {counted}{where}. Drop one of the two columns."
            )
    sizes = {name: len(values) for name, values in found.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"columns must hold one entry a draw; got {sizes}{where}. Drop or rename a column that "
            "holds something else."
        )
    return found


def _token_counts(ids: Iterable[Any], column: str, where: str) -> list[float]:
    """Return the number of tokens of each draw."""
    listed = [_listed(each) for each in ids]
    for each in listed:
        if not is_messages(each):
            raise ValueError(
                f"column {column!r} must hold a list of tokens a draw; got {each!r}{where}. Drop "
                "the column, or give `length`."
            )
    return [float(len(each)) for each in listed]


def _listed(value: Any) -> Any:
    """Return an array as a list, and anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def _numbers(values: Any, column: str, where: str) -> list[float]:
    """Return a list as floats and one number as a list of one draw; all must be finite."""
    values = _listed(values)
    listed = list(values) if is_messages(values) else [values]
    numbers = [_number(value) for value in listed]
    for draw, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(
                f"column {column!r} must hold finite numbers; got {listed[draw]!r} at draw {draw}"
                f"{where.replace(' at', ' of')}. Score or drop that row."
            )
    return numbers


def _number(value: object) -> float:
    """Return a number as a float; NaN for what is none or beyond the largest float."""
    try:
        return float(value) if isinstance(value, (Real, Decimal)) else math.nan
    except (OverflowError, ValueError):  # 10**400, and a signalling NaN of decimals
        return math.nan
