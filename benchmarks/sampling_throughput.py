"""How fast are draws? Ours against plain ``generate`` of transformers, in turn, same settings.

    python benchmarks/sampling_throughput.py MODEL_FOLDER [--draws 16] [--prompts 8] [--tokens 40]
        [--prompt-tokens 200] [--cpu-time]

Both draw K responses to each prompt from the whole distribution at temperature 1, in the type
that is fast here, from the same prompts, padded the same way. Tokens are counted up to and
including the end token.

The bound beside the ratio is what the ratio would be if our draws were nothing but their matrix
products (each prompt token once, each drawn token once), at the rate of a large product measured in
the same round. ``--prompt-tokens`` makes prompts of that length by repeating the recipe's prompts.
``--cpu-time`` measures the processor time of one thread, for a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recording import append_rows

from ctrl_dpo.engine.generation import Sampler, draw_responses, end_tokens
from ctrl_dpo.engine.kv_cache import use_decode_attention
from ctrl_dpo.engine.models import load_model, load_tokenizer, prepare_for_generation

PROMPTS = Path(__file__).parent.parent / "recipes" / "data" / "train_prompts.jsonl"


def plain_generate(
    model: Any, ids: list[list[int]], draws: int, tokens: int, end: list[int]
) -> int:
    """Draw with ``generate``; return the number of tokens drawn."""
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
    out = model.generate(
        padded,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        num_return_sequences=draws,
        max_new_tokens=tokens,
    )[:, width:]
    ends = torch.isin(out, torch.tensor(end))
    first = torch.where(ends.any(1), ends.int().argmax(1) + 1, out.shape[1])
    return int(first.sum())


def ours(model: Any, ids: list[list[int]], draws: int, tokens: int, end: list[int]) -> int:
    """Draw with the library; return the number of tokens drawn."""
    drawn = draw_responses(model, ids, Sampler(draws, tokens), end)
    return sum(len(r) for d in drawn for r in d.response_ids)


def product_rate(clock: Callable[[], float], dtype: torch.dtype, size: int = 1024) -> float:
    """Return the operations per second of a large product."""
    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    start = clock()
    for _ in range(20):
        torch.mm(a, b)
    return 20 * 2 * size**3 / (clock() - start)


def counted_operations(model: Any, ids: list[list[int]], drawn: int) -> float:
    """Count the products with weights that the draws need: attention is left out."""
    head = model.get_output_embeddings().weight.numel()
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is model.get_output_embeddings().weight
    backbone = sum(p.numel() for p in model.parameters()) - embeddings.numel() - head * (not tied)
    return 2.0 * (backbone * sum(map(len, ids)) + (backbone + head) * drawn)


def with_length(ids: list[list[int]], length: int) -> list[list[int]]:
    """Make prompts of a length, each of its own prompt and those after it."""
    joined = [[t for row in ids[i:] + ids[:i] for t in row] for i in range(len(ids))]
    return [(row * (1 + length // len(row)))[:length] for row in joined]


def measure_in_turn(
    stock: Any, fast: Any, ids: list[list[int]], end: list[int], args: argparse.Namespace
) -> tuple[dict[str, list[float]], list[float]]:
    """Draw with both in every round; return tokens per second, and bounds of our ratio."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    contestants = {"generate": (plain_generate, stock), "ctrl_dpo": (ours, fast)}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    bounds = []
    for repeat in range(args.repeats + 1):
        peak = product_rate(clock, stock.dtype)
        for name, (run, model) in contestants.items():
            start = clock()
            n = run(model, ids, args.draws, args.tokens, end)
            rate = n / (clock() - start)
            if repeat:  # the first round warms up
                rates[name].append(rate)
                print(f"{name:10s} {rate:8.0f} tokens/s", flush=True)
        if repeat:  # n is the number of our draws
            bounds.append(n * peak / counted_operations(stock, ids, n) / rates["generate"][-1])
    return rates, bounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model)
    rows = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: args.prompts]]
    ids = [tokenizer.apply_chat_template(r, add_generation_prompt=True)["input_ids"] for r in rows]
    if args.prompt_tokens:
        ids = with_length(ids, args.prompt_tokens)
    stock = load_model(args.model)
    fast = prepare_for_generation(load_model(args.model))
    use_decode_attention(fast)
    end = end_tokens(stock, tokenizer)
    rates, bounds = measure_in_turn(stock, fast, ids, end, args)
    ratios = [a / b for a, b in zip(rates["ctrl_dpo"], rates["generate"], strict=True)]
    names = ("draws", "prompts", "tokens", "repeats", "prompt_tokens", "cpu_time")
    settings = {k: getattr(args, k) for k in names} | {"dtype": str(stock.dtype)}
    row = {
        "settings": json.dumps(settings),
        "generate_tokens_per_s": round(statistics.median(rates["generate"]), 1),
        "ctrl_dpo_tokens_per_s": round(statistics.median(rates["ctrl_dpo"]), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "ratio_bound": round(statistics.median(bounds), 3),
    }
    print(row)
    if args.repeats > 2:
        append_rows("sampling_throughput", [row])


if __name__ == "__main__":
    main()
