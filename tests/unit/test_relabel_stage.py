"""Relabelling by hand arithmetic: columns, refusals, counts."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset, Value

from ctrl_dpo import (
    Optimal,
    RewardCalibrator,
    match_kl,
    optimal_discrete_policy,
    pairs,
    relabel,
)
from ctrl_dpo.data.layouts import read_groups
from ctrl_dpo.labels.pairs import PairStrategy, parse_strategy
from ctrl_dpo.measures.label_summary import summarise_labels
from ctrl_dpo.measures.uniformity import calibration_error, held_out_error
from ctrl_dpo.relabel import count_pairs

IDENTITY = {"procedure": "single_draw", "transformation": "identity"}


def groups(*rewards, **columns) -> Dataset:
    rows = {
        "prompt": [f"question {i}" for i in range(len(rewards))],
        "responses": [[f"answer {i} {j}" for j in range(len(r))] for i, r in enumerate(rewards)],
        "rewards": [list(r) for r in rewards],
    }
    return Dataset.from_dict(rows | columns)


def test_columns_by_hand():
    made = relabel(groups([1.0, 3.0, 2.0], [5.0, 5.0]), **IDENTITY, beta=0.5, estimator="plug_in")
    assert made["calibrated_rewards"][:] == [[0.0, 1.0, 0.5], [0.5, 0.5]]
    # log of (e^(1/beta) - 1) beta at beta 1/2
    assert made["log_normaliser"][0] == pytest.approx(np.log((np.e**2 - 1) / 2), rel=1e-12)
    assert made[1] == {
        "prompt": "question 1",
        "responses": ["answer 1 0", "answer 1 1"],
        "rewards": [5.0, 5.0],
        "calibrated_rewards": [0.5, 0.5],
        "transformed_rewards": [0.5, 0.5],
        "log_normaliser": made["log_normaliser"][0],
        "beta": 0.5,
        "procedure": "single_draw",
        "transformation": "identity",
    }


def test_the_posterior_of_a_draw_is_its_beta_mean():
    # rank j of K draws is Beta(j, K + 1 - j), of mean j / (K + 1)
    made = relabel(groups([1.0, 3.0, 2.0, 2.0]), **IDENTITY, beta=1.0)
    assert made["transformed_rewards"][0] == pytest.approx([0.2, 0.8, 0.5, 0.5], abs=1e-12)


def test_reference_rewards_make_the_responses_new_ones():
    made = relabel(
        groups([1.0, 9.0], reference_rewards=[[0.0, 1.0, 2.0, 3.0]]), **IDENTITY, beta=1.0
    )
    assert made["calibrated_rewards"][0] == [0.375, 1.0]
    # a new one with j draws below it is Beta(j + 1, K - j + 1); a tie is shared between two ranks
    assert made["transformed_rewards"][0] == pytest.approx([2.5 / 6, 5 / 6], abs=1e-12)


def test_the_budget_decides_beta():
    made = relabel(groups([1.0, 2.0]), procedure="best_of_4", target_kl=1.0)
    assert made["beta"][0] == match_kl("optimal", "best_of_4", 1.0)
    assert made["transformation"][0] == "optimal"
    steep = relabel(
        groups([1.0, 2.0]), procedure="best_of_4", transformation="exponential:5", target_kl=1.0
    )
    assert steep["beta"][0] != made["beta"][0]


def test_relabelling_twice_replaces_the_labels():
    once = relabel(groups([1.0, 2.0]), **IDENTITY, beta=1.0)
    twice = relabel(once, procedure="best_of_4", beta=0.1)
    assert twice.column_names == [*once.column_names, "anchor"]
    assert relabel(twice, **IDENTITY, beta=1.0).column_names == once.column_names
    assert twice.to_dict() == relabel(groups([1.0, 2.0]), procedure="best_of_4", beta=0.1).to_dict()


def test_processes_and_batches_change_nothing(rng):
    data = groups(*[rng.normal(size=n) for n in [2, 5, 3, 8, 2, 4, 5] * 3])
    one = relabel(data, procedure="best_of_4", beta=0.1)
    for options in ({"num_proc": 2}, {"batch_size": 3}):
        other = relabel(data, procedure="best_of_4", beta=0.1, **options)
        assert other.to_dict() == one.to_dict()
        assert pairs(other, "random:2", **options).to_dict() == pairs(one, "random:2").to_dict()


def test_a_stream_gives_the_same_rows():
    data = groups([1.0, 2.0, 0.5], [0.1, 0.2])
    stream = relabel(data.to_iterable_dataset(), procedure="best_of_4", beta=0.1)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(relabel(data, procedure="best_of_4", beta=0.1))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (groups([1.0]).select([]), ValueError, "groups must have at least one row; got 0"),
        (groups([1.0, 2.0]).remove_columns("rewards"), ValueError, "'rewards' is missing"),
        (groups([1.0, 2.0]).remove_columns("responses"), ValueError, "'responses' is missing"),
        (
            groups([1.0, 2.0], [1.0, float("nan")]),
            ValueError,
            "rewards must be finite; got nan at row 1, response 1",
        ),
        (
            groups([1.0, 2.0], [1.0, 2.0], reference_rewards=[[1.0], []]),
            ValueError,
            "reference_rewards must hold at least one reward; got none at row 1",
        ),
        (
            groups([1.0, 2.0], responses=[["a", "b", "c"]]),
            ValueError,
            "rewards must have one entry per response; got 2 for 3 responses at row 0",
        ),
        (
            Dataset.from_dict({"responses": [["a"]], "rewards": [["high"]]}),
            TypeError,
            "rewards must hold numbers; got 'high'",
        ),
        (
            Dataset.from_dict({"responses": [["a"], None], "rewards": [[1.0], [1.0]]}),
            ValueError,
            "responses must be a list; got None at row 1",
        ),
        (
            Dataset.from_dict({"responses": ["a"], "rewards": [[1.0]]}),
            TypeError,
            "column 'responses' must hold lists; got string",
        ),
    ],
)
def test_bad_rows_are_named(data, error, message):
    with pytest.raises(error, match=message):
        relabel(data, procedure="best_of_4", beta=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of .* must be given; got none"),
        ({"beta": 1.0, "target_kl": 1.0}, "exactly one of"),
        ({"beta": -1.0}, "beta must be finite and > 0; got -1.0"),
        ({"target_kl": float("nan")}, "target_kl must be finite and > 0; got nan"),
        ({"beta": 1.0, "estimator": "best"}, "estimator must be one of .*; got 'best'"),
        ({"target_kl": 1.0, "estimator": "levels"}, "beta must be given for .*; got target_kl=1.0"),
        ({"beta": 1.0, "calibration": "magic"}, "calibration must be one of .*; got 'magic'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        relabel(groups([1.0, 2.0]), procedure="best_of_4", **settings)


def made_pairs(data: Dataset, strategy: str, **options) -> list[tuple[str, str, float]]:
    # the mid-ranks of three draws among themselves are 1/6, 1/2 and 5/6
    made = pairs(relabel(data, **IDENTITY, beta=1.0, estimator="plug_in"), strategy, **options)
    margins = [round(3 * margin, 12) for margin in made["margin"]]
    return list(zip(made["chosen"], made["rejected"], margins, strict=True))


def test_strategies_by_hand():
    data = groups([1.0, 4.0, 3.0])
    low, high, middle = data["responses"][0]
    whole = [(high, low, 2.0), (high, middle, 1.0), (middle, low, 1.0)]
    assert made_pairs(data, "best_worst") == whole[:1]
    assert sorted(made_pairs(data, "adjacent")) == sorted(whole[1:])
    assert sorted(made_pairs(data, "all")) == sorted(whole)
    assert made_pairs(data, "margin:0.5") == whole[:1]
    assert len(made_pairs(data, "random:2")) == 2
    assert set(made_pairs(data, "random:2")) < set(whole)
    assert sorted(made_pairs(data, "random:9", seed=5)) == sorted(whole)


def test_pairs_carry_their_labels_and_tokens():
    data = groups([0.0, 1.0], response_ids=[[[5], [6, 7]]], finished=[[True, False]])
    (row,) = pairs(relabel(data, **IDENTITY, beta=0.3))
    assert row["prompt"] == "question 0"
    assert (row["beta"], row["procedure"], row["transformation"]) == (0.3, *IDENTITY.values())
    assert (row["chosen_token_ids"], row["rejected_token_ids"]) == ([6, 7], [5])
    assert (row["chosen_finished"], row["rejected_finished"]) == (False, True)


def test_conversations_stay_conversations():
    turn = [{"role": "user", "content": "hello"}]
    (row,) = pairs(relabel(groups([0.0, 1.0], prompt=[turn]), **IDENTITY, beta=1.0))
    assert row["prompt"] == turn
    assert row["chosen"] == [{"role": "assistant", "content": "answer 0 1"}]
    assert row["rejected"] == [{"role": "assistant", "content": "answer 0 0"}]


def test_text_of_pandas_stays_text():
    data = groups([0.0, 1.0]).cast_column("prompt", Value("large_string"))
    (row,) = pairs(relabel(data, **IDENTITY, beta=1.0))
    assert (row["prompt"], row["chosen"], row["rejected"]) == (
        "question 0",
        "answer 0 1",
        "answer 0 0",
    )


def test_ties_duplicates_and_single_responses_are_counted():
    data = groups([1.0, 1.0, 2.0], [1.0], [1.0, 2.0])
    data = data.map(lambda row: {"responses": ["same", "same"]} if len(row["rewards"]) == 2 else {})
    labelled = relabel(data, **IDENTITY, beta=1.0)
    counted = {"groups": 3, "groups_without_pair": 2, "tied_pairs": 1, "duplicate_pairs": 1}
    counted |= {"flipped_pairs": 0}
    assert count_pairs(labelled, "all") == counted | {"pairs": 2}
    assert count_pairs(labelled, "all", ties="keep") == counted | {"pairs": 3}
    assert len(pairs(labelled, "all", ties="keep")) == 3
    assert min(pairs(labelled, "all", ties="keep")["margin"]) == 0.0
    assert min(pairs(labelled, "all")["margin"]) > 0


def test_no_pair_at_all_is_an_error():
    labelled = relabel(groups([1.0, 1.0], [2.0]), **IDENTITY, beta=1.0)
    with pytest.raises(
        ValueError, match="must hold a pair of unequal responses; got .*'groups': 2"
    ):
        pairs(labelled)
    with pytest.raises(ValueError, match="'calibrated_rewards' is missing .* Call relabel first"):
        pairs(groups([1.0, 2.0]))


def test_strategies_are_parsed():
    assert parse_strategy("all") == PairStrategy("all")
    assert parse_strategy("margin:0.5") == PairStrategy("margin", threshold=0.5)
    for bad in ("best", "random", "random:0", "random:x", "margin", "margin:-1", "all:3"):
        with pytest.raises(ValueError, match=f"strategy must be one of .*; got '{bad}'"):
            parse_strategy(bad)


def test_levels_are_the_exact_discrete_optimum_of_each_prompt():
    # a verifier that passed 1 of 4, all of 2, and 2 of 4 of another prompt's reference draws
    data = groups([0, 1, 0, 0], [1, 1])
    made = relabel(data, procedure="best_of_4", beta=0.2, estimator="levels")
    first = optimal_discrete_policy([0.75, 0.25], [0, 1], "best_of_4", 0.2)
    low, high = first.transformed_rewards
    assert made["transformed_rewards"][0] == pytest.approx([low, high, low, low], abs=1e-14)
    assert made["log_normaliser"][:] == pytest.approx([first.log_normaliser, 0.0], abs=1e-14)
    assert made["transformed_rewards"][1] == pytest.approx([0.0, 0.0], abs=1e-14)

    other = groups([1, 0], reference_rewards=[[0, 1, 1, 0, 0, 0]])
    (row,) = relabel(other, procedure="best_of_4", beta=0.2, estimator="levels")
    policy = optimal_discrete_policy([4 / 6, 2 / 6], [0, 1], "best_of_4", 0.2)
    wanted = policy.transformed_rewards[::-1]
    assert row["transformed_rewards"] == pytest.approx(wanted, abs=1e-14)
    assert row["log_normaliser"] == pytest.approx(policy.log_normaliser, abs=1e-14)


def test_extremes_are_ranked_among_all_draws():
    data = groups([3.0, 1.0, 2.0, 4.0, 0.0], finished=[[True, False, True, False, True]])
    whole = relabel(data, procedure="best_of_4", beta=0.1, anchor=1.0)
    (row,) = relabel(data, procedure="best_of_4", beta=0.1, extremes=1)
    assert row["responses"] == ["answer 0 3", "answer 0 4"]
    assert row["rewards"] == [4.0, 0.0]
    assert row["finished"] == [False, True]
    assert row["transformed_rewards"] == [whole[0]["transformed_rewards"][i] for i in (3, 4)]
    assert row["draw_rewards"] == [3.0, 1.0, 2.0, 4.0, 0.0]
    assert "reference_rewards" not in row
    # a group that is small enough stays whole, and equal targets are ordered by reward
    (same,) = relabel(data, procedure="best_of_4", beta=0.1, extremes=3)
    assert same["responses"] == whole[0]["responses"]
    with pytest.raises(ValueError, match="extremes must be an integer >= 1; got 0"):
        relabel(data, procedure="best_of_4", beta=0.1, extremes=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"procedure": "best_of_4", "target_kl": 1.0},
        {"procedure": "worst_of_4", "beta": 0.2, "estimator": "posterior"},
        {"procedure": "best_of_4", "beta": 0.2, "estimator": "levels"},
        {"procedure": "best_of_4", "beta": 0.2, "calibration": "pooled"},
    ],
)
def test_extremes_are_relabelled_as_the_whole_groups_are(settings, rng):
    # of three sizes, with ties
    data = groups(*[rng.integers(0, 9, size=n).astype(float) for n in (16, 16, 7, 3)])
    first = relabel(data, procedure="single_draw", beta=1.0, extremes=3)
    wanted = relabel(data, **settings, extremes=2)
    for again in (relabel(first, **settings, extremes=2), relabel(wanted, **settings)):
        assert again.to_dict() == wanted.to_dict()
    assert [len(row) for row in wanted["rewards"]] == [4, 4, 4, 3]
    method = settings.get("calibration", "empirical")
    errors = [summarise_labels(d, method).calibration_error for d in (wanted, again)]
    assert errors == [summarise_labels(relabel(data, **settings), method).calibration_error] * 2
    if "calibration" not in settings:
        stream = relabel(first.to_iterable_dataset(), **settings, extremes=2)
        assert list(stream) == list(wanted)
    new = first.map(lambda row: {"rewards": [0.5, *row["rewards"][1:]]})
    with pytest.raises(ValueError, match=r"must be among .* draw_rewards, .*; got 0.5 at row 0"):
        relabel(new, **settings)


def test_extremes_of_new_responses_keep_what_they_are_compared_with():
    data = groups([3.0, 1.0, 2.0], reference_rewards=[[0.0, 1.5, 4.0, 5.0]])
    (row,) = relabel(data, **IDENTITY, beta=1.0, extremes=1)
    assert row["calibrated_rewards"] == [0.5, 0.25]
    assert row["reference_rewards"] == [0.0, 1.5, 4.0, 5.0]
    assert "draw_rewards" not in row


def test_best_and_worst_are_so_by_reward_where_targets_are_equal():
    # rank targets of best-of-4 are alike for all but the highest ranks
    data = groups([3.0, 1.0, 2.0, 4.0, 0.0])
    labelled = relabel(data, procedure="best_of_4", target_kl=1.0)
    assert len(set(labelled[0]["transformed_rewards"])) < 5
    (row,) = pairs(labelled, "best_worst")
    assert (row["chosen"], row["rejected"]) == ("answer 0 3", "answer 0 4")
    counts = count_pairs(labelled, "all")
    assert counts["tied_pairs"] > 0
    assert counts["pairs"] + counts["tied_pairs"] == 10


def test_pooled_calibration_of_a_dataset(rng):
    rewards = [rng.normal(i % 3, size=n).tolist() for i, n in enumerate([4, 2, 5, 3] * 5)]
    data = groups(*rewards)
    made = relabel(data, procedure="best_of_4", beta=0.2, calibration="pooled")
    calibrator = RewardCalibrator("pooled").fit(rewards)
    wanted = calibrator.transform(rewards, inside=True)
    for row, values in zip(made, wanted, strict=True):
        known = values[: len(row["rewards"])]
        assert row["calibrated_rewards"] == pytest.approx(known, abs=1e-12)
        phi = Optimal("best_of_4", 0.2)(known)
        assert row["transformed_rewards"] == pytest.approx(phi, abs=1e-9)
    ranked = relabel(data, procedure="best_of_4", beta=0.2, estimator="posterior")
    assert made.column_names == ranked.column_names


def test_weighted_calibration_of_a_dataset():
    logs = {"reference_logps": [[-1.0, -1.5, -2.0]], "sampler_logps": [[-1.0, -1.0, -1.0]]}
    data = groups([1.0, 2.0, 3.0], **logs, sampled_from=["another policy"])
    (row,) = relabel(data, **IDENTITY, beta=1.0, calibration="weighted")
    # weights 1, e^-0.5, e^-1: the middle one beats the first of the others
    assert row["calibrated_rewards"] == pytest.approx([0.0, 1 / (1 + np.exp(-1)), 1.0])
    assert row["transformed_rewards"] == pytest.approx(row["calibrated_rewards"])
    weights = np.exp([0.0, -0.5, -1.0])
    size = weights.sum() ** 2 / (weights**2).sum()
    assert row["effective_sample_size"] == pytest.approx(size)
    # what the weights have settled is gone, or training would ask for it
    assert not row.keys() & {"reference_logps", "sampled_from"}
    kept = data.add_column("reference_computed", ["record"])
    kept = relabel(kept, **IDENTITY, beta=1.0, calibration="weighted")
    assert kept["reference_logps"][0] == logs["reference_logps"][0]
    for calibration in ("empirical", "pooled"):
        with pytest.raises(ValueError, match=f"must be 'weighted' for .*; got '{calibration}' and"):
            relabel(kept, **IDENTITY, beta=1.0, calibration=calibration)
    picky = RewardCalibrator("weighted", min_effective_sample_size=2.9)
    with pytest.raises(ValueError, match=r"sample size must be >= 2.9; got 2.59 at row 0"):
        relabel(data, **IDENTITY, beta=1.0, calibration=picky)
    assert not hasattr(picky, "weights_")
    for name in ("reference_rewards", "draw_rewards"):
        apart = data.add_column(name, [[1.0, 2.0]])
        with pytest.raises(ValueError, match=f"{name} must be absent for calibration='weighted'"):
            relabel(apart, **IDENTITY, beta=1.0, calibration="weighted")
    with pytest.raises(ValueError, match="column 'sampler_logps' is missing"):
        relabel(data.remove_columns("sampler_logps"), **IDENTITY, beta=1.0, calibration="weighted")
    with pytest.raises(ValueError, match="must be finite; got -inf .* at row 0, response 0"):
        relabel(data, procedure="best_of_4", transformation="log", beta=1.0, calibration="weighted")
    with pytest.raises(ValueError, match="estimator must be one of .'plug_in'.; got 'posterior'"):
        relabel(data, **IDENTITY, beta=1.0, calibration="pooled", estimator="posterior")
    with pytest.raises(TypeError, match="must be a Dataset for calibration='pooled'; got Iter"):
        relabel(data.to_iterable_dataset(), **IDENTITY, beta=1.0, calibration="pooled")


@pytest.mark.parametrize(
    ("name", "method"),
    [("rewards", "pooled"), ("reference_logps", "weighted"), ("sampler_logps", "weighted")],
)
def test_every_response_has_what_calibrates_it(name, method):
    lists = {n: [[0.0, 0.0], [0.0] * 3] for n in ("rewards", "reference_logps", "sampler_logps")}
    texts = [["a", "b"], ["c", "d", "e"]]
    data = groups(*lists["rewards"], **lists | {"responses": texts})
    found = relabel(data, **IDENTITY, beta=1.0, calibration=method)["calibrated_rewards"]
    assert found[:] == [[0.5, 0.5], [0.5] * 3]
    # as many in all, but one that belongs to the second prompt is given to the first
    shifted = data.remove_columns(name).add_column(name, lists[name][::-1])
    message = f"{name} must have one entry per response; got 3 for 2 responses at row 0"
    with pytest.raises(ValueError, match=message):
        relabel(shifted, **IDENTITY, beta=1.0, calibration=method)


def test_prompt_features_reach_the_pooled_calibrator(rng):
    features = rng.normal(size=(30, 2))
    rewards = features[:, [0]] * 3 + rng.normal(size=(30, 3))
    data = groups(*rewards, prompt_features=features.tolist())
    made = relabel(data, **IDENTITY, beta=1.0, calibration="pooled")
    with pytest.raises(ValueError, match="groups must have at least one row; got 0"):
        relabel(data.select([]), **IDENTITY, beta=1.0, calibration="pooled")
    fitted = RewardCalibrator("pooled").fit(rewards, prompt_features=features)
    wanted = fitted.transform(rewards, inside=True)
    np.testing.assert_allclose(made["calibrated_rewards"], wanted, atol=1e-12)
    uneven = data.map(lambda row, i: {"prompt_features": [1.0] * (1 + i % 2)}, with_indices=True)
    with pytest.raises(ValueError, match="as many for every prompt; got 2 at row 1, 1 at row 0"):
        relabel(uneven, **IDENTITY, beta=1.0, calibration="pooled")


def stored(data: Dataset) -> bytes:
    """Return the bytes of a dataset in Arrow's own format, chunks joined."""
    sink = io.BytesIO()
    table = data.with_format("arrow")[:].combine_chunks().replace_schema_metadata()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def test_one_process_and_four_write_the_same_bytes(rng):
    data = groups(*[rng.integers(0, 6, size=n).tolist() for n in [2, 5, 3, 8, 2, 4] * 3])
    made = {}
    for processes in (1, 4):
        read, _ = read_groups(data, num_proc=processes)
        options = {"num_proc": processes, "keep_in_memory": True}
        labelled = relabel(read, procedure="best_of_4", beta=0.1, **options)
        few = relabel(labelled, procedure="best_of_4", beta=0.1, extremes=1, **options)
        chosen = pairs(labelled, "random:3", ties="keep", **options)
        made[processes] = [stored(rows) for rows in (read, labelled, few, chosen)]
    assert made[1] == made[4]


