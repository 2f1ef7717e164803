"""The reference policy in every mode: which one it is, and exactly 0 apart before an update."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from plain import plain_logps
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, relabel
from ctrl_dpo.cli import app
from ctrl_dpo.data.folders import read_record, read_rows
from ctrl_dpo.data.hashes import model_hash
from ctrl_dpo.data.tokens import prompt_tokens
from ctrl_dpo.engine.generation import Sampler
from ctrl_dpo.engine.identity import tensors_hash
from ctrl_dpo.engine.models import load_policy, recorded_reference
from ctrl_dpo.engine.policies import (
    ADAPTER_OFF,
    FROM_DATASET,
    FROZEN_ADAPTER,
    SECOND_MODEL,
)
from ctrl_dpo.engine.rows import training_rows
from ctrl_dpo.sample import sample


def labels(count: int = 3, first: int = 0) -> Dataset:
    rows = [
        {
            "prompt": f"question {i}",
            "responses": [f"{'abc'[j]}{i}" * (2 * j + 1) for j in range(3)],
            "rewards": [float((i + 2 * j) % 5) for j in range(3)],
        }
        for i in range(first, first + count)
    ]
    return relabel(
        Dataset.from_list(rows), procedure="single_draw", transformation="identity", beta=0.2
    )


def lora(**settings) -> LoraConfig:
    options = {"r": 8, "lora_dropout": 0.3, "target_modules": "all-linear"} | settings
    return LoraConfig(task_type="CAUSAL_LM", **options)


def trained(model, seed: int = 1):
    """Attach an adapter that changes the model."""
    torch.manual_seed(seed)
    model = get_peft_model(model, lora())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return model


def in_8bit(folder):
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised, dtype=torch.float32
    )
    return model.requires_grad_(False)


def build(tmp_path, model, data=None, ref_model=None, peft_config=None, **settings):
    defaults = {
        "learning_rate": 1e-2,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "model_dtype": "float32",
        "reference_cache": str(tmp_path / "reference"),
    }
    args = CTRLDPOConfig(str(tmp_path / "out"), **defaults | settings)
    options = {"processing_class": tiny_tokenizer(), "ref_model": ref_model}
    data = labels() if data is None else data
    return CTRLDPOTrainer(model, args, data, peft_config=peft_config, **options)


def of_dataset(tmp_path, folder, dtype, **settings):
    """Build a trainer whose data carries what another one computed."""
    made = build(tmp_path / "first", dtype(folder), peft_config=lora(), **settings)
    values = [row["reference_logps"] for row in made.train_dataset]
    data = labels().add_column("reference_logps", values)
    return data.add_column("reference_computed", [made.reference_computed] * len(data))


def make(mode, precision, folder, tmp_path):
    settings = {"bf16": True} if precision == "autocast" else {}
    if precision == "int8":
        settings["optim"] = "adamw_8bit"
    types = {
        "float32": lambda f: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32),
        "bfloat16": lambda f: AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16),
        "int8": in_8bit,
    }
    load = types.get(precision, types["float32"])
    if mode == "adapter folder":
        trained(load(folder)).save_pretrained(tmp_path / "adapter")
        settings["load_in_8bit"] = precision == "int8"
        return build(tmp_path, tmp_path / "adapter", **settings)
    if mode.startswith("dataset"):
        data = of_dataset(tmp_path, folder, load, **settings)
        adapter = lora() if mode == "dataset, adapter" else None
        return build(tmp_path, load(folder), data, peft_config=adapter, **settings)
    made = {
        "new adapter": lambda: {"model": load(folder), "peft_config": lora()},
        "adapter that does nothing": lambda: {"model": get_peft_model(load(folder), lora())},
        "trained adapter": lambda: {"model": trained(load(folder))},
        "second model, adapter": lambda: {
            "model": trained(load(folder)),
            "ref_model": trained(load(folder)),
        },
        "second model, all weights": lambda: {"model": load(folder), "ref_model": load(folder)},
    }
    return build(tmp_path, **made[mode](), **settings)


KINDS = {
    "new adapter": ADAPTER_OFF,
    "adapter that does nothing": ADAPTER_OFF,
    "trained adapter": FROZEN_ADAPTER,
    "adapter folder": FROZEN_ADAPTER,
    "second model, adapter": SECOND_MODEL,
    "second model, all weights": SECOND_MODEL,
    "dataset, adapter": ADAPTER_OFF,
    "dataset, all weights": FROM_DATASET,
}
CASES = [
    (mode, precision)
    for mode in KINDS
    for precision in ("float32", "int8", "bfloat16", "autocast")
    if not ("all weights" in mode and precision == "int8")
]


@pytest.fixture(autouse=True)
def few_layers_of_optimiser_state():
    """Keep bitsandbytes' process-wide list of modules as it was."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    before = list(manager.module_weight_config_triple)
    yield
    manager.module_weight_config_triple[:] = before


