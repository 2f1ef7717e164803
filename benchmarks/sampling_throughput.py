"""How fast are draws? Ours against plain ``generate`` of transformers, in turn, same settings.

    python benchmarks/sampling_throughput.py MODEL_FOLDER [--draws 16] [--prompts 8] [--tokens 40]

Both draw K responses to each prompt from the whole distribution at temperature 1 in bfloat16, from
the same prompts, padded the same way. Tokens are counted up to and including the end token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    rows = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: args.prompts]]
    ids = [tokenizer.apply_chat_template(r, add_generation_prompt=True)["input_ids"] for r in rows]
    stock = load_model(args.model)
    fast = prepare_for_generation(load_model(args.model))
    use_decode_attention(fast)
    end = end_tokens(stock, tokenizer)
    contestants = {"generate": (plain_generate, stock), "ctrl_dpo": (ours, fast)}
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(args.repeats + 1):
        for name, (run, model) in contestants.items():
            start = time.perf_counter()
            n = run(model, ids, args.draws, args.tokens, end)
            rate = n / (time.perf_counter() - start)
            if repeat:  # the first round warms up
                rates[name].append(rate)
                print(f"{name:10s} {rate:8.0f} tokens/s", flush=True)
    ratios = [a / b for a, b in zip(rates["ctrl_dpo"], rates["generate"], strict=True)]
    settings = {k: getattr(args, k) for k in ("draws", "prompts", "tokens", "repeats")}
    row = {
        "settings": json.dumps(settings),
        "generate_tokens_per_s": round(statistics.median(rates["generate"]), 1),
        "ctrl_dpo_tokens_per_s": round(statistics.median(rates["ctrl_dpo"]), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }
    print(row)
    if args.repeats > 2:
        append_rows("sampling_throughput", [row])


if __name__ == "__main__":
    main()
