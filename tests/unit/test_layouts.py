"""Every public layout by a file of its own, and every row that breaks a rule, by name."""

from __future__ import annotations

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ctrl_dpo import RewardCalibrator, to_groups
from ctrl_dpo.cli import app
from ctrl_dpo.data.folders import read_rows
from ctrl_dpo.data.layout_rows import DroppedRow, read_hh, read_pairs
from ctrl_dpo.data.layouts import read_groups
from ctrl_dpo.measures.label_summary import summarise_labels
from ctrl_dpo.measures.uniformity import held_out_error

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
ATTRIBUTES = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
FILES = {
    "canonical": (
        {"prompt": "Hi", "responses": ["good", "bad"], "rewards": [1, 0], "note": "kept"},
        {"prompt": "Hi", "responses": ["good", "bad"], "rewards": [1.0, 0.0], "note": "kept"},
    ),
    "all_generated_responses": (
        {
            "prompt": "Hi",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
            "all_generated_responses": ["good", "bad", "ugly"],
            "all_rm_scores": [0.9, 0.1, 0.0],
        },
        {"prompt": "Hi", "responses": ["good", "bad", "ugly"], "rewards": [0.9, 0.1, 0.0]},
    ),
    "distilabel": (
        {"instruction": "Hi", "generations": ["good", "bad"], "ratings": ["5", "1.5"]},
        {"prompt": "Hi", "responses": ["good", "bad"], "rewards": [5.0, 1.5]},
    ),
    "ultrafeedback": (
        {
            "instruction": "Hi",
            "source": "x",
            "completions": [
                {"response": "good", "overall_score": 8.5, "model": "a"},
                {"response": "bad", "overall_score": 3.0, "model": "b"},
            ],
        },
        {"prompt": "Hi", "responses": ["good", "bad"], "rewards": [8.5, 3.0]},
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Hi\n\nAssistant: ",
            "answers": [
                {"answer": "good", "model": "a", "rank": 1.0},
                {"answer": "bad", "model": "b", "rank": 2.0},
            ],
        },
        {"prompt": [USER], "responses": ["good", "bad"], "rewards": [-1.0, -2.0]},
    ),
    "helpsteer2": (
        {"prompt": "Hi", "response": "good", "helpfulness": 4, **ATTRIBUTES},
        # 0.65 * 4 + 0.8 * 4 + 0.45 * 4 + 0.55 * 2 - 0.4 * 1
        {"prompt": "Hi", "responses": ["good"], "rewards": [8.3]},
    ),
    "pairs": (
        {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
        {"prompt": "Hi", "responses": ["good", "bad"]},
    ),
    "hh": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: good",
            "rejected": "\n\nHuman: Hi\n\nAssistant: bad",
        },
        {"prompt": [USER], "responses": ["good", "bad"]},
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_every_layout_is_detected_and_read(name, tmp_path):
    row, wanted = FILES[name]
    path = tmp_path / "rows.json"
    Dataset.from_list([row]).to_json(path)
    loaded = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    groups, report = read_groups(loaded, ranks_as_rewards=True)
    assert report.layout == name
    (group,) = groups
    if "rewards" in wanted:
        wanted = {**wanted, "rewards": pytest.approx(wanted["rewards"])}
    assert group == wanted


