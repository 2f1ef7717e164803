"""Stages and cells: everything on disk, nothing that is finished done twice."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from recording import circumstances

from ctrl_dpo import CTRLDPOConfig
from ctrl_dpo.data.folders import StageFolder, content_hash, read_record, write_atomically
from ctrl_dpo.engine.generation import Sampler
from ctrl_dpo.engine.models import load_model, load_policy, load_tokenizer
from ctrl_dpo.evaluate import evaluate
from ctrl_dpo.sample import sample
from ctrl_dpo.score import score
from experiment.data import prompts, source, source_name, write_once
from experiment.methods import METHODS, Job
from experiment.settings import Cell, Experiment, read_experiment

_RECORD, _TRAINED, _REWARD = "record.json", "trained.json", "reward_model.json"
JUDGES = ("training", "judging")  # the reward models: what is trained on, what only judges
_RECIPE = Path(__file__).parents[2] / "recipes" / "train_reward_model.py"
_TRAIN_SEED, _MEASURE_SEED, _POLICY_SEED = 1, 2, 1000
# settings that change no cell's numbers
_GRID = ("strengths", "others", "seeds", "ablations", "kls")
# settings that training does not read
_MEASURING = ("where", "held_out_draws", "measured")


class Bench:
    """One experiment in one folder.

    Parameters
    ----------
    experiment : Experiment
        Its settings.
    model : str
        Folder or hub name of the reference policy.
    runs : Path
        Folder of all experiments; reward models are shared between them.
    name : str
        Folder of this one under it.
    """

    def __init__(self, experiment: Experiment, model: str, runs: Path, name: str) -> None:
        self.experiment, self.model, self.runs = experiment, model, runs
        self.folder = runs / name
        self._pairs = runs / "pairs.parquet"
        self.tokenizer = load_tokenizer(model)

    @functools.cached_property
    def reward_models(self) -> dict[str, str]:
        """The two rewards: functions, or models that are trained unless they are there."""
        self.write_inputs()
        return {judge: self.reward_model(judge) for judge in JUDGES}

    @property
    def _rewards_are_given(self) -> bool:
        return set(self.experiment.reward) == set(JUDGES)

    def write_inputs(self) -> None:
        """Write prompts and pairs, which every process reads."""
        experiment = self.experiment
        _ = self.all_prompts
        if not self._rewards_are_given:
            name = source_name(experiment.pairs, experiment.pairs_hub)
            write_once(self.runs / "pairs.json", json.dumps({"source": name}) + "\n")
            trained = all((self.runs / f"reward_{judge}" / _REWARD).exists() for judge in JUDGES)
            if not trained and not self._pairs.exists():
                source(experiment.pairs, experiment.pairs_hub).to_parquet(str(self._pairs))

    def reward_model(self, judge: str) -> str:
        """Return a reward: a function's name, or a model's folder, trained on its half of pairs."""
        experiment, half = self.experiment, JUDGES.index(judge)
        if self._rewards_are_given:
            return str(experiment.reward[judge])
        output = self.runs / f"reward_{judge}"
        wanted = {**experiment.reward, "half": half, "seed": half}
        if (output / _REWARD).exists():
            known = json.loads((output / _REWARD).read_text(encoding="utf-8"))["settings"]
            if other := {k: known.get(k) for k, v in wanted.items() if known.get(k) != v}:
                raise ValueError(
                    f"{output} must be of this experiment's settings; it was trained with "
                    f"{other}. Name another --runs."
                )
            return str(output)
        settings = [
            f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in wanted.items()
        ]
        words = [str(_RECIPE), self.model, str(self._pairs), "--output", str(output), *settings]
        subprocess.run([sys.executable, *words], check=True)
        return str(output)

    @property
    def accuracies(self) -> dict[str, float]:
        """The accuracy of each trained reward model on the pairs it was not trained on."""
        found = {}
        for judge, name in self.reward_models.items():
            if (path := Path(name) / _REWARD).exists():
                record = json.loads(path.read_text(encoding="utf-8"))
                found[judge] = round(record["accuracy"], 4)
        return found

    @functools.cached_property
    def all_prompts(self) -> dict[str, Dataset]:
        """The prompts of each split."""
        return prompts(self.experiment, self.tokenizer, self.folder)

    def prompts(self, split: str, measured: bool = False) -> Dataset:
        """Return the prompts of a split; of training prompts as many are measured as of others."""
        found = self.all_prompts[split]
        count = self.experiment.n_held_out
        return found.select(range(count)) if measured and count < len(found) else found

    def reference_draws(self, split: str, experiment: Experiment, measured: bool) -> Dataset:
        """Return draws of the reference policy, to train on or to measure against."""
        count = experiment.held_out_draws if measured else experiment.draws
        seed = _MEASURE_SEED if measured else _TRAIN_SEED
        return sample(
            self.prompts(split, measured),
            load_model(self.model),
            Sampler(count, experiment.max_new_tokens, seed=seed),
            tokenizer=self.tokenizer,
            output=self.folder / f"reference_{split}_{count}_seed{seed}",
        )

    def scored(self, drawn: Dataset, judge: str) -> Dataset:
        """Add the rewards of one reward model; responses seen before cost nothing."""
        cache = self.runs / f"scores_{judge}.jsonl"
        return score(drawn, self.reward_models[judge], cache=cache)

    def scored_reference(
        self, judge: str, split: str, experiment: Experiment, measured: bool
    ) -> Dataset:
        """Return scored draws of the reference policy."""
        return self.scored(self.reference_draws(split, experiment, measured), judge)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return the settings that decide a cell's numbers."""
        whole = dataclasses.asdict(self.experiment.changed(cell))
        return {name: value for name, value in whole.items() if name not in _GRID}

    def finished(self) -> list[dict[str, Any]]:
        """Return the records of all finished cells that have the experiment's settings."""
        records = []
        for path in sorted((self.folder / "cells").glob("*")):
            if read_record(path).get("complete"):
                record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
                # through JSON: tuples are lists there
                if json.loads(json.dumps(self.settings(cell_of(record)))) == record["settings"]:
                    records.append(record)
        return records

    def adapter(self, record: Mapping[str, Any]) -> Path:
        """Return the folder of a finished cell's policy, which another cell may have trained."""
        owner = record.get("policy_of", cell_of(record).name)
        return self.folder / "cells" / owner / "adapter"

    def run(self, cell: Cell) -> dict[str, Any]:
        """Return the record of a cell, training and measuring it unless that is done."""
        experiment, settings = self.experiment.changed(cell), self.settings(cell)
        inputs = {name: content_hash(path) for name, path in self.reward_models.items()}
        inputs["model"] = content_hash(self.model)
        for split in self.all_prompts:
            inputs[split] = content_hash(self.folder / f"{split}_prompts.jsonl")
        folder = StageFolder(
            self.folder / "cells" / cell.name, "headline", settings, inputs, n_shards=0
        ).open()
        path = folder.path / _RECORD
        if not folder.is_complete:
            adapter = folder.path / "adapter"
            if not (adapter / _TRAINED).exists():
                adapter = self._adapter_of_another(cell, inputs) or adapter
            trained = self._trained(cell, experiment, adapter)
            start = time.perf_counter()
            record = self._measured(cell, experiment, adapter, folder.path / "draws")
            seconds = {"train": trained["seconds"], "measure": time.perf_counter() - start}
            record |= {"cell": dataclasses.asdict(cell), "seconds": seconds}
            record |= {"settings": settings, "circumstances": trained["circumstances"]}
            record |= {"n_train": len(self.prompts("train")), "policy_of": adapter.parent.name}
            write_atomically(path, (json.dumps(record) + "\n").encode("utf-8"))
            folder.finish({"kl": record["training"]["kl"]["value"]})
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return loaded

    def _adapter_of_another(self, cell: Cell, inputs: dict[str, str]) -> Path | None:
        """Return the policy of a finished cell that was trained alike and measured otherwise."""

        def training_of(one: Cell) -> tuple[Any, ...]:
            read = {k: v for k, v in self.settings(one).items() if k not in _MEASURING}
            return one.method, one.strength, one.seed, read

        wanted = training_of(cell), inputs
        for record in self.finished():
            other, adapter = cell_of(record), self.adapter(record)
            known = read_record(self.folder / "cells" / other.name)["inputs"]
            if (training_of(other), known) == wanted and (adapter / _TRAINED).exists():
                return adapter
        return None

    def _trained(self, cell: Cell, experiment: Experiment, output: Path) -> dict[str, Any]:
        """Train the policy of a cell, unless that is done; say how long it took, and where."""
        known = output / _TRAINED
        if not known.exists():
            start = time.perf_counter()
            self._train(cell, experiment, output)
            record = {"seconds": time.perf_counter() - start, "circumstances": circumstances()}
            write_atomically(known, (json.dumps(record) + "\n").encode("utf-8"))
        loaded: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return loaded

    def _train(self, cell: Cell, experiment: Experiment, output: Path) -> None:
        """Train the policy of a cell into a folder."""
        groups = self.scored_reference(JUDGES[0], "train", experiment, measured=False)
        groups = groups.remove_columns("sampler_logps")
        job: Job = METHODS[cell.method](groups, cell.strength, experiment)
        config = {**experiment.training, **job.config}
        args = CTRLDPOConfig(
            str(output),
            seed=cell.seed,
            load_in_8bit=experiment.load_in_8bit,
            model_dtype=_dtype(experiment),
            reference_cache=str(self.folder / "reference_logps"),
            save_strategy="no",
            report_to="none",
            **config,
        )
        trainer = job.trainer(
            self.model,
            args,
            job.data,
            ref_model=self._reference(experiment),
            peft_config=_adapter(experiment.lora_r),
        )
        trainer.train()
        trainer.save_model()

    def _reference(self, experiment: Experiment) -> str | None:
        """Name the reference policy of a model that is trained whole; an adapter is its own."""
        return None if experiment.lora_r else self.model

    def _measured(
        self, cell: Cell, experiment: Experiment, adapter: Path, output: Path
    ) -> dict[str, Any]:
        """Measure the policy of a cell by fresh draws, under both reward models."""
        reference = self.reference_draws(experiment.where, experiment, measured=True)
        in_8bit, dtype = experiment.load_in_8bit, _dtype(experiment)
        drawn = sample(
            self.prompts(experiment.where, measured=True),
            load_policy(adapter, load_in_8bit=in_8bit, dtype=dtype),
            Sampler(
                experiment.held_out_draws,
                experiment.max_new_tokens,
                seed=_POLICY_SEED + cell.seed,
            ),
            tokenizer=self.tokenizer,
            output=output,
            log_ratios=True,
            reference=self._reference(experiment),
        )
        name = f"{cell.method} {cell.strength:g}"
        return {
            judge: evaluate(
                self.scored(drawn, judge),
                self.scored(reference, judge),
                name=name,
                procedures=experiment.measured,
            )
            for judge in JUDGES
        }


def _adapter(rank: int) -> LoraConfig | None:
    """Return the adapter that is trained; at rank 0 the whole model is."""
    if rank == 0:
        return None
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _dtype(experiment: Experiment) -> str | None:
    """Return float32 for a model that is trained whole: bfloat16 rounds its small updates away."""
    return None if experiment.lora_r else "float32"


def cell_of(record: Mapping[str, Any]) -> Cell:
    """Return the cell of a record, as it was before it became JSON."""
    changes = tuple((key, value) for key, value in record["cell"]["changes"])
    return Cell(**{**record["cell"], "changes": changes})


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which experiment is meant, of which model and where."""
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--model", default="runs/quickstart/model")
    parser.add_argument("--runs", type=Path, default=Path("runs/headline"))
    parser.add_argument("--quick", action="store_true")


def open_bench(args: argparse.Namespace) -> Bench:
    """Open the experiment that the options name."""
    sys.path.append(str(_RECIPE.parent))  # rewards that are functions
    experiment = read_experiment(args.experiment, args.quick)
    name = f"{experiment.task}_quick" if args.quick else experiment.task
    return Bench(experiment, args.model, args.runs, name)
