"""LoRA layers at speed: products in the type of the activations, master weights as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ctrl_dpo.engine.int8 import RowScaled, row_scaled


class _AddLowRank(torch.autograd.Function):
    r"""Add a low-rank term in place to the output of any layer: :math:`y + s \, (x A^T) B^T`.

    Saved are the input, which the neighbouring layers share, and the ``(n, r)`` product: neither a
    copy of the input in the adapter's type nor a second output.
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        down, up = a.to(x.dtype), b.to(x.dtype)
        rows = x.flatten(0, -2)
        inner = rows @ down.t()
        ctx.save_for_backward(rows, inner, down, up)
        ctx.scale = scale
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(inner, up.t(), alpha=scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, down, up = ctx.saved_tensors
        outer = grad.flatten(0, -2)
        scaled = (outer @ up).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (scaled @ down).view(*grad.shape[:-1], rows.shape[-1])
        # autograd casts the gradients of the adapter to its own type, where they add up
        return grad, grad_x, scaled.t() @ rows, (outer.t() @ inner).mul_(ctx.scale), None


class _LinearWithLowRank(torch.autograd.Function):
    r"""A frozen layer and its low-rank term: :math:`σ ⊙ (x W^T + x A^T (s B / σ)^T) + b`.

    The product with W is accumulated on top of the low-rank term, not the other way round: an
    output that is rounded already lies on the grid of its type, and adding less than half of the
    grid's step to it gives back the same number (benchmarks/LOG.md).
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, base: RowScaled, a: torch.Tensor, b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        down, up = a.to(x.dtype), b.to(x.dtype)
        inner = x @ down.t()
        rows = x.flatten(0, -2)
        shares = up * scale if base.scale is None else up * (scale / base.scale).unsqueeze(1)
        y = torch.nn.functional.linear(inner, shares.to(x.dtype))
        if base.scale is None and base.bias is not None:
            y += base.bias
        y.view(-1, y.shape[-1]).addmm_(rows, base.weight.to(x.dtype).t())
        if base.scale is not None:
            y.mul_(base.scale)
            if base.bias is not None:
                y += base.bias.to(y.dtype)
        ctx.save_for_backward(rows, inner.flatten(0, -2), down, up, base.weight, base.scale)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, down, up, weight, row_scale = ctx.saved_tensors
        outer = grad.flatten(0, -2)
        with torch.autocast(grad.device.type, enabled=False):
            scaled = (outer @ up).mul_(ctx.scale)
            grad_a, grad_b = scaled.t() @ rows, (outer.t() @ inner).mul_(ctx.scale)
            grad_x = None
            if ctx.needs_input_grad[0]:
                if row_scale is not None:
                    outer = outer.mul(row_scale).to(outer.dtype)
                grad_x = (scaled @ down).addmm_(outer, weight.to(outer.dtype))
                grad_x = grad_x.view(*grad.shape[:-1], rows.shape[-1])
        # autograd casts the gradients of the adapter to its own type, where they add up
        return grad_x, None, grad_a, grad_b, None


def speed_up_adapters(model: torch.nn.Module) -> int:
    r"""Let the LoRA layers of a model compute in the type of its activations, without copies.

    PEFT holds adapters in float32 and multiplies in float32 too, on copies of every input. Here

    .. math:: y = W x + s \, B (A x)

    is computed in the type of ``x``, with A and B cast for the call; their gradients are added up
    in float32, where the optimiser works. For a frozen float layer, and an int8 one on a CPU, the
    sum is accumulated before it is rounded: an addition of less than a 512th of an output that is
    already rounded to bfloat16, as in PEFT, is lost.

    Parameters
    ----------
    model : torch.nn.Module
        Model with PEFT's LoRA layers, whatever they adapt (float or int8); changed in place.

    Returns
    -------
    int
        Number of layers changed. Left to PEFT are layers with dropout, a variant (DoRA and such),
        a bias, several adapters at once, or another kind of adapter.

    Notes
    -----
    With B = 0 the output is that of the base layer, on a CPU to the last bit (of a contiguous
    input): policy and reference are one function before the first update.
    """
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and _is_plain(m)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    """Tell whether a layer computes W x + s B (A x) and nothing else."""
    base = layer.get_base_layer()
    return (
        isinstance(base, torch.nn.Linear)
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and all(isinstance(d, torch.nn.Identity) for d in layer.lora_dropout.values())
    )


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    usual = layer.disable_adapters or layer.merged or len(active) != 1 or args or kwargs
    if usual or torch.is_autocast_enabled(x.device.type):
        result: torch.Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    a, b = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    base = row_scaled(layer.base_layer, x.dtype)
    if base is not None:
        y: torch.Tensor = _LinearWithLowRank.apply(x, base, a, b, layer.scaling[active[0]])  # type: ignore[no-untyped-call]
        return y
    y = layer.base_layer(x)
    added: torch.Tensor = _AddLowRank.apply(y, x, a, b, layer.scaling[active[0]])  # type: ignore[no-untyped-call]
    return added
