"""Every stage as a command over files, on the tiny model, with sockets blocked."""

from __future__ import annotations

import json
import shlex
import shutil
import sys

import datasets
import numpy as np
import pytest
from tiny import tiny_llama
from typer.testing import CliRunner

from ctrl_dpo import CTRLDPOTrainer, inference_win_rate, kl_divergence
from ctrl_dpo.arguments import parse_arguments
from ctrl_dpo.cli import app, main
from ctrl_dpo.data.folders import read_record
from ctrl_dpo.data.hashes import model_hash
from ctrl_dpo.sample import sample

CONFIG = """
loss: squared
anchor: 0.5
load_in_8bit: true
model_dtype: float32
lora_r: 8
learning_rate: 1.0e-2
max_steps: 40
per_device_train_batch_size: 3
logging_steps: 10
report_to: none
save_strategy: "no"
"""
REWARD = """
def vowels(prompts, responses):
    return [sum(map(r.lower().count, "aeiou")) / (len(r) + 1) for r in responses]
"""


def command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder):
    """All stages, once; the tests look at what they left."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rewards_of_tests.py").write_text(REWARD)
    (folder / "train.yaml").write_text(CONFIG)
    for name, count in (("train", 6), ("held_out", 4)):
        rows = [{"prompt": [{"role": "user", "content": f"{name} {i}"}]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    sys.path.insert(0, str(folder))
    all_stages(folder, tiny_model_folder)
    yield folder
    sys.path.remove(str(folder))


def all_stages(runs, model) -> list[str]:
    drawing = ["--max-new-tokens", 12, "--dtype", "float32", "--load-in-8bit"]
    scoring = ["--reward", "rewards_of_tests:vowels"]
    outputs = []

    def do(*words):
        outputs.append(command(*words))

    do("sample", model, runs / "train.jsonl", "--output", runs / "draws", "--draws", 6, *drawing)
    do("score", runs / "draws", "--output", runs / "scored", *scoring)
    labels = ["--procedure", "best_of_2", "--target-kl", 0.5]
    do("relabel", runs / "scored", "--output", runs / "groups", *labels, "--anchor", 0.5)
    do("relabel", runs / "scored", "--output", runs / "pairs", *labels, "--pairs", "adjacent")
    options = ["--config", runs / "train.yaml", "--output_dir", runs / "adapter"]
    do("train", model, runs / "groups", *options)
    for name, source in (("reference", model), ("policy", runs / "adapter")):
        draws, scored = runs / f"{name}_draws", runs / f"{name}_scored"
        seed = ["--seed", len(name), "--draws", 16]
        ratios = ["--log-ratios"] if name == "policy" else []
        held_out = runs / "held_out.jsonl"
        do("sample", source, held_out, "--output", draws, *drawing, *seed, *ratios)
        do("score", draws, "--output", scored, *scoring)
    sides = ["--policy", runs / "policy_scored", "--reference", runs / "reference_scored"]
    served = ["--procedure", "single_draw", "--procedure", "best_of_2"]
    do("evaluate", *sides, "--name", "ours", "--output", runs / "evaluation", *served)
    curves = ["--training", f"ours={runs / 'adapter'}"]
    shown = [*curves, "--labels", runs / "groups"]
    do("report", runs / "evaluation", "--output", runs / "report", *shown)
    return outputs


def test_all_stages(runs):
    # every stage's rows load with datasets, one line each, and the record says what made them
    for name, rows in (("draws", 6), ("scored", 6), ("groups", 6), ("policy_scored", 4)):
        loaded = datasets.load_dataset(str(runs / name), split="train")
        assert len(loaded) == rows
        record = read_record(runs / name)
        assert record["versions"]["ctrl-dpo"]
        assert record["inputs"]
    pairs = datasets.load_dataset(str(runs / "pairs"), split="train")
    assert min(pairs["margin"]) > 0
    assert pairs.column_names[:4] == ["prompt", "chosen", "rejected", "margin"]

    # the anchored fit follows its targets
    lines = (runs / "adapter" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    logged = [step for step in steps if "loss" in step]
    assert [step["step"] for step in logged] == [10, 20, 30, 40]
    assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
    assert logged[-1]["fit/r2"] > 0.2

    # the evaluation is that of the library's functions on the same files
    policy = datasets.load_dataset(str(runs / "policy_scored"), split="train")
    reference = datasets.load_dataset(str(runs / "reference_scored"), split="train")
    record = json.loads((runs / "evaluation" / "evaluation.json").read_text())
    rewards = np.array(policy["rewards"]), np.array(reference["rewards"])
    rate = inference_win_rate(*rewards, "best_of_2")
    assert record["win_rates"]["best_of_2"]["value"] == pytest.approx(rate.value, abs=1e-12)
    kl = kl_divergence(np.array(policy["policy_logps"]), np.array(policy["reference_logps"]))
    assert record["kl"]["value"] == pytest.approx(kl.value, abs=1e-12)
    assert record["n_draws"] == 4 * 16

    page = (runs / "report" / "report.md").read_text()
    pictures = {path.name for path in (runs / "report").glob("*.png")}
    drawn = {"frontier.png", "rewards.png", "calibration.png", "training.png"}
    assert pictures == drawn | {"labels0.png"}
    assert all(f"({name})" in page for name in pictures)
    assert f"{rate.value:.1%}" in page


def test_draws_of_a_command_are_known_by_the_files_of_their_model(runs, tiny_model_folder):
    draws = datasets.load_dataset(str(runs / "draws"), split="train")
    (origin,) = draws.unique("sampled_from")
    files = f"files:{model_hash(tiny_model_folder)}"
    assert json.loads(origin)["model"] == files
    assert read_record(runs / "draws")["settings"]["load_in_8bit"] is True
    other = runs / "other_model"
    shutil.copytree(tiny_model_folder, other)
    tiny_llama(seed=9).save_pretrained(other)
    words = [str(other), str(runs / "groups"), "--config", str(runs / "train.yaml")]
    words += ["--output_dir", str(runs / "refused")]
    with pytest.raises(ValueError, match=f"draws of the reference policy; got model '{files}'"):
        CliRunner().invoke(app, ["train", *words], catch_exceptions=False)
    with pytest.raises(ValueError, match="must be for a model given by name; got .*'dtype'"):
        sample(draws.select_columns(["prompt"]), tiny_llama(), dtype="float32")


def test_the_model_card_tells_the_run(runs):
    card = (runs / "report" / "model_card.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:3]] for line in card.splitlines() if "|" in line]
    told, made = dict(cells), read_record(runs / "adapter")
    assert told["KL budget (nats)"] == "0.5"
    assert told["procedure"] == "best_of_2"
    beta = datasets.load_dataset(str(runs / "groups"), split="train")["beta"][0]
    assert told["beta"] == f"{beta:.4g}"
    # what was in memory: int8 with a float32 scale a row, the rest in float32
    assert 8 < float(told["linear"]) < 10
    assert told["embedding"] == told["adapter"] == told["other"] == "32.00"
    assert "activations are float32" in card
    # the command holds all settings that decide the weights
    (line,) = (line for line in card.splitlines() if line.startswith("ctrl-dpo train "))
    words = shlex.split(line)[4:]
    words[words.index("--output_dir") + 1] = str(runs / "elsewhere")
    adapter, args = parse_arguments(None, words)
    settings = json.loads(json.dumps(args.to_dict() | vars(adapter)))
    decisive = made["summary"]["run"].keys() & made["settings"].keys()
    assert {"loss", "anchor", "learning_rate", "load_in_8bit", "max_steps"} < decisive
    assert {k: settings[k] for k in decisive} == {k: made["settings"][k] for k in decisive}
    assert settings["lora_r"] == 8


def test_a_second_run_repeats_nothing(runs, tiny_model_folder, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in runs.rglob("*") if "report" not in p.parts}
    monkeypatch.setattr(CTRLDPOTrainer, "train", None)
    outputs = all_stages(runs, tiny_model_folder)
    assert len(outputs) == 11
    changed = [p for p, t in before.items() if p.is_file() and p.stat().st_mtime_ns != t]
    assert [p for p in changed if "report" not in str(p)] == []


def failing(monkeypatch, capsys, *words: object) -> str:
    """Run the command line as a shell does; return the error it prints."""
    monkeypatch.setattr(sys, "argv", ["ctrl-dpo", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_folder_of_another_run_is_refused(runs, monkeypatch, capsys):
    words = ["relabel", runs / "scored", "--output", runs / "groups", "--procedure", "best_of_2"]
    error = failing(monkeypatch, capsys, *words, "--target-kl", 0.9)
    assert error.startswith("error: ")
    assert "target_kl" in error
    error = failing(monkeypatch, capsys, *words, "--beta", 0.5)
    assert str(runs / "groups") in error
    # the run that was there is as it was
    assert read_record(runs / "groups")["settings"]["target_kl"] == 0.5


def test_unscored_draws_and_missing_files_are_named(runs, monkeypatch, capsys, tmp_path):
    settings = ["--target-kl", 1, "--output", tmp_path / "out"]
    error = failing(monkeypatch, capsys, "relabel", runs / "draws", *settings)
    assert "'rewards' is missing" in error
    assert "ctrl-dpo score" in error
    error = failing(monkeypatch, capsys, "relabel", tmp_path / "absent.jsonl", *settings)
    assert "absent.jsonl" in error
    # nothing is left that a correct second try would trip over
    command("relabel", runs / "scored", *settings)


def test_debugging_shows_the_traceback(runs, monkeypatch):
    monkeypatch.setenv("CTRL_DPO_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["ctrl-dpo", "frontier", "best_of_0"])
    with pytest.raises(ValueError, match="got 0"):
        main()


def test_an_unknown_setting_stops_training_before_the_model_is_read(runs, monkeypatch, capsys):
    words = ["train", "no_model", runs / "groups", "--config", runs / "train.yaml"]
    error = failing(monkeypatch, capsys, *words, "--output_dir", runs / "x", "--lerning_rate", 1)
    assert "'lerning_rate'" in error
    assert "'learning_rate'" in error
    assert not (runs / "x").exists()


def test_the_frontier_is_printed_and_drawn(tmp_path):
    words = ["--kl", 1, "--plot", tmp_path / "f.png", "--serve", "best_of_4"]
    printed = command("frontier", "best_of_8", *words)
    assert "0.9760" in printed
    assert (tmp_path / "f_sensitivity.png").exists()
    assert "0.046572" in printed
    assert (tmp_path / "f.png").stat().st_size > 10_000
    shutil.rmtree(tmp_path)
