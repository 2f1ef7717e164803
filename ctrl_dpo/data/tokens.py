"""Text to tokens: chat template, border of prompt and response, end token, length limits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ctrl_dpo._validation import check_choice, check_integer
from ctrl_dpo.data.messages import check_prompt, check_text, is_messages
from ctrl_dpo.data.token_groups import TokenizedGroup

Prompt = str | Sequence[Any]
# no token of a known vocabulary spans more: a longer text is cut before it is tokenised
_CHARACTERS_PER_TOKEN = 256
_BORDER_CHARACTERS = 32
_PROBE = "probe of the turn's end"


def prompt_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Turn a prompt into the tokens that a response continues.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Tokenizer of the model; needs a chat template for messages.
    prompt : str or list of dict
        Plain text, tokenised as it stands with the tokenizer's own opening tokens; or messages,
        rendered by the chat template with its generation prompt.

    Returns
    -------
    list of int
        Token ids, at least one.

    Raises
    ------
    ValueError
        If the prompt is malformed or empty, messages meet a tokenizer without chat template, or
        the template refuses them.
    """
    return _prompt_ids(tokenizer, prompt, slice(None))


def end_token(tokenizer: Any, conversational: bool) -> int:
    """Return the token that closes a complete response.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Tokenizer of the model.
    conversational : bool
        Whether prompts are messages: then it is the special token with which the chat template
        closes an assistant's turn, if it has one.

    Returns
    -------
    int
        Token id.

    Raises
    ------
    ValueError
        If neither the template nor the tokenizer names an end token.
    """
    if conversational:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        rendered = _render(tokenizer, turns, add_generation_prompt=False)
        closing = _encode(tokenizer, [rendered.rpartition(_PROBE)[2].lstrip()])[0]
        if closing and closing[0] in special_ids(tokenizer):
            return closing[0]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer must have an eos_token; got None for {tokenizer.name_or_path!r}. Set "
            "tokenizer.eos_token to the token that ends a response."
        )
    return int(tokenizer.eos_token_id)


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all control tokens of a tokenizer."""
    added = tokenizer.added_tokens_decoder.items()
    return {int(i) for i in tokenizer.all_special_ids} | {int(i) for i, t in added if t.special}


def tokenize_group(
    tokenizer: Any,
    prompt: Prompt,
    responses: Sequence[str],
    *,
    response_ids: Sequence[Sequence[int]] | None = None,
    finished: Sequence[bool] | None = None,
    max_prompt_length: int | None = None,
    max_response_length: int | None = None,
    keep: str = "end",
) -> TokenizedGroup:
    """Tokenise a prompt and its responses, joined in token space.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Tokenizer of the model.
    prompt : str or list of dict
        Plain text or messages, see :func:`prompt_tokens`.
    responses : sequence of str
        Texts of the responses.
    response_ids : sequence of sequence of int, optional
        Tokens as drawn, used instead of the texts.
    finished : sequence of bool, optional
        False where a response ran into a length limit, so that no end token closes it. Without it,
        texts are complete, and drawn tokens are taken as they are.
    max_prompt_length, max_response_length : int, optional
        Limits in tokens, the end token included; none by default.
    keep : {"end", "start"}
        Which part of a prompt longer than its limit is kept.

    Returns
    -------
    TokenizedGroup
        Token ids and flags.

    Raises
    ------
    ValueError
        If lengths differ, a text or limit is malformed, or an unfinished response has no token.

    Notes
    -----
    Prompt and response are tokenised apart, as they are when a model generates, so every response
    of a prompt shares all of its prompt tokens and no token spans the border. The end token is
    appended as an id; it is never recognised by value, so a pad token equal to it is harmless.
    ``tokenizer.split_special_tokens = True`` makes control tokens inside responses plain text.
    """
    check_choice("keep", keep, ["end", "start"])
    for name, limit in (("prompt", max_prompt_length), ("response", max_response_length)):
        if limit is not None:
            check_integer(f"max_{name}_length", limit, 1)
    for name, values in (("response_ids", response_ids), ("finished", finished)):
        if values is not None and len(values) != len(responses):
            raise ValueError(
                f"{name} must have one entry per response; got {len(values)} for {len(responses)}."
            )
    texts = [check_text("response", r, f" at response {i}") for i, r in enumerate(responses)]
    prompt_ids, prompt_truncated = _limited_prompt(tokenizer, prompt, max_prompt_length, keep)
    end = end_token(tokenizer, is_messages(prompt))
    if response_ids is None:
        drawn, merged = _from_text(tokenizer, prompt, texts, max_response_length)
        complete = [True] * len(texts) if finished is None else list(finished)
        closing = {end, tokenizer.eos_token_id}
    else:
        drawn, merged = [list(ids) for ids in response_ids], [False] * len(texts)
        complete = [False] * len(texts) if finished is None else list(finished)
        closing = special_ids(tokenizer)
    special = special_ids(tokenizer)
    closed = [_closed(ids, done, end, closing) for ids, done in zip(drawn, complete, strict=True)]
    limited = [ids[:max_response_length] for ids in closed]
    return TokenizedGroup(
        prompt_ids=prompt_ids,
        response_ids=limited,
        truncated=[len(a) < len(b) for a, b in zip(limited, closed, strict=True)],
        prompt_truncated=prompt_truncated,
        empty=[not set(ids) - special for ids in closed],
        control_tokens=[bool(special.intersection(ids[:-1])) for ids in closed],
        prompt_control_tokens=_has_control_tokens(tokenizer, prompt),
        merged=merged,
        repeated=_repeated(limited, closed),
    )


def _render(tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Render messages by the tokenizer's chat template, in its own sandbox."""
    if not tokenizer.chat_template:
        raise ValueError(
            "tokenizer must have a chat template for conversational prompts; got None for "
            f"{tokenizer.name_or_path!r}. Set tokenizer.chat_template, or give prompts as text."
        )
    from jinja2 import TemplateError  # transformers needs it to render, and only then

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise ValueError(
            f"messages must be such as the chat template renders; got {str(error)!r} from it for "
            f"roles {[message['role'] for message in messages]}. Change them, or "
            "tokenizer.chat_template."
        ) from error
    return text


