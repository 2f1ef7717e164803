"""Prompts of a task, split in two, and the preference pairs of the reward models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from ctrl_dpo.data.folders import read_rows, write_atomically
from ctrl_dpo.data.layouts import read_groups
from ctrl_dpo.data.messages import prompt_key
from ctrl_dpo.data.tokens import prompt_tokens
from experiment.settings import Experiment

_SPLIT_SEED = 0


def source_name(path: str, hub: tuple[str, str, str]) -> str:
    """Name what :func:`source` reads."""
    return Path(path).name if Path(path).exists() else "/".join(hub)


def source(path: str, hub: tuple[str, str, str]) -> Dataset:
    """Read a local file or, where there is none, a split of a folder of a hub data set."""
    if Path(path).exists():
        return read_rows(path)
    name, folder, split = hub
    return datasets.load_dataset(name, data_dir=folder, split=split)


def first_turns(rows: Dataset) -> list[list[dict[str, str]]]:
    """Return the distinct opening messages of people, in their order."""
    if "prompt" not in rows.column_names:
        rows, _ = read_groups(rows, same_prompt="keep", invalid="drop")
    opening = {prompt_key(p[:1]): p[:1] for p in rows["prompt"] if p[0]["role"] == "user"}
    return list(opening.values())


def write_once(path: Path, text: str) -> None:
    """Write what every cell of a folder shares; a file of another content is not replaced."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode("utf-8"))
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{path} must be that of this experiment; it was written with other settings or from "
            "another source. Name another --runs."
        )


def prompts(experiment: Experiment, tokenizer: Any, folder: Path) -> dict[str, Dataset]:
    """Return training and held-out prompts, in files that all cells share."""
    found = first_turns(source(experiment.prompts, experiment.prompts_hub))
    limit = experiment.max_prompt_tokens
    fitting = [p for p in found if len(prompt_tokens(tokenizer, p)) <= limit]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(fitting))
    chosen = [{"prompt": fitting[i]} for i in order]
    held_out, rest = chosen[: experiment.n_held_out], chosen[experiment.n_held_out :]
    made = {}
    for name, rows in (("held_out", held_out), ("train", rest[: experiment.n_train])):
        path = folder / f"{name}_prompts.jsonl"
        write_once(path, "".join(json.dumps(row) + "\n" for row in rows))
        made[name] = read_rows(path)
    return made
