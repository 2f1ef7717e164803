"""LoRA layers in the type of the activations: PEFT's values, gradients and special cases."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.int8 import ScaledLinear, fix_8bit_forward
from ctrl_dpo.engine.models import load_model

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46], [3, 50, 51, 52, 53, 54, 55, 56]])


def adapted(base=None, *, fast: bool, zero: bool = False, **settings):
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(base or tiny_llama(), LoraConfig(**config | settings)).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and not zero:
                parameter.normal_(0, 0.2)
    changed = speed_up_adapters(model) if fast else 0
    return model, changed


def values_and_gradients(model):
    logits = model(IDS).logits.double()
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).reshape(logits.shape)
    (logits * weights).sum().backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), found


def worst(found, wanted) -> float:
    """Largest difference relative to the largest entry, over all parameters."""
    pairs = ((found[n] - g).abs().max() / g.abs().max() for n, g in wanted.items())
    return max(pair.item() for pair in pairs)


@pytest.mark.parametrize("load_in_8bit", [False, True])
def test_values_and_gradients_are_those_of_peft(tiny_model_folder, load_in_8bit):
    found = []
    for fast in (False, True):
        base = load_model(tiny_model_folder, dtype="float32", load_in_8bit=load_in_8bit)
        model, changed = adapted(base, fast=fast)
        assert changed == (14 if fast else 0)
        found.append(values_and_gradients(model))
    (plain_values, plain_gradients), (values, gradients) = found
    assert (values - plain_values).abs().max() < 1e-5 * plain_values.abs().max()
    assert worst(gradients, plain_gradients) < 1e-5


def test_in_bfloat16_the_gradients_are_as_near_to_float32_as_those_of_peft():
    _, exact = values_and_gradients(adapted(fast=False)[0])
    model, _ = adapted(tiny_llama(dtype=torch.bfloat16), fast=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    _, fast = values_and_gradients(model)
    _, slow = values_and_gradients(adapted(tiny_llama(dtype=torch.bfloat16), fast=False)[0])
    assert worst(fast, exact) < 1.5 * worst(slow, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_at_zero_is_the_base_model_bit_by_bit(dtype):
    model, _ = adapted(tiny_llama(dtype=dtype), fast=True, zero=True)
    with torch.no_grad():
        on = model(IDS).logits
        with model.disable_adapter():
            assert torch.equal(on, model(IDS).logits)


KINDS = ["float", "float, biased", "int8", "int8, biased"]


def lone_layer(kind: str) -> torch.nn.Module:
    """A layer of 256 inputs and 64 outputs with a small adapter, its first row of weights zero."""
    torch.manual_seed(1)
    bias = "biased" in kind
    layer = torch.nn.Linear(256, 64, bias=bias)
    with torch.no_grad():
        layer.weight[0] = 0
    if "int8" in kind:
        made = bnb.nn.Linear8bitLt(256, 64, bias=bias, has_fp16_weights=False)
        made.load_state_dict(layer.state_dict())
        layer = made.to("cpu")
    holder = torch.nn.Sequential(layer)
    holder.is_loaded_in_8bit = "int8" in kind
    fix_8bit_forward(holder)
    # a scale that is no power of two is rounded
    model = get_peft_model(holder, LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    assert speed_up_adapters(model) == 1
    found = model.base_model.model[0]
    with torch.no_grad():
        found.lora_B["default"].weight.normal_(0, 2e-4)  # a thousandth of the outputs
    return found


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_additions_below_the_rounding_of_bfloat16_are_not_lost(kind):
    layer = lone_layer(kind)
    x = torch.randn(2000, 256).bfloat16()
    a, b = (getattr(layer, n)["default"].weight.double() for n in ("lora_A", "lora_B"))
    wanted = layer.scaling["default"] * x.double() @ a.t() @ b.t()
    if "int8" not in kind:
        layer.base_layer.bfloat16()
    on, off = layer(x).double(), layer.base_layer(x).double()
    if "biased" not in kind:
        assert torch.allclose(on[:, 0], wanted[:, 0], rtol=2**-5, atol=1e-5)
    found, wanted = (on - off)[:, 1:], wanted[:, 1:]  # of rows of weights that are not zero
    assert wanted.abs().mean() < 2**-8 * off[:, 1:].abs().mean()
    assert (found * wanted).sum() / wanted.square().sum() == pytest.approx(1, abs=0.05)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_drawn_layer_has_the_bits_of_the_trained_one(kind):
    layer = lone_layer(kind)
    layer.lora_B["default"].weight.mul_(100)
    if "int8" not in kind:
        layer.base_layer.bfloat16()
    x = torch.randn(3, 40, 256).bfloat16()
    trained, base = layer(x), layer.base_layer(x)
    assert not torch.equal(trained, base)
    if "int8" in kind:
        layer.base_layer = ScaledLinear(layer.base_layer, torch.bfloat16)
    for each in (layer.lora_A, layer.lora_B):
        each.bfloat16()
    assert torch.equal(layer(x), trained)
    layer.lora_B["default"].weight.zero_()
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_may_be_empty_and_changed_in_place(kind):
    layer = lone_layer(kind)
    assert layer(torch.randn(2, 0, 256)).shape == (2, 0, 64)
    layer(torch.randn(5, 256)).relu_().sum().backward()
    assert layer.lora_B["default"].weight.grad.abs().max() > 0


def test_a_bias_that_is_trained_gets_its_gradient():
    layer = lone_layer("float, biased")
    layer.base_layer.bias.requires_grad_()
    layer(torch.randn(5, 256)).sum().backward()
    assert layer.base_layer.bias.grad == pytest.approx(5)


def test_a_base_layer_with_hooks_is_called():
    layer, seen = lone_layer("float"), []
    x = torch.randn(5, 256)
    before = layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert layer(x).detach() == pytest.approx(before.detach(), abs=1e-6)
    assert len(seen) == 1


def test_no_copy_of_an_input_is_kept_for_the_backward_pass():
    saved = {}
    for fast in (False, True):
        model, _ = adapted(tiny_llama(dtype=torch.bfloat16), fast=fast)
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits = model(IDS).logits
        saved[fast] = sum(kept.values())
        assert logits.requires_grad
    assert saved[True] < 0.85 * saved[False]


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_other_forms_are_left_to_peft(settings):
    assert adapted(fast=True, **settings)[1] == 0


@torch.no_grad()
def test_merged_and_several_adapters_are_left_to_peft():
    model, _ = adapted(fast=True)
    before = model(IDS).logits
    model.merge_adapter()
    assert model(IDS).logits == pytest.approx(before, abs=1e-4)
    model.unmerge_adapter()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    both = model(IDS).logits  # the second starts at zero
    assert both == pytest.approx(before, abs=1e-4)
