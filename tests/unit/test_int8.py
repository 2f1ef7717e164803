"""The int8 layers' product: bitsandbytes' values and gradients, whatever the types."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch

from ctrl_dpo.engine.int8 import ScaledLinear, fix_8bit_forward


def layer(bias: bool) -> bnb.nn.Linear8bitLt:
    torch.manual_seed(0)
    float_layer = torch.nn.Linear(48, 32, bias=bias)
    made = bnb.nn.Linear8bitLt(48, 32, bias=bias, has_fp16_weights=False)
    made.load_state_dict(float_layer.state_dict())
    holder = torch.nn.Sequential(made.to("cpu"))
    holder.is_loaded_in_8bit = True
    fix_8bit_forward(holder)
    return made


def dequantised(made: bnb.nn.Linear8bitLt) -> torch.Tensor:
    scale = made.state.SCB if made.state.SCB is not None else made.weight.SCB
    return made.weight.data.double() * scale.double().unsqueeze(1) / 127


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float64, 1e-6),
        (torch.float32, 2e-6),
        (torch.bfloat16, 2**-7),
        (torch.float16, 2**-9),
    ],
)
def test_values_and_gradients_are_those_of_the_dequantised_weights(bias, dtype, rounding):
    made = layer(bias)
    x = torch.randn(3, 5, 48).to(dtype).requires_grad_()
    other = x.detach().double().requires_grad_()
    grad = torch.randn(3, 5, 32).to(dtype)
    y = made(x)
    wanted = torch.nn.functional.linear(
        other, dequantised(made), made.bias.double() if bias else None
    )
    assert y.dtype == dtype
    assert (y - wanted).abs().max() < rounding * wanted.abs().max()
    y.backward(grad)
    wanted.backward(grad.double())
    assert (x.grad - other.grad).abs().max() < rounding * other.grad.abs().max()


def test_it_is_the_product_of_bitsandbytes_training_pass():
    made = layer(False)
    x = torch.randn(7, 48)
    ours = made(x)
    theirs = type(made).forward(made.train(), x)
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_for_drawing_has_the_same_bits(dtype):
    made = layer(True)
    x = torch.randn(7, 48).to(dtype)
    assert torch.equal(ScaledLinear(made, dtype)(x), made(x))


def test_autocast_computes_in_its_type():
    made = layer(True)
    x = torch.randn(7, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, made(x.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_float16_does_not_overflow_where_bitsandbytes_does_not():
    made = layer(False)
    x = (400 * torch.randn(7, 48)).half().requires_grad_()
    y = made(x)
    wanted = x.detach().double() @ dequantised(made).t()
    assert (y - wanted).abs().max() < 2**-8 * wanted.abs().max()
    y.backward(torch.full_like(y, 1e-3))
    wanted_grad = torch.full_like(wanted, 1e-3) @ dequantised(made)
    assert (x.grad - wanted_grad).abs().max() < 2**-8 * wanted_grad.abs().max()


def test_a_layer_can_be_copied_and_pickled():
    made = layer(True)
    x = torch.randn(7, 48)
    expected = made(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert other.forward.args == (other,)
        assert torch.equal(other(x), expected)


def test_no_activation_is_kept_for_the_backward_pass():
    """bitsandbytes keeps the input, which the gradient of a frozen layer does not need."""
    made, kept = layer(False), []
    x = torch.randn(1000, 48, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        made(x)
    assert sorted(map(tuple, kept)) == [(32,), (32, 48)]
