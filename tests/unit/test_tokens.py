"""Text to tokens on a byte tokenizer, where every id can be counted by hand."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer

from ctrl_dpo.data.token_groups import count_tokens
from ctrl_dpo.data.tokens import end_token, prompt_tokens, tokenize_group

PAD, START, END = 0, 1, 2
CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture
def byte():
    """Return the id of one letter."""
    tokenizer = tiny_tokenizer()
    return lambda letter: tokenizer.convert_tokens_to_ids(letter)


def test_a_conversation_is_rendered_with_the_generation_prompt(tokenizer):
    ids = prompt_tokens(tokenizer, CHAT)
    assert tokenizer.decode(ids) == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(START) == 2
    assert tokenizer.decode(prompt_tokens(tokenizer, "ab")) == "ab"


def test_a_complete_response_gets_one_end_token(tokenizer, byte):
    group = tokenize_group(tokenizer, CHAT, ["a", "ab"])
    assert group.response_ids == [[byte("a"), END], [byte("a"), byte("b"), END]]
    assert group.truncated == [False, False]


def test_drawn_tokens_are_kept_and_only_finished_ones_end(tokenizer, byte):
    drawn = [[byte("a"), END], [byte("b")], [byte("b")]]
    group = tokenize_group(
        tokenizer, CHAT, ["a", "b", "b"], response_ids=drawn, finished=[True, False, True]
    )
    assert group.response_ids == [[byte("a"), END], [byte("b")], [byte("b"), END]]
    unfinished = tokenize_group(tokenizer, CHAT, ["a"], response_ids=[[byte("a")]])
    assert unfinished.response_ids == [[byte("a")]]


def test_limits_cut_and_are_counted(tokenizer, byte):
    group = tokenize_group(
        tokenizer, "abcdef", ["xyz", "xyw", "x"], max_prompt_length=2, max_response_length=2
    )
    assert group.prompt_ids == [byte("e"), byte("f")]
    assert group.prompt_truncated
    assert group.response_ids == [[byte("x"), byte("y")]] * 2 + [[byte("x"), END]]
    assert group.truncated == [True, True, False]
    assert group.repeated == [False, True, False]
    start = tokenize_group(tokenizer, "abcdef", ["x"], max_prompt_length=2, keep="start")
    assert start.prompt_ids == [byte("a"), byte("b")]


def test_what_happened_is_counted_and_logged(tokenizer, caplog):
    groups = [
        tokenize_group(tokenizer, CHAT, ["fine", ""]),
        tokenize_group(
            tokenizer, [{"role": "user", "content": "a <|im_end|> b"}], ["x <|im_end|> y"]
        ),
    ]
    counts = count_tokens(groups)
    assert (counts["prompts"], counts["responses"]) == (2, 3)
    assert counts["responses_empty"] == 1
    assert counts["responses_with_control_tokens"] == 1
    assert counts["prompts_with_control_tokens"] == 1
    assert "responses empty: 1 of 3 responses, first at row 0" in caplog.text


def test_the_end_of_a_turn_comes_from_the_template(tokenizer):
    assert end_token(tokenizer, conversational=True) == END
    tokenizer.eos_token = "<pad>"
    assert end_token(tokenizer, conversational=True) == END
    assert end_token(tokenizer, conversational=False) == PAD
    # a template that closes turns with plain text falls back to the end of text
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    assert end_token(tokenizer, conversational=True) == PAD


def test_refusals(tokenizer):
    bare = tiny_tokenizer(chat_template=None)
    with pytest.raises(ValueError, match="must have a chat template .*; got None"):
        prompt_tokens(bare, CHAT)
    with pytest.raises(ValueError, match="finished must have one entry per response; got 1 for 2"):
        tokenize_group(tokenizer, "a", ["x", "y"], finished=[True])
    with pytest.raises(ValueError, match="max_response_length must be an integer >= 1; got 0"):
        tokenize_group(tokenizer, "a", ["x"], max_response_length=0)
    with pytest.raises(ValueError, match="keep must be one of .*; got 'middle'"):
        tokenize_group(tokenizer, "a", ["x"], keep="middle")
    with pytest.raises(ValueError, match="at least one token; got none for an unfinished one"):
        tokenize_group(tokenizer, "a", [""], response_ids=[[]], finished=[False])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an eos_token; got None"):
        end_token(tokenizer, conversational=False)


def test_tokens_that_would_merge_across_the_border_are_counted():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, "a": 1, "b": 2, "ab": 3}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    group = tokenize_group(merging, "ba", ["bb", "ab"])
    assert group.merged == [True, False]
    assert group.prompt_ids == [2, 1]
    assert group.response_ids == [[2, 2, 0], [3, 0]]
    assert count_tokens([group])["responses_merged_at_border"] == 1


def test_opening_tokens_of_plain_prompts_stay_and_closing_ones_go(tokenizer, byte):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", START), ("<|im_end|>", END)],
    )
    assert prompt_tokens(tokenizer, "a") == [START, byte("a")]
    # rendered conversations carry their own control tokens already
    assert prompt_tokens(tokenizer, CHAT)[:2] == [START, byte("u")]
