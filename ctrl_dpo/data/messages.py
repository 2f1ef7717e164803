"""Prompts: plain text, or a list of ``{"role", "content"}`` messages; checks and identity."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ctrl_dpo.data.inputs import is_blank

ROLES = ("system", "developer", "user", "assistant", "tool")
_OPENING_ROLES = ("system", "developer")


def check_text(name: str, text: object, where: str = "") -> str:
    """Return ``text``, or raise unless it is text that can be written as UTF-8.

    Parameters
    ----------
    name : str
        What the error calls it.
    text : object
        The candidate.
    where : str
        Place in the data, such as ``" at row 3"``.

    Returns
    -------
    str
        The same text, byte for byte.

    Raises
    ------
    TypeError
        If it is not a string.
    ValueError
        If it holds half of a surrogate pair, which no encoding and no Arrow column can hold.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be text; got {text!r}{where}. Convert or drop that row.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be valid Unicode; got a lone surrogate {text[error.start]!r} at "
            f"character {error.start}{where}. Decode the source with errors='replace'."
        ) from None
    return text


def is_messages(value: object) -> bool:
    """Tell whether a value is a list of messages rather than text."""
    return isinstance(value, (list, tuple))


def check_messages(messages: object, where: str = "") -> list[dict[str, Any]]:
    """Return a copy of a conversation, or raise unless its turns are well formed.

    Parameters
    ----------
    messages : object
        List of mappings with ``role`` and ``content``.
    where : str
        Place in the data, such as ``" at row 3"``.

    Returns
    -------
    list of dict
        The messages, without keys whose value is None (Arrow fills absent keys with None).

    Raises
    ------
    ValueError
        If there is no message, one lacks a role or content, a system message comes after the first
        position, or two assistant messages follow each other.
    """
    if not is_messages(messages) or not messages:
        raise ValueError(
            f"messages must be a list of at least one message; got {messages!r}{where}."
        )
    checked: list[dict[str, Any]] = []
    for i, message in enumerate(messages):  # type: ignore[arg-type, var-annotated]
        place = f" at message {i}{where.replace(' at', ' of')}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"message must have 'role' and 'content'; got {message!r}{place}.")
        role = message["role"]
        if role not in ROLES:
            raise ValueError(f"role must be one of {list(ROLES)}; got {role!r}{place}.")
        check_text("content", message["content"], place)
        if role in _OPENING_ROLES and i > 0:
            raise ValueError(f"{role} message must come first; got one{place}. Move or drop it.")
        if checked and role == checked[-1]["role"] == "assistant":
            raise ValueError(
                "assistant messages must not follow each other; got a second one"
                f"{place}. Join them."
            )
        checked.append({key: value for key, value in message.items() if value is not None})
    return checked


def check_prompt(
    prompt: object, where: str = "", allow_empty: bool = False
) -> str | list[dict[str, Any]]:
    """Return a prompt ready for a tokenizer, or raise.

    Parameters
    ----------
    prompt : object
        Text with at least one character, or messages that an assistant can answer.
    where : str
        Place in the data, such as ``" at row 3"``.
    allow_empty : bool
        Whether text may be empty: a model with an opening token can continue that.

    Returns
    -------
    str or list of dict
        The prompt.

    Raises
    ------
    ValueError
        If the text is empty, or the last message is the assistant's.
    """
    if not is_messages(prompt):
        text = check_text("prompt", prompt, where)
        if not text and not allow_empty:
            raise ValueError(
                f"prompt must not be empty; got ''{where}. Drop that row, or give "
                "empty_prompts='keep'."
            )
        return text
    messages = check_messages(prompt, where or " at prompt")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "prompt must end before the assistant's turn; got an assistant message at its end"
            f"{where}. Move that message to the responses."
        )
    return messages


def response_text(name: str, response: object) -> str:
    """Return the text of a response, or raise unless it is text or one assistant message.

    Parameters
    ----------
    name : str
        Its column.
    response : object
        Text, or a list of one message.

    Returns
    -------
    str
        The text.

    Raises
    ------
    TypeError
        If it is neither, or the content of the message is no text.
    ValueError
        If there are several messages, it is another role's, or it holds more than its text.
    """
    if not is_messages(response):
        return check_text(name, response)
    messages: list[Any] = list(response)  # type: ignore[call-overload]
    first = messages[0] if len(messages) == 1 else None
    if not isinstance(first, Mapping) or first.get("role") != "assistant":
        raise ValueError(
            f"{name}, as a conversational response, must be one assistant message; got "
            f"{response!r}. Move earlier messages to the prompt."
        )
    return message_text(name, first)


def message_text(name: str, message: Mapping[str, Any]) -> str:
    """Return the text of a message that is trained on, or raise where it holds more than that.

    Parameters
    ----------
    name : str
        Its column.
    message : mapping
        ``role`` and ``content``.

    Returns
    -------
    str
        The content.

    Raises
    ------
    TypeError
        If the content is no text.
    ValueError
        If another key, such as ``tool_calls``, is not empty: it would not be trained on.
    """
    more = {k: v for k, v in message.items() if k not in ("role", "content") and not is_blank(v)}
    if more:
        raise ValueError(
            f"{name} must hold no more than role and content; got {more!r}. Render it into the "
            "content, or remove that key from the messages."
        )
    return check_text(f"content of {name}", message.get("content"))


def prompt_key(prompt: object) -> str:
    """Return a text that is equal for equal prompts and differs between text and messages.

    Parameters
    ----------
    prompt : object
        Text or messages.

    Returns
    -------
    str
        Canonical JSON: keys sorted, None values left out.

    Examples
    --------
    >>> prompt_key([{"role": "user", "content": "Hi", "name": None}])
    '[{"content": "Hi", "role": "user"}]'
    """
    if is_messages(prompt):
        prompt = [{k: v for k, v in m.items() if v is not None} for m in prompt]  # type: ignore[attr-defined]
    return json.dumps(prompt, sort_keys=True, ensure_ascii=True)
