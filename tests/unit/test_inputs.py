"""What a dataset is refused for as a whole: its type, and columns that nothing renders."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, relabel, to_groups
from ctrl_dpo.data import columns
from ctrl_dpo.engine.labelling import labelled
from ctrl_dpo.engine.provenance import check_provenance, provenance
from ctrl_dpo.engine.rows import training_rows
from ctrl_dpo.sample import sample
from ctrl_dpo.score import score

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
GROUP = {"prompt": "one", "responses": ["a", "bb"], "rewards": [0.0, 1.0]}


def config(tmp_path, **settings) -> CTRLDPOConfig:
    return CTRLDPOConfig(str(tmp_path), **{"loss": "dpo", "beta": 0.1} | settings)


def lengths(groups):
    return score(groups, lambda prompts, responses: map(len, responses), progress=False)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("images", ["x.png"]),
        ("image", "x.png"),
        ("system", "Be nice."),
    ],
)
def test_columns_that_nothing_renders_are_refused(column, value, tmp_path):
    pairs = Dataset.from_list([{**PAIR, column: None}, {**PAIR, column: value}])
    message = f"{column} must be empty, since nothing renders that column; got .* at row 1 of"
    with pytest.raises(ValueError, match=f"{message} train_dataset. Render it into the prompt, or"):
        labelled(pairs, config(tmp_path))
    groups = Dataset.from_list([GROUP | {column: None}, GROUP | {"prompt": "two", column: value}])
    for data in (pairs, groups, groups.to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"row 1: {column} must be empty, .* remove the colum"):
            list(to_groups(data))
    assert len(to_groups(groups, invalid="drop")) == 1
    with pytest.raises(ValueError, match=f"{message} prompts"):
        sample(groups, tiny_llama(), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match=f"{message} groups"):
        lengths(groups.remove_columns("rewards"))


@pytest.mark.parametrize("value", [None, [], "", {"enable_thinking": None}])
def test_such_columns_may_be_there_without_values(value, tmp_path):
    data = labelled(Dataset.from_list([PAIR | {"tools": value}]), config(tmp_path))
    assert data["chosen"][:] == ["good"]
    assert to_groups(Dataset.from_list([GROUP | {"tools": value}]))[0]["responses"] == ["a", "bb"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DatasetDict(a=Dataset.from_list([PAIR])), r"DatasetDict. Choose a split of \['a'\]"),
        ({"train": [PAIR]}, r"dict. Choose a split of \['train'\]"),
        (Dataset.from_list([PAIR]).to_iterable_dataset(), "IterableDataset. Read the stream: Data"),
        ([PAIR], r"list. Make one with Dataset.from_list\(rows\)"),
        (None, "NoneType. Make one"),
    ],
)
def test_data_of_another_type_is_refused(data, message, tmp_path):
    with pytest.raises(TypeError, match=f"train_dataset must be a datasets.Dataset; got {message}"):
        CTRLDPOTrainer(tiny_llama(), config(tmp_path), data, processing_class=tiny_tokenizer())
    with pytest.raises(TypeError, match=f"groups must be a datasets.Dataset; got {message}"):
        lengths(data)


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "arrow"])
def test_the_format_of_a_dataset_changes_nothing(form, tmp_path):
    args = config(tmp_path, loss="squared", beta=None)
    made = relabel(
        Dataset.from_list([GROUP, GROUP | {"prompt": "two"}]), procedure="single_draw", beta=0.1
    )
    formed, plain = (
        training_rows(labelled(data, args), tiny_tokenizer(), args, 0.1)
        for data in (made.with_format(form), made)
    )
    assert formed == plain
    groups = made.select_columns(["prompt", "responses"]).with_format(form)
    assert lengths(groups)["rewards"][:] == [[1.0, 2.0]] * 2


def test_rows_that_do_not_say_where_they_were_drawn_are_taken():
    told = provenance("files:another", tiny_tokenizer(), dict(columns.UNCHANGED_SAMPLER))
    data = Dataset.from_dict({"sampled_from": [None, None]})
    assert check_provenance(data, "files:this", tiny_tokenizer()) is None
    data = Dataset.from_dict({"sampled_from": [None, told]})
    with pytest.raises(
        ValueError, match=r"responses of a_set must be .* got model 'files:another'"
    ):
        check_provenance(data, "files:this", tiny_tokenizer(), "a_set")
