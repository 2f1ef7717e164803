"""Dataset rows to training rows: what is accepted, dropped and counted, and refused by name."""

from __future__ import annotations

import pytest
from datasets import Dataset
from tiny import tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, match_kl, pairs, relabel
from ctrl_dpo.engine.rows import labelled, resolve_beta, training_rows

GROUPS = {
    "prompt": ["one", "two"],
    "responses": [["a", "bb", "c"], ["d", "e", "f"]],
    "rewards": [[0.0, 1.0, 2.0], [5.0, 3.0, 4.0]],
}


def scored(**changes) -> Dataset:
    return Dataset.from_dict(GROUPS | changes)


def config(tmp_path, **settings) -> CTRLDPOConfig:
    return CTRLDPOConfig(str(tmp_path), **settings)


def rows_of(data: Dataset, args: CTRLDPOConfig):
    data = labelled(data, args)
    return training_rows(data, tiny_tokenizer(), args, resolve_beta(data, args))


def test_scored_groups_are_relabelled_by_the_configuration(tmp_path):
    args = config(tmp_path, procedure="best_of_4", target_kl=0.5)
    rows, counts = rows_of(scored(), args)
    beta = match_kl("optimal", "best_of_4", 0.5)
    made = relabel(scored(), procedure="best_of_4", target_kl=0.5)
    assert resolve_beta(labelled(scored(), args), args) == beta
    for row, label in zip(rows, made, strict=True):
        wanted = [x / beta - label["log_normaliser"] for x in label["transformed_rewards"]]
        assert row["targets"] == pytest.approx(wanted)
        assert row["reference_logps"] is None
    assert counts["rows"] == 2
    assert counts["dropped_single_response"] == 0


def test_tokens_and_reference_values_of_the_dataset_are_used(tmp_path):
    made = relabel(
        scored(
            response_ids=[[[9], [8, 7], [6]]] * 2,
            finished=[[True, False, True]] * 2,
            reference_logps=[[-1.0, -2.0, -3.0]] * 2,
        ),
        procedure="single_draw",
        beta=1.0,
    )
    rows, _ = rows_of(made, config(tmp_path))
    assert rows[0]["response_ids"] == [[9, 2], [8, 7], [6, 2]]
    assert rows[1]["reference_logps"] == [-1.0, -2.0, -3.0]


def test_pairs_are_groups_of_two(tmp_path):
    made = pairs(relabel(scored(), procedure="single_draw", beta=0.5))
    rows, _ = rows_of(made, config(tmp_path))
    for row, pair in zip(rows, made, strict=True):
        assert row["targets"] == [pair["margin"] / 0.5, 0.0]
    letters = tiny_tokenizer().convert_tokens_to_ids
    assert rows[0]["response_ids"] == [[letters("c"), 2], [letters("a"), 2]]


def test_plain_pairs_serve_the_hard_label_losses(tmp_path):
    plain = Dataset.from_dict({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]})
    rows, _ = rows_of(plain, config(tmp_path, loss="dpo", beta=0.1))
    assert rows[0]["targets"][0] > rows[0]["targets"][1]
    with pytest.raises(ValueError, match="must have a column 'margin' for loss='squared'; got"):
        rows_of(plain, config(tmp_path, beta=0.1))


def test_conversational_pairs(tmp_path):
    answer = [{"role": "assistant", "content": "a"}]
    two = [*answer, *answer]
    data = {
        "prompt": [[{"role": "user", "content": "q"}]],
        "chosen": [answer],
        "rejected": [answer],
    }
    rows, _ = rows_of(Dataset.from_dict(data), config(tmp_path, loss="dpo", beta=0.1))
    assert len(rows[0]["response_ids"]) == 2
    with pytest.raises(ValueError, match="must be one assistant message; got"):
        rows_of(
            Dataset.from_dict(data | {"rejected": [two]}), config(tmp_path, loss="dpo", beta=0.1)
        )


def test_a_response_alone_is_dropped_and_counted_unless_anchored(tmp_path):
    data = scored(responses=[["a"], ["d", "e"]], rewards=[[1.0], [2.0, 3.0]])
    made = relabel(data, procedure="single_draw", transformation="identity", beta=1.0)
    rows, counts = rows_of(made, config(tmp_path))
    assert len(rows) == 1
    assert counts["dropped_single_response"] == 1
    rows, counts = rows_of(made, config(tmp_path, anchor=1.0))
    assert len(rows) == 2
    assert counts["dropped_single_response"] == 0
    with pytest.raises(ValueError, match="a group of two responses or more; got 1 groups of one"):
        rows_of(made.select([0]), config(tmp_path))


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (scored().select([]), {}, "at least one row; got 0"),
        (scored().remove_columns("rewards"), {}, "must hold groups .* or pairs .*; got"),
        (scored(), {"beta": 1.0}, "procedure must be given for unlabelled groups; got None"),
    ],
)
def test_what_cannot_be_labelled_is_named(data, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        labelled(data, config(tmp_path, **settings))


def test_one_beta_and_one_procedure(tmp_path):
    made = relabel(scored(), procedure="best_of_4", beta=0.5)
    assert resolve_beta(made, config(tmp_path, beta=0.5, procedure="best_of_4")) == 0.5
    assert resolve_beta(made, config(tmp_path, loss="ipo", beta=0.9)) == 0.9
    with pytest.raises(
        ValueError, match="beta must be that of the relabelled dataset, 0.5; got 0.7"
    ):
        resolve_beta(made, config(tmp_path, beta=0.7))
    with pytest.raises(
        ValueError, match="procedure must be that of .* 'best_of_4'; got 'worst_of_4'"
    ):
        resolve_beta(made, config(tmp_path, procedure="worst_of_4"))
    mixed = Dataset.from_list([made[0], {**made[1], "beta": 0.6}])
    with pytest.raises(ValueError, match="beta must be one for the whole dataset; got .0.5, 0.6"):
        resolve_beta(mixed, config(tmp_path))
    with pytest.raises(ValueError, match="beta must be given, since the dataset has no column"):
        resolve_beta(made.remove_columns("beta"), config(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": [float("nan")] * 2}, "beta must be finite and > 0; got nan"),
        (
            {"transformed_rewards": [[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0]]},
            "targets of train_dataset's row 1 must be finite; got 1 non-finite of 3, first .*nan",
        ),
        (
            {"response_ids": [[[5], [], [6]]] * 2, "finished": [[False] * 3] * 2},
            "response must have at least one token; got none",
        ),
    ],
)
def test_numbers_that_would_spoil_the_first_step_are_refused(changes, message, tmp_path):
    made = relabel(scored(), procedure="single_draw", beta=1.0)
    data = Dataset.from_dict(made.to_dict() | changes)
    with pytest.raises(ValueError, match=message):
        rows_of(data, config(tmp_path))