PAIRS = [
    # explicit and implicit prompts, standard and conversational, as TRL names them
    ({"prompt": "Hi", "chosen": "good", "rejected": "bad"}, "Hi"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ({"chosen": "The sky is good", "rejected": "The sky is bad"}, "The sky is "),
    ({"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, "Hi"),
    ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
]


@pytest.mark.parametrize(("row", "prompt"), PAIRS)
def test_pairs_in_every_format(row, prompt):
    assert read_pairs(row) == {"prompt": prompt, "responses": ["good", "bad"]}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "responses"),
    [
        # one response is the beginning of the other; a shared beginning of words is no prompt
        ("Q: x A: yes", "Q: x A: yes indeed", "Q: x A: ", ["yes", "yes indeed"]),
        ("Q: x A: yes ", "Q: x A: yes please", "Q: x A: ", ["yes ", "yes please"]),
        ("a sunny", "a sunday", "a ", ["sunny", "sunday"]),
    ],
)
def test_implicit_prompts_end_at_a_word(chosen, rejected, prompt, responses):
    row = {"chosen": chosen, "rejected": rejected}
    assert read_pairs(row) == {"prompt": prompt, "responses": responses}


def test_a_prefix_of_another_message_is_a_response_of_its_own():
    longer = {"role": "assistant", "content": "good and more"}
    group = read_pairs({"chosen": [USER, GOOD], "rejected": [USER, longer]})
    assert group == {"prompt": [USER], "responses": ["good", "good and more"]}


def test_pairs_that_share_no_prompt_are_dropped_and_counted():
    rows = [{"chosen": "x y", "rejected": "z y"}, {"chosen": "a b", "rejected": "a c"}]
    groups, report = read_groups(Dataset.from_list(rows))
    assert list(groups) == [{"prompt": "a ", "responses": ["b", "c"]}]
    assert report.dropped == {"chosen and rejected share no prompt": [0]}
    assert report.summary()["dropped: chosen and rejected share no prompt"] == (
        "1, first at rows [0]"
    )
    other = {"role": "user", "content": "Bye"}
    with pytest.raises(DroppedRow, match="different conversations"):
        read_pairs({"chosen": [USER, GOOD], "rejected": [other, BAD]})


def test_scores_come_with_pairs_and_flips_are_counted():
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "score_chosen": s, "score_rejected": 3}
        for s in (5, 1)
    ]
    groups, report = read_groups(Dataset.from_list(rows), same_prompt="keep")
    assert groups["rewards"][:] == [[5.0, 3.0], [1.0, 3.0]]
    wanted = {"labelled_pairs": 2, "flipped_labels": 1, "equal_labels": 0}
    assert report.counts.items() >= wanted.items()
    assert report.counts["unscored_groups"] == 0
    _, unscored = read_groups(Dataset.from_list([PAIRS[0][0]]))
    assert unscored.counts["unscored_groups"] == 1


def test_helpsteer_rows_of_one_prompt_become_one_group():
    row = FILES["helpsteer2"][0]
    rows = [row, {**row, "prompt": "Other"}, {**row, "response": "worse", "helpfulness": 0}]
    groups, report = read_groups(Dataset.from_list(rows), attribute_weights={"helpfulness": 1.0})
    assert list(groups) == [
        {"prompt": "Hi", "responses": ["good", "worse"], "rewards": [4.0, 0.0]},
        {"prompt": "Other", "responses": ["good"], "rewards": [4.0]},
    ]
    assert report.counts["merged_rows"] == 1
    assert report.counts["single_response_groups"] == 1


def test_own_columns_are_mapped():
    rows = Dataset.from_dict({"q": ["Hi"], "cand": [["a", "b"]], "s": [[1, 2]], "rewards": ["x"]})
    columns = {"prompt": "q", "responses": "cand", "rewards": "s"}
    assert list(to_groups(rows, columns=columns)) == [
        {"prompt": "Hi", "responses": ["a", "b"], "rewards": [1.0, 2.0]}
    ]
    with pytest.raises(ValueError, match="columns key must be one of .*; got 'question'"):
        to_groups(rows, columns={"question": "q"})
    with pytest.raises(ValueError, match="column 'absent' is missing"):
        to_groups(rows, columns={"prompt": "absent"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "respones": ["a"]}, "nearest is 'canonical', .*needs .'responses'"),
        ({"chosen": "a", "regected": "b"}, "nearest is '(pairs|hh)', .*needs .'rejected'"),
        (
            {**FILES["distilabel"][0], **FILES["ultrafeedback"][0]},
            "named where several fit; got .* of .'distilabel', 'ultrafeedback'",
        ),
    ],
)
def test_unknown_and_ambiguous_layouts_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        to_groups(Dataset.from_list([row]))


