"""Cards for the hub: metadata that its loader reads, recorded numbers, and no text of the data."""

from __future__ import annotations

import json
import shlex

import pytest
from huggingface_hub import DatasetCard, ModelCard
from typer.testing import CliRunner

from ctrl_dpo.cards import model_card
from ctrl_dpo.cli import app
from ctrl_dpo.data.folders import read_record

TEXTS = ("zebra question", "walrus answer")
TAGS = ["ctrl_dpo", "inference-aware", "preference-optimisation"]
DRAWN = {"model": "files:0123", "template": "4567", "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def command(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_draws(path, shift: float) -> None:
    rows = [
        {
            "prompt": f"{TEXTS[0]} {i}",
            "responses": [f"{TEXTS[1]} {i} {j}" for j in range(6)],
            "rewards": [((5 * i + 3 * j) % 7) / 7 + shift * (j % 2) for j in range(6)],
            "policy_logps": [-1.0 - 0.1 * j for j in range(6)],
            "reference_logps": [-1.5 - 0.1 * j for j in range(6)],
            "sampled_from": json.dumps(DRAWN),
        }
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_policy(path, base: str, data: str, processes: int = 1):
    """Leave what `ctrl-dpo train` leaves, as far as cards read it."""
    settings = {"loss": "squared", "seed": 3, "target_kl": None, "learning_rate": 0.25, "lora_r": 4}
    run = {"loss": "squared", "seed": 3, "target_kl": None, "learning_rate": 0.25}
    run |= {"beta": 0.0625, "model": "files:89ab", "reference_model": "files:cdef"}
    run |= {"processes": processes, "transformation of the data": ["optimal"]}
    weights = {"linear": {"bytes": 4_500_000, "bits": 8.25}}
    summary = {"prompts": 77, "dtype": "bfloat16", "weights": weights, "run": run}
    made = {"stage": "train", "settings": settings, "inputs": {"data": data}}
    made |= {"summary": summary, "versions": {"torch": "2.99"}}
    path.mkdir()
    (path / "stage.json").write_text(json.dumps(made))
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return path


@pytest.fixture
def runs(tmp_path):
    """Labels, an evaluation and a policy trained on those labels."""
    for name, shift in (("policy", 0.5), ("reference", 0.0)):
        write_draws(tmp_path / f"{name}.jsonl", shift)
    labels = ["--target-kl", 0.75, "--extremes", 1, "--output", tmp_path / "labels"]
    command("relabel", tmp_path / "reference.jsonl", *labels)
    sides = ["--policy", tmp_path / "policy.jsonl", "--reference", tmp_path / "reference.jsonl"]
    command("evaluate", *sides, "--name", "ours", "--output", tmp_path / "evaluation", "--no-plot")
    write_policy(tmp_path / "ours", "org/base", read_record(tmp_path / "labels")["content_hash"])
    return tmp_path


def cells(text: str, name: str) -> list[str]:
    """Return the cells that follow a name in the first table row that starts with it."""
    rows = (line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|"))
    return next([c.strip() for c in row[1:]] for row in rows if row[0].strip() == name)


def test_report_writes_both_cards_without_any_text(runs):
    words = ["--labels", runs / "labels", "--training", f"ours={runs / 'ours'}"]
    printed = command("report", runs / "evaluation", "--output", runs / "page", *words)
    for name in ("report.md", "model_card.md", "dataset_card.md"):
        assert str(runs / "page" / name) in printed
    model = ModelCard.load(runs / "page" / "model_card.md")
    assert model.data.to_dict() == {
        "base_model": "org/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
    }
    record = json.loads((runs / "evaluation" / "evaluation.json").read_text())
    rate, share = record["win_rates"]["best_of_4"], record["attainment"]["best_of_4"]
    table, attained = model.text.split("## Attainment")
    assert "({low:.1%} to {high:.1%})".format(**rate) in table
    assert f"{rate['value']:.1%}" in table
    assert "0.50 (0.50 to 0.50)" in table  # the KL of these log-ratios
    assert f"{share['value']:.2f}" in attained
    assert "8 held-out prompts, 48 draws" in table
    assert cells(model.text, "KL budget (nats)") == ["0.75"]  # of the labels
    assert cells(model.text, "beta") == ["0.0625"]
    assert cells(model.text, "transformation of the data") == ["optimal"]
    assert cells(model.text, "linear") == ["8.25", "4.50"]
    assert "activations are bfloat16" in model.text
    assert cells(model.text, "torch") == ["2.99"]

    labels = DatasetCard.load(runs / "page" / "dataset_card.md")
    assert labels.data.to_dict() == {"task_categories": ["text-generation"], "tags": TAGS}
    summary = read_record(runs / "labels")["summary"]
    described = labels.text.split("## Labels\n")[1]
    for name in ("beta", "kolmogorov_smirnov", "tied_share", "flipped_share", "margin_nats"):
        assert cells(described, name) == [f"{summary[name]:.4g}"], name
    assert cells(labels.text, "transformed_rewards")[0] == "list<item: double>"
    assert cells(labels.text, "model") == ["files:0123"]
    assert "8 rows" in labels.text
    assert [text for text in TEXTS if text in str(model) + str(labels)] == []


def test_the_command_of_a_dataset_card_makes_the_labels_again(runs):
    command("report", "--labels", runs / "labels", "--output", runs / "page")
    card = DatasetCard.load(runs / "page" / "dataset_card.md").text
    _, *words = shlex.split(next(x for x in card.splitlines() if x.startswith("ctrl-dpo relabel")))
    places = {"SOURCE": runs / "reference.jsonl", "LABELS": runs / "again"}
    command(*(places.get(word, word) for word in words))
    assert read_record(runs / "again") == read_record(runs / "labels")


def test_the_commands_of_a_model_card(runs):
    record = json.loads((runs / "evaluation" / "evaluation.json").read_text())
    policy = write_policy(runs / "many", "org/base", "hub:me/groups", processes=2)
    card = model_card(record, policy)
    assert card.data.datasets == ["me/groups"]
    lines = [line for line in card.text.splitlines() if " train " in line]
    trained = "train org/base DATA --output_dir POLICY --seed 3 --learning_rate 0.25 --lora_r 4"
    assert lines == [f"accelerate launch --num_processes 2 -m ctrl_dpo {trained}"]
    (line,) = (line for line in card.text.splitlines() if line.startswith("ctrl-dpo evaluate"))
    places = {"DRAWS": "policy.jsonl", "REFERENCE_DRAWS": "reference.jsonl", "EVALUATION": "again"}
    _, *words = shlex.split(line)
    command(*(runs / places[word] if word in places else word for word in words))
    assert json.loads((runs / "again" / "evaluation.json").read_text()) == record


def test_what_is_not_known_is_left_out(runs):
    record = json.loads((runs / "evaluation" / "evaluation.json").read_text())
    bare = model_card(record)
    assert bare.data.to_dict() == {"pipeline_tag": "text-generation", "tags": TAGS}
    assert "## Training" not in bare.text
    assert "## Weights" not in bare.text
    assert "None" not in bare.text
    # a folder is no name of the hub, which would refuse the card for it
    for base in ("some/local/folder", str(runs)):
        local = model_card(record, write_policy(runs / f"p{len(base)}", base, "0123"))
        assert "base_model" not in local.data.to_dict()
        assert cells(local.text, "base model") == [base]
    (runs / "trained_in_python").mkdir()
    assert model_card(record, runs / "trained_in_python").data.library_name == "transformers"
