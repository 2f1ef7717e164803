"""Rows of equal prompts -> one group each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from ctrl_dpo.data import columns as names
from ctrl_dpo.data.messages import prompt_key
from ctrl_dpo.data.ragged import is_text

if TYPE_CHECKING:
    from datasets import Dataset


def merge_equal_prompts(groups: Dataset, once: bool) -> tuple[Dataset, int]:
    """Join groups of equal prompts, in the order of their first rows.

    Parameters
    ----------
    groups : Dataset
        ``prompt`` and lists of one entry per response.
    once : bool
        Keep a response that several rows name once. Draws are kept as often as they were drawn:
        they carry mass.

    Returns
    -------
    groups : Dataset
        One group a prompt; of other columns, the value of its first row.
    merged : int
        Rows that were added to an earlier one.

    Raises
    ------
    ValueError
        If two rows give one response to one prompt different rewards, or only one has a column.
    """
    from datasets import Dataset, concatenate_datasets

    column = groups.select_columns([names.PROMPT]).with_format("arrow")[:][names.PROMPT]
    if is_text(column.type) and pc.count_distinct(column, "all").as_py() == len(groups):
        return groups, 0  # without a Python string for each
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(groups[names.PROMPT]):
        rows_of.setdefault(prompt if isinstance(prompt, str) else prompt_key(prompt), []).append(
            row
        )
    if len(rows_of) == len(groups):
        return groups, 0
    repeated = [rows for rows in rows_of.values() if len(rows) > 1]
    joined = [_joined([groups[row] for row in rows], rows, once) for rows in repeated]
    made = Dataset.from_list(joined, features=groups.features)
    # one row each, in the order of first appearance: single rows from the old, others from the new
    place = {rows[0]: len(groups) + i for i, rows in enumerate(repeated)}
    order = [place.get(rows[0], rows[0]) for rows in rows_of.values()]
    return concatenate_datasets([groups, made]).select(order), len(groups) - len(rows_of)


def _joined(parts: list[dict[str, Any]], rows: list[int], once: bool) -> dict[str, Any]:
    """Return one group made of several."""
    _check_rewards(parts, rows)
    lists = [name for name in names.PER_RESPONSE if name in parts[0]]
    for name in lists:
        given = [part[name] is not None for part in parts]
        if any(given) != all(given):
            raise ValueError(
                f"{name} must be given for all rows of a prompt or none; got it for "
                f"{sum(given)} of {len(rows)} rows, the first {rows[0]}. Score them all, or give "
                "same_prompt='keep'."
            )
    made = dict(parts[0])
    for name in lists:
        if parts[0][name] is not None:
            made[name] = [entry for part in parts for entry in part[name]]
    if once:
        texts = made[names.RESPONSES]
        first = sorted({text: i for i, text in reversed(list(enumerate(texts)))}.values())
        made |= {name: [made[name][i] for i in first] for name in lists if made[name] is not None}
    if names.DRAW_REWARDS in made:
        draws = [part[names.DRAW_REWARDS] or part[names.REWARDS] for part in parts]
        made[names.DRAW_REWARDS] = [reward for values in draws for reward in values]
    reference = [part.get(names.REFERENCE_REWARDS) for part in parts]
    if reference[0] is not None and any(values != reference[0] for values in reference):
        made[names.REFERENCE_REWARDS] = [r for values in reference for r in values or []]
    return made


def _check_rewards(parts: list[dict[str, Any]], rows: list[int]) -> None:
    """Raise where two rows score one response differently."""
    seen: dict[str, tuple[float, int]] = {}
    for part, row in zip(parts, rows, strict=True):
        for text, reward in zip(part[names.RESPONSES], part.get(names.REWARDS) or [], strict=False):
            known, where = seen.setdefault(text, (reward, row))
            if known != reward and where != row:
                raise ValueError(
                    f"rewards of one response to one prompt must agree; got {known} at row {where} "
                    f"and {reward} at row {row} for {text[:40]!r}. Score them again, or give "
                    "same_prompt='keep' to leave such rows apart."
                )
