"""How much of what an adapter adds survives bfloat16? PEFT's LoRA layers against this library's.

    python benchmarks/small_additions.py

One layer of SmolLM2-135M's shape, float or int8, with an adapter whose addition is a share of the
output. Printed is the slope of the addition that comes out (output with the adapter minus output
without) on the exact one: 1 where nothing is lost on average.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from recording import append_rows

from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.int8 import fix_8bit_forward
from ctrl_dpo.measures.tables import table

INPUTS, OUTPUTS, TOKENS = 576, 1536, 512
SHARES = [2.0**-k for k in (3, 5, 7, 9, 11)]


def adapted(int8: bool, fast: bool) -> torch.nn.Module:
    """Return a LoRA layer of rank 16 over a frozen layer that computes in bfloat16."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    if int8:
        made = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False)
        made.load_state_dict(layer.state_dict())
        layer = made.to("cpu")
    else:
        layer.bfloat16()
    holder = torch.nn.Sequential(layer)
    holder.is_loaded_in_8bit = int8
    fix_8bit_forward(holder)
    model = get_peft_model(holder, LoraConfig(r=16, target_modules=["0"]))
    if fast:
        speed_up_adapters(model)
    return model.base_model.model[0]


@torch.no_grad()
def slope(layer: torch.nn.Module, share: float) -> float:
    """Scale the adapter to the share of the output's size, and compare with the exact addition."""
    x = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(1)).bfloat16()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.normal_(generator=torch.Generator().manual_seed(2))
    without = layer.base_layer(x).double()
    exact = layer.scaling["default"] * (x.double() @ a.double().t()) @ b.double().t()
    factor = share * float(without.norm() / exact.norm())
    b.mul_(factor)
    found, wanted = layer(x).double() - without, exact * factor
    return float((found * wanted).sum() / wanted.square().sum())


def main() -> None:
    rows, lines = [], []
    for int8 in (False, True):
        for side, fast in (("PEFT", False), ("ctrl_dpo", True)):
            layer, kind = adapted(int8, fast), "int8" if int8 else "bfloat16"
            slopes = {share: round(slope(layer, share), 3) for share in SHARES}
            rows += [
                {"layer": kind, "side": side, "share": k, "slope": v} for k, v in slopes.items()
            ]
            lines.append([kind, side, *(f"{value:.2f}" for value in slopes.values())])
    print(table(["layer", "side", *(f"{share:.2%}" for share in SHARES)], lines))
    append_rows("small_additions", rows)


if __name__ == "__main__":
    main()
