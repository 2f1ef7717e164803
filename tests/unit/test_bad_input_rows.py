"""The 37 kinds of bad data, numbered as in the specification: what is refused, what is counted."""

from __future__ import annotations

import decimal
import gzip
import json
import logging
import re

import numpy as np
import pytest
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer
from transformers import TrainingArguments

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, pairs, relabel, to_groups
from ctrl_dpo.calibrate import RewardCalibrator
from ctrl_dpo.data.folders import read_rows
from ctrl_dpo.data.layouts import read_groups
from ctrl_dpo.data.messages import check_text
from ctrl_dpo.data.token_groups import count_tokens
from ctrl_dpo.data.tokens import tokenize_group
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.relabel import count_pairs
from ctrl_dpo.sample import Sampler, sample

GROUP = {"prompt": "Hi", "responses": ["a", "b"], "rewards": [1.0, 2.0]}
LABELS = {"procedure": "best_of_4", "beta": 0.1}


def dataset(**changes) -> Dataset:
    return Dataset.from_list([GROUP | {"prompt": "Ho"}, GROUP | changes])


def labelled(*rewards: list[float], **changes):
    rows = [
        {"prompt": f"{i}", "responses": [f"r{j}" for j in range(len(r))], "rewards": r} | changes
        for i, r in enumerate(rewards)
    ]
    return relabel(Dataset.from_list(rows), **LABELS)


def refused(data: Dataset, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        relabel(to_groups(data), **LABELS)


def dropped(data: Dataset, reason: str) -> None:
    groups, report = read_groups(data, invalid="drop")
    assert (len(groups), report.dropped) == (1, {reason: [1]})


def trainer(tmp_path, data: Dataset, **options) -> CTRLDPOTrainer:
    args = CTRLDPOConfig(str(tmp_path), report_to="none", **options.pop("args", {}))
    tokenizer = options.pop("processing_class", tiny_tokenizer())
    models = {"model": tiny_llama(), "ref_model": tiny_llama(), "processing_class": tokenizer}
    return CTRLDPOTrainer(args=args, train_dataset=data, **models | options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"args": None}, r"args must be a CTRLDPOConfig; got None. Give CTRLDPOConfig\(output_dir"),
        ({"args": "out"}, "args must be a CTRLDPOConfig; got one of type str"),
        ({"args": TrainingArguments}, "args must be .*; got one of type TrainingArguments. Give C"),
        ({"model": None}, "^model must be a model, its folder or its hub name; got None"),
        ({"ref_model": 5}, "^ref_model must be a model, its .*; got one of type int"),
        ({"peft_config": {"r": 4}}, "peft_config must be .*; got one of type dict. .*LoraConfig"),
    ],
)
def test_arguments_of_the_trainer_are_of_their_types(given, message, tmp_path):
    settings = {"output_dir": str(tmp_path), "report_to": "none"}
    whole = {"model": tiny_llama(), "args": CTRLDPOConfig(**settings)} | given
    if given.get("args") is TrainingArguments:
        whole["args"] = TrainingArguments(**settings)
    with pytest.raises(TypeError, match=message):
        CTRLDPOTrainer(train_dataset=labelled([1.0, 2.0]), **whole)


def test_01_empty_dataset():
    refused(Dataset.from_dict({"prompt": []}), "at least one row; got 0")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.gz"])
def test_01_empty_and_broken_files_are_named(name, tmp_path):
    pack = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(b""))
    with pytest.raises(ValueError, match=f"dataset must have at least one row; got 0 in '{name}'"):
        read_rows(tmp_path / name)
    if "json" in name:
        (tmp_path / f"broken_{name}").write_bytes(pack(b'{"prompt": "a"}\n{"prompt": b}\n'))
        with pytest.raises(ValueError, match=f"data file must be json; got 'broken_{name}', of wh"):
            read_rows(tmp_path / f"broken_{name}")


@pytest.mark.parametrize("content", [b"", b"no parquet"])
def test_01_parquet_that_is_none_is_named(content, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"file must be parquet; got 'rows.parquet', of which"):
        read_rows(tmp_path / "rows.parquet")


def test_02_missing_column_lists_columns_and_nearest_layout():
    data = dataset().rename_column("responses", "response_list")
    refused(data, r"got columns \['prompt', 'response_list', 'rewards'\]. The nearest is 'canon")