def test_a_layout_that_lacks_a_column_is_named():
    with pytest.raises(ValueError, match="'ratings' is missing .*Layout 'distilabel'"):
        to_groups(Dataset.from_list([{"generations": ["a"]}]), layout="distilabel")
    with pytest.raises(ValueError, match="layout must be one of .*; got 'magic'"):
        to_groups(Dataset.from_list([PAIRS[0][0]]), layout="magic")
    with pytest.raises(ValueError, match="at least one row; got 0"):
        to_groups(Dataset.from_dict({"prompt": [], "responses": []}))


def test_ranks_are_no_rewards_unless_declared():
    rows = Dataset.from_list([FILES["nectar"][0]])
    with pytest.raises(ValueError, match="ranks_as_rewards must be True .*; got False"):
        to_groups(rows)


GROUP = {"prompt": "Hi", "responses": ["a", "b"], "rewards": [1.0, 2.0]}
BROKEN = [
    ({**GROUP, "rewards": [1.0, float("nan")]}, "rewards must be finite; got nan at response 1"),
    ({**GROUP, "rewards": [1.0]}, "rewards must have one entry per response; got 1 for 2"),
    ({**GROUP, "responses": []}, "responses must hold at least one"),
    ({**GROUP, "responses": ["a", None]}, "response must be text; got None at response 1"),
    ({**GROUP, "prompt": ""}, "prompt must not be empty; got ''"),
    ({**GROUP, "prompt": None}, "prompt must be text; got None"),
    ({**GROUP, "reference_rewards": []}, "reference_rewards must hold at least one"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN)
def test_broken_rows_stop_the_run_or_are_dropped_and_counted(row, message):
    whole = {**GROUP, "reference_rewards": [0.5]} if "reference_rewards" in row else GROUP
    rows = Dataset.from_list([whole, row])
    with pytest.raises(ValueError, match=f"row 1: {message}.*invalid='drop'"):
        to_groups(rows)
    groups, report = read_groups(rows, invalid="drop")
    assert list(groups) == [whole]
    assert list(report.dropped.values()) == [[1]]
    with pytest.raises(ValueError, match="must have a usable row; got none of 1"):
        read_groups(rows.select([1]), invalid="drop")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"instruction": "Hi", "generations": ["a"], "ratings": ["N/A"]},
            "got 'N/A' at response 0",
        ),
        ({"generations": ["a"], "ratings": ["1"]}, "in one of .'prompt', 'instruction'.; got none"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "rejected must end in an assistant message"),
        ({"chosen": "\n\nHuman: only", "rejected": "x"}, "must start with"),
    ],
)
def test_broken_rows_of_other_layouts(row, message):
    with pytest.raises(ValueError, match=message):
        to_groups(Dataset.from_list([row]))


def test_pairs_of_two_kinds_are_named():
    with pytest.raises(ValueError, match="must be of one kind"):
        read_pairs({"chosen": "text", "rejected": [USER, BAD]})


def test_what_is_odd_but_usable_is_counted():
    rows = [{**GROUP, "responses": ["same", "same"]}, {**GROUP, "responses": ["", "  "]}]
    _, report = read_groups(Dataset.from_list(rows), same_prompt="keep")
    assert report.counts["empty_responses"] == 1
    assert report.counts["duplicate_responses"] == 1
    assert report.counts["whitespace_only_responses"] == 1
    assert report.summary() == {
        "layout": "canonical",
        "rows": 2,
        "groups": 2,
        "duplicate_responses": 1,
        "empty_responses": 1,
        "whitespace_only_responses": 1,
    }


def test_processes_change_nothing():
    rows = Dataset.from_list([{**GROUP, "prompt": f"{i}", "rewards": [i, 2]} for i in range(7)])
    assert to_groups(rows, num_proc=2).to_dict() == to_groups(rows).to_dict()


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1).filter(str.strip)