def logratios(made) -> torch.Tensor:
    parts = []
    for inputs in made.get_train_dataloader():
        inputs = made._prepare_inputs(inputs)
        with torch.no_grad():
            for part in inputs["passes"]:
                parts.append(made._logps(made.model, part) - part["reference_logps"])
    return torch.cat(parts)


@pytest.mark.parametrize(("mode", "precision"), CASES)
def test_policy_and_reference_are_one_function_before_the_first_update(
    mode, precision, tiny_model_folder, tmp_path
):
    made = make(mode, precision, tiny_model_folder, tmp_path)
    assert made.reference.kind == KINDS[mode]
    made.model.eval()
    assert (logratios(made) == 0.0).all()
    made.model.train()
    if "trained" in mode or "folder" in mode or mode == "second model, adapter":
        # this adapter's own dropout is noise on what it already does
        assert (logratios(made) != 0.0).any()
        for module in made.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    assert (logratios(made) == 0.0).all()
    made._check_step_zero(made.model, made._prepare_inputs(next(iter(made.get_train_dataloader()))))
    assert made.model.training


@pytest.mark.parametrize("mode", ["new adapter", "trained adapter", "second model, all weights"])
def test_the_reference_stays_after_training_and_is_computed_for_new_data(
    mode, tiny_model_folder, tmp_path
):
    made = make(mode, "float32", tiny_model_folder, tmp_path)
    fresh = labels(count=2, first=9)
    before = training_rows(fresh, made.processing_class, made.args, made.beta)[0]
    made._add_reference_logps(before, made.args)
    made.train()
    shutil.rmtree(tmp_path / "reference")
    trained_weights = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    after = training_rows(fresh, made.processing_class, made.args, made.beta)[0]
    made._add_reference_logps(after, made.args)
    assert after == before
    for name, weight in made.model.named_parameters():
        assert torch.equal(weight, trained_weights[name]), name
    found = made.evaluate(fresh)
    assert abs(found["eval_rewards/margins"]) > 1e-3  # the policy has moved, its reference not


def test_the_log_names_the_reference_policy(tiny_model_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "ctrl_dpo"):
        make("trained adapter", "float32", tiny_model_folder, tmp_path)
    assert f"reference policy: {FROZEN_ADAPTER}" in caplog.text
    assert "reference log-probabilities: 3 computed, 0 found, 0 of the dataset" in caplog.text