def test_03_null_text():
    refused(dataset(responses=["a", None]), "row 1: response must be text; got None at response 1")
    dropped(dataset(responses=["a", None]), "response must be text")


@pytest.mark.parametrize("prompt", [7, b"x"])
def test_04_text_that_is_no_text(prompt):
    data = Dataset.from_list([{**GROUP, "prompt": prompt}])
    refused(data, f"row 0: prompt must be text; got {prompt!r}")


@pytest.mark.parametrize("response", [7, b"x", ["x"]])
def test_04_responses_that_are_no_text(response):
    data = Dataset.from_list([{**GROUP, "responses": [response, response]}])
    shown = re.escape(repr(response))
    refused(data, f"row 0: response must be text; got {shown} at response 0. Convert or drop")


def test_05_an_empty_response_is_its_end_token():
    group = tokenize_group(tiny_tokenizer(), "Hi", ["", "a"])
    assert group.response_ids[0] == [2]
    assert count_tokens([group])["responses_empty"] == 1
    assert read_groups(dataset(responses=["", "a"]))[1].counts["empty_responses"] == 1
    data = dataset(responses=["", "a"], response_ids=None, reference_logps=None)
    groups, report = read_groups(data, empty_responses="drop")
    assert (groups[1]["responses"], groups[1]["rewards"]) == (["a"], [2.0])
    assert report.counts["empty_responses"] == 0
    with pytest.raises(ValueError, match="empty_responses must be one of .*; got 'cut'"):
        read_groups(data, empty_responses="cut")


def test_06_empty_prompt():
    refused(dataset(prompt=""), "row 1: prompt must not be empty; got ''. Drop that row")
    dropped(dataset(prompt=""), "prompt must not be empty")
    assert to_groups(dataset(prompt=""), empty_prompts="keep")[1]["prompt"] == ""
    with pytest.raises(ValueError, match="at least one token; got none from ''. Drop that row"):
        tokenize_group(tiny_tokenizer(), "", ["a"])


def test_07_whitespace_is_counted():
    counts = read_groups(dataset(responses=[" \n", "a"]))[1].counts
    assert counts["whitespace_only_responses"] == 1


def test_08_equal_responses_make_no_pair():
    made = labelled([1.0, 2.0, 3.0], responses=["same", "same", "other"])
    assert [(p["chosen"], p["rejected"]) for p in pairs(made, "all")] == [("other", "same")] * 2
    counts = count_pairs(made, "all")
    assert (counts["pairs"], counts["duplicate_pairs"]) == (2, 1)


def test_09_duplicates_carry_mass_and_make_one_pair_with_another():
    made = labelled([1.0, 1.0, 2.0], responses=["x", "x", "y"])
    assert made[0]["calibrated_rewards"] == [0.25, 0.25, 1.0]
    assert len(pairs(made, "best_worst")) == 1


def test_10_rows_of_one_prompt_merge_or_contradict():
    assert len(to_groups(Dataset.from_list([GROUP, GROUP]))) == 1
    contrary = Dataset.from_list([GROUP, GROUP | {"rewards": [5.0, 2.0]}])
    refused(contrary, "one response to one prompt must agree; got 1.0 at row 0 and 5.0 at row 1")


def test_11_a_response_alone_makes_no_pair():
    data = Dataset.from_list([GROUP, {"prompt": "x", "responses": ["a"], "rewards": [1.0]}])
    assert read_groups(data)[1].counts["single_response_groups"] == 1
    made = relabel(data, **LABELS)
    assert made[1]["calibrated_rewards"] == [0.5]
    assert len(pairs(made)) == 1


def test_12_no_reference_reward():
    data = Dataset.from_list([GROUP | {"reference_rewards": []}])
    refused(data, "row 0: reference_rewards must hold at least one; got none. Draw from the ref")


def test_13_one_reference_reward(caplog):
    made = labelled([1.0, 2.0, 3.0], reference_rewards=[2.0])
    assert made[0]["calibrated_rewards"] == [0.0, 0.5, 1.0]
    assert "1 of 1 prompts have one reference draw to compare with at most" in caplog.text
    assert "first at row 0. Draw more, or use calibration='pooled'" in caplog.text
    caplog.clear()
    labelled([1.0, 2.0, 3.0])
    assert caplog.text == ""
    labelled([1.0, 2.0, 3.0], [1.0, 2.0])
    assert "1 of 2 prompts have one reference draw" in caplog.text
    assert "first at row 1" in caplog.text


