"""What each of several processes runs in the tests: trainings whose results are left in a folder.

accelerate launch ... tests/launched.py FOLDER SCENARIO...
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, relabel
from ctrl_dpo.cli import app
from ctrl_dpo.engine.processes import on_main


def unequal_groups(count: int) -> Dataset:
    """Make groups of two to four responses of unequal length."""
    sizes = [2 + i % 3 for i in range(count)]
    groups = {
        "prompt": [f"question {i} " * (1 + i % 3) for i in range(count)],
        "responses": [
            [f"{'abcd'[j]}{i}" * (1 + j + i % 4) for j in range(k)] for i, k in enumerate(sizes)
        ],
        "rewards": [[float((i + 2 * j) % 5) for j in range(k)] for i, k in enumerate(sizes)],
    }
    settings: dict[str, Any] = {"procedure": "single_draw", "transformation": "identity"}
    return relabel(Dataset.from_dict(groups), beta=0.2, **settings)


def make_trainer(folder: Path, count: int, **settings: Any) -> CTRLDPOTrainer:
    """Make a trainer of an adapter on the tiny model, with ``count`` groups to train on."""
    defaults: dict[str, Any] = {
        "learning_rate": 1e-3,
        # at 1e-8 one weight in 8,192, whose gradient is mere rounding, moves by a whole step
        "adam_epsilon": 1e-4,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
        "reference_cache": str(folder / "reference"),
    }
    return CTRLDPOTrainer(
        tiny_llama(),
        CTRLDPOConfig(str(folder), **defaults | settings),
        unequal_groups(count),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def equal_batches(folder: Path, processes: int) -> None:
    """Train 20 steps of four groups, however many processes share them."""
    trainer = make_trainer(folder, 16, max_steps=20, per_device_train_batch_size=4 // processes)
    trainer.train()
    trainer.save_model()


def unequal_last_batch(folder: Path, processes: int) -> None:
    """Train two epochs of 13 groups in batches of four: one is left for the last batch."""
    size = 4 // processes
    trainer = make_trainer(folder, 13, num_train_epochs=2, per_device_train_batch_size=size)
    trainer.train()


def resumed(folder: Path, processes: int) -> None:
    """Train six updates in one go, and again from the third, in either order of the rows."""
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4 // processes}
    for order in ("random", "group_by_length"):
        whole, again = folder / order / "whole", folder / order / "again"
        for place, start in ((whole, None), (again, str(whole / "checkpoint-3"))):
            trainer = make_trainer(place, 13, train_sampling_strategy=order, **settings)
            trainer.train(resume_from_checkpoint=start)
            trainer.save_model()


def one_process_fails(folder: Path, processes: int) -> None:
    """Give the last process a wrong reference; keep the error of every process."""
    trainer = make_trainer(folder, 8, max_steps=2, per_device_train_batch_size=2)
    if trainer.accelerator.is_last_process:
        for row in trainer.train_dataset:
            row["reference_logps"] = [logp - 1.0 for logp in row["reference_logps"]]
    try:
        trainer.train()
    except ValueError:
        place = folder / f"error-{trainer.accelerator.process_index}.txt"
        place.write_text(traceback.format_exc())
    trainer.accelerator.wait_for_everyone()


def command_line(folder: Path, processes: int) -> None:
    """Run the training command twice: the second finds that nothing is left to do."""
    model, data, output = folder / "model", folder / "data.parquet", folder / "output"
    on_main(lambda: write_inputs(model, data))
    words = [str(model), str(data), "--output_dir", str(output), "--report_to", "none"]
    words += ["--max_steps", "4", "--save_steps", "2", "--model_dtype", "float32"]
    words += ["--per_device_train_batch_size", str(4 // processes), "--disable_tqdm", "true"]
    words += ["--reference_cache", str(folder / "reference"), "--logging_steps", "1"]
    for _ in range(2):
        app(["train", *words], standalone_mode=False)


def write_inputs(model: Path, data: Path) -> None:
    """Write the tiny model and its groups as users have them: as a folder and a file."""
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    unequal_groups(8).to_parquet(str(data))


def sharded(folder: Path, processes: int) -> None:
    """Train as in ``equal_batches``, with the weights sharded over the processes (FSDP2)."""
    settings: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}
    settings |= {"save_strategy": "steps", "save_steps": 10}
    size = 4 // processes
    trainer = make_trainer(folder, 16, max_steps=20, per_device_train_batch_size=size, **settings)
    trainer.train()
    trainer.save_model()
    kinds = {type(weight).__name__ for weight in trainer.model.parameters()}
    (folder / f"kinds-{trainer.accelerator.process_index}.json").write_text(json.dumps([*kinds]))


def let_fsdp_run_on_a_cpu() -> None:
    """Make accelerate take the processes for ones with a GPU each: it shards for no others."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    start = PartialState.__init__
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.__init__ = lambda self, cpu=False, **options: start(self, cpu=False, **options)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        equal_batches,
        unequal_last_batch,
        resumed,
        one_process_fails,
        command_line,
        sharded,
    )
}


def main() -> None:
    """Run the scenarios named on the command line, one after the other."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    if "sharded" in sys.argv[2:]:
        let_fsdp_run_on_a_cpu()
    for name in sys.argv[2:]:
        SCENARIOS[name](root / name, int(os.environ.get("WORLD_SIZE", "1")))


if __name__ == "__main__":
    main()
