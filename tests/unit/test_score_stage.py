"""The score stage with functions as rewards: order, cache, resumption and refusals."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset

from ctrl_dpo.data.folders import read_rows
from ctrl_dpo.engine.reward_functions import Candidate, FunctionReward, import_function
from ctrl_dpo.engine.score_cache import ScoreCache
from ctrl_dpo.score import load_reward, score

MESSAGES = [{"role": "user", "content": "Say hi"}]
calls: list[tuple[list, list]] = []


def length(prompts: list, responses: list[str]) -> list[float]:
    calls.append((prompts, responses))
    return [len(response) / 4 for response in responses]


def groups(prompts=("a", "b"), responses=(("x", "xxxx"), ("xx",))) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), "responses": [list(r) for r in responses]})


@pytest.fixture(autouse=True)
def _no_calls():
    calls.clear()


def quiet(data: Dataset, reward, **options) -> list[list[float]]:
    return score(data, reward, progress=False, **options)["rewards"][:]


def test_scores_stand_in_the_order_of_responses():
    """length / 4: x -> 0.25, xxxx -> 1, xx -> 0.5; the row with two responses is row 0."""
    assert quiet(groups(), length) == [[0.25, 1.0], [0.5]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batch_size_changes_no_score_and_bounds_the_calls(batch_size):
    assert quiet(groups(), length, batch_size=batch_size) == [[0.25, 1.0], [0.5]]
    assert max(len(responses) for _, responses in calls) <= batch_size
    assert sum(len(responses) for _, responses in calls) == 3


def test_other_columns_and_message_prompts_pass_through():
    data = Dataset.from_dict({"prompt": [MESSAGES], "responses": [["hello"]], "id": [7]})
    scored = score(data, length, progress=False)
    assert scored.column_names == ["prompt", "responses", "id", "rewards"]
    assert calls == [([MESSAGES], ["hello"])]


def test_equal_texts_are_scored_once_and_equal_responses_of_other_prompts_are_not():
    data = groups(["a", "a", "b"], [["x", "x"], ["x"], ["x"]])
    assert quiet(data, length) == [[0.25, 0.25], [0.25], [0.25]]
    assert calls == [(["a", "b"], ["x", "x"])]


@pytest.mark.parametrize(
    "convert",
    [np.asarray, lambda x: np.asarray(x, dtype=np.float16), lambda x: map(int, x)],
    ids=["float64 array", "float16 array", "integers"],
)
def test_numbers_of_any_kind_become_floats(convert):
    assert quiet(groups(), lambda p, r: convert([len(x) for x in r])) == [[1.0, 4.0], [2.0]]


# --- cache


def test_a_rerun_scores_nothing(tmp_path):
    cache = tmp_path / "folder" / "scores.jsonl"
    first = quiet(groups(), length, cache=cache)
    calls.clear()
    assert quiet(groups(), length, cache=cache) == first
    assert calls == []


def test_scores_survive_the_file_exactly(tmp_path):
    cache = tmp_path / "scores.jsonl"
    values = [0.1, 1e-320, -1e308]
    with ScoreCache(cache, "reward") as store:
        store.add({store.key("p", str(v)): v for v in values})
    again = ScoreCache(cache, "reward")
    assert [again[again.key("p", str(v))] for v in values] == values


def test_processes_that_share_a_cache_do_not_cut_each_others_lines(tmp_path):
    path = tmp_path / "scores.jsonl"
    write = (
        "import sys\n"
        "from pathlib import Path\n"
        "from ctrl_dpo.engine.score_cache import ScoreCache\n"
        "with ScoreCache(Path(sys.argv[1]), 'reward') as store:\n"
        "    print(flush=True)\n"
        "    input()\n"
        "    for i in range(100):\n"
        "        store.add({f'{sys.argv[2]} {i} {j}': 0.5 for j in range(500)})\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", write, str(path)]
    with contextlib.ExitStack() as stack:
        opened = [subprocess.Popen([*words, name], **pipes) for name in "ab"]
        writers = [stack.enter_context(process) for process in opened]
        for writer in writers:
            writer.stdout.readline()
        for writer in writers:  # both have opened it: they write at the same time
            writer.stdin.write("\n")
            writer.stdin.flush()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(path.read_text().splitlines()) == 100_000
    found = ScoreCache(path, "reward")
    assert all(f"{name} {i} {j}" in found for name in "ab" for i in range(100) for j in range(500))


def test_only_new_responses_are_scored(tmp_path):
    cache = tmp_path / "scores.jsonl"
    quiet(groups(), length, cache=cache)
    calls.clear()
    assert quiet(groups(["a"], [["x", "new", "xxxx"]]), length, cache=cache) == [[0.25, 0.75, 1.0]]
    assert calls == [(["a"], ["new"])]


def test_an_interrupted_run_keeps_what_it_scored(tmp_path, monkeypatch):
    """Three responses, one a call, the third call dies: two lines are on disk, one call remains."""
    cache = tmp_path / "scores.jsonl"
    model = FunctionReward(length)

    def dies_at_third(prompts, responses):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return length(prompts, responses)

    monkeypatch.setattr(model, "function", dies_at_third)
    monkeypatch.setattr(FunctionReward, "identity", "length")
    with pytest.raises(KeyboardInterrupt):
        quiet(groups(), model, batch_size=1, cache=cache)
    assert len(cache.read_text().splitlines()) == 2
    calls.clear()
    assert quiet(groups(), length, batch_size=1, cache=cache) == [[0.25, 1.0], [0.5]]
    assert [responses for _, responses in calls] == [["xx"]]


@pytest.mark.parametrize("n_bytes", range(1, 60, 7))
def test_a_half_written_last_line_is_scored_again(tmp_path, n_bytes, caplog):
    cache = tmp_path / "scores.jsonl"
    expected = quiet(groups(), length, cache=cache)
    content = cache.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    cache.write_bytes(content[: last + n_bytes])
    calls.clear()
    assert quiet(groups(), length, cache=cache) == expected
    assert [responses for _, responses in calls] == [["xx"]]
    assert "1 incomplete lines left out" in caplog.text
    calls.clear()
    assert quiet(groups(), length, cache=cache) == expected, "the line after the torn one is whole"
    assert calls == []


def test_another_reward_does_not_find_the_scores(tmp_path):
    with ScoreCache(tmp_path / "scores.jsonl", "first") as store:
        store.add({store.key("p", "r"): 1.0})
    other = ScoreCache(tmp_path / "scores.jsonl", "second")
    assert other.key("p", "r") not in other


def test_keys_tell_texts_from_messages_and_where_a_prompt_ends():
    store = ScoreCache(None, "reward")
    keys = {
        store.key("ab", "c"),
        store.key("a", "bc"),
        store.key(MESSAGES, "c"),
        store.key(json.dumps(MESSAGES), "c"),
        store.key("\ud800", "lone surrogate"),
    }
    assert len(keys) == 5


def test_a_changed_module_is_another_reward(tmp_path, monkeypatch):
    module = tmp_path / "changing_reward.py"
    module.write_text("def reward(prompts, responses):\n    return [1.0 for _ in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = FunctionReward(import_function("changing_reward:reward")).identity
    assert before.startswith("changing_reward:reward:")
    module.write_text("BONUS = 2\n" + module.read_text())
    assert FunctionReward(import_function("changing_reward:reward")).identity != before


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    other = tmp_path / "data.jsonl"
    other.write_text('{"prompt": "a"}\n')
    with pytest.raises(
        ValueError, match=r"cache must be a file that this stage wrote; got .*line 1"
    ):
        score(groups(), length, cache=other, progress=False)


@pytest.mark.parametrize(
    "reward", [lambda p, r: [0.0] * len(r), max, FunctionReward(length).batches]
)
def test_a_reward_without_a_module_has_no_cache(tmp_path, reward):
    with pytest.raises(ValueError, match="reward must be a function at the top of a module"):
        score(groups(), reward, cache=tmp_path / "scores.jsonl", progress=False)


# --- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_names_row_and_response(tmp_path, bad):
    def reward(prompts, responses):
        return [bad if r == "xxxx" else 1.0 for r in responses]

    with pytest.raises(ValueError, match=f"rewards must be finite; got {bad} at row 0, response 1"):
        score(groups(), reward, progress=False)


def test_a_wrong_number_of_scores_is_refused():
    with pytest.raises(ValueError, match=r"one score a response; got 1 for 3 responses from row 0"):
        score(groups(), lambda p, r: [1.0], progress=False)


@pytest.mark.parametrize("bad", ["4", None, b"1"])
def test_scores_that_are_no_numbers_are_refused(bad):
    with pytest.raises(TypeError, match=f"must return numbers; got {bad!r}"):
        score(groups(), lambda p, r: [bad] * len(r), progress=False)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (1.0, "got 1.0"),
        (None, "got None"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "got {0: 1.0, 1: 2.0, 2: 3.0}"),
        ({1.0, 2.0, 3.0}, "got {1.0, 2.0, 3.0}"),
        ("123", "got '123'"),
        (np.float64(2.0), r"got float64 of shape \(\)"),
        (np.zeros((3, 2)), r"got ndarray of shape \(3, 2\)"),
        (torch.zeros(3, 1, 1), r"got Tensor of shape \(3, 1, 1\)"),
    ],
)
def test_rewards_that_return_no_list_are_refused_by_name(returned, got):
    def of_mine(prompts, responses):
        return returned

    name = "test_score_stage:.*of_mine must return one number a response, in a list .*; "
    with pytest.raises(TypeError, match=f"reward {name}{got}"):
        score(groups(), of_mine, progress=False)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_logits_of_a_reward_model_are_one_number_a_response(kind):
    def logits(prompts, responses):
        return kind([[float(len(response))] for response in responses])

    wanted = [[float(len(r)) for r in responses] for responses in groups()["responses"]]
    assert score(groups(), logits, progress=False)["rewards"][:] == wanted


def test_a_list_of_lists_is_refused_by_name_and_one_of_tensors_is_not():
    with pytest.raises(TypeError, match=r"must return numbers; got tensor\(\[0., 0.\]\)"):
        score(groups(), lambda p, r: [*torch.zeros(3, 2)], progress=False)
    assert quiet(groups(), lambda p, r: [torch.tensor(float(len(x))) for x in r])[1] == [2.0]


def test_what_is_no_reward_is_refused():
    with pytest.raises(TypeError, match="reward must be a checkpoint's name, .*; got 5"):
        score(groups(), 5, progress=False)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"prompt": ["a"]}, ValueError, r"column 'responses' is missing.*found \['prompt'\]"),
        ({"prompt": [], "responses": []}, ValueError, "at least one row; got 0"),
        ({"prompt": ["a"], "responses": [[]]}, ValueError, r"at least one; got \[\] at row 0"),
        ({"prompt": ["a", None], "responses": [["x"], ["y"]]}, ValueError, "got None at row 1"),
        ({"prompt": [[]], "responses": [["x"]]}, ValueError, r"got \[\] at row 0"),
        ({"prompt": ["a"], "responses": [["x", None]]}, TypeError, "None at row 0, response 1"),
        ({"prompt": ["a"], "responses": [[3]]}, TypeError, "got 3 at row 0, response 0"),
        (
            {"prompt": ["a"], "responses": [["x"]], "rewards": [[1.0]]},
            ValueError,
            "must not have the column 'rewards' yet",
        ),
    ],
)
def test_bad_groups_are_refused_before_any_call(data, error, message):
    with pytest.raises(error, match=message):
        score(Dataset.from_dict(data), length, progress=False)
    assert calls == []


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1; got 0"):
        score(groups(), length, batch_size=0)


def test_text_that_names_no_function_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'json'; got 'lods'. It has .*'loads'"):
        import_function("json:lods")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory with a reward module, which is not on the path."""
    source = "def letters(prompts, responses):\n    return [len(r) for r in responses]\n"
    (tmp_path / "work" / "inner").mkdir(parents=True)
    for name in ("reward_of_work.py", "inner/reward_of_inner.py"):
        (tmp_path / "work" / name).write_text(source)
    (tmp_path / "work" / "broken_reward.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize("name", ["reward_of_work", "inner.reward_of_inner"])
def test_modules_of_the_working_directory_are_found(name, elsewhere):
    before = [*sys.path]
    assert import_function(f"{name}:letters")(["p"], ["four"]) == [4]
    assert sys.path == [*before, str(elsewhere)]  # at the end: it hides no other module


@pytest.mark.slow
def test_a_script_that_lies_elsewhere_finds_modules_where_it_runs(elsewhere):
    """As the console script does: the first entry of its path is its own folder."""
    (elsewhere.parent / "scripts").mkdir()
    script = elsewhere.parent / "scripts" / "score.py"
    script.write_text("from ctrl_dpo.cli import main\nmain()\n")
    groups().to_json(elsewhere / "groups.jsonl")
    words = ["score", "groups.jsonl", "--reward", "reward_of_work:letters", "--output", "scored"]
    made = subprocess.run(
        [sys.executable, script, *words], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    assert read_rows(elsewhere / "scored")["rewards"][:] == [[1.0, 4.0], [2.0]]


@pytest.mark.parametrize(
    ("name", "missing"),
    [("reward_that_is_not_there", None), ("broken_reward", "a_package_that_is_not_there")],
)
def test_a_module_that_does_not_import_is_named(name, missing, elsewhere):
    where = f"looked for in '{elsewhere}' and on the path: name its folder in PYTHONPATH"
    message = f"got '{name}': No module named '{missing or name}'. It was {where}"
    with pytest.raises(ImportError, match=message):
        load_reward(f"{name}:letters")


def test_options_for_a_function_are_refused():
    with pytest.raises(ValueError, match=r"must be for a checkpoint; got \['dtype'\]"):
        load_reward(length, dtype="bfloat16")


def test_a_function_named_by_text_is_the_function():
    assert load_reward("test_score_stage:length").function.__name__ == "length"


def test_the_function_reward_yields_every_position_once():
    candidates = [Candidate("p", "x" * i, f"row {i}") for i in range(7)]
    scores: dict[int, float] = {}
    for part in FunctionReward(length).batches(candidates, 3):
        assert not scores.keys() & part.keys()
        scores |= part
    assert scores == {i: i / 4 for i in range(7)}
