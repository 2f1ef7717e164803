"""How step time and memory grow with lengths, responses and width, and where sharing stops paying.

    python benchmarks/scaling.py [--layers 4] [--repeats 5] [--threads 1]

A random Llama with SmolLM2's shape but fewer layers and a small vocabulary, LoRA on all linear
layers, in the type that is fast here, one group a step. One quantity varies at a time; exponents
are slopes of a straight line through the logarithms. Seconds are of the processor; memory is what
the backward pass keeps. Shared and unshared rows take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from recording import append_rows
from transformers import LlamaConfig, LlamaForCausalLM

from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.memory import activation_bytes
from ctrl_dpo.engine.models import DTYPES, fast_dtype

START = {"prompt": 128, "response": 48, "responses": 2, "width": 576}
VARIED = {
    "prompt": [4, 16, 64, 128, 256, 512, 1024, 2048],
    "response": [16, 48, 128, 256, 512],
    "responses": [2, 4, 8, 16],
    "width": [192, 384, 576, 1152],
}


def make_model(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 192,
        max_position_embeddings=8192,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).to(DTYPES[fast_dtype("cpu")]), lora)
    speed_up_adapters(model)
    return model.train()


def make_row(prompt: int, response: int, responses: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 1024, size=response).tolist() for _ in range(responses)]
    return {"prompt_ids": rng.integers(3, 1024, size=prompt).tolist(), "response_ids": texts}


def step(model: Any, row: dict[str, Any], share: bool) -> float:
    """Return the processor seconds of a forward and backward pass."""
    batch = collate([row], share)
    start = time.process_time()
    response_logps(model, batch).sum().backward()
    return time.process_time() - start


def measure(point: dict[str, int], layers: int, repeats: int) -> dict[str, Any]:
    model = make_model(point["width"], layers)
    row = make_row(point["prompt"], point["response"], point["responses"])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats + 1):
        for share, found in seconds.items():
            found.append(step(model, row, share))
    ratios = [a / b for a, b in zip(seconds[True][1:], seconds[False][1:], strict=True)]
    return {
        **point,
        "shared_cpu_s": round(statistics.median(seconds[True][1:]), 5),
        "unshared_cpu_s": round(statistics.median(seconds[False][1:]), 5),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "shared_mib": round(activation_bytes(model, row, True) / 2**20, 2),
        "unshared_mib": round(activation_bytes(model, row, False) / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for quantity, values in VARIED.items():
        found = [measure(START | {quantity: v}, args.layers, args.repeats) for v in values]
        slopes = {}
        for name in ("shared_cpu_s", "shared_mib"):
            # the small ends are overhead of calls: the slope is that of the larger half
            half = found[len(found) // 2 - 1 :]
            x, y = ([np.log(point[key]) for point in half] for key in (quantity, name))
            slopes[name] = float(np.polyfit(x, y, 1)[0])
        for point in found:
            print(json.dumps(point), flush=True)
            settings = {"layers": args.layers, "repeats": args.repeats, "threads": args.threads}
            settings["dtype"] = fast_dtype("cpu")
            rows.append(
                {
                    "varied": quantity,
                    **point,
                    "time_exponent": round(slopes["shared_cpu_s"], 2),
                    "memory_exponent": round(slopes["shared_mib"], 2),
                    "settings": json.dumps(settings),
                }
            )
        print(f"{quantity}: time ~ x^{slopes['shared_cpu_s']:.2f}, ", end="")
        print(f"memory ~ x^{slopes['shared_mib']:.2f}", flush=True)
    append_rows("scaling", rows)


if __name__ == "__main__":
    main()