@pytest.mark.parametrize(
    "start", ["pissa", "pissa_niter_4", "corda", "olora", "OLoRA", "loftq", "lora_ga"]
)
def test_an_adapter_whose_start_rewrites_the_base_model_is_refused(
    start, tiny_model_folder, tmp_path
):
    adapter = lora(target_modules=["q_proj"])
    adapter.init_lora_weights = start
    message = f"init_lora_weights must leave the base model as it is.* got '{start}', which rewr"
    with pytest.raises(ValueError, match=message):
        build(tmp_path, tiny_model_folder, peft_config=adapter)
    assert not (tmp_path / "reference").exists()
    with pytest.raises(ValueError, match=r"layer_replication must be left out.*got \[\[0, 2\], "):
        build(tmp_path, tiny_llama(), peft_config=lora(layer_replication=[[0, 2], [0, 2]]))


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva", "mica"])
@pytest.mark.filterwarnings("ignore:.*EVA:UserWarning")
def test_other_starts_leave_the_base_model(start, tmp_path):
    before = f"tensors:{tensors_hash(tiny_llama())}"
    adapter = lora(init_lora_weights=start, lora_dropout=0.0)
    made = build(tmp_path, tiny_llama(), peft_config=adapter)
    assert made.reference.identity == before
    if start != "orthogonal":  # its product is 0 up to rounding: the check of step 0 has its say
        made.train()
    assert f"tensors:{tensors_hash(made.model, adapter=False)}" == before


@pytest.fixture
def merged(tiny_model_folder, tmp_path):
    """Merge an adapter in memory; the model keeps the name of the folder it was loaded from."""

    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)

    trained(load()).save_pretrained(tmp_path / "sft")
    model = PeftModel.from_pretrained(load(), tmp_path / "sft").merge_and_unload()
    assert model.name_or_path == str(tiny_model_folder)
    return model


def test_a_model_changed_in_memory_is_not_the_one_it_is_named_after(
    merged, tiny_model_folder, tmp_path
):
    tensors = f"tensors:{tensors_hash(merged)}"
    assert tensors != f"tensors:{tensors_hash(tiny_llama())}"
    made = build(tmp_path, get_peft_model(merged, lora()))
    assert (made.reference.kind, made.reference.identity) == (ADAPTER_OFF, tensors)
    assert made.reference.start == tensors
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    # the untouched model has a cache of its own, under its files where its name was given
    build(tmp_path, get_peft_model(plain, lora())).train()
    named = build(tmp_path, str(tiny_model_folder), peft_config=lora())
    assert named.reference.identity == f"files:{model_hash(tiny_model_folder)}"
    named.train()


def test_both_ways_to_attach_an_adapter_share_the_cache(tmp_path, caplog):
    build(tmp_path, tiny_llama(), peft_config=lora())
    with caplog.at_level(logging.INFO, "ctrl_dpo"):
        build(tmp_path, get_peft_model(tiny_llama(), lora()))
    assert "reference log-probabilities: 0 computed, 3 found, 0 of the dataset" in caplog.text


