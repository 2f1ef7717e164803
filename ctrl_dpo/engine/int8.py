"""Linear layers in int8 (bitsandbytes) as one fast function on a processor."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


def linear_8bit_modules(model: torch.nn.Module) -> list[Any]:
    """List the bitsandbytes int8 layers of a model; empty when it has none."""
    if not getattr(model, "is_loaded_in_8bit", False):
        return []
    import bitsandbytes as bnb

    return [m for m in model.modules() if isinstance(m, bnb.nn.Linear8bitLt)]


class RowScaled(NamedTuple):
    """Weights (out, in) of a linear layer, the scale (out,) of its outputs if any, and its bias."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    bias: torch.Tensor | None


def row_scaled(layer: Any, dtype: torch.dtype) -> RowScaled | None:
    """Return what a linear layer multiplies by, or None where only the layer itself can tell.

    Parameters
    ----------
    layer : torch.nn.Module
        Float layer; or int8 layer on a CPU after :func:`fix_8bit_forward`, or its form for drawing.
    dtype : torch.dtype
        Type of its inputs.

    Returns
    -------
    RowScaled or None
        None for other kinds of layers, hooks, parameters that are trained, weights of another type
        or elsewhere until the layer is called (sharded, offloaded), and int8 in float16, whose sums
        overflow.
    """
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks)
    trained = any(p.requires_grad for p in layer.parameters(recurse=False))
    if any(hooks) or layer._backward_pre_hooks or hasattr(layer, "_hf_hook") or trained:
        return None
    if type(layer) is torch.nn.Linear:
        weight = layer.weight
        here = weight.dtype == dtype and type(weight) is torch.nn.Parameter
        whole = weight.shape == (layer.out_features, layer.in_features)
        own = here and whole and "forward" not in vars(layer)
        return RowScaled(weight, None, layer.bias) if own else None
    if dtype is torch.float16:
        return None
    if isinstance(layer, ScaledLinear):
        return RowScaled(layer.weight, _row_scale(layer.absmax), layer.bias)
    if getattr(layer.forward, "func", None) is not _forward:
        return None
    _prepare(layer)
    return RowScaled(layer.weight.data, _row_scale(layer.state.SCB), layer.bias)


def fix_8bit_forward(model: torch.nn.Module) -> None:
    r"""Make the int8 layers one function in training and evaluation, and a fast one.

    On CPU and XPU, bitsandbytes multiplies by dequantised weights while ``training`` is set and
    quantises the activations too otherwise: two functions that differ by nats per response. On a
    CPU

    .. math:: y = s \odot (W x) + b

    with the integers W, which bfloat16 holds exactly, and the scale s of each output, is computed
    in both. bitsandbytes scales the weights instead, in every pass, forward and backward, which
    takes longer (benchmarks/LOG.md); float16, which such sums overflow, is computed so here too. On
    XPU the flag is forced on before each forward pass.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place, where it has int8 layers.
    """
    # one warning per layer and forward pass about the cast of the activations
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in linear_8bit_modules(model):
        if module.state.has_fp16_weights:
            continue  # its weights are floats: it is quantised anew in every pass
        if module.weight.device.type == "cpu":
            module.forward = partial(_forward, module)
        elif _set_training not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_set_training)


def _set_training(module: torch.nn.Module, args: object) -> None:
    """Set the flag on one layer only; a lambda could not be pickled by a checkpoint."""
    module.training = True


def _prepare(module: Any) -> None:
    if module.weight.CB is not None:
        module.init_8bit_state()


def _row_scale(absmax: torch.Tensor) -> torch.Tensor:
    """Return the outputs' scales; a row of zeros has one to divide by too."""
    return absmax.mul(1.0 / 127.0).clamp_(min=1e-30)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    _prepare(module)
    return _scaled(x, module.weight.data, module.state.SCB, module.bias)


def _scaled(
    x: torch.Tensor, integers: torch.Tensor, absmax: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply by integers of any type and scale the outputs."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: torch.Tensor = _ScaledProduct.apply(x, integers, _row_scale(absmax))  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


class _ScaledProduct(torch.autograd.Function):
    """Keep no activation: the gradient of the input needs the weights only."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(integers, scale)
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype is torch.float16:
                return torch.nn.functional.linear(x, _float16(integers, scale))
            return torch.nn.functional.linear(x, integers.to(x.dtype)).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        integers, scale = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            if grad.dtype is torch.float16:
                return grad @ _float16(integers, scale), None, None
            return grad.mul(scale).to(grad.dtype) @ integers.to(grad.dtype), None, None


def _float16(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale the weights: sums of integers reach beyond 65504."""
    return integers.to(torch.float16).mul_(scale.unsqueeze(1))


def is_in_8bit(model: torch.nn.Module) -> bool:
    """Tell whether a model has int8 layers, or had them before it was prepared for drawing."""
    return bool(linear_8bit_modules(model)) or any(
        isinstance(module, ScaledLinear) for module in model.modules()
    )


class ScaledLinear(torch.nn.Module):
    """The function of an int8 layer, its integers held as floats: for drawing, not for training.

    Parameters
    ----------
    layer : bitsandbytes.nn.Linear8bitLt
        Layer whose outputs it has, bit by bit for inputs of one shape.
    dtype : torch.dtype
        Type that holds the integers, that of the activations.
    """

    weight: torch.Tensor
    absmax: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        absmax = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        self.register_buffer("weight", layer.weight.data.to(dtype))
        self.register_buffer("absmax", absmax)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.data.to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs."""
        return _scaled(x, self.weight, self.absmax, self.bias)
