"""Pairs of one prompt in one row: each response is computed once, however many pairs it is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def merge_pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the pairs that share their prompt's tokens into one row.

    All K (K - 1) / 2 pairs of K responses then cost K responses. The loss does not change: each
    pair stays a group of its own, of which ``members`` says where its responses are.

    Parameters
    ----------
    rows : sequence of dict
        ``prompt_ids``, ``response_ids``, ``targets`` (nats), ``order``, ``truncated``,
        ``dataset_rows``, ``reference_logps`` or None, one number per response, and ``weight``.

    Returns
    -------
    list of dict
        One row per prompt, in the order of its first pair. A prompt with one pair is left as it
        was; others have ``members``: per pair the places of its responses among ``response_ids``,
        in which no text occurs twice. ``targets`` and ``order`` are those of the members one after
        the other, ``weight`` those of the pairs, ``reference_logps``, ``truncated`` and
        ``dataset_rows`` those of ``response_ids``.

    Examples
    --------
    >>> pair = {"prompt_ids": [1], "targets": [1.0, 0.0], "order": [1, 0]}
    >>> pair |= {"truncated": [False, False], "weight": 1.0, "reference_logps": None}
    >>> pair |= {"dataset_rows": [0, 0]}
    >>> rows = [pair | {"response_ids": r} for r in ([[5], [6]], [[5], [7]], [[7], [6]])]
    >>> (row,) = merge_pairs(rows)
    >>> row["response_ids"], row["members"]
    ([[5], [6], [7]], [[0, 1], [0, 2], [2, 1]])
    """
    # rows with and without reference values stay apart
    keys = [(tuple(row["prompt_ids"]), row["reference_logps"] is None) for row in rows]
    counts = Counter(keys)
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    places: dict[tuple[Any, ...], dict[tuple[int, ...], int]] = {}
    for key, row in zip(keys, rows, strict=True):
        known = row["reference_logps"]
        if counts[key] == 1:
            merged[key] = row
            continue
        if key not in merged:
            merged[key] = {
                "prompt_ids": row["prompt_ids"],
                "response_ids": [],
                "members": [],
                "targets": [],
                "order": [],
                "weight": [],
                "truncated": [],
                "dataset_rows": [],
                "reference_logps": None if known is None else [],
            }
            places[key] = {}
        group, place_of = merged[key], places[key]
        members = []
        for slot, response in enumerate(row["response_ids"]):
            place = place_of.setdefault(tuple(response), len(place_of))
            if place == len(group["response_ids"]):
                group["response_ids"].append(response)
                group["truncated"].append(row["truncated"][slot])
                group["dataset_rows"].append(row["dataset_rows"][slot])
                if known is not None:
                    group["reference_logps"].append(known[slot])
            members.append(place)
        group["members"].append(members)
        group["targets"] += row["targets"]
        group["order"] += row["order"]
        group["weight"].append(row["weight"])
    return list(merged.values())
