"""What does the cache of reference log-probabilities save? Rows computed, and seconds.

    python benchmarks/reference_cache.py MODEL_FOLDER [--prompts 8] [--draws 4] [--tokens 40]

Builds a trainer on relabelled groups again and again, each time with one thing changed, and reads
from the log how many rows were computed. Seconds are those from the call to the trainer being
ready, the loading of the model and its hash included; the file of weights is hashed once in all.
The other tokenizer has a blank more at the start of every message of its template.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from recording import append_rows

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, relabel
from ctrl_dpo.engine.models import fast_dtype, load_tokenizer

PROMPTS = Path(__file__).parent.parent / "recipes" / "data" / "train_prompts.jsonl"


def groups(n_prompts: int, draws: int, tokens: int) -> Dataset:
    """Make prompts of the recipe with responses cut from the other prompts' texts."""
    rows = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    words = " ".join(message["content"] for row in rows for message in row).split()
    starts = [[(17 * (i * draws + j)) % len(words) for j in range(draws)] for i in range(n_prompts)]
    made = {
        "prompt": rows[:n_prompts],
        "responses": [[" ".join((words * 2)[s : s + tokens]) for s in row] for row in starts],
        "rewards": [[float(s) for s in row] for row in starts],
    }
    return relabel(Dataset.from_dict(made), procedure="best_of_4", target_kl=1.0)


class Computed(logging.Handler):
    """Keeps the last number of rows found and computed from the log."""

    def __init__(self) -> None:
        super().__init__()
        self.found, self.computed = 0, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Read the numbers of a record that has them."""
        match = re.search(r"(\d+) found, (\d+) to compute", record.getMessage())
        if match:
            self.found, self.computed = map(int, match.groups())


def build(model: Path, data: Dataset, output: Path, rank: int = 16, **settings: Any) -> float:
    """Build a trainer; return the seconds it took."""
    start = time.perf_counter()
    args = CTRLDPOConfig(str(output), report_to="none", **settings)
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    CTRLDPOTrainer(str(model), args, data, peft_config=lora)
    return time.perf_counter() - start


def other_tokenizer(model: Path, folder: Path, old: str, new: str) -> Path:
    """Copy the model by links, with a change in its chat template."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    tokenizer = load_tokenizer(model)
    if old not in tokenizer.chat_template:
        raise ValueError(f"chat template must contain {old!r}; got another model's. Edit `old`.")
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    counter, log = Computed(), logging.getLogger("ctrl_dpo")
    log.setLevel(logging.INFO)
    log.addHandler(counter)
    data = groups(args.prompts, args.draws, args.tokens)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        os.environ["CTRL_DPO_CACHE"] = str(place / "cache")
        model = place / "model"
        shutil.copytree(args.model, model)
        template = "<|im_start|>"
        other = other_tokenizer(model, place / "other", template, template + " ")
        other_dtype = "float32" if fast_dtype() == "bfloat16" else "bfloat16"
        half = data.select(range(len(data) // 2))
        cases: dict[str, tuple[Path, Dataset, dict[str, Any]]] = {
            "cold": (model, data, {}),
            "warm": (model, data, {}),
            "LoRA rank": (model, data, {"rank": 4}),
            "learning rate": (model, data, {"learning_rate": 1e-5}),
            "seed": (model, data, {"seed": 7}),
            "batch size": (model, data, {"per_device_train_batch_size": 2}),
            "half of the dataset, reversed": (model, half.select(range(len(half))[::-1]), {}),
            "type of weights": (model, data, {"model_dtype": other_dtype}),
            "8 bits": (model, data, {"load_in_8bit": True}),
            "row layout": (model, data, {"share_prompt": False}),
            "tokenizer, other tokens": (other, data, {}),
            "tokenizer, warm": (other, data, {}),
        }
        time.sleep(3)  # the copied weights are older than the resolution of their times
        results = []
        for number, (case, (folder, part, settings)) in enumerate(cases.items()):
            output = place / f"run{number}"  # each run has an output folder of its own
            seconds = build(folder, part, output, **settings)
            row = {"case": case, "found": counter.found, "computed": counter.computed}
            results.append(row | {"seconds": round(seconds, 2)})
            print(results[-1], flush=True)
    settings = {k: getattr(args, k) for k in ("prompts", "draws", "tokens")}
    settings |= {"threads": torch.get_num_threads()}
    append_rows("reference_cache", [row | {"settings": json.dumps(settings)} for row in results])


if __name__ == "__main__":
    main()