def test_14_all_rewards_tied():
    made = labelled([3.0, 3.0, 3.0], [1.0, 2.0, 3.0])
    assert made[0]["calibrated_rewards"] == [0.5, 0.5, 0.5]
    assert np.ptp(made[0]["transformed_rewards"]) == 0
    assert len(pairs(made)) == 1


def test_15_some_ties_share_a_mid_rank():
    assert labelled([1.0, 2.0, 2.0, 3.0])[0]["calibrated_rewards"] == [0.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_16_17_rewards_that_are_not_finite(value):
    message = f"row 1: rewards must be finite; got {value!r} at response 1. Score it again"
    refused(dataset(rewards=[1.0, value]), message)
    dropped(dataset(rewards=[1.0, value]), "rewards must be finite")


def test_18_rewards_as_text(tmp_path):
    data = [{"instruction": f"{i}", "generations": ["a", "b"], "ratings": ["4", "5"]} for i in "xy"]
    assert to_groups(Dataset.from_list(data))["rewards"][:] == [[4.0, 5.0]] * 2
    data[1]["ratings"] = ["4", "N/A"]
    refused(Dataset.from_list(data), "row 1: ratings must be a number; got 'N/A' at response 1")
    # text in one row only, which the reader of the file holds as JSON
    rows = [GROUP, GROUP | {"prompt": "Ho", "rewards": ["3", 4]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert to_groups(read_rows(tmp_path / "rows.jsonl"))["rewards"][:] == [[1.0, 2.0], [3.0, 4.0]]


def test_19_lists_of_different_lengths():
    refused(dataset(rewards=[1.0]), "row 1: rewards must have one entry per response; got 1 for 2")


def test_20_rewards_far_apart_are_ranks():
    far, near = labelled([-1e308, 1e-320, 1e308]), labelled([1.0, 2.0, 3.0])
    assert far["transformed_rewards"][:] == near["transformed_rewards"][:]


@pytest.mark.parametrize(
    "rewards", [[0, 1], [False, True], np.float16([0, 1]), [decimal.Decimal(0), decimal.Decimal(1)]]
)
def test_21_any_number_is_a_reward(rewards):
    data = Dataset.from_dict({"prompt": ["x"], "responses": [["a", "b"]], "rewards": [rewards]})
    assert to_groups(data)["rewards"][:] == [[0.0, 1.0]]
    assert relabel(data, **LABELS)["calibrated_rewards"][:] == [[0.0, 1.0]]


def test_22_scores_that_contradict_themselves_are_pointed_out():
    completion = {"response": "a", "overall_score": 10.0, "fine-grained_score": 1.0}
    data = Dataset.from_list([{"instruction": "x", "completions": [completion, completion]}])
    assert read_groups(data)[1].noted["suspect_scores"] == [0]


def test_23_ranks_are_not_rewards():
    answers = [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 2.0}]
    data = Dataset.from_list([{"prompt": "x", "answers": answers}])
    refused(data, "ranks_as_rewards must be True .*; got False")
    assert to_groups(data, ranks_as_rewards=True)["rewards"][:] == [[-1.0, -2.0]]


def test_24_a_chosen_response_scored_below_the_rejected_one():
    row = {"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}
    groups, report = read_groups(Dataset.from_list([row]))
    assert report.counts["flipped_labels"] == 1
    assert pairs(relabel(groups, **LABELS))[0]["chosen"] == "b"


def test_25_a_prompt_without_room_is_named_by_row():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    data = Dataset.from_dict({"prompt": ["x", "y" * 510]})
    with pytest.raises(ValueError, match="at most 508 tokens .*; got 510 at row 1. Shorten"):
        sample(data, model, Sampler(2, max_new_tokens=4), tokenizer=tokenizer)


def test_25_a_row_longer_than_the_context_is_named_before_the_reference_pass(tmp_path, monkeypatch):
    """Context 512: prompts of 1 and 2 tokens, with responses of 512 and 513, the end included."""
    monkeypatch.setattr("ctrl_dpo.train.add_reference_logps", None)
    groups = {
        "prompt": ["z", "x", "x", "xy"],
        "responses": [["a"], ["a", "b"], ["c", "d" * 511], ["e" * 512, "f"]],
        "rewards": [[1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]],
    }
    data = relabel(Dataset.from_dict(groups), **LABELS)
    message = (
        "at most 512 tokens together, the model's context; got {} rows of {} with more, first {} "
        "at row {}. Set max_prompt_length and max_response_length to 512 together at most, or drop"
    )
    with pytest.raises(ValueError, match=message.format("2 of 3", "train_dataset", 513, 2)):
        trainer(tmp_path, data)
    # of pairs that share their prompt, the one with the long response
    texts = {"chosen": ["a", "b" * 520], "rejected": ["c", "c"]}
    both = Dataset.from_dict(
        {"prompt": ["x", "x"], **texts, "margin": [1.0, 1.0], "beta": [0.1] * 2}
    )
    with pytest.raises(ValueError, match=message.format("1 of 1", "train_dataset", 522, 1)):
        trainer(tmp_path, both)
    monkeypatch.undo()
    made = trainer(tmp_path, data, args={"max_prompt_length": 1, "max_response_length": 511})
    assert made.data_counts["responses_truncated"] == 2
    short = data.select([1])
    with pytest.raises(ValueError, match=message.format("1 of 1", "eval_dataset", 515, 0)):
        trainer(tmp_path, short, eval_dataset=data.select([3]))
    with pytest.raises(ValueError, match=message.format("2 of 3", "eval_dataset", 513, 2)):
        trainer(tmp_path, short).evaluate(data)


def test_26_a_response_cut_to_nothing():
    with pytest.raises(ValueError, match="max_response_length must be an integer >= 1; got 0"):
        tokenize_group(tiny_tokenizer(), "x", ["a"], max_response_length=0)


def test_27_responses_cut_to_the_same_text_are_counted_and_a_pair_of_them_dropped(tmp_path):
    group = tokenize_group(tiny_tokenizer(), "x", ["abc", "abd"], max_response_length=2)
    assert group.repeated == [False, True]
    assert count_tokens([group])["responses_equal_after_truncation"] == 1
    row = {"prompt": "x", "margin": 0.3, "beta": 0.1}
    sides = [{"chosen": "abc", "rejected": "abd"}, {"chosen": "abc", "rejected": "xyz"}]
    data = Dataset.from_list([row | side for side in sides])
    counts = trainer(tmp_path, data, args={"max_response_length": 2}).data_counts
    assert (counts["dropped_cut_alike"], counts["responses"]) == (1, 2)


def test_28_the_border_is_in_tokens():
    group = tokenize_group(tiny_tokenizer(), "ab", ["cd", "c"])
    assert [group.prompt_ids + ids for ids in group.response_ids] == [
        [*tiny_tokenizer()("abcd").input_ids, 2],
        [*tiny_tokenizer()("abc").input_ids, 2],
    ]


def test_29_control_tokens_in_text_are_counted(caplog):
    group = tokenize_group(tiny_tokenizer(), "x", ["a<|im_end|>b"])
    assert count_tokens([group])["responses_with_control_tokens"] == 1
    assert "first at row 0" in caplog.text


def test_30_odd_characters_come_back_byte_for_byte(tmp_path):
    text = "\x00\u202eabc\U0001f600e\u0301\r\n"
    to_groups(dataset(responses=[text, "b"])).to_json(tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl")[1]["responses"][0] == text
    assert tiny_tokenizer().decode(
        tokenize_group(tiny_tokenizer(), "x", [text]).response_ids[0]
    ) == (text + "<|im_end|>")
    with pytest.raises(ValueError, match="lone surrogate '.ud800' at character 1"):
        check_text("response", "x\ud800")


def test_31_columns_of_two_types_name_the_file(tmp_path):
    chat = GROUP | {"prompt": [{"role": "user", "content": "Hi"}]}
    for name, row in (("a", GROUP), ("b", chat)):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    message = "column 'prompt' must be of one type in all files; .* in 'a.jsonl' .* in 'b.jsonl'"
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path)
    (tmp_path / "b.jsonl").write_text(json.dumps(GROUP) + "\n" + json.dumps(chat) + "\n")
    with pytest.raises(ValueError, match="'prompt' must be .*; got text at row 0 and messages at "):
        to_groups(read_rows(tmp_path / "b.jsonl"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}], "message must have 'role' and 'content'"),
        ([{"role": "assistant", "content": "a"}] * 2, "assistant messages must not follow"),
        ([{"role": r, "content": "a"} for r in ("user", "system")], "system message must come fir"),
    ],
)
def test_32_malformed_conversations(messages, message):
    refused(Dataset.from_list([GROUP | {"prompt": messages}]), f"row 0: {message}")


