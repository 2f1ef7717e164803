"""One row of each public layout -> prompt, responses and rewards."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrl_dpo.data import columns as names
from ctrl_dpo.data.messages import (
    check_messages,
    check_prompt,
    check_text,
    is_messages,
    message_text,
)

Row = Mapping[str, Any]
Group = dict[str, Any]

# the weights of HelpSteer2's own 70B reward model (Wang et al., arXiv:2406.08673): verbosity counts
# against a response
HELPSTEER_WEIGHTS = {
    "helpfulness": 0.65,
    "correctness": 0.8,
    "coherence": 0.45,
    "complexity": 0.55,
    "verbosity": -0.4,
}
FLOATS = (names.REWARDS, names.REFERENCE_REWARDS)  # always float64, whatever the layout holds
DIALOGUE = "\n\nHuman:"  # how Anthropic's dialogues begin
_TURN = re.compile(r"\n\n(Human|Assistant):[ \t]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class DroppedRow(ValueError):  # noqa: N818 (a row is dropped by rule, which is no error)
    """A row that the rules leave out; its text is the reason that is counted."""


@dataclass(frozen=True)
class Layout:
    """A public dataset layout.

    Parameters
    ----------
    name : str
        How it is called.
    required : tuple of str
        Columns it is known by.
    read : callable
        Row to group.
    """

    name: str
    required: tuple[str, ...]
    read: Callable[[Row], Group]


def to_float(name: str, value: object, place: str = "") -> float:
    """Return a finite number, also from text such as ``"4"``, or raise."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a number; got {value!r}{place}. Mend or drop it."
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; got {value!r}{place}. Score it again.")
    return number


def to_floats(name: str, values: Sequence[object]) -> list[float]:
    """Return one finite number per response, or raise."""
    return [to_float(name, value, f" at response {i}") for i, value in enumerate(values)]


def _entries(row: Row, name: str, *keys: str) -> Sequence[Mapping[str, Any]]:
    """Return a list of mappings that all have these keys, or raise."""
    entries = row[name]
    if not is_messages(entries):
        raise ValueError(f"{name} must be a list; got {entries!r}. Mend or drop it.")
    for i, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not set(keys) <= set(entry):
            raise ValueError(
                f"{name} must hold {list(keys)}; got {entry!r} at response {i}. Mend or drop it."
            )
    return entries  # type: ignore[no-any-return]


def _first(row: Row, *options: str) -> Any:
    """Return the first of these columns that the row has."""
    found = [name for name in options if row.get(name) is not None]
    if not found:
        raise ValueError(f"a prompt must be in one of {list(options)}; got none of them.")
    return row[found[0]]


def checked_group(group: Group, allow_empty_prompt: bool = False) -> Group:
    """Return the group, or raise where a prompt or response is not text or lists differ."""
    group["prompt"] = check_prompt(group["prompt"], allow_empty=allow_empty_prompt)
    # text is a sequence too, and would be taken for a list of its characters
    if not is_messages(group["responses"]) or not group["responses"]:
        raise ValueError(f"responses must hold at least one; got {group['responses']!r}.")
    for i, text in enumerate(group["responses"]):
        check_text("response", text, f" at response {i}")
    n = len(group["responses"])
    for name in names.PER_RESPONSE:
        values = group.get(name)
        if values is not None and (not is_messages(values) or len(values) != n):
            got = len(values) if is_messages(values) else repr(values)
            raise ValueError(
                f"{name} must have one entry per response; got {got} for {n} responses."
            )
    reference = group.get(names.REFERENCE_REWARDS)
    if reference is not None and not reference:
        raise ValueError(
            "reference_rewards must hold at least one; got none. Draw from the reference policy "
            "first, or drop that row."
        )
    for name in (*FLOATS, names.REFERENCE_LOGPS):
        if group.get(name) is not None:
            group[name] = to_floats(name, group[name])
    return group


def read_canonical(row: Row) -> Group:
    """Read ``prompt, responses[, rewards, reference_rewards, ...]``."""
    return dict(row)


def read_scored_list(responses: str, *scores: str) -> Callable[[Row], Group]:
    """Return the reader of a list of responses beside a list of scores."""

    def read(row: Row) -> Group:
        group = {"prompt": _first(row, "prompt", "instruction"), "responses": row[responses]}
        given = [name for name in scores if row.get(name) is not None]
        if given:
            group["rewards"] = to_floats(given[0], row[given[0]])
        return group

    return read


def read_ultrafeedback(row: Row) -> Group:
    """Read ``completions``: a list of ``{response, overall_score}``."""
    completions = _entries(row, "completions", "response")
    scores = [c.get("overall_score") for c in completions]
    return {
        "prompt": _first(row, "prompt", "instruction"),
        "responses": [c["response"] for c in completions],
        "rewards": to_floats("overall_score", scores),
    }


def read_nectar(row: Row) -> Group:
    """Read ``answers``: a list of ``{answer, rank}``, rank 1 the best."""
    prompt, answers = (
        check_text("prompt", row["prompt"]),
        _entries(row, "answers", "answer", "rank"),
    )
    turns = _dialogue(prompt) if prompt.startswith(DIALOGUE) else []
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()  # Nectar's prompts end in an open assistant turn
    return {
        "prompt": turns or prompt,
        "responses": [a["answer"] for a in answers],
        "rewards": [-x for x in to_floats("rank", [a["rank"] for a in answers])],
    }


def read_unpaired(row: Row) -> Group:
    """Read one response and its reward; rows of one prompt are merged later."""
    rewards = to_floats(names.REWARD, [row[names.REWARD]])
    return {"prompt": row["prompt"], "responses": [row[names.RESPONSE]], "rewards": rewards}


