"""Scored draws of any source -> columns by prompt: lists, or one draw a row."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

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
        If there is no row, a column is missing, a reward or log-probability is no finite number, or
        rows or columns do not fit together.
    TypeError
        If a prompt is neither text nor a list of messages.

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
        prompt = check_prompt(row[theirs[PROMPT]], f" at row {number}", allow_empty=True)
        draws = gathered.setdefault(prompt_key(prompt), {n: [] for n in found})
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


def _columns_of(
    row: Mapping[str, Any], theirs: Mapping[str, str], number: int
) -> dict[str, list[Any]]:
    """Return the lists of one row, one entry a draw."""
    rewards, ids = row.get(theirs[REWARDS]), row.get(theirs[RESPONSE_IDS])
    if rewards is None:
        raise ValueError(
            f"column {theirs[REWARDS]!r} must hold rewards; got None at row {number}. Score or "
            "drop that row."
        )
    given = {name: row.get(theirs[name]) for name in _PER_DRAW}
    found = {n: _numbers(v, theirs[n], number) for n, v in given.items() if v is not None}
    if ids is not None:
        listed = ids if is_messages(rewards) and is_messages(ids) else [ids]
        for each in listed:
            if not is_messages(each):
                raise ValueError(
                    f"column {theirs[RESPONSE_IDS]!r} must hold a list of tokens a draw; got "
                    f"{each!r} at row {number}. Drop the column, or give `length`."
                )
        found[LENGTH] = [len(each) for each in listed]
    sizes = {name: len(values) for name, values in found.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"columns must hold one entry a draw; got {sizes} at row {number}.")
    return found


def _numbers(values: Any, column: str, number: int) -> list[Any]:
    """Return a list as it is and one number as a list of one draw; all must be finite."""
    listed = list(values) if is_messages(values) else [values]
    for draw, value in enumerate(listed):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"column {column!r} must hold finite numbers; got {value!r} at draw {draw} of row "
                f"{number}. Score or drop that row."
            )
    return listed
