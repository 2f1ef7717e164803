"""Dataset rows to training rows: what is accepted, dropped and counted, and refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from tiny import tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, match_kl, pairs, relabel
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.labelling import labelled, resolve_beta, resolve_procedure
from ctrl_dpo.engine.rows import check_batches, training_rows

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


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_hard_label_losses_order_by_the_rewards(loss, tmp_path):
    """Rank-optimal targets of best-of-4 tie all but the best; no pair is lost to that."""
    made = relabel(scored(), procedure="best_of_4", beta=0.5)
    assert [len(set(values)) for values in made["transformed_rewards"]] == [2, 2]
    args = config(tmp_path, loss=loss, beta=0.1, procedure="best_of_4")
    for data in (scored(), made):
        rows, _ = rows_of(data, args)
        assert [row["targets"] for row in rows] == [[0, 1, 2], [2, 0, 1]]
        assert str(resolve_procedure(labelled(data, args), args)) == "best_of_4"
    # the dataset's procedure, where the configuration names none
    args = config(tmp_path, loss=loss, beta=0.1)
    assert str(resolve_procedure(labelled(made, args), args)) == "best_of_4"
    assert rows_of(made, args)[0][0]["targets"] == [0, 1, 2]
    # without rewards, the order of the labels is what there is
    assert rows_of(made.remove_columns("rewards"), args)[0][1]["targets"] == [1, 0, 0]


def test_rows_keep_the_order_that_targets_tie(tmp_path):
    made = relabel(
        scored(rewards=[[0.0, 1.0, 2.0], [1e-320, 0.0, 0.0]]), procedure="best_of_4", beta=1
    )
    rows, _ = rows_of(made, config(tmp_path))
    assert [row["order"] for row in rows] == [[0, 1, 2], [1, 0, 0]]
    assert rows[0]["targets"][0] == rows[0]["targets"][1]
    assert collate(rows)["order"].tolist() == [0, 1, 2, 1, 0, 0]
    (pair, _), _ = rows_of(pairs(made), config(tmp_path))
    assert pair["order"] == [1, 0]
    spoilt = made.remove_columns("rewards").add_column("rewards", [[0.0, 1.0, None]] * 2)
    with pytest.raises(ValueError, match="train_dataset's row 0: rewards must be finite; got 1 "):
        rows_of(spoilt, config(tmp_path))


def test_conversational_pairs(tmp_path):
    answer = [{"role": "assistant", "content": "a"}]
    two = [*answer, *answer]
    data = {
        "prompt": [[{"role": "user", "content": "q"}]],
        "chosen": [answer],
        "rejected": [[{"role": "assistant", "content": "b"}]],
    }
    rows, _ = rows_of(Dataset.from_dict(data), config(tmp_path, loss="dpo", beta=0.1))
    letters = tiny_tokenizer().convert_tokens_to_ids
    assert rows[0]["response_ids"] == [[letters("a"), 2], [letters("b"), 2]]
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
        (scored().remove_columns("rewards"), {}, "must hold groups .*, pairs .*; got"),
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
    told = config(tmp_path, beta=0.7, procedure="worst_of_4", accept_other_labels=True)
    assert resolve_beta(made, told) == 0.7
    rows, _ = training_rows(made, tiny_tokenizer(), told, 0.7)
    labels = made[0]["transformed_rewards"]
    assert np.diff(rows[0]["targets"]) == pytest.approx(np.diff(labels) / 0.7)
    with pytest.raises(ValueError, match="beta must be one for the whole dataset; got .0.5, 0.6"):
        resolve_beta(mixed, config(tmp_path))
    with pytest.raises(ValueError, match="beta must be given, since the dataset has no column"):
        resolve_beta(made.remove_columns("beta"), config(tmp_path))


def test_labels_by_rank_are_for_the_anchor_that_trains(tmp_path):
    """Of two draws the contrastive fit is twice its targets, so they are half as far apart."""
    apart = {}
    for anchor in (0.0, 1.0):
        settings = config(tmp_path, anchor=anchor, procedure="best_of_4", target_kl=0.5)
        data = labelled(scored(), settings)
        resolve_beta(data, settings)
        apart[anchor] = [max(row) - min(row) for row in data["transformed_rewards"]]
        with pytest.raises(ValueError, match=f"anchor must be that of .*, {anchor}; got 0.5"):
            resolve_beta(data, config(tmp_path, anchor=0.5))
    for row, draws in enumerate(map(len, scored()["responses"])):
        expected = apart[1.0][row] * (draws - 1) / draws
        assert apart[0.0][row] == pytest.approx(expected, abs=1e-8)
    assert max(apart[0.0]) > 0


def test_the_transformation_of_the_dataset_is_the_one_configured(tmp_path):
    made = relabel(scored(), procedure="best_of_4", transformation="exponential:5", beta=0.5)
    for data in (made, pairs(made)):
        assert resolve_beta(data, config(tmp_path, transformation="exponential:5")) == 0.5
        other = config(tmp_path, transformation="identity")
        message = "transformation must be that of .*, 'exponential:5.0'; got 'identity'. Relabel"
        with pytest.raises(ValueError, match=message):
            resolve_beta(labelled(data, other), other)
    accepted = {"transformation": "identity", "accept_other_labels": True, "beta": 0.7}
    assert resolve_beta(made, config(tmp_path, **accepted)) == 0.7
    named = made.remove_columns("transformation").add_column("transformation", ["log", "raw"])
    with pytest.raises(ValueError, match="transformation must be one .*; got .'log', 'raw'."):
        resolve_beta(named, config(tmp_path))


@pytest.mark.parametrize(
    ("setting", "lacks"),
    [
        ({"target_kl": 3.0}, []),
        ({"calibration": "empirical"}, []),
        ({"transformation": "identity"}, ["transformation"]),
    ],
)
def test_a_setting_that_would_label_a_labelled_dataset_is_refused(setting, lacks, tmp_path):
    ((name, value),) = setting.items()
    made = relabel(scored(), procedure="best_of_4", transformation="identity", beta=0.5)
    for data in (made, pairs(made)):
        message = f"{name} must be left out for a dataset that has its labels; got {value!r} with"
        with pytest.raises(ValueError, match=message):
            labelled(data.remove_columns(lacks), config(tmp_path, **setting))
    args = config(tmp_path, procedure="best_of_4", **{"target_kl": 3.0} | setting)
    wanted = args.transformation or "optimal"
    assert labelled(scored(), args)["transformation"][:] == [wanted] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": [float("nan")] * 2}, "beta must be finite and > 0; got nan"),
        (
            {"transformed_rewards": [[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0]]},
            "train_dataset's row 1: targets must be finite; got 1 non-finite of 3, first .*nan",
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


def test_raw_rewards_are_labels_without_a_normaliser(tmp_path):
    rows, _ = rows_of(scored(), config(tmp_path, transformation="raw", beta=0.5))
    assert [row["targets"] for row in rows] == [[0.0, 2.0, 4.0], [10.0, 6.0, 8.0]]
    made = relabel(scored(), procedure="best_of_4", transformation="raw", beta=0.5)
    assert made["log_normaliser"] == [None, None]
    assert made["transformation"] == ["raw", "raw"]
    assert pairs(made)["margin"] == [2.0, 2.0]
    with pytest.raises(ValueError, match="anchor must be 0 where the normaliser is not known; got"):
        rows_of(made, config(tmp_path, anchor=1.0))
    # and their order is all that the hard-label losses need
    rows, _ = rows_of(scored(), config(tmp_path, loss="dpo", beta=0.1))
    assert np.argsort(rows[1]["targets"]).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_kl": 1.0}, "beta must be given for transformation='raw'; got target_kl=1.0"),
        ({"beta": 1.0, "calibration": "pooled"}, "calibration must be left out .*; got 'pooled'"),
        ({"beta": 1.0, "estimator": "levels"}, "estimator must be left out .*; got 'levels'"),
        ({"beta": None}, "beta must be a number > 0; got None"),
    ],
)
def test_what_raw_rewards_do_not_have_is_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        relabel(scored(), procedure="single_draw", transformation="raw", **settings)


UNPAIRED = {"prompt": ["one", "one", "two"], "response": ["a", "b", "c"], "reward": [1.0, 2.0, 0.5]}


def test_unpaired_responses_are_groups_of_one_with_known_targets(tmp_path):
    drawn = np.random.default_rng(0).normal(size=(3, 50)).tolist()
    data = Dataset.from_dict(UNPAIRED | {"reference_rewards": drawn, "weight": [1.0, 2.0, 0.5]})
    args = config(
        tmp_path, anchor=1.0, procedure="single_draw", transformation="identity", beta=0.5
    )
    rows, counts = rows_of(data, args)
    assert (len(rows), counts["dropped_single_response"]) == (3, 0)
    assert [row["weight"] for row in rows] == [1.0, 2.0, 0.5]
    for row, draws, reward in zip(rows, drawn, UNPAIRED["reward"], strict=True):
        # E[U] for j draws of 50 below, and the uniform normaliser of the identity
        below = sum(x < reward for x in draws)
        wanted = (below + 1) / 52 / 0.5 - np.log(0.5 * np.expm1(1 / 0.5))
        assert row["targets"] == pytest.approx([wanted])
    bare = Dataset.from_dict(UNPAIRED)
    with pytest.raises(ValueError, match="must have a column 'reference_rewards', .*; got"):
        rows_of(bare, args)
    with pytest.raises(ValueError, match="anchor must be > 0 for unpaired responses; got 0.0"):
        rows_of(data, config(tmp_path, procedure="single_draw", beta=0.5))
    pooled = config(tmp_path, anchor=1.0, procedure="single_draw", beta=0.5, calibration="pooled")
    rows, _ = rows_of(bare, pooled)
    assert rows[1]["targets"] > rows[0]["targets"] > rows[2]["targets"]


def test_weights_travel_with_groups_and_pairs(tmp_path):
    made = relabel(scored(weight=[0.5, 3.0]), procedure="single_draw", beta=0.5)
    assert [row["weight"] for row in rows_of(made, config(tmp_path))[0]] == [0.5, 3.0]
    assert [row["weight"] for row in rows_of(pairs(made), config(tmp_path))[0]] == [0.5, 3.0]
    for bad in (-1.0, float("nan"), None):
        made = relabel(scored(weight=[1.0, bad]), procedure="single_draw", beta=0.5)
        with pytest.raises(
            ValueError, match=f"row 1: weight must be a finite number >= 0; got {bad}"
        ):
            rows_of(made, config(tmp_path))


def test_pairs_need_their_prompt_and_no_anchor(tmp_path):
    made = pairs(relabel(scored(), procedure="single_draw", beta=0.5))
    with pytest.raises(ValueError, match="anchor must be 0 for pairs, .*; got 1.0"):
        rows_of(made, config(tmp_path, anchor=1.0))
    with pytest.raises(ValueError, match="and 2 pairs whose sides begin with no common prompt"):
        rows_of(made.remove_columns("prompt"), config(tmp_path))
    ids = {"chosen_token_ids": [[5], [6]], "rejected_token_ids": [[7], [8]]}
    drawn = Dataset.from_dict(made.to_dict() | ids)
    assert rows_of(drawn, config(tmp_path))[0][1]["response_ids"] == [[6], [8]]
    message = "column 'prompt' is missing .* train_dataset has tokens of responses without it"
    with pytest.raises(ValueError, match=message):
        rows_of(drawn.remove_columns("prompt"), config(tmp_path))


@pytest.mark.parametrize("loss", [{}, {"loss": "dpo"}])
@pytest.mark.parametrize(
    ("margins", "message"),
    [
        ([1.0, None, -2.0], "got None at row 1, the first of 2 of 3"),
        ([1, None, 2], "got None at row 1, the first of 1 of 3"),
        ([0.5, 0.0, -2.0], "got -2.0 at row 2, the first of 1 of 3. Drop those rows, swap"),
        ([0, 3, -1], "got -1 at row 2, the first of 1 of 3"),
        ([float("inf"), 1.0, float("nan")], "got inf at row 0, the first of 2 of 3"),
        ([None, None, None], "got None at row 0, the first of 3 of 3"),
        (["0.5", "1", "2"], "got '0.5' at row 0, the first of 3 of 3"),
    ],
)
def test_margins_that_are_none_are_refused_by_row(margins, message, loss, tmp_path):
    data = Dataset.from_dict({"prompt": ["q"] * 3, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    data = data.add_column("margin", margins)
    with pytest.raises(ValueError, match=f"margin must be a finite number >= 0; {message}"):
        labelled(data, config(tmp_path, beta=0.1, **loss))
    good = data.remove_columns("margin").add_column("margin", [0.0, 0.5, 2.0])
    assert labelled(good, config(tmp_path, beta=0.1, **loss))["margin"][:] == [0.0, 0.5, 2.0]


def test_reference_values_of_other_tokens_are_refused(tmp_path):
    logps = [[-1.0, -2.0, -3.0]] * 2
    made = relabel(scored(reference_logps=logps), procedure="single_draw", beta=0.5)
    with pytest.raises(
        ValueError, match="row 0: reference_logps must be of the tokens .* cut. Remove"
    ):
        rows_of(made, config(tmp_path, max_response_length=1))
    bad = relabel(scored(reference_logps=[[-1.0], [-2.0]]), procedure="single_draw", beta=0.5)
    with pytest.raises(ValueError, match="one finite number per response; got .-1.0. for 3"):
        rows_of(bad, config(tmp_path))


def test_what_lacks_its_end_is_truncated(tmp_path):
    made = relabel(
        scored(response_ids=[[[9], [8, 7], [6]]] * 2, finished=[[True, False, True]] * 2),
        procedure="single_draw",
        beta=1.0,
    )
    assert rows_of(made, config(tmp_path))[0][0]["truncated"] == [False, True, False]
    short = rows_of(scored(), config(tmp_path, procedure="single_draw", beta=1.0))[0]
    assert short[0]["truncated"] == [False] * 3
    cut = config(tmp_path, procedure="single_draw", beta=1.0, max_response_length=2)
    assert rows_of(scored(), cut)[0][0]["truncated"] == [False, True, False]


@pytest.mark.parametrize(("split", "batch"), [(False, 8), (True, 4)])
def test_a_batch_of_several_processes_is_theirs_together(split, batch):
    """Each takes per_device_train_batch_size rows, or with split_batches its share of so many."""
    args = SimpleNamespace(
        train_batch_size=4,
        per_device_train_batch_size=4,
        world_size=2,
        dataloader_drop_last=True,
        accelerator_config=SimpleNamespace(split_batches=split),
    )
    check_batches([{}] * batch, {}, args)
    with pytest.raises(
        ValueError, match=f"got {batch - 1} rows of batches, and a batch is {batch} "
    ):
        check_batches([{}] * (batch - 1), {}, args)
    args.dataloader_drop_last = False
    check_batches([{}], {}, args)