@given(st.lists(WORDS, min_size=1, max_size=5).filter(lambda t: len(t) % 2), WORDS, WORDS)
def test_dialogues_come_back_turn_by_turn(turns, good, bad):
    turns = [turn.strip() for turn in turns]
    speakers = ["Human", "Assistant"]
    head = "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))
    sides = {
        "chosen": f"{head}\n\nAssistant: {good.strip()}",
        "rejected": f"{head}\n\nAssistant: {bad.strip()}",
    }
    group = read_hh(sides)
    assert [m["content"] for m in group["prompt"]] == turns
    assert [m["role"] for m in group["prompt"]] == ["user", "assistant", "user"][: len(turns)] + [
        "assistant",
        "user",
    ] * (len(turns) > 3)
    assert group["responses"] == [good.strip(), bad.strip()]


def test_a_speaker_who_writes_twice_has_one_turn():
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: {}"
    group = read_hh({"chosen": text.format("x"), "rejected": text.format("y")})
    assert group["prompt"] == [{"role": "user", "content": "a\n\nb"}]


def command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception
    return result.output


def reported(output: str) -> dict[str, str]:
    """Read the table that a command prints."""
    cells = [line.split("|")[1:3] for line in output.splitlines() if line.count("|") == 3]
    return {name.strip(): value.strip() for name, value in cells}