def test_labels_are_cached_by_what_decides_them(tmp_path, rng):
    groups(*rng.normal(size=(5, 4)).tolist()).to_parquet(tmp_path / "rows.parquet")
    script = (
        "import sys; from datasets import Dataset; from ctrl_dpo import relabel, pairs\n"
        f"rows = Dataset.from_parquet({str(tmp_path / 'rows.parquet')!r}, cache_dir="
        f"{str(tmp_path / 'cache')!r})\n"
        "made = relabel(rows, procedure='best_of_4', target_kl=float(sys.argv[1]))\n"
        "print(sorted(f['filename'] for f in [*made.cache_files, *pairs(made).cache_files]))"
    )

    def cached(kl: str) -> str:
        words = [sys.executable, "-c", script, kl]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    # another process with the same settings reads the same files
    assert cached("1.0") == cached("1.0") != cached("0.5")


def test_pairs_of_a_stream_are_the_same_pairs(rng):
    data = groups(*rng.normal(size=(9, 4)).tolist())
    labelled = relabel(data, procedure="best_of_4", beta=0.1)
    stream = relabel(data.to_iterable_dataset(), procedure="best_of_4", beta=0.1)
    assert list(pairs(stream, "random:2")) == list(pairs(labelled, "random:2"))


def test_flips_of_the_order_of_rewards_are_counted():
    data = groups([1.0, 2.0, 3.0]).add_column("beta", [1.0])
    data = data.add_column("calibrated_rewards", [[0.9, 0.5, 0.1]])
    data = data.add_column("transformed_rewards", [[0.9, 0.1, 0.5]])
    counts = count_pairs(data, "all")
    assert (counts["pairs"], counts["flipped_pairs"]) == (3, 2)
    assert summarise_labels(data).flipped_share == 1.0


