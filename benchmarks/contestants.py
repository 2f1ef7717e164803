"""One training run of one trainer in a process of its own, measured: ours, or TRL's DPO trainer.

A parent calls :func:`run`; the child builds the trainer, trains, and prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

BORN = time.perf_counter()  # what follows is part of what a user waits for
SIDES = ("ours", "ours_8bit", "trl_bf16", "trl_bf16_ckpt", "trl_fp32", "trl_fp32_ckpt")


def run(model: str, side: str, threads: int, **workload: Any) -> dict[str, Any]:
    """Measure one side in a sub-process; returns what :func:`_measure` prints."""
    command = [sys.executable, __file__, model, side, json.dumps(workload)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"side": side, "failed": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _data(side: str, workload: dict[str, Any]) -> tuple[str, Any]:
    """Return pairs or groups; TRL gets all pairs of each group."""
    from datasets import Dataset
    from workloads import expand, groups, hh_pairs

    if workload["kind"] == "hh":
        name, rows = hh_pairs()
        rows = rows[: workload["rows"]]
    else:
        name = workload["kind"]
        rows = groups(*(workload[k] for k in ("prompt", "response", "size", "rows")))
        if side.startswith("trl"):
            rows = expand(rows)[: 3 * workload["pairs_per_group"]]
    return name, Dataset.from_list(rows)


def _trainer(model: str, side: str, data: Any, workload: dict[str, Any], callback: Any) -> Any:
    from peft import LoraConfig

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {
        "output_dir": tempfile.mkdtemp(),
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "beta": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    build = _our_trainer if side.startswith("ours") else _trl_trainer
    return build(model, side, data, workload, common, peft_config=lora, callbacks=[callback])


def _our_trainer(
    model: str, side: str, data: Any, workload: dict[str, Any], common: dict[str, Any], **parts: Any
) -> Any:
    from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer

    options = {"loss": "dpo", "load_in_8bit": side == "ours_8bit"}
    options["model_dtype"] = workload.get("dtype", "bfloat16")
    if "share_prompt" in workload:
        options["share_prompt"] = workload["share_prompt"]
    args = CTRLDPOConfig(**common, per_device_train_batch_size=workload["per_step"], **options)
    return CTRLDPOTrainer(model, args, data, **parts)


def _trl_trainer(
    model: str, side: str, data: Any, workload: dict[str, Any], common: dict[str, Any], **parts: Any
) -> Any:
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        **common,
        per_device_train_batch_size=workload["per_step"] * workload.get("pairs_per_group", 1),
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=8,
        activation_checkpointing=side.endswith("ckpt"),
        bf16=False,
        model_init_kwargs={"dtype": "bfloat16" if "bf16" in side else "float32"},
        max_length=None,
        dataloader_pin_memory=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, **parts)


def _measure(model: str, side: str, workload: dict[str, Any]) -> dict[str, Any]:
    import torch
    from flops import count_flops, ideal_flops
    from transformers import TrainerCallback

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    steps: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append((time.perf_counter() - self.wall, time.process_time() - self.cpu))

    name, data = _data(side, workload)
    trainer = _trainer(model, side, data, workload, Clock())
    if side.startswith("trl"):  # computes the reference when the loader is first asked for
        trainer.get_train_dataloader()
    ready = time.perf_counter() - BORN, time.process_time()
    trainer.train()
    total = time.perf_counter() - BORN, time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    batch = next(iter(trainer.get_train_dataloader()))
    found = {
        "side": side,
        "data": name,
        "rows": len(data),
        "ready_s": ready[0],
        "ready_cpu_s": ready[1],
        "total_s": total[0],
        "total_cpu_s": total[1],
        "steps_s": [wall for wall, _ in steps],
        "steps_cpu_s": [cpu for _, cpu in steps],
        "peak_mib": peak,
        "loss": [row["loss"] for row in trainer.state.log_history if "loss" in row][-1],
        "weight_mib": _linear_mib(trainer.model),
    }
    if workload.get("flops", True):
        with count_flops() as counter:
            trainer.training_step(trainer.model, batch)
        found["flops"] = counter.get_total_flops()
        if side.startswith("ours"):
            found["ideal_flops"] = sum(ideal_flops(trainer.model, p) for p in batch["passes"])
    return found


def _linear_mib(model: Any) -> float:
    """Count the bytes of the frozen linear weights of the decoder layers, scales included."""
    import torch

    layers = [m for n, m in model.named_modules() if n.endswith("base_layer")]
    states = [t for layer in layers for t in layer.parameters()]
    scales = [s for s in (getattr(t, "SCB", None) for t in states) if isinstance(s, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*states, *scales]) / 2**20


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("workload", type=json.loads)
    args = parser.parse_args(words)
    print(json.dumps(_measure(args.model, args.side, args.workload)))


if __name__ == "__main__":
    main()
