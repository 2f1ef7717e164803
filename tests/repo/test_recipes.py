"""Recipes are code: configurations build, scripts parse, the prompts are what they say."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import ctrl_dpo
from ctrl_dpo.arguments import parse_arguments

RECIPES = Path(ctrl_dpo.__file__).parent.parent / "recipes"
EXPERIMENTS = sorted(RECIPES.rglob("headline_*.yaml"))
LAUNCHES = sorted((RECIPES / "accelerate").rglob("*.yaml"))
CONFIGS = sorted(set(RECIPES.rglob("*.yaml")) - set(EXPERIMENTS) - set(LAUNCHES))
SCRIPTS = sorted(RECIPES.rglob("*.sh"))


def test_all_recipe_files_are_covered():
    assert len(CONFIGS) == 2
    assert len(EXPERIMENTS) == 10
    names = ["cpu_2proc", "fsdp2", "multi_gpu", "single_gpu", "zero2"]
    assert [path.stem for path in LAUNCHES] == names
    assert len(SCRIPTS) == 7


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_builds_and_opens_with_its_command(path, tmp_path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ctrl-dpo train ")
    assert f"--config recipes/configs/{path.name}" in first
    adapter, args = parse_arguments(path, ["--output_dir", str(tmp_path)])
    assert adapter.peft_config().r == adapter.lora_r
    assert args.output_dir == str(tmp_path)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_every_experiment_builds_and_names_its_cells_once(path, quick, benchmarks):
    from experiment.methods import METHODS
    from experiment.settings import read_experiment

    first = path.read_text().splitlines()[0]
    assert first.startswith(f"# python benchmarks/headline.py recipes/configs/{path.name}")
    experiment = read_experiment(path, quick)
    harmless = read_experiment(RECIPES / "configs" / "headline_harmless.yaml")
    # experiments in one folder share reward models, so their pairs must be the same
    assert not experiment.pairs or experiment.pairs_hub == harmless.pairs_hub
    assert experiment.procedure in experiment.measured
    cells = list(experiment.cells())
    assert len({cell.name for cell in cells}) == len(cells)
    main = {cell.method for cell in cells if cell.ablation == "main"}
    compared = {"optimal"} if "ablations" in path.stem else {"optimal", "dpo", "qrpo_log", "rebel"}
    assert compared <= main <= set(METHODS)
    if not quick:
        assert set(experiment.strengths) == set(METHODS)
        assert min(map(len, experiment.strengths.values())) == 5
        assert len(experiment.seeds) == 3
    for cell in cells:
        experiment.changed(cell)


def test_an_experiment_with_a_base_changes_what_it_names_and_no_more(benchmarks):
    from experiment.settings import read_experiment

    folder = RECIPES / "configs"
    base, other = (
        dataclasses.asdict(read_experiment(folder / f"headline_{name}.yaml"))
        for name in ("harmless", "harmless_512")
    )
    named = set(yaml.safe_load((folder / "headline_harmless_512.yaml").read_text()))
    assert {name for name in base if base[name] != other[name]} == named - {"base", "quick"}


def test_the_sweep_shares_the_cells_of_the_grid_around_which_it_is(benchmarks):
    from experiment.cells import _GRID
    from experiment.settings import read_experiment

    base, sweep = (
        read_experiment(RECIPES / "configs" / f"headline_{name}.yaml", quick=True)
        for name in ("harmless", "harmless_sweep")
    )
    found = dataclasses.asdict(base), dataclasses.asdict(sweep)
    assert {name for name in found[0] if found[0][name] != found[1][name]} <= set(_GRID)
    assert set(base.seeds) == set(sweep.seeds)
    for theirs, ours in ((base.strengths, sweep.strengths), (base.others, sweep.others)):
        assert set(theirs) == set(ours)
        for method, strengths in theirs.items():
            assert set(strengths) < set(ours[method])
            assert len(ours[method]) == 5


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_accelerate_reads_every_launch_file(path):
    config = load_config_from_file(str(path))
    kinds = {"fsdp2": "FSDP", "single_gpu": "NO", "zero2": "DEEPSPEED"}
    assert config.distributed_type.value == kinds.get(path.stem, "MULTI_GPU")
    assert config.use_cpu == path.stem.startswith("cpu")
    assert config.num_machines == 1
    assert config.mixed_precision == "no"  # the trainer's own type is that of the reference too
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem == "zero2":
        assert config.deepspeed_config["zero_stage"] == 2
    first = path.read_text().splitlines()[0]
    command = f"# accelerate launch --config_file recipes/accelerate/{path.name} -m ctrl_dpo train"
    assert first.startswith(command)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_parses_and_stops_at_the_first_error(path):
    assert "set -euo pipefail" in path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


def test_training_and_held_out_prompts_are_distinct_single_turns():
    texts = {}
    for name, count in (("train", 96), ("held_out", 32)):
        rows = [
            json.loads(line)
            for line in (RECIPES / "data" / f"{name}_prompts.jsonl").read_text().splitlines()
        ]
        assert len(rows) == count
        assert all([m["role"] for m in row["prompt"]] == ["user"] for row in rows)
        texts[name] = {row["prompt"][0]["content"] for row in rows}
        assert len(texts[name]) == count
    assert texts["train"].isdisjoint(texts["held_out"])