def test_the_summary_by_hand(tmp_path):
    data = groups([1.0, 3.0, 2.0, 3.0], [5.0])
    made = relabel(data, **IDENTITY, beta=0.5, estimator="plug_in")
    summary = summarise_labels(made, reading={"rows": 2}, pairs=count_pairs(made, "all"))
    assert (summary.groups, summary.responses, summary.beta) == (2, 5, 0.5)
    # mid-ranks 1/8, 3/4, 3/8, 3/4: one of six pairs is tied
    assert summary.tied_share == pytest.approx(1 / 6)
    assert summary.margin_quantiles["50%"] == pytest.approx(0.375)
    assert summary.margin_nats == pytest.approx(0.75)
    assert summary.histograms["margins"]["counts"][0] == 1
    assert sum(summary.histograms["margins"]["counts"]) == 6
    assert summary.histograms["margins"]["edges"][-1] == pytest.approx(1.25)
    assert summary.calibration_error.n == 2
    summary.save(tmp_path / "labels.json")
    loaded = json.loads((tmp_path / "labels.json").read_text())
    assert loaded == summary.to_dict()
    assert loaded["rows"] == 2
    assert loaded["pairs"] == 5
    assert "| tied_share " in str(summary)
    assert "histograms" not in str(summary)


def test_the_summary_of_weighted_labels_states_sample_sizes():
    logs = {"reference_logps": [[-1.0] * 4] * 2, "sampler_logps": [[-1.0] * 4, [-9, -1, -1, -1]]}
    data = groups([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], **logs)
    loose = RewardCalibrator("weighted", min_effective_sample_size=1.0)
    made = relabel(data, **IDENTITY, beta=1.0, calibration=loose)
    summary = summarise_labels(made, "weighted")
    low = (np.exp(8) + 3) ** 2 / (np.exp(16) + 3)
    assert summary.effective_sample_size == pytest.approx({"minimum": low, "median": (low + 4) / 2})
    assert summary.to_dict()["effective_sample_size_minimum"] == pytest.approx(low)