def test_dropout_of_the_base_model_is_off_and_of_the_adapter_on(tmp_path):
    settings = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 259, "n_positions": 128}
    settings |= {"bos_token_id": 2, "eos_token_id": 2, "resid_pdrop": 0.5, "attn_pdrop": 0.5}
    torch.manual_seed(0)
    adapter = lora(target_modules=["c_attn"], fan_in_fan_out=True)
    made = build(tmp_path, GPT2LMHeadModel(GPT2Config(**settings)), peft_config=adapter)
    found = {n: m.p for n, m in made.model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert {p for n, p in found.items() if "lora" in n} == {0.3}
    assert {p for n, p in found.items() if "lora" not in n} == {0.0}
    made.model.train()
    assert (logratios(made) == 0.0).all()


def test_another_model_stops_the_run_before_the_first_update(tmp_path):
    made = build(tmp_path, tiny_llama(), ref_model=tiny_llama(seed=1), peft_config=lora())
    with pytest.raises(ValueError, match="before the first update must be within 0 nats; got"):
        made.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "files:other"}, "computed as in training; got model 'files:other' instead"),
        ({"template": "0"}, "got template '0' instead of"),
        ({"weights": "of other types"}, "got weights 'of other types' instead of"),
        ({"autocast": "torch.bfloat16"}, "got autocast 'torch.bfloat16' instead of ''"),
        ({"share_prompt": False}, "got share_prompt False instead of True. Remove the column"),
    ],
)
def test_values_of_the_dataset_that_were_computed_otherwise_are_refused(
    change, message, tiny_model_folder, tmp_path
):
    def load(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    data = of_dataset(tmp_path, tiny_model_folder, load)
    record = json.loads(data[0]["reference_computed"]) | change
    data = data.remove_columns("reference_computed")
    bare = data
    data = data.add_column("reference_computed", [json.dumps(record)] * len(data))
    with pytest.raises(ValueError, match=message):
        build(tmp_path, load(tiny_model_folder), data, peft_config=lora())
    with pytest.raises(ValueError, match="must come with 'reference_computed', the record"):
        build(tmp_path, load(tiny_model_folder), bare, peft_config=lora())


def test_8_bits_that_are_not_there_or_cannot_be_trained_are_refused(tiny_model_folder, tmp_path):
    with pytest.raises(ValueError, match="must be in 8 bits with load_in_8bit; got Llama.*GGUF"):
        build(tmp_path, tiny_llama(), peft_config=lora(), load_in_8bit=True)
    with pytest.raises(ValueError, match="peft_config must be given for a model in 8 bits; got No"):
        build(tmp_path, in_8bit(tiny_model_folder))
    with pytest.raises(ValueError, match="must be left out for a model that has an adapter; got L"):
        build(tmp_path, trained(tiny_llama()), peft_config=lora())


def test_a_tokenizer_that_nothing_names_must_be_given(tmp_path):
    for model in ("", tiny_llama()):
        with pytest.raises(ValueError, match=r"in training\) must be given .* named ''"):
            CTRLDPOTrainer(model, CTRLDPOConfig(str(tmp_path), report_to="none"), labels())


def test_an_adapter_that_cannot_be_trained_is_named(tiny_model_folder, tmp_path):
    trained(tiny_llama()).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="trainable weights; got none.*is_trainable=True"):
        build(tmp_path, frozen)


# ---- the reference policy of a trained policy's log-ratios

SAMPLER = Sampler(draws=2, max_new_tokens=6, seed=4)
PROMPTS = Dataset.from_dict({"prompt": ["one", "a second one"]})


def plain(policy, row) -> list[float]:
    prompt = prompt_tokens(tiny_tokenizer(), row["prompt"])
    group = {"prompt_ids": prompt, "response_ids": row["response_ids"]}
    return plain_logps(policy, [group]).tolist()


@pytest.mark.parametrize(
    "mode",
    ["new adapter", "trained adapter", "second model, all weights", "dataset, all weights"],
)
def test_a_saved_policy_records_its_reference_policy(mode, tiny_model_folder, tmp_path):
    made = make(mode, "float32", tiny_model_folder, tmp_path)
    made.args.save_strategy, made.args.save_steps = "steps", 1
    made.train()
    made.save_model()
    expected = {"kind": KINDS[mode], "identity": made.reference.identity}
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-2"):
        record = json.loads((folder / "reference_policy.json").read_text())
        assert record == expected, folder
        assert recorded_reference(load_policy(folder, dtype="float32")) == expected
    assert recorded_reference(made.model) == expected
    if mode == "new adapter":
        rows = sample(PROMPTS, made.model, SAMPLER, tokenizer=tiny_tokenizer(), log_ratios=True)
        assert rows["policy_logps"][:] != rows["reference_logps"][:]
        return
    message = f"of a policy trained against {KINDS[mode]}; got None.*--reference MODEL"
    for policy in (made.model, tmp_path / "out"):
        with pytest.raises(ValueError, match=message):
            sample(PROMPTS, policy, SAMPLER, tokenizer=tiny_tokenizer(), log_ratios=True)


