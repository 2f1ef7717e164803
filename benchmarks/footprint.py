"""Bytes of weights and optimiser state, in bf16 and in 8 bits, by rank of the adapter.

Usage: python benchmarks/footprint.py MODEL
"""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from recording import append_rows

from ctrl_dpo.engine.footprint import optimizer_footprint, weight_footprint
from ctrl_dpo.engine.models import load_model

RANKS = (4, 8, 16, 32)


def update_once(model: torch.nn.Module) -> dict[str, float]:
    """Make one update of 8-bit AdamW with any gradient: its state exists only afterwards."""
    from bitsandbytes.optim import AdamW8bit

    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = AdamW8bit(weights)
    optimizer.step()
    return optimizer_footprint(optimizer)


def _load(name: str, load_in_8bit: bool) -> torch.nn.Module:
    return load_model(name, dtype="bfloat16", load_in_8bit=load_in_8bit)


def main(name: str) -> None:
    """Print two tables and append them to the results."""
    rows = []
    print("| weights | bytes in bf16 | bits | bytes in 8 bits | bits |\n|---|---|---|---|---|")
    found = [weight_footprint(_load(name, eight)) for eight in (False, True)]
    for kind in found[0]:
        cells = [f"{part[kind]['bytes']:,} | {part[kind]['bits']:.2f}" for part in found]
        print(f"| {kind} | {' | '.join(cells)} |")
        for part, precision in zip(found, ("bf16", "int8"), strict=True):
            row = {"what": kind, "precision": precision, "bytes": part[kind]["bytes"]}
            rows.append(row | {"bits": round(part[kind]["bits"], 4), "share_8bit": ""})
    print("\n| rank of the adapter | bytes of AdamW's state | of it in 8 bits |\n|---|---|---|")
    for rank in RANKS:
        adapter = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        state = update_once(get_peft_model(_load(name, True), adapter))
        print(f"| {rank} | {state['bytes']:,} | {100 * state['share_8bit']:.1f} % |")
        row = {"what": f"AdamW, rank {rank}", "precision": "adamw_8bit", "bytes": state["bytes"]}
        rows.append(row | {"bits": "", "share_8bit": round(state["share_8bit"], 4)})
    append_rows("footprint", rows)


if __name__ == "__main__":
    main(sys.argv[1])
