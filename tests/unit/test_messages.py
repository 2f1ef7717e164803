"""Prompts as text and as conversations: what is accepted, and how a refusal names the place."""

from __future__ import annotations

import pytest

from ctrl_dpo.data.messages import check_messages, check_prompt, check_text, prompt_key

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind"}


def test_well_formed_prompts_pass_unchanged():
    assert check_prompt(" text ") == " text "
    assert check_prompt([SYSTEM, USER, ANSWER, USER]) == [SYSTEM, USER, ANSWER, USER]
    assert check_messages([USER | {"name": None}]) == [USER]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"list of at least one message; got \[\] at row 4"),
        ("Hi", "list of at least one message; got 'Hi'"),
        ([USER, "Hi"], "'role' and 'content'; got 'Hi' at message 1 of row 4"),
        ([{"role": "user"}], "'role' and 'content'; got .* at message 0"),
        ([{"role": "human", "content": "Hi"}], "role must be one of .*; got 'human'"),
        ([USER, SYSTEM], "system message must come first; got one at message 1"),
        ([USER, ANSWER, ANSWER], "must not follow each other; got a second one at message 2"),
    ],
)
def test_malformed_conversations_are_named(messages, message):
    with pytest.raises(ValueError, match=message):
        check_messages(messages, " at row 4")


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "prompt must not be empty; got '' at row 2"),
        (None, TypeError, "prompt must be text; got None at row 2"),
        ([USER, ANSWER], ValueError, "must end before the assistant's turn; got .* at row 2"),
        (
            "half \ud800",
            ValueError,
            r"valid Unicode; got a lone surrogate '\\ud800' at character 5 at row 2",
        ),
    ],
)
def test_malformed_prompts_are_named(prompt, error, message):
    with pytest.raises(error, match=message):
        check_prompt(prompt, " at row 2")


def test_content_that_is_not_text_is_named():
    with pytest.raises(TypeError, match="content must be text; got 3 at message 0"):
        check_messages([{"role": "user", "content": 3}])
    assert check_text("response", "ü") == "ü"


def test_keys_tell_text_from_messages():
    assert prompt_key([USER | {"name": None}]) == prompt_key([USER])
    assert prompt_key("Hi") == '"Hi"'
    assert prompt_key([USER]) != prompt_key([ANSWER])
