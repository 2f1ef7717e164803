"""Whether the bound of memory that training logs holds, and how far above the truth it is.

Usage: python benchmarks/memory_bound.py MODEL

Three updates of LoRA of rank 16 in a process of its own per row; the peak is what the process
held beyond what it held before them (Linux). `mmap` is glibc's MALLOC_MMAP_THRESHOLD_: buffers of
so many bytes are given back to the system when they are freed; 0 leaves it as it is. One thread.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from recording import append_rows
from scaling import make_row

from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.memory import memory_bound
from ctrl_dpo.engine.models import load_model

# dtype, groups, responses of each, tokens of a prompt and of a response, checkpointing, mmap
CELLS = [
    ("float32", 1, 16, 64, 32, False, 0),
    ("float32", 4, 16, 64, 32, False, 0),
    ("bfloat16", 4, 16, 64, 32, False, 0),
    ("float32", 4, 2, 200, 128, False, 0),
    ("bfloat16", 8, 2, 64, 32, False, 0),
    ("float32", 1, 16, 64, 32, True, 0),
    ("float32", 4, 16, 64, 32, True, 0),
    ("float32", 4, 16, 64, 32, True, 2**16),
    ("bfloat16", 4, 16, 64, 32, True, 0),
    ("bfloat16", 4, 16, 64, 32, True, 2**16),
]
NAMES = ("dtype", "groups", "responses", "prompt", "response", "checkpointing", "mmap")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(path: str, cell: dict[str, Any]) -> dict[str, float]:
    """Train for three updates and compare the peak with the bound; GiB."""
    torch.set_num_threads(1)
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(path, dtype=cell["dtype"]), adapter)
    speed_up_adapters(model)
    model.train()
    if cell["checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    group = make_row(cell["prompt"], cell["response"], cell["responses"])
    groups = [group] * cell["groups"]
    settings = {"per_device_train_batch_size": len(groups), "max_tokens_per_pass": None}
    settings |= {"share_prompt": True, "optim": "adamw_torch"}
    settings["activation_checkpointing"] = cell["checkpointing"]
    # the probe pages the weights in; free heap that it left would hide as much of the peak
    bound = memory_bound(model, groups, SimpleNamespace(**settings))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start = _resident("VmRSS"), time.perf_counter()
    for _ in range(3):
        response_logps(model, collate(groups, share_prompt=True)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    peak = _resident("VmHWM") - before
    beyond = sum(size for part, size in bound.items() if part != "weights")
    found = {"peak_gib": peak / 2**30, "bound_gib": beyond / 2**30, "ratio": beyond / peak}
    return {name: round(value, 3) for name, value in (found | {"seconds": seconds}).items()}


def main(path: str) -> None:
    """Print a table and append it to the results."""
    print("| model | " + " | ".join(NAMES) + " | peak GiB | bound GiB | bound / peak | seconds |")
    print("|" + "---|" * (len(NAMES) + 5), flush=True)
    for values in CELLS:
        cell = dict(zip(NAMES, values, strict=True))
        mapped = {"MALLOC_MMAP_THRESHOLD_": str(cell["mmap"])} if cell["mmap"] else {}
        run = subprocess.run(
            [sys.executable, __file__, path, json.dumps(cell)],
            env=os.environ | mapped,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        row = {"model": Path(path).name, **cell} | json.loads(run.stdout.splitlines()[-1])
        append_rows("memory_bound", [row])
        print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1])