@pytest.mark.parametrize("name", FILES)
def test_every_layout_goes_through_the_command_with_a_report(name, tmp_path, monkeypatch):
    """Three rows: two of one prompt, and one that breaks a rule.

    The reward of unscored layouts is the length of a response, so that "good" stays the better one.
    """
    (tmp_path / "file_reward.py").write_text("def length(p, r):\n    return [len(x) for x in r]\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = FILES[name][0]
    rows = [row, dict(row), dict.fromkeys(row)]
    if name == "helpsteer2":  # one response a row
        rows[1] |= {"response": "worse", "helpfulness": 0}
    path = tmp_path / "rows.jsonl"
    Dataset.from_list(rows).to_json(path)
    words = ["relabel", path, "--output", tmp_path / "out", "--beta", 0.1, "--invalid", "drop"]
    words += ["--pairs", "best_worst"]
    words += ["--ranks-as-rewards"] if name == "nectar" else []
    scored = "rewards" in FILES[name][1]
    if not scored:
        with pytest.raises(ValueError, match="column 'rewards' is missing .* give .* a --reward"):
            command(*words)
        words += ["--reward", "file_reward:length"]
    found = reported(command(*words))
    wanted = {"layout": name, "rows": "3", "groups": "1", "merged_rows": "1", "beta": "0.1"}
    wanted |= {"pairs": "1", "groups_without_pair": "0", "flipped_share": "0"}
    # draws carry mass and stay, of pairs a response is kept once
    twice = name not in ("pairs", "hh", "helpsteer2")
    width = len(FILES[name][1]["responses"])
    wanted["responses"] = str(2 * width if twice else 2)
    assert found.items() >= wanted.items()
    (lost,) = (value for key, value in found.items() if key.startswith("dropped: "))
    assert lost == "1, first at rows [2]"
    assert found.get("unscored_groups") == (None if scored else "1")
    assert found.get("labelled_pairs") == (None if scored else "1")
    (pair,) = read_rows(tmp_path / "out")
    best, worst = ("good", "bad") if name != "helpsteer2" else ("good", "worse")
    assert (pair["chosen"], pair["rejected"]) in (
        (best, "ugly" if name == "all_generated_responses" else worst),
        ([{"role": "assistant", "content": best}], [{"role": "assistant", "content": worst}]),
    )
    assert pair["margin"] > 0
    command("report", "--labels", tmp_path / "out", "--output", tmp_path / "page")
    page = reported((tmp_path / "page" / "report.md").read_text())
    assert page.items() >= wanted.items()
    assert (tmp_path / "page" / "labels0.png").stat().st_size > 10_000


def test_weights_and_policies_from_the_command_line(tmp_path):
    row = FILES["helpsteer2"][0]
    rows = [row, row | {"response": "", "verbosity": 9}, row | {"prompt": ""}]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    words = ["relabel", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--beta", 0.1]
    words += ["--attribute-weight", "helpfulness=1", "--attribute-weight", "verbosity=-0.5"]
    with pytest.raises(ValueError, match="row 2: prompt must not be empty; .*empty_prompts='keep'"):
        command(*words)
    found = reported(command(*words, "--empty-prompts", "keep", "--empty-responses", "drop"))
    assert (
        found.items()
        >= {
            "weight of helpfulness": "1",
            "weight of verbosity": "-0.5",
            "dropped: all responses are empty": "1, first at rows [1]",
            "groups": "2",
        }.items()
    )
    made = read_rows(tmp_path / "out")
    assert made["prompt"][:] == ["Hi", ""]
    assert made["rewards"][:] == [[3.5], [3.5]]
    for word, message in (("helpfulness", "KEY=VALUE; got 'helpf"), ("a=b", "a number; got 'b'")):
        with pytest.raises(ValueError, match=f"--attribute-weight.* must be {message}"):
            command(*words, "--attribute-weight", word)
    with pytest.raises(ValueError, match="must be of layout 'helpsteer2'; got 'pairs'"):
        to_groups(Dataset.from_list([PAIRS[0][0]]), attribute_weights={"helpfulness": 1.0})


def test_extremes_of_weighted_labels_through_the_command(tmp_path, rng):
    drawn = rng.normal(0.3, 1.0, size=(30, 12))  # weighted to N(0, 1)
    data = {"prompt": [str(i) for i in range(30)], "rewards": drawn.tolist()}
    data |= {"responses": [[str(j) for j in range(12)]] * 30}
    data |= {"sampler_logps": (0.3 * drawn).tolist(), "reference_logps": [[0.045] * 12] * 30}
    Dataset.from_dict(data).to_parquet(tmp_path / "rows.parquet")
    words = ["relabel", tmp_path / "rows.parquet", "--beta", 0.1, "--calibration", "weighted"]
    found = reported(command(*words, "--extremes", 2, "--output", tmp_path / "out"))
    # of all draws, not of the extremes
    error, _ = held_out_error(RewardCalibrator("weighted"), drawn, 0.045 - 0.3 * drawn)
    wanted = {"responses": "120", "held_out_draws": "180"}
    wanted |= {"mean_absolute_deviation": f"{error.mean_absolute_deviation:.4g}"}
    assert found.items() >= wanted.items()
    made = read_rows(tmp_path / "out")
    assert made["rewards"][:] == [
        [r for r in row if r in (*sorted(row)[:2], *sorted(row)[-2:])] for row in drawn.tolist()
    ]
    assert summarise_labels(made, "weighted").calibration_error is None


def test_flips_are_counted_before_rows_of_one_prompt_merge():
    rows = [
        {"prompt": "Hi", "chosen": c, "rejected": r, "score_chosen": a, "score_rejected": b}
        for c, r, a, b in [("a", "b", 1, 2), ("c", "b", 3, 2), ("a", "d", 1, 1)]
    ]
    groups, report = read_groups(Dataset.from_list(rows))
    assert groups["rewards"][:] == [[1.0, 2.0, 3.0, 1.0]]
    counts = {"labelled_pairs": 3, "flipped_labels": 1, "equal_labels": 1, "merged_rows": 2}
    assert report.counts.items() >= counts.items()
    stream, told = read_groups(Dataset.from_list(rows).to_iterable_dataset())
    assert len(list(stream)) == 3
    assert told.counts.items() >= (counts | {"unscored_groups": 0}).items() - {("merged_rows", 2)}
