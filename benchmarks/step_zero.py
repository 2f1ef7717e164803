"""Distance of policy and reference before the first update, by how the reference is computed.

The policy's log-probabilities are taken as in training, a row at a time; the reference's by the
same path, by rows batched with others (what an accelerator does), and by the other row layout. Nats
per response, largest over all. Usage: python benchmarks/step_zero.py MODEL [PROMPTS]
"""

from __future__ import annotations

import sys

import torch
from datasets import load_dataset
from recording import append_rows

from ctrl_dpo.data.tokens import prompt_tokens
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import _token_logps, response_logps
from ctrl_dpo.engine.models import load_model, load_tokenizer

KINDS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False), "int8": ("bfloat16", True)}
PATHS = ("same path", "in training mode", "rows batched", "prompts not shared")
PROMPTS_FILE = "recipes/data/held_out_prompts.jsonl"


@torch.no_grad()
def by_batch(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute all rows of a batch together, as on an accelerator."""
    logps = _token_logps(model, batch)
    return logps.new_zeros(len(batch["group_of"])).index_add(0, batch["owners"], logps)


@torch.no_grad()
def measure(model: torch.nn.Module, groups: list[dict]) -> dict[str, float]:
    """Return the largest distance to the policy for each way to compute the reference."""
    shared = collate(groups)
    policy = response_logps(model.eval(), shared)
    found = {
        "same path": response_logps(model, shared),
        "in training mode": response_logps(model.train(), shared),
        "rows batched": by_batch(model.eval(), shared),
        "prompts not shared": response_logps(model, collate(groups, share_prompt=False)),
    }
    return {name: (values - policy).abs().max().item() for name, values in found.items()}


def main(name: str, count: int = 4) -> None:
    """Print a table and append it to the results."""
    tokenizer = load_tokenizer(name)
    prompts = load_dataset("json", data_files=PROMPTS_FILE, split=f"train[:{count}]")["prompt"]
    ids = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    text = " ".join(str(prompt) for prompt in prompts)
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    # two responses of 100 tokens and two of 25 each: any tokens do, forward passes are compared
    lengths = (100, 25, 100, 25)
    groups = [
        {
            "prompt_ids": prompt,
            "response_ids": [
                [words[(7 * i + 31 * j + t) % len(words)] for t in range(n)]
                for j, n in enumerate(lengths)
            ],
        }
        for i, prompt in enumerate(ids)
    ]
    rows = []
    for kind, (dtype, load_in_8bit) in KINDS.items():
        found = measure(load_model(name, dtype=dtype, load_in_8bit=load_in_8bit), groups)
        rows += [{"kind": kind, "path": p, "nats": float(f"{found[p]:.3g}")} for p in PATHS]
    print(f"Largest distance to the policy over {4 * count} responses, nats per response\n")
    print(f"| reference computed by | {' | '.join(KINDS)} |\n|---|---|---|---|")
    for path in PATHS:
        cells = [f"{row['nats']:.3g}" for row in rows if row["path"] == path]
        print(f"| {path} | {' | '.join(cells)} |")
    append_rows("step_zero", rows)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
