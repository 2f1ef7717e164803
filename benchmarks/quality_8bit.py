"""Does training in 8 bits end where training in bf16 ends? One task, five seeds each.

8 bits: int8 base (bitsandbytes) and 8-bit AdamW. bf16: bf16 base and torch's AdamW. Both train a
LoRA adapter on draws of the model; measured is the fit on held-out prompts. The model is a folder,
its draws scored by VADER; or `small`, a seeded Llama of width 128 that a few minutes suffice for,
its draws scored by a linear function of their letters. Every run is a process of its own and a
finished one is not repeated.
Usage: python benchmarks/quality_8bit.py MODEL WORK_FOLDER [STEPS]
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset
from recording import RESULTS, append_rows

SEEDS = range(5)
KINDS = ("int8", "bf16")
MEASURED = ("eval_loss", "eval_fit/r2", "eval_logratios/margins", "fit/r2")
RECIPES = Path(__file__).parent.parent / "recipes"
NAME = "quality_8bit"
SMALL = "small"


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """Reward of the small model: bytes have random values, a response their sum."""
    values = np.random.default_rng(0).normal(size=256)
    return [float(values[list(text.encode())].sum()) for text in responses]


def make_small_model(folder: Path) -> str:
    """Save a seeded model whose linear layers are wide enough for 8-bit optimiser state."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tiny import tiny_llama, tiny_tokenizer

    sizes = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}
    tiny_llama(**sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts_of(model: str, part: str, count: int) -> Dataset:
    """Return the recipes' prompts, or short made ones for the small model."""
    if model.endswith(SMALL):
        return Dataset.from_dict({"prompt": [f"{part} {i}" for i in range(2 * count)]})
    file = str(RECIPES / "data" / f"{part}_prompts.jsonl")
    return load_dataset("json", data_files=file, split=f"train[:{count}]")


def make_data(model: str, work: Path) -> None:
    """Draw and score once, from the bf16 model: both kinds train on the same rows."""
    from ctrl_dpo import relabel
    from ctrl_dpo.engine.generation import Sampler
    from ctrl_dpo.engine.models import load_model, load_tokenizer
    from ctrl_dpo.sample import sample
    from ctrl_dpo.score import score

    sys.path.insert(0, str(RECIPES))
    for part, count in (("train", 32), ("held_out", 16)):
        if (work / f"{part}.parquet").exists():
            continue
        length = 8 if model.endswith(SMALL) else 24
        prompts = prompts_of(model, part, count)
        drawn = sample(
            prompts,
            load_model(model, dtype="bfloat16"),
            Sampler(draws=8, max_new_tokens=length, seed=0),
            tokenizer=load_tokenizer(model),
        )
        reward = letters if model.endswith(SMALL) else "sentiment_reward:compound"
        scored = score(drawn, reward)
        groups = relabel(scored, procedure="best_of_4", target_kl=1.0, extremes=2)
        # either kind of model is a reference policy of its own, so the draws are not exactly its
        groups.remove_columns("sampled_from").to_parquet(work / f"{part}.parquet")


def train(model: str, work: Path, kind: str, seed: int, steps: int) -> dict[str, float]:
    """Train one adapter and measure it."""
    from peft import LoraConfig

    from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer

    data = {
        part: load_dataset("parquet", data_files=str(work / f"{part}.parquet"), split="train")
        for part in ("train", "held_out")
    }
    args = CTRLDPOConfig(
        str(work / f"{kind}-{seed}"),
        load_in_8bit=kind == "int8",
        model_dtype="bfloat16",
        max_steps=steps,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=3e-4 if model.endswith(SMALL) else 5e-4,
        warmup_steps=2,
        logging_steps=steps // 2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        reference_cache=str(work / f"reference-{kind}"),
    )
    rank = 64 if model.endswith(SMALL) else 32  # all, or nearly all, of the state is in 8 bits
    adapter = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = CTRLDPOTrainer(model, args, data["train"], data["held_out"], peft_config=adapter)
    trainer.train()
    found = trainer.evaluate()
    found |= {k: v for row in trainer.state.log_history for k, v in row.items() if k == "fit/r2"}
    return {name: round(found[name], 5) for name in MEASURED}


def finished(model: str, steps: int) -> list[dict[str, str]]:
    """Read the runs that are there."""
    path = RESULTS / f"{NAME}.csv"
    rows = csv.DictReader(path.open(newline="")) if path.exists() else []
    return [row for row in rows if (row["model"], row["steps"]) == (model, str(steps))]


def print_table(rows: list[dict[str, str]]) -> None:
    """Print mean and spread of both kinds, and their difference in units of the spread."""
    print("| measured on held-out prompts | int8 | bf16 | difference / seed-to-seed spread |")
    print("|---|---|---|---|")
    for name in MEASURED:
        found = {k: np.array([float(r[name]) for r in rows if r["kind"] == k]) for k in KINDS}
        cells = [f"{v.mean():.4f} +- {v.std(ddof=1):.4f}" for v in found.values()]
        spread = np.sqrt(np.mean([v.var(ddof=1) for v in found.values()]))
        gap = (found["int8"].mean() - found["bf16"].mean()) / spread
        print(f"| {name} | {' | '.join(cells)} | {gap:+.2f} |")


def main(model: str, work: str, steps: int = 16) -> None:
    """Run what is missing, then print the table."""
    Path(work).mkdir(parents=True, exist_ok=True)
    label = Path(model).name
    if model == SMALL:
        model = make_small_model(Path(work) / SMALL)
    make_data(model, Path(work))
    done = {(row["kind"], int(row["seed"])) for row in finished(label, steps)}
    for seed in SEEDS:
        for kind in KINDS:
            if (kind, seed) in done:
                continue
            words = [model, work, str(steps), kind, str(seed)]
            command = [sys.executable, __file__, *words]
            made = subprocess.run(command, capture_output=True, text=True, check=True)
            measured = json.loads(made.stdout.splitlines()[-1])
            row = {"model": label, "kind": kind, "seed": seed, "steps": steps}
            append_rows(NAME, [row | measured])
    print_table(finished(label, steps))


if __name__ == "__main__":
    if len(sys.argv) > 4:
        where, folder, count, which, number = sys.argv[1:]
        print(json.dumps(train(where, Path(folder), which, int(number), int(count))))
    else:
        main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