def test_held_out_draws_of_a_calibrated_reward_are_uniform():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4000, 1)) + rng.normal(size=(4000, 8))
    error, values = held_out_error(RewardCalibrator("pooled"), draws)
    assert values.size == error.n == 16_000
    assert error.kolmogorov_smirnov < 0.04
    # 4 draws calibrate: by exchangeability 1/5 of the others on each of 5 values, 1/5 at 0 and 1
    coarse, values = held_out_error(RewardCalibrator(), draws)
    assert np.bincount((4 * values).astype(int)) / 16_000 == pytest.approx([0.2] * 5, abs=0.02)
    assert coarse.kolmogorov_smirnov == pytest.approx(0.2, abs=0.02)
    # sorted draws are the same draws
    ordered, _ = held_out_error(RewardCalibrator(), np.sort(draws))
    assert ordered.kolmogorov_smirnov == pytest.approx(0.2, abs=0.02)
    # draws of N(0.3, 1), weighted to N(0, 1)
    shifted = rng.normal(0.3, size=(4000, 64))
    weighted, values = held_out_error(RewardCalibrator("weighted"), shifted, 0.045 - 0.3 * shifted)
    assert weighted.mean_absolute_deviation < 0.01
    assert calibration_error(values).mean_absolute_deviation > 0.05
    assert held_out_error(RewardCalibrator(), [[1.0], [2.0]]) is None