@pytest.fixture
def continued(tiny_model_folder, tmp_path):
    """Folder of a policy that began as an adapter, which is its reference policy."""
    made = make("adapter folder", "float32", tiny_model_folder, tmp_path)
    made.train()
    made.save_model()
    return tmp_path / "out"


def test_log_ratios_are_against_the_policy_of_training(continued, tiny_model_folder, tmp_path):
    start, output = tmp_path / "adapter", tmp_path / "draws"
    options = ["--draws", "2", "--max-new-tokens", "6", "--dtype", "float32", "--log-ratios"]
    PROMPTS.to_json(tmp_path / "prompts.jsonl")
    words = ["sample", str(continued), str(tmp_path / "prompts.jsonl"), "--output", str(output)]
    for wrong, message in (
        ([], f"of a policy trained against {FROZEN_ADAPTER}; got None"),
        (
            ["--reference", str(tiny_model_folder)],
            r"that was trained against, .* got files:\w+\. G",
        ),
    ):
        refused = CliRunner().invoke(app, [*words, *options, *wrong]).exception
        with pytest.raises(ValueError, match=message):
            raise refused
        assert not output.exists()
    made = CliRunner().invoke(app, [*words, *options, "--reference", str(start)])
    assert made.exit_code == 0, made.output
    policy, reference = (load_policy(f, dtype="float32") for f in (continued, start))
    for row in read_rows(output):
        assert row["policy_logps"] == pytest.approx(plain(policy, row), abs=1e-4)
        expected = plain(reference, row)
        assert row["reference_logps"] == pytest.approx(expected, abs=1e-4)
        with reference.disable_adapter():  # what they were taken against before
            assert plain(reference, row) != pytest.approx(expected, abs=0.1)
    known = json.loads((continued / "reference_policy.json").read_text())["identity"]
    assert read_record(output)["inputs"]["reference"] == known


@pytest.mark.parametrize("in_8_bits", [False, True])
@pytest.mark.parametrize("kind", ["adapter", "whole model", "adapter that does nothing"])
def test_a_policy_that_is_its_reference_has_a_kl_of_exactly_0(
    kind, in_8_bits, tiny_model_folder, tmp_path
):
    if kind == "whole model":
        folder = given = tiny_model_folder
    else:
        folder = given = tmp_path / "adapter"
        base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        made = trained(base) if kind == "adapter" else get_peft_model(base, lora())
        made.save_pretrained(folder)
    if kind == "adapter that does nothing":
        given = tiny_model_folder
    policy = load_policy(folder, dtype="float32", load_in_8bit=in_8_bits)
    options = {"tokenizer": tiny_tokenizer(), "log_ratios": True, "reference": given}
    for _ in range(2):  # the second time it has been made ready for drawing
        rows = sample(PROMPTS, policy, SAMPLER, **options)
        assert rows["policy_logps"][:] == rows["reference_logps"][:]


