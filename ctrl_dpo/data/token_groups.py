"""Tokens of a prompt and its responses, and counts of what tokenisation did to them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedGroup:
    """Token ids of a prompt and its responses, and what happened to each of them.

    Parameters
    ----------
    prompt_ids : list of int
        Tokens of the prompt, generation prompt of the chat template included.
    response_ids : list of list of int
        Tokens of each response, at least one; one end token closes each complete response.
    truncated : list of bool
        Whether a response was cut at ``max_response_length``; it then has no end token.
    prompt_truncated : bool
        Whether prompt tokens were cut.
    empty : list of bool
        Whether a response has no text: its end token stands alone.
    control_tokens : list of bool
        Whether a response's text contains special tokens of the tokenizer, so that it could close
        its own turn or open another.
    prompt_control_tokens : bool
        The same for the prompt's text, the template's own tokens not counted.
    merged : list of bool
        Whether text tokenised as a whole would have merged characters of prompt and response.
    repeated : list of bool
        Whether truncation made a response equal to an earlier one of the group.
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    truncated: list[bool]
    prompt_truncated: bool
    empty: list[bool]
    control_tokens: list[bool]
    prompt_control_tokens: bool
    merged: list[bool]
    repeated: list[bool]

    def counts(self) -> dict[str, int]:
        """Return the number of responses in each state, ready to be summed over groups."""
        return {
            "prompts": 1,
            "prompts_truncated": int(self.prompt_truncated),
            "prompts_with_control_tokens": int(self.prompt_control_tokens),
            "responses": len(self.response_ids),
            "responses_truncated": sum(self.truncated),
            "responses_empty": sum(self.empty),
            "responses_with_control_tokens": sum(self.control_tokens),
            "responses_merged_at_border": sum(self.merged),
            "responses_equal_after_truncation": sum(self.repeated),
        }


def count_tokens(groups: Iterable[TokenizedGroup]) -> dict[str, int]:
    """Sum the counts of tokenised groups, and log those that lose or change something.

    Parameters
    ----------
    groups : iterable of TokenizedGroup
        Results of :func:`tokenize_group`, in row order.

    Returns
    -------
    dict of str to int
        See :meth:`TokenizedGroup.counts`.
    """
    total: Counter[str] = Counter()
    first: dict[str, int] = {}
    for row, group in enumerate(groups):
        counts = group.counts()
        total.update(counts)
        for name, count in counts.items():
            if count:
                first.setdefault(name, row)
    for name in total:
        if total[name] and name not in ("prompts", "responses"):
            what = name.partition("_")[0]
            logger.warning(
                "%s: %d of %d %s, first at row %d",
                name.replace("_", " "), total[name], total[what], what, first[name],
            )  # fmt: skip
    return dict(total)
