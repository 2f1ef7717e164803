"""Rows of one prompt become one group, and what contradicts itself is named."""

from __future__ import annotations

import pytest
from datasets import Dataset

from ctrl_dpo import to_groups
from ctrl_dpo.data.layouts import read_groups

CHAT = [{"role": "user", "content": "Hi"}]


def pair(chosen: str, rejected: str, *scores: float, prompt: object = "Hi") -> dict:
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


def test_pairs_of_one_prompt_share_their_responses():
    rows = [pair("a", "b", 3, 1), pair("z", "y", 2, 1, prompt="Ho"), pair("c", "b", 2, 1)]
    groups, report = read_groups(Dataset.from_list(rows))
    assert list(groups) == [
        {"prompt": "Hi", "responses": ["a", "b", "c"], "rewards": [3.0, 1.0, 2.0]},
        {"prompt": "Ho", "responses": ["z", "y"], "rewards": [2.0, 1.0]},
    ]
    assert report.counts["merged_rows"] == 1
    assert report.groups == 2


def test_draws_are_kept_as_often_as_they_were_drawn():
    row = {"prompt": "Hi", "responses": ["a", "b"], "rewards": [1.0, 2.0], "source": "x"}
    groups = to_groups(Dataset.from_list([row, {**row, "source": "y"}]))
    assert groups[0] == {
        "prompt": "Hi",
        "responses": ["a", "b", "a", "b"],
        "rewards": [1.0, 2.0, 1.0, 2.0],
        "source": "x",
    }


def test_reference_rewards_are_joined_unless_they_are_the_same():
    row = {"prompt": "Hi", "responses": ["a"], "rewards": [1.0], "reference_rewards": [0.0, 2.0]}
    other = {**row, "responses": ["b"], "reference_rewards": [5.0]}
    assert to_groups(Dataset.from_list([row, row]))[0]["reference_rewards"] == [0.0, 2.0]
    assert to_groups(Dataset.from_list([row, other]))[0]["reference_rewards"] == [0.0, 2.0, 5.0]


def test_draws_of_which_some_are_kept_are_joined():
    row = {"prompt": "Hi", "responses": ["a"], "rewards": [1.0], "draw_rewards": [0.0, 1.0]}
    whole = {**row, "draw_rewards": None}
    assert to_groups(Dataset.from_list([row, row]))[0]["draw_rewards"] == [0.0, 1.0, 0.0, 1.0]
    assert to_groups(Dataset.from_list([row, whole]))[0]["draw_rewards"] == [0.0, 1.0, 1.0]


def test_text_and_conversation_are_different_prompts():
    rows = [{"prompt": p, "responses": ["a"]} for p in (CHAT, [*CHAT], [{**CHAT[0], "name": None}])]
    groups, report = read_groups(Dataset.from_list(rows))
    assert groups["responses"][:] == [["a", "a", "a"]]
    assert report.counts["merged_rows"] == 2


def test_contradictions_are_named_and_can_be_kept_apart():
    rows = Dataset.from_list([pair("a", "b", 3, 1), pair("a", "c", 2, 1)])
    with pytest.raises(ValueError, match=r"must agree; got 3.0 at row 0 and 2.0 at row 1 for 'a'"):
        read_groups(rows)
    groups, report = read_groups(rows, same_prompt="keep")
    assert groups["rewards"][:] == [[3.0, 1.0], [2.0, 1.0]]
    assert "merged_rows" not in report.counts
    with pytest.raises(ValueError, match="same_prompt must be one of .*; got 'join'"):
        read_groups(rows, same_prompt="join")
    partly = [pair("a", "b", 3, 1), pair("a", "c", 2, 1) | {"score_chosen": None}]
    with pytest.raises(ValueError, match="rewards must be given for all rows of a prompt or none"):
        read_groups(Dataset.from_list(partly))


def test_outliers_and_contradicting_scores_are_pointed_out():
    def completion(overall: float, fine: float) -> dict:
        return {"response": f"{overall}", "overall_score": overall, "fine-grained_score": fine}

    rows = [
        {"instruction": f"{i}", "completions": [completion(7 + i % 3, 4), completion(6, 3)]}
        for i in range(20)
    ]
    rows[3]["completions"][0] = completion(10, 1)
    rows[5]["completions"][1] = completion(5000, 2500)
    _, report = read_groups(Dataset.from_list(rows))
    assert report.noted == {"suspect_scores": [3], "outlier_rewards": [5]}
    assert report.summary()["suspect_scores"] == "1, first at rows [3]"
    _, none = read_groups(Dataset.from_list(rows[:3]))
    assert not any(none.noted.values())
