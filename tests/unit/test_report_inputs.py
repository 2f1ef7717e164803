"""What `ctrl-dpo report` reads: the draws that were evaluated, wherever it is called from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from ctrl_dpo.cli import app
from ctrl_dpo.evaluate import evaluate
from ctrl_dpo.report_inputs import read_evaluation, report_inputs


def command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


def write_draws(path, shift: float = 0.0, n: int = 8, m: int = 6, seed: int = 0):
    rewards = np.random.default_rng(seed).normal(shift, 1, (n, m))
    rows = [{"prompt": f"p{i}", "rewards": row.tolist()} for i, row in enumerate(rewards)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def runs(tmp_path):
    """Two files of draws and an evaluation of them."""
    write_draws(tmp_path / "policy.jsonl", 0.5, seed=1)
    write_draws(tmp_path / "reference.jsonl")
    sides = ["--policy", tmp_path / "policy.jsonl", "--reference", tmp_path / "reference.jsonl"]
    command("evaluate", *sides, "--name", "ours", "--output", tmp_path / "made", "--no-plot")
    return tmp_path


def test_draws_are_found_from_any_folder_and_after_a_move(runs, monkeypatch):
    stored = json.loads((runs / "made" / "evaluation.json").read_text())["sources"]
    assert stored == {"policy": "../policy.jsonl", "reference": "../reference.jsonl"}
    expected = report_inputs([read_evaluation(runs / "made")], {})
    (runs / "elsewhere").mkdir()
    for name in ("policy.jsonl", "reference.jsonl", "made"):
        shutil.move(runs / name, runs / "elsewhere" / name)
    (runs / "below").mkdir()
    monkeypatch.chdir(runs / "below")
    record = read_evaluation("../elsewhere/made")
    assert record["sources"]["policy"] == "../elsewhere/policy.jsonl"
    found = report_inputs([record], {})
    for name in ("reference_rewards", "calibrated_rewards"):
        assert found[name].tolist() == expected[name].tolist()
    command("report", "../elsewhere/made", "--output", "page")
    assert (runs / "below" / "page" / "rewards.png").stat().st_size > 10_000


def test_sources_as_they_were_typed_are_still_read(runs, monkeypatch):
    path = runs / "made" / "evaluation.json"
    record = json.loads(path.read_text())
    record["sources"] = {"policy": "policy.jsonl", "reference": "reference.jsonl"}
    path.write_text(json.dumps(record))
    monkeypatch.chdir(runs)
    assert read_evaluation("made")["sources"] == record["sources"]
    assert report_inputs([read_evaluation("made")], {})["reference_rewards"].size == 48


@pytest.mark.parametrize("side", ["policy", "reference"])
def test_draws_that_changed_since_are_refused(runs, side):
    write_draws(runs / f"{side}.jsonl", 5.0)
    error = refused("report", runs / "made", "--output", runs / "page")
    assert f"draws of the {side} must be those that 'ours' was evaluated on; got" in error
    assert f"{side}.jsonl', which has changed or is not there" in error
    assert not (runs / "page").exists()


def test_what_is_no_evaluation_is_named(tmp_path):
    error = refused("report", tmp_path / "absent", "--output", tmp_path / "page")
    assert "folders of `ctrl-dpo evaluate`; got" in error
    assert "absent', without evaluation.json" in error


def test_draws_sorted_from_best_to_worst_are_split_by_lot(tmp_path):
    rows = write_draws(tmp_path / "reference.jsonl", n=200, m=16)
    ordered = [row | {"rewards": sorted(row["rewards"], reverse=True)} for row in rows]
    path = tmp_path / "sorted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ordered))
    record = {"name": "ours", "seed": 3, "sources": {"policy": str(path), "reference": str(path)}}
    found = report_inputs([record], {})
    assert found["k"] == 8
    # uniform on the nine ranks: mean 1/2, and 1600 draws of 200 prompts leave 0.02
    assert found["calibrated_rewards"].mean() == pytest.approx(0.5, abs=0.05)
    assert np.mean(found["calibrated_rewards"] == 0) == pytest.approx(1 / 9, abs=0.04)
    again = report_inputs([record], {})["calibrated_rewards"]
    assert found["calibrated_rewards"].tolist() == again.tolist()
    other = report_inputs([record | {"seed": 4}], {})["calibrated_rewards"]
    assert found["calibrated_rewards"].tolist() != other.tolist()


def test_training_is_read_with_labels_alone(runs):
    command("relabel", runs / "reference_with_responses.jsonl", *labelled(runs))
    words = ["report", "--labels", runs / "labels", "--output", runs / "page"]
    error = refused(*words, "--training", f"ours={runs / 'absent'}")
    assert "--training must name folders of `ctrl-dpo train`; got" in error
    assert "without metrics.jsonl" in error
    (runs / "trained").mkdir()
    (runs / "trained" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    command(*words, "--training", f"ours={runs / 'trained'}")
    assert (runs / "page" / "training.png").stat().st_size > 10_000
    assert "training.png" in (runs / "page" / "report.md").read_text()


def labelled(folder) -> list[object]:
    rows = write_draws(folder / "reference.jsonl")
    rows = [row | {"responses": [f"{j}" for j in range(6)]} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "reference_with_responses.jsonl").write_text(text)
    return ["--target-kl", 0.5, "--output", folder / "labels"]


def test_training_without_a_name_is_refused(runs):
    words = ["report", runs / "made", "--output", runs / "page", "--training", "ours"]
    assert refused(*words) == "--training must be KEY=VALUE; got 'ours'."


def test_two_evaluations_of_one_name_are_refused(runs):
    shutil.copytree(runs / "made", runs / "again")
    error = refused("report", runs / "made", runs / "again", "--output", runs / "page")
    assert "records must have different names; got 'ours' for numbers 0 and 1" in error


def test_a_record_of_the_library_has_no_draws_to_show(runs):
    rows = write_draws(runs / "policy.jsonl"), write_draws(runs / "reference.jsonl")
    (runs / "saved").mkdir()
    text = json.dumps(evaluate(*rows, name="saved"))
    (runs / "saved" / "evaluation.json").write_text(text)
    command("report", runs / "saved", "--output", runs / "page")
    assert list((runs / "page").glob("*.png")) == []
    assert "| saved " in (runs / "page" / "report.md").read_text()
