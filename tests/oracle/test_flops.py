"""Operations that a benchmark counts, against sums over the products of a layer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ctrl_dpo.engine.adapters import speed_up_adapters

ROWS, INPUTS, OUTPUTS, RANK = 10, 24, 40, 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [False, True])
def test_every_product_of_an_adapted_layer_is_counted(benchmarks, dtype, fast):
    from flops import count_flops

    layer = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS)).to(dtype)
    model = get_peft_model(layer, LoraConfig(r=RANK, target_modules=["0"]))
    assert not fast or speed_up_adapters(model) == 1
    x = torch.randn(ROWS, INPUTS, dtype=dtype, requires_grad=True)
    with count_flops() as counter:
        model(x).sum().backward()
    frozen = 4 * INPUTS * OUTPUTS  # forward, and backward to the input
    adapter = 6 * RANK * (INPUTS + OUTPUTS)  # and the gradients of A and B
    assert counter.get_total_flops() == ROWS * (frozen + adapter)