def read_helpsteer(weights: Mapping[str, float]) -> Callable[[Row], Group]:
    """Return the reader of one response with attributes; rows of one prompt are merged later."""

    def read(row: Row) -> Group:
        reward = sum(weight * to_float(name, row[name]) for name, weight in weights.items())
        return {"prompt": row["prompt"], "responses": [row["response"]], "rewards": [reward]}

    return read


def read_pairs(row: Row) -> Group:
    """Read TRL's pairs, standard or conversational, with explicit or implicit prompt."""
    sides = [row["chosen"], row["rejected"]]
    if is_messages(sides[0]) != is_messages(sides[1]):
        raise ValueError(f"chosen and rejected must be of one kind; got {sides!r}.")
    if is_messages(sides[0]):
        prompt, texts = _split_conversations(row.get("prompt"), sides)
    elif row.get("prompt") is not None:
        prompt, texts = row["prompt"], sides
    else:
        prompt, texts = _split_texts(sides)
    group: Group = {"prompt": prompt, "responses": texts}
    if row.get("score_chosen") is not None and row.get("score_rejected") is not None:
        scores = [row["score_chosen"], row["score_rejected"]]
        group["rewards"] = to_floats("score", scores)
    return group


def split_pair(row: Row) -> Group | None:
    """Split a pair whose sides begin with its prompt; return None where it stands apart.

    Parameters
    ----------
    row : mapping
        ``chosen`` and ``rejected`` without ``prompt``; or whole conversations beside a prompt that
        is text, as TRL reads them.

    Returns
    -------
    dict or None
        ``prompt`` and ``responses``, the chosen one first.

    Raises
    ------
    DroppedRow
        If the sides share no prompt.
    """
    sides = row[names.CHOSEN], row[names.REJECTED]
    if names.PROMPT in row:
        whole = any(is_messages(side) and len(side) > 1 for side in sides)
        return read_pairs(row) if whole and not is_messages(row[names.PROMPT]) else None
    is_dialogue = isinstance(sides[0], str) and sides[0].startswith(DIALOGUE)
    return read_hh(row) if is_dialogue else read_pairs(row)


def read_hh(row: Row) -> Group:
    """Read Anthropic's dialogues: two texts of turns that share all but the last."""
    sides = [_dialogue(row[name]) for name in ("chosen", "rejected")]
    prompt, texts = _split_conversations(None, sides)
    return {"prompt": prompt, "responses": texts}


def _dialogue(text: object) -> list[dict[str, str]]:
    r"""Split a text at ``\n\nHuman:`` and ``\n\nAssistant:``."""
    pieces = _TURN.split(check_text("dialogue", text))
    if pieces[0].strip() or len(pieces) < 3:
        raise ValueError(f"a dialogue must start with '\\n\\nHuman:'; got {str(text)[:40]!r}.")
    turns = list(zip(pieces[1::2], pieces[2::2], strict=True))
    messages: list[dict[str, str]] = []
    for speaker, content in turns:
        role = _ROLES[speaker]
        if messages and messages[-1]["role"] == role:
            # people write on without waiting: one turn of several paragraphs
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages


def _split_conversations(prompt: Any, sides: Sequence[Any]) -> tuple[Any, list[str]]:
    """Split at message level: the last message of each side is the response."""
    conversations, texts = [], []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        messages = check_messages(side, f" at {name}")
        conversations.append(messages)
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{name} must end in an assistant message; got {messages[-1]['role']!r}."
            )
        texts.append(message_text(name, messages[-1]))
    before = [messages[:-1] for messages in conversations]
    if before[0] != before[1]:
        raise DroppedRow("chosen and rejected answer different conversations")
    given = check_messages(prompt) if is_messages(prompt) and prompt else []
    whole = before[0] if before[0][: len(given)] == given else given + before[0]
    if not whole and isinstance(prompt, str):
        return prompt, texts
    return whole, texts


def _split_texts(sides: Sequence[Any]) -> tuple[str, list[str]]:
    """Split two texts after the last line break, else space, of their common beginning."""
    texts = [check_text("pair", side) for side in sides]
    # the shorter may be the beginning of the longer, and both must keep a response
    shortest = min(map(len, texts)) - 1
    same = next((i for i in range(shortest) if texts[0][i] != texts[1][i]), max(shortest, 0))
    head = texts[0][:same]
    cut = max(head.rfind("\n"), head.rfind(" ")) + 1
    if cut == 0:
        raise DroppedRow("chosen and rejected share no prompt")
    return texts[0][:cut], [text[cut:] for text in texts]


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("canonical", ("prompt", "responses"), read_canonical),
        Layout(
            "all_generated_responses",
            ("prompt", "all_generated_responses"),
            read_scored_list("all_generated_responses", "all_rm_scores", "scores"),
        ),
        Layout(
            "distilabel", ("generations", "ratings"), read_scored_list("generations", "ratings")
        ),
        Layout("ultrafeedback", ("completions",), read_ultrafeedback),
        Layout("nectar", ("prompt", "answers"), read_nectar),
        Layout(
            "helpsteer2",
            ("prompt", "response", *HELPSTEER_WEIGHTS),
            read_helpsteer(HELPSTEER_WEIGHTS),
        ),
        Layout("unpaired", ("prompt", "response", "reward"), read_unpaired),
        Layout("pairs", ("chosen", "rejected"), read_pairs),
        Layout("hh", ("chosen", "rejected"), read_hh),
    )
}