def test_33_a_conversation_without_a_template(tmp_path):
    data = labelled([1.0, 2.0], prompt=[{"role": "user", "content": "Hi"}])
    with pytest.raises(ValueError, match="must have a chat template .*; got None"):
        trainer(tmp_path, data, processing_class=tiny_tokenizer(chat_template=None))


def test_34_a_pad_token_that_ends_responses_too():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenize_group(tokenizer, "x", ["a"]).response_ids[0][-1] == tokenizer.eos_token_id
    rows = [
        {"prompt_ids": group.prompt_ids, "response_ids": group.response_ids, "targets": [0.0, 0.0]}
        for group in (tokenize_group(tokenizer, "x", texts) for texts in (["a", ""], ["abc", "b"]))
    ]
    batch = collate(rows)
    # every response is asked for its end, although padding has the same id
    assert batch["token_ids"].tolist().count(tokenizer.eos_token_id) == 4
    assert (batch["segments"] == -1).any()
    tokenizer.pad_token = None
    assert tokenize_group(tokenizer, "x", ["a"]).response_ids[0][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("keep", ["end", "start"])
def test_35_a_long_text_is_cut_before_it_is_tokenised(chat, keep):
    seen = []

    class Recording(type(tiny_tokenizer())):
        def __call__(self, text, **options):
            seen.extend([text] if isinstance(text, str) else text)
            return super().__call__(text, **options)

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Recording
    prompt = "p" * 10_000_000
    group = tokenize_group(
        tokenizer,
        [{"role": "user", "content": prompt}] if chat else prompt,
        ["y" * 10_000_000],
        max_prompt_length=40,
        max_response_length=8,
        keep=keep,
    )
    assert (len(group.response_ids[0]), group.truncated) == (8, [True])
    assert (len(group.prompt_ids), group.prompt_truncated) == (40, True)
    assert max(map(len, seen)) < 20_000
    kept = tokenizer.decode(group.prompt_ids)
    assert kept.endswith("<|im_start|>assistant\n") == (chat and keep == "end")


def test_36_evaluation_prompts_among_the_training_ones(tmp_path, caplog):
    data = labelled([1.0, 2.0], [2.0, 1.0])
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, data, eval_dataset=data.select([1]))
    assert "1 of 1 are also in train_dataset, first at row 0" in caplog.text


def test_37_draws_of_another_model_template_or_sampler(tmp_path):
    prompts = Dataset.from_dict({"prompt": ["x", "y"]})

    def drawn(seed: int = 0, **settings) -> Dataset:
        sampler = Sampler(3, max_new_tokens=4, **settings)
        data = sample(prompts, tiny_llama(seed=seed), sampler, tokenizer=tiny_tokenizer())
        return relabel(data.add_column("rewards", [[0.0, 1.0, 2.0]] * 2), **LABELS)

    assert trainer(tmp_path, drawn()).data_counts["rows"] == 2
    with pytest.raises(ValueError, match="draws of the reference policy; got model 'tensors:"):
        trainer(tmp_path, drawn(seed=1))
    with pytest.raises(ValueError, match=r"got temperature 0.5 instead of 1.0"):
        trainer(tmp_path, drawn(temperature=0.5))
    other = tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="got template "):
        trainer(tmp_path, drawn(), processing_class=other)


def test_a_prompt_without_draws_takes_the_pooled_value():
    made = RewardCalibrator("pooled").fit([[0.0, 1.0], [], [0.5, 0.7]]).transform([[0.5]] * 3)
    assert 0 < made[1, 0] < 1
