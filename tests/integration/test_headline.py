"""The headline experiment on the tiny model: labels, cells that run once, the reward recipe."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats
from transformers import AutoModelForCausalLM

import ctrl_dpo
from ctrl_dpo.data.folders import read_rows
from ctrl_dpo.data.tokens import prompt_tokens
from ctrl_dpo.score import score

RECIPES = Path(ctrl_dpo.__file__).parent.parent / "recipes"

REWARD = """
def vowels(prompts, responses):
    return [sum(map(r.lower().count, "aeiou")) / (len(r) + 1) for r in responses]

def length(prompts, responses):
    return [len(r) / 100 for r in responses]
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory, benchmarks):
    """Put a reward on the path, beside the benchmarks."""
    folder = tmp_path_factory.mktemp("headline")
    (folder / "rewards_of_headline.py").write_text(REWARD)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def experiment(parts):
    from experiment.settings import read_experiment

    rows = [{"prompt": [{"role": "user", "content": f"question {i}"}]} for i in range(10)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (parts / "prompts.jsonl").write_text(text)
    return dataclasses.replace(
        read_experiment(RECIPES / "configs" / "headline_harmless.yaml", quick=True),
        prompts=str(parts / "prompts.jsonl"),
        n_train=6,
        n_held_out=4,
        max_new_tokens=6,
        draws=5,
        held_out_draws=8,
        lora_r=4,
        measured=("single_draw", "worst_of_4"),
        kls=(1e-4,),
        training={"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 3},
        strengths={"optimal": (1.0,), "bonbon": (2.0,)},
        others={},
        ablations=(),
    )


@pytest.fixture(scope="module")
def bench(parts, experiment, tiny_model_folder):
    from experiment.cells import Bench

    class FunctionBench(Bench):
        reward_models = {  # noqa: RUF012
            "training": "rewards_of_headline:vowels",
            "judging": "rewards_of_headline:length",
        }

    return FunctionBench(experiment, str(tiny_model_folder), parts / "runs", "harmless_tiny")


def test_cells_run_once_and_share_their_draws(bench, experiment, monkeypatch, tmp_path):
    import headline

    monkeypatch.setattr("recording.RESULTS", tmp_path)
    monkeypatch.setattr("headline.RESULTS", tmp_path)
    cells = list(experiment.cells())
    first = [bench.run(cell) for cell in cells]
    drawn = bench.folder / "reference_train_5_seed1" / "stage.json"
    before = drawn.stat().st_mtime_ns
    # a second run reads what is there: it could not draw or train without these
    monkeypatch.setattr("experiment.cells.load_policy", None)
    assert [bench.run(cell) for cell in cells] == first
    assert drawn.stat().st_mtime_ns == before
    for record in first:
        assert np.isfinite(record["training"]["kl"]["value"])
        assert record["training"]["kl"] == record["judging"]["kl"]
        assert record["training"]["rewards"] != record["judging"]["rewards"]
        assert record["training"]["n_draws"] == 32
    page = headline.write_results(bench, "tiny")
    assert "| bonbon " in page
    assert "Share of the reward that was learned" in page
    policy = next(row for row in page.splitlines() if row.startswith("| bonbon 2, seed 0 "))
    measured = first[1]["training"]
    assert f"| {measured['win_rates']['worst_of_4']['value']:.1%} (" in policy
    assert f"| {measured['length']['value']:.1f} (" in policy
    assert headline.write_results(bench, "tiny") == page
    rows = list(csv.DictReader((tmp_path / "headline.csv").read_text().splitlines()))
    assert sorted(row["method"] for row in rows) == ["bonbon", "optimal"]
    assert float(rows[0]["kl"]) == round(first[1]["training"]["kl"]["value"], 4)
    assert len((tmp_path / "headline_equal_kl.csv").read_text().splitlines()) == 9
    shares = list(csv.DictReader((tmp_path / "headline_learned.csv").read_text().splitlines()))
    assert [row["judge"] for row in shares] == ["judging"] * 2 + ["training"] * 2
    (bonbon,) = (r for r in shares if (r["judge"], r["method"]) == ("training", "bonbon"))
    assert bonbon["r2 value"] == rows[0]["training r2"]  # of its one policy
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_processes_of_their_own_give_the_same_cells(bench, experiment):
    """Two cells at a time, on draws that are made and scored once, before them."""
    from experiment.cells import Bench
    from experiment.jobs import run_cells, shared_stages

    expected = {cell.name: bench.run(cell) for cell in experiment.cells()}
    given = {judge: bench.reward_models[judge] for judge in ("training", "judging")}
    named = dataclasses.replace(experiment, reward=given)
    apart = Bench(named, bench.model, bench.runs, "harmless_jobs")
    cells = list(named.cells())
    drawn, scored = shared_stages(apart, cells)
    assert [(name, arguments[0]) for name, arguments in drawn] == [
        ("reference_draws", "train"),
        ("reward_model", "training"),
        ("reward_model", "judging"),
        ("reference_draws", "held_out"),
    ]
    assert [(arguments[0], arguments[1]) for _, arguments in scored] == [
        ("training", "train"),
        ("training", "held_out"),
        ("judging", "held_out"),
    ]
    assert sorted(c.name for c, ran in run_cells(apart, cells, jobs=2) if ran) == sorted(expected)
    records = apart.finished()
    assert len(records) == len(cells)
    for record in records:
        cell = next(c for c in cells if c.method == record["cell"]["method"])
        for judge in ("training", "judging"):
            found, known = record[judge], expected[cell.name][judge]
            assert found["kl"]["value"] == pytest.approx(known["kl"]["value"], rel=1e-3)
            rate = known["win_rates"]["worst_of_4"]["value"]
            assert found["win_rates"]["worst_of_4"]["value"] == pytest.approx(rate, abs=0.02)
    assert not list(run_cells(apart, [], jobs=2))


def test_an_error_begins_no_more_than_was_running(parts):
    from experiment.jobs import in_turn

    begun = []

    def half(number: int) -> float:
        begun.append(number)
        return 1 / number

    with ThreadPoolExecutor(2) as pool:
        assert sorted(in_turn(pool, 2, half, [4, 2, 1, 5])) == [
            (1, 1),
            (2, 0.5),
            (4, 0.25),
            (5, 0.2),
        ]
        begun.clear()
        with pytest.raises(ZeroDivisionError):
            list(in_turn(pool, 2, half, [4, 0, *range(1, 20)]))
    assert 2 <= len(begun) <= 4


def test_training_prompts_can_be_measured_as_many_as_held_out_ones(bench, experiment):
    change = {"ablation": "train_prompts", "method": "bonbon", "strength": 2.0, "where": "train"}
    cell = next(
        dataclasses.replace(experiment, strengths={"bonbon": ()}, ablations=(change,)).cells()
    )
    record = bench.run(cell)
    train, drawn = bench.prompts("train"), read_rows(bench.folder / "cells" / cell.name / "draws")
    assert drawn["prompt"] == train["prompt"][:4]
    assert record["training"]["n_prompts"] == 4


def test_a_policy_measured_elsewhere_is_not_trained_again(bench, experiment, monkeypatch):
    from experiment.settings import Cell

    bench = type(bench)(experiment, bench.model, bench.runs, "harmless_measured")
    main = Cell("bonbon", 2.0, 5)
    held_out = bench.run(main)
    train = Cell("bonbon", 2.0, 5, "train_prompts", (("where", "train"),))
    other = Cell("bonbon", 2.0, 5, "rank", (("where", "train"), ("lora_r", 2)))
    monkeypatch.setattr(type(bench), "_train", None)
    for unlike in (other, Cell("bonbon", 1.5, 5), Cell("bonbon", 2.0, 6)):
        with pytest.raises(TypeError, match="not callable"):  # would be trained
            bench.run(unlike)
    record = bench.run(train)
    cells = bench.folder / "cells"
    assert not (cells / train.name / "adapter").exists()
    assert bench.adapter(record) == bench.adapter(held_out) == cells / main.name / "adapter"
    assert record["seconds"]["train"] == held_out["seconds"]["train"]
    assert record["training"]["kl"] != held_out["training"]["kl"]


def test_a_policy_that_a_cell_has_trained_is_the_one_it_measures(bench, experiment, monkeypatch):
    """Killed after its training, while the same policy was trained and measured elsewhere."""
    from experiment.settings import Cell

    bench = type(bench)(experiment, bench.model, bench.runs, "harmless_measured")
    bench.run(Cell("bonbon", 2.0, 5))
    cell = Cell("bonbon", 2.0, 5, "again", (("where", "train"), ("held_out_draws", 6)))
    with monkeypatch.context() as patched:
        patched.setattr(type(bench), "_measured", None)
        patched.setattr(type(bench), "_adapter_of_another", lambda *_: None)
        with pytest.raises(TypeError, match="not callable"):
            bench.run(cell)
    assert bench.adapter(bench.run(cell)) == bench.folder / "cells" / cell.name / "adapter"


def test_results_are_of_every_finished_cell_of_these_settings(bench, experiment):
    """Also of those that this call does not ask for; not of those trained with other settings."""
    ran = [bench.run(cell)["cell"]["method"] for cell in experiment.cells()]
    asked = dataclasses.replace(experiment, strengths={"optimal": (1.0,)}, seeds=(7,))
    for changed, expected in ((asked, ran), (dataclasses.replace(experiment, lora_r=2), [])):
        other = type(bench)(changed, bench.model, bench.runs, "harmless_tiny")
        found = [r for r in other.finished() if r["cell"]["ablation"] == "main"]
        assert sorted(r["cell"]["method"] for r in found) == sorted(expected)
        assert {r["n_train"] for r in found} <= {6}


def test_rank_0_trains_and_measures_the_whole_model(bench, experiment):
    """Its log-ratios are those of transformers' own forward passes."""
    from experiment.settings import Cell

    changes = (("lora_r", 0), ("learning_rate", 1e-3))
    cell = Cell("optimal", 1.0, 0, "rank", changes)
    record = bench.run(cell)
    policy = bench.adapter(record)
    assert not list(policy.glob("adapter*"))
    drawn = read_rows(bench.folder / "cells" / cell.name / "draws")
    models = {"policy": policy, "reference": bench.model}
    for name, folder in models.items():
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        row = drawn[0]
        prompt = prompt_tokens(bench.tokenizer, row["prompt"])
        for ids, expected in zip(row["response_ids"][:3], row[f"{name}_logps"], strict=False):
            whole = torch.tensor([[*prompt, *ids]])
            logps = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            value = logps.gather(1, torch.tensor(ids)[:, None]).sum().item()
            assert value == pytest.approx(expected, abs=1e-4)
    ratios = np.array(drawn["policy_logps"]) - np.array(drawn["reference_logps"])
    assert record["training"]["kl"]["value"] == pytest.approx(ratios.mean())
    assert np.abs(ratios).max() > 0.1


def test_a_change_that_is_compared_is_another_method(parts, experiment):
    """Of cells called main: its policies are no points of the curve of the method unchanged."""
    from experiment.results import curves, equal_kl_rows, main_cells
    from experiment.settings import Cell

    def record(cell, kl, rate):
        measured = {
            "kl": {"per_prompt": [kl, kl]},
            "win_rates": {
                name: {"per_prompt": [rate, rate + 0.02]} for name in experiment.measured
            },
        }
        whole = {"cell": dataclasses.asdict(cell), "n_train": 8, "n_prompts": 2, "n_draws": 4}
        return whole | dict.fromkeys(
            ("training", "judging"), measured | {"n_prompts": 2, "n_draws": 4}
        )

    all_pairs = (("as_pairs", "all"),)
    records = [
        record(Cell("optimal", 0.1, 0), 1.0, 0.7),
        record(Cell("dpo", 2.0, 0), 1.0, 0.6),
        record(Cell("dpo", 2.0, 0, "main", all_pairs), 1.0, 0.65),
        record(Cell("dpo", 2.0, 1, "main", all_pairs), 1.0, 0.67),
        record(Cell("dpo", 1.0, 0, "responses", all_pairs), 1.0, 0.9),
    ]
    found = curves(main_cells(records), "training", experiment.procedure)
    rates = {name: curve.win_rates.tolist() for name, curve in found.items()}
    assert rates["dpo"] == [[0.6, 0.62]]
    np.testing.assert_allclose(rates["dpo as_pairs=all"], [[0.66, 0.68]])
    at_one = dataclasses.replace(experiment, kls=(1.0,))
    rows = {
        row["method"]: row
        for row in equal_kl_rows(at_one, main_cells(records))
        if (row["judge"], row["procedure"]) == ("training", experiment.procedure)
    }
    assert rows["dpo as_pairs=all"]["seeds"] == 2
    assert rows["dpo as_pairs=all"]["ours_minus_method"]["value"] == pytest.approx(0.04)
    assert rows["dpo"]["ours_minus_method"]["value"] == pytest.approx(0.1)


def test_a_change_is_compared_with_the_same_seeds_unchanged(parts, experiment):
    """Per prompt, seeds averaged; what is measured on other prompts, or has no partner, is not."""
    from experiment.changes import changed_rows, page
    from experiment.learned import learned_share

    from ctrl_dpo.measures.equal_kl import Curve

    rng = np.random.default_rng(1)
    kls, rates = rng.uniform(0.5, 1.5, (5, 8)), rng.uniform(0.6, 0.9, (5, 8))

    def record(number, seed, ablation="main", **changes):
        measured = {
            "kl": {"per_prompt": kls[number].tolist()},
            "win_rates": {"worst_of_4": {"per_prompt": rates[number].tolist()}},
        }
        cell = {"method": "optimal", "strength": 0.2, "seed": seed, "ablation": ablation}
        return {"cell": cell | {"changes": list(changes.items())}} | dict.fromkeys(
            ("training", "judging"), measured
        )

    records = [
        record(0, 0),
        record(1, 1, "seed"),
        record(2, 0, "rate", learning_rate=0.1),
        record(3, 1, "rate", learning_rate=0.1),
        record(4, 2, "rate", learning_rate=0.1),
        record(4, 0, "train_prompts", where="train"),
        record(4, 5, "anchor", anchor=1.0),
    ]
    training, judging = rows = changed_rows(experiment, records)
    assert (training["judge"], judging["judge"]) == ("training", "judging")
    assert (training["changes"], training["seeds"]) == ("learning_rate=0.1", 2)
    after, before = (
        Curve(*(v[a:b].mean(0)[None] for v in (kls, rates))) for a, b in ((2, 4), (0, 2))
    )
    expected = learned_share([after, before], "worst_of_4")
    assert training["changed_minus_unchanged"] == expected
    assert expected["value"] != 0
    assert training["r2"] == learned_share([after], "worst_of_4")
    assert f"| {expected['value']:+.3f} (" in page(rows)


def test_accuracies_are_those_of_each_reward_model(bench, tmp_path):
    folders = {judge: tmp_path / judge for judge in ("training", "judging", "function")}
    for number, folder in enumerate(folders.values()):
        folder.mkdir()
        if folder.name != "function":
            (folder / "reward_model.json").write_text(json.dumps({"accuracy": 0.5 + number / 10}))
    other = type(bench)(bench.experiment, bench.model, bench.runs, "harmless_tiny")
    other.reward_models = {judge: str(folder) for judge, folder in folders.items()}
    assert other.accuracies == {"training": 0.5, "judging": 0.6}


def test_an_ablation_alone_gives_a_table_and_no_comparison(
    bench, experiment, monkeypatch, tmp_path
):
    """As `--only` does in a folder where nothing else is finished."""
    import headline

    monkeypatch.setattr("recording.RESULTS", tmp_path)
    monkeypatch.setattr("headline.RESULTS", tmp_path)
    record = bench.run(next(experiment.cells()))
    alone = {**record, "cell": {**record["cell"], "ablation": "anchor"}}
    monkeypatch.setattr(type(bench), "finished", lambda self: [alone])
    assert "| optimal 1, seed 0 (anchor) " in headline.write_results(bench, "tiny")
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["headline.csv"]


def test_a_split_of_the_hub_is_read_where_there_is_no_file(parts, tmp_path):
    """The slice that a configuration names, of the folder that it names."""
    from experiment.data import source, source_name

    for folder, split in (("part", "test"), ("part", "train"), ("other", "test")):
        rows = "".join(json.dumps({"row": f"{folder} {split} {i}"}) + "\n" for i in range(5))
        path = tmp_path / "hub" / folder / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows)
    hub = (str(tmp_path / "hub"), "part", "test[:2]")
    assert source("nowhere.jsonl", hub)["row"][:] == ["part test 0", "part test 1"]
    assert source_name("nowhere.jsonl", hub).endswith("hub/part/test[:2]")
    assert source(str(tmp_path / "hub" / "other" / "test.jsonl"), hub).num_rows == 5


@pytest.mark.parametrize("procedure", ["single_draw", "best_of_4", "worst_of_4"])
def test_the_learned_share_is_that_of_normals(parts, procedure):
    """Share 0.3 at 0.8 nat: the win rate of 400,000 simulated draws; for one draw a closed form."""
    from experiment.learned import learned_share, share_of

    from ctrl_dpo.measures.equal_kl import Curve

    kl, shift = 0.8, np.sqrt(2 * 0.8 * 0.3)
    rng = np.random.default_rng(0)
    pick = {"single_draw": lambda x: x[..., 0], "best_of_4": lambda x: x.max(-1)}
    pick["worst_of_4"] = lambda x: x.min(-1)
    mine, theirs = (pick[procedure](rng.normal(size=(400_000, 4))) for _ in range(2))
    rate = np.mean(mine + shift > theirs)
    assert share_of(rate, kl, procedure) == pytest.approx(0.3, abs=0.01)
    if procedure == "single_draw":
        rate = stats.norm.cdf(shift / np.sqrt(2))
        assert share_of(rate, kl, procedure) == pytest.approx(0.3, abs=1e-4)
        assert share_of(1 - rate, kl, procedure) == pytest.approx(-0.3, abs=1e-4)
    shape = (1, 6)
    better = Curve(np.full(shape, kl), np.full(shape, rate))
    found = learned_share([better, Curve(better.kls * 2, better.win_rates)], procedure)
    assert found["value"] == pytest.approx(share_of(rate, kl, procedure) / 2)


def test_a_folder_of_other_prompts_or_rewards_is_refused(parts, bench, experiment):
    from experiment.cells import Bench

    bench.prompts("train")  # is in the folder, whichever test runs first
    changed = dataclasses.replace(experiment, n_train=5)
    other = type(bench)(changed, bench.model, bench.runs, "harmless_tiny")
    with pytest.raises(ValueError, match=r"train_prompts.jsonl must be that .* another --runs"):
        other.prompts("train")
    known = bench.runs / "reward_training" / "reward_model.json"
    known.parent.mkdir(parents=True)
    settings = {**experiment.reward, "half": 0, "seed": 0}
    known.write_text(json.dumps({"settings": settings | {"layers": 5}}))
    dialogue = {f: f"\n\nHuman: a\n\nAssistant: {f}" for f in ("chosen", "rejected")}
    (parts / "known.jsonl").write_text(json.dumps(dialogue) + "\n")
    of_known = dataclasses.replace(experiment, pairs=str(parts / "known.jsonl"))
    real = Bench(of_known, bench.model, bench.runs, "harmless_tiny")
    with pytest.raises(ValueError, match=r"reward_training must be .* trained with {'layers': 5}"):
        _ = real.reward_models
    pairs = dataclasses.replace(
        experiment, pairs="nowhere.jsonl", pairs_hub=("other", "part", "test")
    )
    with pytest.raises(ValueError, match=r"pairs.json must be that of this experiment"):
        _ = Bench(pairs, bench.model, bench.runs, "harmless_tiny").reward_models


def test_only_cells_that_there_are_can_be_asked_for(parts, experiment):
    from headline import choose

    given = {"seeds": None, "methods": None, "only": None, "others": False}
    grid = dataclasses.replace(experiment, others={"ipo": (0.1,)})
    chosen = choose(grid, argparse.Namespace(**given))
    assert [c.method for c in chosen] == ["optimal", "bonbon"]
    more = argparse.Namespace(**given | {"seeds": [0, 3], "methods": ["ipo"], "others": True})
    assert [(c.method, c.seed) for c in choose(grid, more)] == [("ipo", 0), ("ipo", 3)]
    for wrong in ({"methods": ["ipo"]}, {"only": "anchr"}):
        with pytest.raises(ValueError, match=r"must be one of"):
            choose(grid, argparse.Namespace(**given | wrong))


def test_rows_of_other_columns_are_kept(parts, monkeypatch, tmp_path):
    from recording import merge_rows

    monkeypatch.setattr("recording.RESULTS", tmp_path)
    merge_rows("q", [{"task": "a", "x": 1, "more": 2}, {"task": "b", "x": 3, "more": 4}], ["task"])
    path = merge_rows("q", [{"task": "b", "x": 5, "new": 6}], ["task"])
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert rows == [
        {"task": "a", "x": "1", "more": "2", "new": ""},
        {"task": "b", "x": "5", "more": "", "new": "6"},
    ]


def test_a_finished_cell_is_not_mistaken_for_one_of_other_settings(bench, experiment):
    cell = next(experiment.cells())
    bench.run(cell)
    other = type(bench)(
        dataclasses.replace(experiment, lora_r=2), bench.model, bench.runs, "harmless_tiny"
    )
    with pytest.raises(ValueError, match=r"settings.lora_r is 4, not 2"):
        other.run(cell)


def groups(k: int = 5, n: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    return Dataset.from_dict(
        {
            "prompt": [f"question {i}" for i in range(n)],
            "responses": [[f"answer {j}" for j in range(k)] for _ in range(n)],
            "rewards": rng.normal(size=(n, k)).tolist(),
        }
    )


def test_every_method_labels_what_its_loss_needs(parts, experiment):
    from experiment.methods import METHODS

    strengths = {"best_of_k": 2.0, "bonbon": 3.0}
    jobs = {
        name: make(groups(), strengths.get(name, 0.25), experiment)
        for name, make in METHODS.items()
    }
    assert {name for name, job in jobs.items() if "margin" in job.data.column_names} == {
        "dpo",
        "ipo",
        "bonbon",
        "best_of_k",
    }
    assert jobs["best_of_k"].config["learning_rate"] == pytest.approx(2e-2)
    assert {name for name, job in jobs.items() if job.config.get("anchor")} == {
        "qrpo_log",
        "qrpo_identity",
    }
    assert set(jobs["exponential"].data["transformation"]) == {"exponential:-10.0"}


def test_named_pairs_of_hard_labels_are_of_the_responses_that_the_others_see(parts, experiment):
    from experiment.methods import METHODS

    data = groups()
    best_two = dataclasses.replace(experiment, extremes=2, as_pairs="all")
    ordered = {}
    for row in METHODS["dpo"](data, 1.0, best_two).data:
        ordered.setdefault(row["prompt"], set()).add((row["chosen"], row["rejected"]))
    for row in data:
        ranked = [row["responses"][i] for i in np.argsort(row["rewards"])]
        kept = [*ranked[:2], *ranked[-2:]]
        assert ordered[row["prompt"]] == {
            (better, worse) for i, better in enumerate(kept) for worse in kept[:i]
        }


def test_rank_labels_are_for_the_anchor_they_are_trained_with(parts, experiment):
    """The loss of anchor 0 fits k/(k-1) times its labels' differences, that of 1 fits them."""
    from experiment.methods import METHODS

    whole = dataclasses.replace(experiment, extremes=None)
    made = {}
    for anchor in (0.0, 1.0):
        job = METHODS["optimal"](groups(), 0.1, dataclasses.replace(whole, anchor=anchor))
        assert set(job.data["anchor"]) == {job.config["anchor"]} == {anchor}
        made[anchor] = np.array(job.data["transformed_rewards"])
        made[anchor] /= np.array(job.data["beta"])[:, None]
        made[anchor] -= made[anchor].mean(axis=1, keepdims=True)
    k = made[0.0].shape[1]
    assert np.abs(made[1.0]).max() > 0.1
    np.testing.assert_allclose(made[0.0], made[1.0] * (k - 1) / k, rtol=1e-6)


def test_raw_targets_are_rewards_in_units_of_their_spread_over_beta(parts, experiment):
    """The spread is pooled over prompts, so a prompt with twice the spread has twice the margin."""
    from experiment.methods import METHODS, reward_spread

    data = groups()
    rewards = np.array(data["rewards"])
    assert reward_spread(data) == pytest.approx(np.sqrt(rewards.var(axis=1, ddof=1).mean()))
    whole = dataclasses.replace(experiment, extremes=None)
    made = METHODS["rebel"](data, 0.5, whole).data
    np.testing.assert_allclose(made["transformed_rewards"], rewards / reward_spread(data))
    assert set(made["beta"]) == {0.5}


def test_the_margin_of_bonbon_is_that_of_best_of_n(parts, experiment):
    """log of best-of-3's density, 2 log u, best against worst of 5 uniforms: by simulation."""
    from experiment.methods import bonbon

    draws = np.log(np.random.default_rng(1).random((200_000, 5)))
    gap = 2 * (draws.max(axis=1) - draws.min(axis=1))
    beta = bonbon(groups(), 3.0, experiment).config["beta"]
    assert 0.5 / beta == pytest.approx(gap.mean(), abs=5 * gap.std() / np.sqrt(gap.size))


def test_best_response_losses_are_what_they_say(parts, monkeypatch):
    """Two groups of two: -log pi(best), alone and mixed with (delta - 1/(2 beta))^2."""
    from experiment import methods

    logps = torch.tensor([-3.0, -5.0, -2.0, -7.0])
    monkeypatch.setattr(methods, "response_logps", lambda model, inputs: logps)
    inputs = {
        "group_of": torch.tensor([0, 0, 1, 1]),
        "slot_of": torch.tensor([0, 1, 0, 1]),
        "targets": torch.tensor([1.0, 0.0, 0.0, 1.0]),
        "reference_logps": torch.tensor([-4.0, -4.0, -3.0, -5.0]),
        "members": torch.arange(4),
        "weights": torch.ones(2),
    }
    for trainer, share in ((methods.BestResponseTrainer, 1.0), (methods.BonbonTrainer, 0.005)):
        made = trainer.__new__(trainer)
        made.beta, made.accelerator = 0.25, SimpleNamespace(num_processes=1)
        # log-ratios (1, -1) and (1, -2): differences best minus worst 2 and -3, aim 2
        expected = share * (3 + 7) / 2 + (1 - share) * (0 + 25) / 2
        assert made.compute_loss(None, inputs).item() == pytest.approx(expected)
        # a pass of 2 groups in an update of 6 has a third of its loss
        part = made.compute_loss(None, inputs, num_items_in_batch=torch.tensor(6))
        assert part.item() == pytest.approx(expected / 3)


def test_the_reward_recipe_learns_and_scores(parts, tiny_model_folder, monkeypatch, capsys):
    """Chosen responses hold an `a`, rejected ones a `z`: learned from one half of 64 dialogues."""
    rows = [
        {
            "chosen": f"\n\nHuman: question {i}\n\nAssistant: {'a' * (2 + i % 3)}",
            "rejected": f"\n\nHuman: question {i}\n\nAssistant: {'z' * (2 + i % 3)}",
        }
        for i in range(64)
    ]
    pairs, output = parts / "pairs.jsonl", parts / "reward"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["recipe", str(tiny_model_folder), str(pairs), "--output", str(output)]
    words += ["--epochs", "6", "--learning-rate", "1e-2", "--layers", "1", "--short-template"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(RECIPES / "train_reward_model.py"), run_name="__main__")
    assert "held-out pairs ranked right" in capsys.readouterr().out
    measured = json.loads((output / "reward_model.json").read_text())
    assert measured["train_pairs"] + measured["held_out_pairs"] == 64
    assert measured["accuracy"] == 1.0
    asked = [{"role": "user", "content": "question 99"}]
    found = score(Dataset.from_list([{"prompt": asked, "responses": ["aaa", "zzz"]}]), str(output))
    assert found["rewards"][0][0] > found["rewards"][0][1]