def saved(made, folder, base):
    """Save a trainer's adapter as one on the base model of a folder."""
    made.train()
    made.save_model(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_is_drawn_from_on_the_model_it_was_trained_on(
    merged, tiny_model_folder, tmp_path
):
    merged.save_pretrained(tmp_path / "base")
    made = build(tmp_path, merged, peft_config=lora(modules_to_save=["norm"]))
    # what PEFT writes: the folder that the merged model was loaded from
    wrong = saved(made, tmp_path / "wrong", tiny_model_folder)
    right = saved(made, tmp_path / "right", tmp_path / "base")
    identity = f"tensors:{tensors_hash(load_policy(tmp_path / 'base', dtype='float32'))}"
    assert made.reference.identity == identity
    options = {"tokenizer": tiny_tokenizer(), "log_ratios": True, "dtype": "float32"}
    found = f"tensors:{tensors_hash(tiny_llama())}, '{tiny_model_folder}'. Save that model"
    with pytest.raises(
        ValueError, match=f"on the model it was trained on, {identity}; got {found}"
    ):
        sample(PROMPTS, wrong, SAMPLER, **options)
    row = sample(PROMPTS, right, SAMPLER, **options)[0]
    policy = load_policy(right, dtype="float32")
    assert row["policy_logps"] == pytest.approx(plain(policy, row), abs=1e-4)
    with policy.disable_adapter():
        assert row["reference_logps"] == pytest.approx(plain(policy, row), abs=1e-4)
    del options["dtype"]
    for _ in range(2):  # the second time it has been made ready for drawing
        sample(PROMPTS, policy, SAMPLER, **options)


@pytest.mark.parametrize(
    ("stored", "trained_in", "drawn_in", "fine"),
    [
        ("bfloat16", "float32", "bfloat16", True),  # the float32 weights are bfloat16 numbers
        ("float32", "bfloat16", "float32", True),
        ("float32", "float32", "bfloat16", False),
    ],
)
def test_a_base_model_known_by_its_tensors_in_another_type(
    stored, trained_in, drawn_in, fine, tmp_path
):
    tiny_llama(dtype=getattr(torch, stored)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=trained_in)
    folder = saved(build(tmp_path, model, peft_config=lora()), tmp_path / "a", tmp_path / "base")
    options = {"tokenizer": tiny_tokenizer(), "log_ratios": True, "dtype": drawn_in}
    if fine:
        assert len(sample(PROMPTS, folder, SAMPLER, **options)) == 2
        return
    message = r"got tensors:.* is that one, torch.bfloat16 rounds it: load it as in tr.* \(--dtype"
    with pytest.raises(ValueError, match=message):
        sample(PROMPTS, folder, SAMPLER, **options)


def test_a_trained_int8_model_made_ready_for_drawing_is_on_its_base(tiny_model_folder, tmp_path):
    made = build(tmp_path, in_8bit(tiny_model_folder), peft_config=lora())
    for log_ratios in (False, True):  # its tensors are others after the first
        rows = sample(
            PROMPTS, made.model, SAMPLER, tokenizer=tiny_tokenizer(), log_ratios=log_ratios
        )
    assert rows["policy_logps"][:] == rows["reference_logps"][:]


def test_a_base_model_known_by_its_files_that_has_changed(tmp_path):
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    folder = saved(build(tmp_path, str(base), peft_config=lora()), tmp_path / "adapter", base)
    options = {"tokenizer": tiny_tokenizer(), "log_ratios": True, "dtype": "bfloat16"}
    assert len(sample(PROMPTS, folder, SAMPLER, **options)) == 2
    known = model_hash(base)
    tiny_llama(seed=1).save_pretrained(base)
    found = model_hash(base)
    with pytest.raises(ValueError, match=f"trained on, files:{known}; got files:{found}, '{base}'"):
        sample(PROMPTS, folder, SAMPLER, **options)


def test_adapters_without_a_record_are_compared_with_the_adapter_off(tiny_model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    trained(base).save_pretrained(tmp_path / "adapter")
    policy = load_policy(tmp_path / "adapter", dtype="float32")
    assert recorded_reference(policy) == {}
    options = {"tokenizer": tiny_tokenizer(), "log_ratios": True}
    row = sample(PROMPTS, policy, SAMPLER, **options)[0]
    again = load_policy(tmp_path / "adapter", dtype="float32")
    with again.disable_adapter():
        assert row["reference_logps"] == pytest.approx(plain(again, row), abs=1e-4)


def test_a_second_model_given_by_name_is_known_by_its_files(tiny_model_folder, tmp_path):
    made = build(tmp_path, tiny_model_folder, ref_model=tiny_model_folder)
    assert made.reference.kind == SECOND_MODEL
    assert made.reference.identity.startswith("files:")
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    made.save_model()
    with pytest.raises(ValueError, match=f"trained against, {SECOND_MODEL} .files:.*got files:"):
        sample(PROMPTS, tmp_path / "out", SAMPLER, log_ratios=True, reference=tmp_path / "other")
