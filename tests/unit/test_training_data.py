"""What training data may be: TRL's pairs in their four forms, and what is refused by name."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, to_groups
from ctrl_dpo.engine.labelling import labelled
from ctrl_dpo.engine.rows import training_rows

USER = {"role": "user", "content": "Q"}
CHAT = {
    "prompt": [USER],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}
PAIR = {"prompt": "Q: x A: ", "chosen": "good", "rejected": "bad"}
GROUP = {"prompt": "one", "responses": ["a", "bb"], "rewards": [0.0, 1.0]}


def config(tmp_path, **settings) -> CTRLDPOConfig:
    return CTRLDPOConfig(str(tmp_path), **{"loss": "dpo", "beta": 0.1} | settings)


def rows_of(rows: list[dict], tmp_path, name: str = "train_dataset", **settings):
    args = config(tmp_path, **settings)
    data = labelled(Dataset.from_list(rows), args, name)
    tokenizer = tiny_tokenizer()
    return training_rows(data, tokenizer, args, 0.1, name)


def said(**message) -> list[dict]:
    return [{"role": "assistant", "content": "x"} | message]


def trainer(tmp_path, data, **options) -> CTRLDPOTrainer:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    args = config(tmp_path / "run", report_to="none", max_steps=1, logging_steps=1)
    return CTRLDPOTrainer(
        tiny_llama(), args, data, processing_class=tiny_tokenizer(), peft_config=lora, **options
    )


CALL = {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            said(content=None, tool_calls=[CALL]),
            "chosen must hold no more than .*; got .*'tool_cal",
        ),
        (
            said(tool_calls=[CALL]),
            "chosen must hold no more than role and content; got .*'name': '",
        ),
        (said(content=None), "content of chosen must be text; got None"),
        (
            said(content=[{"type": "text", "text": "hi"}]),
            "content of chosen must be text; got .*'hi'",
        ),
        ([{"content": "x"}], "chosen, as a conversational response, must be one assistant message"),
        ([], r"chosen, as a conversational response, must be one assistant message; got \[\]"),
        (None, "chosen must be text; got None. Convert or drop that row"),
    ],
)
def test_a_response_that_is_more_than_text_is_refused_by_row(response, message, tmp_path):
    """Content parts and calls of tools were trained on as the text of a Python object."""
    with pytest.raises(ValueError, match=f"train_dataset's row 0: {message}"):
        rows_of([CHAT | {"chosen": response}], tmp_path)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            said(tool_calls=[CALL]),
            "chosen must hold no more than role and content; got .*'name': '",
        ),
        (said(content=None), "content must be text; got None at message 0 of chosen"),
        (said(content=[{"type": "text", "text": "hi"}]), "content must be text; .* 0 of chosen"),
    ],
)
def test_reading_groups_refuses_them_too(response, message):
    pair = {"prompt": [USER], "chosen": response, "rejected": response}
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        to_groups(Dataset.from_list([pair]))


def test_an_empty_list_of_calls_is_no_call(tmp_path):
    rows, _ = rows_of([CHAT | {"chosen": said(content="good", tool_calls=[], name=None)}], tmp_path)
    assert rows == rows_of([CHAT], tmp_path)[0]


DIALOGUE = {
    k: f"\n\nHuman: Q\n\nAssistant: {CHAT[k][0]['content']}" for k in ("chosen", "rejected")
}
WHOLE = {name: [USER, *CHAT[name]] for name in ("chosen", "rejected")}
IMPLICIT = [
    (WHOLE, CHAT),
    (WHOLE | {"prompt": "Q"}, CHAT),
    ({"chosen": "Q: x A: good", "rejected": "Q: x A: bad"}, PAIR),
    (DIALOGUE, CHAT),
]


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize(("implicit", "explicit"), IMPLICIT)
def test_pairs_with_an_implicit_prompt_train_as_with_an_explicit_one(
    implicit, explicit, loss, tmp_path
):
    rows, counts = rows_of([implicit] * 2, tmp_path, loss=loss)
    assert rows == rows_of([explicit] * 2, tmp_path, loss=loss)[0]
    assert counts["dropped_no_shared_prompt"] == 0
    margins = [implicit | {"margin": 0.5}], [explicit | {"margin": 0.5}]
    rows = [rows_of(each, tmp_path, loss="squared")[0] for each in margins]
    assert rows[0] == rows[1]
    assert rows[0][0]["targets"] == [5.0, 0.0]


@pytest.mark.parametrize("scores", [(3.0, 4.0), (4.0, 4.0), (5.0, 4.0)])
@pytest.mark.parametrize(("implicit", "explicit"), IMPLICIT)
def test_chosen_is_the_better_one_whatever_scores_say(implicit, explicit, scores, tmp_path):
    told = dict(zip(("score_chosen", "score_rejected"), scores, strict=True))
    for pair in (implicit, explicit):
        (row,) = rows_of([pair | told], tmp_path, loss="dpo")[0]
        assert row["order"] == row["targets"] == [1, 0]


def test_pairs_that_share_no_prompt_are_dropped_and_counted(tmp_path, caplog):
    other = {"chosen": "x y", "rejected": "z y"}
    with caplog.at_level(logging.WARNING):
        rows, counts = rows_of([other, IMPLICIT[2][0], other], tmp_path)
    assert (counts["rows"], counts["dropped_no_shared_prompt"]) == (3, 2)
    assert [row["dataset_rows"] for row in rows] == [[1, 1]]
    assert "'dropped_no_shared_prompt': 2" in caplog.text


def test_the_trainer_takes_an_implicit_prompt(tmp_path):
    runs = []
    for name, pair in zip(("implicit", "explicit"), IMPLICIT[0], strict=True):
        made = trainer(tmp_path / name, Dataset.from_list([pair] * 2))
        made.train()
        runs.append(made.state.log_history[0]["loss"])
    assert runs[0] == runs[1] == pytest.approx(np.log(2), abs=1e-6)


def test_a_layout_that_training_does_not_read_names_what_does(tmp_path):
    row = {"instruction": "Q", "completions": [{"response": "a", "overall_score": 1.0}]}
    data = Dataset.from_list([row])
    with pytest.raises(
        ValueError, match="other layouts .* are read by to_groups and `ctrl-dpo rel"
    ):
        labelled(data, config(tmp_path))
    unscored = Dataset.from_list([GROUP]).remove_columns("rewards")
    with pytest.raises(ValueError, match="Score responses that have no rewards .`ctrl-dpo score`"):
        labelled(unscored, config(tmp_path))
    made = labelled(to_groups(data), config(tmp_path))
    assert made["transformed_rewards"][:] == [[1.0]]


def test_equal_responses_are_dropped_and_counted(tmp_path, caplog):
    same = PAIR | {"chosen": "same", "rejected": "same"}
    cut = PAIR | {"chosen": "same but", "rejected": "same or"}
    with caplog.at_level(logging.WARNING):
        rows, counts = rows_of([same, PAIR, cut, same], tmp_path, max_response_length=5)
    assert [row["dataset_rows"] for row in rows] == [[1, 1]]
    assert (counts["dropped_equal_responses"], counts["dropped_cut_alike"]) == (2, 1)
    assert "'dropped_equal_responses': 2" in caplog.text
    with pytest.raises(ValueError, match="got 0 groups of one, 1 of equal responses, 0 whose"):
        rows_of([same], tmp_path)
    groups = [GROUP | {"responses": r} for r in (["a", "a"], ["a", "bb"])]
    settings = {"loss": "squared", "procedure": "single_draw", "transformation": "identity"}
    rows, counts = rows_of(groups, tmp_path, **settings)
    assert (len(rows), counts["dropped_equal_responses"]) == (1, 1)
    # an anchored loss knows the target of every single response
    rows, counts = rows_of(groups, tmp_path, anchor=1.0, **settings)
    assert (len(rows), counts["dropped_equal_responses"]) == (2, 0)


def test_a_text_prompt_with_messages_for_responses_is_refused(tmp_path):
    """The bare text would be trained on without the chat template."""
    message = "row 0: prompt must be messages where chosen is; got 'Q', .* Write it as"
    with pytest.raises(ValueError, match=message):
        rows_of([CHAT | {"prompt": "Q"}], tmp_path)
    assert rows_of([CHAT | PAIR | {"prompt": [USER]}], tmp_path)[0] == rows_of([CHAT], tmp_path)[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"prompt": [USER | {"role": "human"}]},
            "role must be one of .*; got 'human' at message 0 of",
        ),
        ({"prompt": [USER, *said()]}, "prompt must end before the assistant's turn"),
        ({"prompt": []}, r"messages must be a list of .*; got \[\] at prompt"),
        ({"prompt": None}, "prompt must be text; got None. Convert or drop that row"),
        ({"rejected": None}, "rejected must be text; got None. Convert or drop that row"),
    ],
)
def test_errors_of_a_row_name_it_and_its_column(bad, message, tmp_path):
    rows = [CHAT, CHAT, CHAT | bad]
    with pytest.raises(ValueError, match=f"train_dataset's row 2: {message}"):
        rows_of(rows, tmp_path)
    with pytest.raises(ValueError, match=f"eval_dataset's row 2: {message}"):
        rows_of(rows, tmp_path, "eval_dataset")
    with pytest.raises(ValueError, match="row 0: chosen must be text; got 3. Convert or drop"):
        rows_of([PAIR | {"chosen": 3}], tmp_path)


def test_what_a_chat_template_refuses_is_named(tmp_path):
    template = "{{ raise_exception('System role not supported') }}"
    args = config(tmp_path)
    data = Dataset.from_list([CHAT])
    message = (
        "train_dataset's row 0: messages must be such as the chat template renders; got 'System"
    )
    with pytest.raises(ValueError, match=message):
        training_rows(data, tiny_tokenizer(template), args, 0.1)


def test_evaluation_data_is_called_by_its_argument(tmp_path):
    data = Dataset.from_list([PAIR])
    bad = Dataset.from_list([PAIR, PAIR | {"prompt": None}])
    for given, name in ((bad, "eval_dataset"), ({"a": data, "b": bad}, r"eval_dataset\['b'\]")):
        with pytest.raises(ValueError, match=f"{name}'s row 1: prompt must be text; got None"):
            trainer(tmp_path, data, eval_dataset=given)
    with pytest.raises(TypeError, match="eval_dataset must be a datasets.Dataset; got list"):
        trainer(tmp_path, data, eval_dataset=[PAIR])
    with pytest.raises(ValueError, match="eval_dataset must have at least one row; got 0"):
        trainer(tmp_path, data, eval_dataset=data.select([]))
    with pytest.raises(ValueError, match="eval_dataset must hold groups"):
        trainer(tmp_path, data, eval_dataset=data.remove_columns("chosen"))
    for row, message in (
        (PAIR | {"margin": -1.0}, "eval_dataset's margin must be a finite number >= 0; got -1.0"),
        (PAIR, "eval_dataset's pairs must have a column 'margin' for loss='squared'"),
        (PAIR | {"tools": "x"}, "tools must be empty, .* at row 0 of eval_dataset"),
        (PAIR | {"margin": 1.0, "weight": -1.0}, "eval_dataset's row 0: weight must be a finite"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_of([row], tmp_path, "eval_dataset", loss="squared")
    with pytest.raises(ValueError, match="eval_dataset's row 1: prompt must be text; got None"):
        trainer(tmp_path, data).evaluate(bad)