def _encode(tokenizer: Any, texts: list[str], **options: bool) -> list[list[int]]:
    """Tokenise rendered texts without adding tokens."""
    if not texts:
        return []
    options = {"split_special_tokens": False} | options
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
    return ids


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a plain prompt with the tokenizer's opening tokens, without a closing one."""
    ids: list[int] = tokenizer(text, split_special_tokens=False)["input_ids"]
    bare = _encode(tokenizer, [text])[0]
    closing = len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id and ids[-1:] != bare[-1:]
    return ids[:-1] if closing else ids


def _prompt_ids(tokenizer: Any, prompt: Prompt, part: slice) -> list[int]:
    """Turn a part of the text of a prompt into tokens."""
    checked = check_prompt(prompt, allow_empty=True)  # whose opening token may be enough
    if isinstance(checked, str):
        ids = _plain_ids(tokenizer, checked[part])
    else:
        rendered = _render(tokenizer, checked, add_generation_prompt=True)
        ids = _encode(tokenizer, [rendered[part]])[0]
    if not ids:
        raise ValueError(
            f"prompt must have at least one token; got none from {prompt!r}. Drop that row."
        )
    return ids


def _limited_prompt(
    tokenizer: Any, prompt: Prompt, limit: int | None, keep: str
) -> tuple[list[int], bool]:
    """Return the prompt's tokens within the limit, and whether any were cut."""
    if limit is None:
        return prompt_tokens(tokenizer, prompt), False
    room = (limit + 1) * _CHARACTERS_PER_TOKEN
    ids = _prompt_ids(tokenizer, prompt, slice(-room, None) if keep == "end" else slice(room))
    if len(ids) <= limit:
        return ids, False
    return (ids[-limit:] if keep == "end" else ids[:limit]), True


def _from_text(
    tokenizer: Any, prompt: Prompt, texts: list[str], limit: int | None
) -> tuple[list[list[int]], list[bool]]:
    """Tokenise response texts, and tell which would merge with the prompt's last characters."""
    room = None if limit is None else (limit + 1) * _CHARACTERS_PER_TOKEN
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    ids = _encode(tokenizer, [text[:room] for text in texts], split_special_tokens=split)
    if is_messages(prompt):
        return ids, [False] * len(texts)  # the template's generation prompt ends in its own token
    tail = str(prompt)[-_BORDER_CHARACTERS:]
    heads = [text[:_BORDER_CHARACTERS] for text in texts]
    joint = _encode(tokenizer, [tail + head for head in heads])
    left, *right = _encode(tokenizer, [tail, *heads])
    return ids, [whole != left + part for whole, part in zip(joint, right, strict=True)]


def _closed(ids: list[int], complete: bool, end: int, closing: set[int]) -> list[int]:
    """Append the end token to a complete response, unless it ends in one."""
    if complete and not (ids and ids[-1] in closing):
        return [*ids, end]
    if not ids:
        raise ValueError(
            "response must have at least one token; got none for an unfinished one. Drop it."
        )
    return ids


def _has_control_tokens(tokenizer: Any, prompt: Prompt) -> bool:
    """Tell whether a prompt's text holds the text of a control token."""
    messages: Sequence[Any] = prompt if is_messages(prompt) else [{"content": prompt}]
    added = tokenizer.added_tokens_decoder.values()
    tokens = {str(t) for t in tokenizer.all_special_tokens} | {str(t) for t in added if t.special}
    return any(token in str(message["content"]) for message in messages for token in tokens)


def _repeated(limited: list[list[int]], closed: list[list[int]]) -> list[bool]:
    """Mark responses that equal an earlier, different one since both were cut."""
    seen: dict[tuple[int, ...], list[int]] = {}
    marks = []
    for short, full in zip(limited, closed, strict=True):
        first = seen.setdefault(tuple(short), full)
        marks.append(first != full)
    return marks
