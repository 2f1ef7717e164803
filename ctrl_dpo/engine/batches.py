"""Batches of groups: one row holds a prompt and all its responses, each token computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

PADDING = -1
# pairs of tokens that attention compares in the time that a token takes in all other products:
# measured on width 576 (benchmarks/scaling.py), more on wider models
_PAIRS_PER_TOKEN = 2048


def collate(
    groups: Sequence[Mapping[str, Any]], share_prompt: bool = True
) -> dict[str, torch.Tensor]:
    """Lay tokenised groups out as rows of one batch.

    Parameters
    ----------
    groups : sequence of mapping
        ``prompt_ids`` (list of int), ``response_ids`` (list of list of int), and lists of one
        number per response: ``targets`` and their ``order``, and ``reference_logps`` where they are
        known. From :func:`ctrl_dpo.engine.merged_pairs.merge_pairs` also ``members``: the loss is
        then that of several groups, given by the places of their responses, ``targets`` and
        ``order`` have one number per member, and ``weight`` one per group.
    share_prompt : bool
        One row per group, in which a response sees the prompt and itself, where that is faster
        (:func:`pays_to_share`); else one per response.

    Returns
    -------
    dict of str to Tensor
        ``input_ids``, ``position_ids`` and ``segments`` ``(rows, s)``: segment 0 is the prompt,
        ``i + 1`` a response, -1 padding. For the response tokens of all rows in order:
        ``predictors`` ``(n_tokens,)``, the flat place whose output predicts the token,
        ``token_ids`` and ``owners``, the response it belongs to. For the responses in order:
        ``lengths`` in tokens and ``reference_logps``, ``(n_responses,)``. For the members of the
        loss's groups in order: ``members``, the response, ``group_of``, ``slot_of``, ``targets``
        and ``order``, ``(n_members,)``; each response is one member unless pairs were merged.
        ``weights`` of the loss's groups, ``(n_groups,)``.
    """
    rows = _rows(groups, share_prompt)
    laid = [_lay_out(prompt, responses) for prompt, responses in rows]
    width = max(len(row["ids"]) for row in laid)
    batch = {
        "input_ids": torch.zeros(len(laid), width, dtype=torch.long),
        "position_ids": torch.zeros(len(laid), width, dtype=torch.long),
        "segments": torch.full((len(laid), width), PADDING),
    }
    predictors, owners, n_responses = [], [], 0
    for place, row in enumerate(laid):
        length = len(row["ids"])
        batch["input_ids"][place, :length] = torch.tensor(row["ids"])
        batch["position_ids"][place, :length] = torch.tensor(row["positions"])
        batch["segments"][place, :length] = torch.tensor(row["segments"])
        predictors += [place * width + p for p in row["predictors"]]
        owners += [n_responses + o for o in row["owners"]]
        n_responses += 1 + row["owners"][-1]
    batch["predictors"] = torch.tensor(predictors)
    batch["token_ids"] = torch.tensor([t for g in groups for r in g["response_ids"] for t in r])
    batch["owners"] = torch.tensor(owners)
    batch["lengths"] = torch.tensor([len(r) for g in groups for r in g["response_ids"]])
    batch |= _members(groups)
    for column in ("targets", "order", "reference_logps", "truncated"):
        if groups[0].get(column) is not None:
            batch[column] = torch.tensor([float(x) for g in groups for x in g[column]])
    return batch


def _members(groups: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Say which responses form the groups of the loss."""
    members: list[int] = []
    sizes: list[int] = []
    weights: list[float] = []
    start = 0
    for group in groups:
        count = len(group["response_ids"])
        for places in group.get("members") or [range(count)]:
            members += [start + place for place in places]
            sizes.append(len(places))
        weights += group["weight"] if "members" in group else [group.get("weight", 1.0)]
        start += count
    counts = torch.tensor(sizes)
    group_of = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    return {
        "members": torch.tensor(members),
        "group_of": group_of,
        "slot_of": torch.arange(len(members)) - (counts.cumsum(0) - counts)[group_of],
        "weights": torch.tensor([float(weight) for weight in weights]),
    }


def _rows(
    groups: Sequence[Mapping[str, Any]], share_prompt: bool
) -> list[tuple[list[int], list[list[int]]]]:
    rows: list[tuple[list[int], list[list[int]]]] = []
    for group in groups:
        prompt, responses = group["prompt_ids"], group["response_ids"]
        if share_prompt and pays_to_share(len(prompt), [len(r) for r in responses]):
            rows.append((prompt, responses))
        else:
            rows += [(prompt, [response]) for response in responses]
    return rows


def pays_to_share(prompt: int, responses: Sequence[int]) -> bool:
    """Tell whether one row for a group is faster than a row for each response.

    A shared row saves prompts, but its masked attention compares all tokens of the row, where a
    row of one text compares half of its square. Long responses to a short prompt are faster apart.

    Parameters
    ----------
    prompt : int
        Tokens of the prompt.
    responses : sequence of int
        Tokens of each response.

    Returns
    -------
    bool
        By the lengths alone, so that policy and reference lay a group out alike.

    Examples
    --------
    >>> pays_to_share(128, [48, 48]), pays_to_share(128, [512, 512])
    (True, False)
    """
    saved = (len(responses) - 1) * prompt
    together = (prompt + sum(responses)) ** 2
    apart = sum((prompt + response) ** 2 for response in responses) // 2
    return saved * _PAIRS_PER_TOKEN >= together - apart


def row_lengths(group: Mapping[str, Any], share_prompt: bool) -> list[int]:
    """Return the tokens that each row of a group computes.

    Parameters
    ----------
    group : mapping
        ``prompt_ids`` and ``response_ids``.
    share_prompt : bool
        Row layout, see :func:`collate`.

    Returns
    -------
    list of int
        One number per row; the last token of a response predicts nothing and is not computed.
    """
    rows = _rows([group], share_prompt)
    return [len(prompt) + sum(len(r) - 1 for r in responses) for prompt, responses in rows]


def _lay_out(prompt: list[int], responses: list[list[int]]) -> dict[str, list[int]]:
    """Lay one row out; the last token of a response predicts nothing and is left out."""
    row = {"ids": list(prompt), "positions": list(range(len(prompt)))}
    row |= {"segments": [0] * len(prompt), "predictors": [], "owners": []}
    for number, response in enumerate(responses):
        start, inputs = len(row["ids"]), response[:-1]
        row["predictors"] += [len(prompt) - 1, *range(start, start + len(inputs))]
        row["owners"] += [number] * len(response)
        row["ids"] += inputs
        row["positions"] += range(len(prompt), len(prompt) + len(inputs))
        row["segments"] += [number + 1] * len(inputs)
    return row
