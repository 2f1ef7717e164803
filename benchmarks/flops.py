"""Operations of a training step: counted by torch, and the fewest that the task needs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _product(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
    rows, inner = left
    return 2 * int(rows * inner * right[1])


def _sdpa(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def count_flops() -> FlopCounterMode:
    """Count products, in place and of attention on a processor too, which torch's table has not."""
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten.addmm_: _product,
            aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
        },
    )


def ideal_flops(model: Any, batch: Mapping[str, torch.Tensor]) -> int:
    """Count the fewest operations of a training step on this batch.

    Each prompt token and each response token once through the frozen layers, forward and backward
    to its input; the adapter's products and its gradients; attention between tokens that see each
    other, with one recomputation of the scores; the head on response tokens only, twice.
    """
    from ctrl_dpo.engine.logprobs import causal_model
    from ctrl_dpo.engine.masks import visible

    base = causal_model(model)
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    tokens = int((batch["segments"] >= 0).sum())
    frozen = adapters = 0
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            frozen += module.in_features * module.out_features
        elif name.endswith(("lora_A.default", "lora_B.default")):
            adapters += module.weight.numel()
    real = batch["segments"] >= 0
    seen = (
        visible(batch["segments"], batch["position_ids"])[:, 0]
        & real.unsqueeze(1)
        & real.unsqueeze(2)
    )
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = int(seen.sum()) * width * config.num_hidden_layers
    head_products = len(batch["token_ids"]) * head.weight.numel()
    return (4 * frozen + 6 * adapters) * tokens + 14 * attention + 4 * head_products


def matmul_ceiling(
    model_shapes: list[tuple[int, int, int]], dtype: torch.dtype
) -> dict[str, float]:
    """Measure FLOP/s of matrix products: the model's own shapes, and a large square.

    Parameters
    ----------
    model_shapes : list of (tokens, inputs, outputs)
        Products of one forward pass.
    dtype : torch.dtype
        Type of both factors.

    Returns
    -------
    dict of str to float
        ``model`` and ``square``, medians of seven, FLOP/s by the clock.
    """
    found = {}
    for name, shapes in {"model": model_shapes, "square": [(2048, 2048, 2048)]}.items():
        factors = [
            (torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)) for m, k, n in shapes
        ]
        rates = []
        for _ in range(8):
            start = time.perf_counter(), time.process_time()
            for x, w in factors:
                torch.nn.functional.linear(x, w)
            rates.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        work = sum(2 * m * k * n for m, k, n in shapes)
        found[name] = work / statistics.median(r[0] for r in rates[1:])
        found[f"{name}_per_cpu_s"] = work / statistics.median(r[1] for r in rates[1:])
    return found
