"""Faults that a layout must name, or survive, without a word from the reader's internals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, List, Value

from ctrl_dpo import relabel, to_groups
from ctrl_dpo.data import row_reader
from ctrl_dpo.data.folders import read_rows
from ctrl_dpo.data.layouts import read_groups

GROUP = {"prompt": "Hi", "responses": ["a", "b"], "rewards": [1.0, 2.0]}
PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
UNSCORED = {**PAIR, "score_chosen": None, "score_rejected": None}
HELPFUL = {"prompt": "Hi", "response": "a", "helpfulness": 1, "correctness": 1, "coherence": 1}
# a folder beside the repository, unless the variable names another; absent from a plain clone
DATA = Path(
    os.environ.get("CTRL_DPO_DATA", Path(__file__).parents[3] / "shared" / "data"),
    "hh_harmless_test_half.jsonl.gz",
)


@pytest.mark.parametrize("rewards", [[1, 0], [True, False], ["1", "0"], [1.0, 0.0]])
def test_rewards_are_float64_whatever_their_type_was(rewards):
    row = {**GROUP, "rewards": rewards, "reference_rewards": rewards}
    groups = to_groups(Dataset.from_list([row]))
    assert groups[0]["rewards"] == groups[0]["reference_rewards"] == [1.0, 0.0]
    assert groups.features["rewards"] == List(Value("float64"))
    assert groups.features["reference_rewards"] == List(Value("float64"))


def test_scores_that_begin_after_a_thousand_rows_are_read():
    """The writer infers types from 1000 rows; the only scored one comes after them."""
    scored = {**PAIR, "score_chosen": 2.0, "score_rejected": 1.0}
    groups, report = read_groups(
        Dataset.from_list([UNSCORED] * 1001 + [scored]), same_prompt="keep"
    )
    assert groups[1001]["rewards"] == [2.0, 1.0]
    assert groups[0]["rewards"] is None
    assert report.counts["unscored_groups"] == 1001


def test_dropped_rows_take_their_rewards_along():
    rows = [{**GROUP, "rewards": [float(i), 9.0]} for i in range(4)]
    rows[1]["rewards"] = [1.0]
    groups, report = read_groups(Dataset.from_list(rows), invalid="drop", same_prompt="keep")
    assert groups["rewards"][:] == [[0.0, 9.0], [2.0, 9.0], [3.0, 9.0]]
    assert report.dropped == {"rewards must have one entry per response": [1]}


def test_a_null_first_row_does_not_hide_the_dialogues():
    rows = Dataset.from_list([{"chosen": None, "rejected": None}, HH])
    groups, report = read_groups(rows, invalid="drop")
    assert report.layout == "hh"
    assert list(groups) == [{"prompt": [{"role": "user", "content": "q"}], "responses": ["a", "b"]}]


def test_dialogues_among_other_pairs_are_ambiguous():
    rows = Dataset.from_list([{"chosen": "x y", "rejected": "x z"}, HH])
    with pytest.raises(ValueError, match="named where several fit; got dialogues .* 1 of 2 rows"):
        to_groups(rows)
    assert len(to_groups(rows, layout="pairs")) == 2


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (GROUP, {**GROUP, "responses": None}, "responses must hold at least one; got None"),
        (
            {**GROUP, "reference_logps": [-1.0, -2.0]},
            {**GROUP, "reference_logps": [-1.0]},
            "reference_logps must have one entry per response; got 1 for 2",
        ),
        (
            {**GROUP, "response_ids": [[1], [2]]},
            {**GROUP, "response_ids": [[1]]},
            "response_ids must have one entry per response; got 1 for 2",
        ),
        (
            {**GROUP, "reference_rewards": [1.0]},
            {**GROUP, "reference_rewards": [float("inf")]},
            "reference_rewards must be finite; got inf at response 0",
        ),
        (
            {"prompt": "Hi", "answers": [{"answer": "a", "rank": 1}]},
            {"prompt": None, "answers": [{"answer": "a", "rank": 1}]},
            "prompt must be text; got None",
        ),
        (
            {"prompt": "Hi", "completions": [{"response": "a", "overall_score": 1.0}]},
            {"prompt": "Hi", "completions": None},
            "completions must be a list; got None",
        ),
        (
            {"prompt": "Hi", "completions": [{"response": "a", "overall_score": 1.0}]},
            {"prompt": "Hi", "completions": [None]},
            "completions must hold .'response'.; got None at response 0",
        ),
    ],
)
def test_a_broken_row_is_named_or_dropped(good, bad, message):
    rows = Dataset.from_list([good, bad])
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        to_groups(rows, ranks_as_rewards=True)
    groups, report = read_groups(rows, invalid="drop", ranks_as_rewards=True)
    assert len(groups) == 1
    assert report.dropped == {
        message.partition(";")[0].replace(".'", "['").replace("'.", "']"): [1]
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GROUP, "responses": "ab"}, "responses must hold at least one; got 'ab'"),
        ({**GROUP, "rewards": 3.0}, "rewards must have one entry per response; got 3.0 for 2"),
    ],
)
def test_a_column_that_holds_no_lists_is_named(row, message):
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        to_groups(Dataset.from_list([row]))


def test_scores_of_pairs_can_be_mapped_and_no_column_twice():
    rows = Dataset.from_list([{"q": "Hi", "good": "a", "bad": "b", "g": 1.0, "h": 0.5}])
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    scores = {"score_chosen": "g", "score_rejected": "h"}
    assert to_groups(rows, columns=columns | scores)["rewards"][:] == [[1.0, 0.5]]
    with pytest.raises(ValueError, match="columns must map each column once; got .*'good'"):
        to_groups(rows, columns={"chosen": "good", "rejected": "good"})


def test_an_unknown_attribute_weight_is_named():
    rows = Dataset.from_list([{**HELPFUL, "complexity": 1, "verbosity": 1}])
    with pytest.raises(ValueError, match="'helpfullness' is missing .*attribute_weights"):
        to_groups(rows, attribute_weights={"helpfullness": 1.0})


def test_several_splits_are_named():
    with pytest.raises(TypeError, match="got DatasetDict. Choose a split"):
        to_groups(DatasetDict(train=Dataset.from_list([GROUP])))


def test_a_stream_is_read_as_it_passes():
    rows = [{**GROUP, "rewards": [float(i), 9.0]} for i in range(4)]
    rows[2]["rewards"] = [1.0]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    groups, report = read_groups(stream, invalid="drop")
    whole, told = read_groups(Dataset.from_list(rows), invalid="drop", same_prompt="keep")
    assert list(groups) == list(whole)
    assert (report.rows, report.groups, report.dropped) == (4, 3, told.dropped)
    assert report.counts["duplicate_responses"] == told.counts["duplicate_responses"]
    with pytest.raises(ValueError, match="row 2: rewards must have one entry per response"):
        list(to_groups(stream))
    labelled = relabel(to_groups(stream, invalid="drop"), procedure="best_of_4", beta=0.1)
    exact = relabel(whole, procedure="best_of_4", beta=0.1)
    assert [row["transformed_rewards"] for row in labelled] == exact["transformed_rewards"][:]


def test_rows_of_an_older_reading_do_not_come_back(tmp_path, monkeypatch):
    Dataset.from_list([PAIR]).to_json(tmp_path / "rows.json")

    def cache_files():
        rows = Dataset.from_json(str(tmp_path / "rows.json"), cache_dir=str(tmp_path / "cache"))
        return {file["filename"] for file in to_groups(rows).cache_files}

    first = cache_files()
    assert first
    assert cache_files() == first
    monkeypatch.setattr(row_reader, "READING", -1)
    assert cache_files().isdisjoint(first)


@pytest.mark.skipif(not DATA.exists(), reason="no hh_harmless_test_half.jsonl.gz")
def test_every_row_of_the_harmless_half_is_read():
    groups, report = read_groups(read_rows(DATA))
    assert (report.layout, report.rows, report.groups, report.dropped) == ("hh", 1156, 1156, {})
    assert report.counts["empty_responses"] == 4
    assert groups.column_names == ["prompt", "responses"]
    assert {prompt[-1]["role"] for prompt in groups["prompt"]} == {"user"}
