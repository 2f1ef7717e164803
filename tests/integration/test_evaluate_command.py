"""`ctrl-dpo evaluate` as a harness: other people's files in, numbers and figures out, no model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from ctrl_dpo.cli import app
from ctrl_dpo.evaluate import evaluate
from ctrl_dpo.measures.draws import gather_draws


def command(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return result.output if code == 0 else str(result.exception)


def draws(seed: int, m: int, shift: float = 0.0):
    """Eight prompts with m draws each, as rows of lists."""
    rng = np.random.default_rng(seed)
    logps = -rng.random((8, m))
    return [
        {
            "prompt": f"p{i}",
            "rewards": (rng.random(m) + shift).tolist(),
            "policy_logps": (logps[i] + 0.2 + 0.1 * rng.random(m)).tolist(),
            "reference_logps": logps[i].tolist(),
        }
        for i in range(8)
    ]


def one_a_line(rows, path, **names):
    """Write the same draws as JSON lines, one draw a line, under other names."""
    lines = []
    for row in rows:
        for j in range(len(row["rewards"])):
            line = {names.get(k, k): v[j] for k, v in row.items() if k != "prompt"}
            lines.append(json.dumps({"question": row["prompt"], **line}))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def sides():
    return draws(1, 6, shift=0.2), draws(2, 5)


def test_parquet_of_lists_and_lines_of_single_draws_give_one_record(tmp_path, sides):
    expected = evaluate(*sides)
    for rows, name in zip(sides, ("policy", "reference"), strict=True):
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
        one_a_line(rows, tmp_path / f"{name}.jsonl", rewards="score", policy_logps="logp")
    mapped = ["prompt=question", "rewards=score", "policy_logps=logp"]
    columns = [word for pair in mapped for word in ("--column", pair)]
    for suffix, words in (("parquet", []), ("jsonl", columns)):
        files = ["--policy", tmp_path / f"policy.{suffix}"]
        files += ["--reference", tmp_path / f"reference.{suffix}"]
        printed = command("evaluate", *files, "--output", tmp_path / suffix, *words)
        record = json.loads((tmp_path / suffix / "evaluation.json").read_text())
        for key in ("win_rates", "kl", "attainment", "n_draws", "n_reference_draws"):
            assert record[key] == json.loads(json.dumps(expected[key])), key
        assert f"{expected['win_rates']['best_of_4']['value']:.1%}" in printed
        assert "Attainment:" in printed
        pictures = {path.name for path in (tmp_path / suffix).glob("*.png")}
        assert pictures == {"frontier.png", "rewards.png", "calibration.png"}
        assert "best of 4" in (tmp_path / suffix / "report.md").read_text()


def test_without_log_probabilities_there_is_no_kl_and_no_frontier(tmp_path, sides):
    for rows, name in zip(sides, ("policy", "reference"), strict=True):
        bare = [{k: row[k] for k in ("prompt", "rewards")} for row in rows]
        Dataset.from_list(bare).to_parquet(tmp_path / f"{name}.parquet")
    files = ["--policy", tmp_path / "policy.parquet", "--reference", tmp_path / "reference.parquet"]
    printed = command("evaluate", *files, "--output", tmp_path / "out", "--procedure", "best_of_5")
    assert "attainable" not in printed
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "rewards.png",
        "calibration.png",
    }
    command("evaluate", *files, "--output", tmp_path / "bare", "--no-plot")
    assert not list((tmp_path / "bare").glob("*.png"))
    error = command(
        "evaluate", *files, "--output", tmp_path / "n", "--procedure", "best_of_6", code=1
    )
    assert "reference_rewards must hold >= 6 draws" in error


def test_a_folder_that_another_call_writes_is_refused(tmp_path, sides, held_by_another):
    for rows, name in zip(sides, ("policy", "reference"), strict=True):
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    files = ["--policy", tmp_path / "policy.parquet", "--reference", tmp_path / "reference.parquet"]
    words = ["evaluate", *files, "--output", tmp_path / "out", "--no-plot"]
    with held_by_another(tmp_path / "out"):
        error = command(*words, code=1)
        assert "output folder must not be in use" in error
        assert not list((tmp_path / "out").glob("*.json"))
    assert "best of 4" in command(*words)


def test_no_model_library_is_loaded(tmp_path, sides):
    """In a process of its own, where nothing else has imported torch."""
    for rows, name in zip(sides, ("policy", "reference"), strict=True):
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    code = (
        "import sys; from ctrl_dpo.commands.evaluation import evaluate; from pathlib import Path;"
        "evaluate(sys.argv[1], sys.argv[2], Path(sys.argv[3]));"
        "found = {'transformers', 'peft', 'bitsandbytes'} & set(sys.modules);"
        "sys.exit(str(found) if found else 0)"
    )
    paths = [str(tmp_path / name) for name in ("policy.parquet", "reference.parquet", "out")]
    made = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]


def test_wrong_files_are_named():
    with pytest.raises(ValueError, match=r"one entry a draw; got .*'rewards': 2, .* at row 0"):
        gather_draws([{"prompt": "a", "rewards": [1, 2], "policy_logps": [0.0]}])
    unlike = [{"prompt": "a", "rewards": 1.0, "length": 3}, {"prompt": "a", "rewards": 1.0}]
    with pytest.raises(ValueError, match=r"same columns; got \['rewards'\] at row 1"):
        gather_draws(unlike)
    rows = [{"prompt": p, "rewards": [1.0, 2.0]} for p in "ab"]
    with pytest.raises(ValueError, match=r"no 'policy_logps' there"):
        evaluate(rows, rows, columns={"policy_logps": "absent"})
    with pytest.raises(ValueError, match=r"columns key must be one of .*'scores'"):
        gather_draws([{"prompt": "a", "rewards": 1.0}], {"scores": "rewards"})


def test_one_draw_a_row_has_the_length_of_its_tokens():
    rows = [{"prompt": "a", "rewards": 1.0, "response_ids": [5, 6, 7]}]
    rows.append({"prompt": "a", "rewards": 2.0, "response_ids": [5]})
    assert gather_draws(rows) == {'"a"': {"rewards": [1.0, 2.0], "length": [3, 1]}}
