"""Hard-label DPO is TRL's: same pairs, model, seed and order, same numbers step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer

pytestmark = [pytest.mark.bench, pytest.mark.filterwarnings("ignore")]

STEPS = 6
SAME = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins")
SAME += ("rewards/chosen", "rewards/rejected", "rewards/accuracies")


def tiny_qwen() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    return Qwen3ForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=259,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=2,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    torch.manual_seed(2)
    return GPT2LMHeadModel(config)


MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen, "gpt2": tiny_gpt2}


def plain_pairs() -> Dataset:
    """Make pairs of unequal length, some with the longer response chosen, some the shorter."""
    return Dataset.from_dict(
        {
            "prompt": [f"Question {i}: " + "why? " * (i % 4) for i in range(24)],
            "chosen": [f"{'yes' * (1 + i % 3)} {i}" for i in range(24)],
            "rejected": [f"{'no' * (1 + i % 5)} {i}" for i in range(24)],
        }
    )


def settings(folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "logging_steps": 1,
        "beta": 0.1,
        "seed": 3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def by_ours(model: PreTrainedModel, reference: PreTrainedModel, folder: Path) -> list[dict]:
    args = CTRLDPOConfig(**settings(folder), loss="dpo")
    trainer = CTRLDPOTrainer(
        model, args, plain_pairs(), processing_class=tiny_tokenizer(), ref_model=reference
    )
    trainer.train()
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def by_trl(model: PreTrainedModel, folder: Path) -> list[dict]:
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(**settings(folder), bf16=False, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=plain_pairs(), processing_class=tiny_tokenizer()
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(params=MODELS)
def folder(request, tmp_path) -> Path:
    """Return a folder with a model: TRL loads its reference policy again, by name."""
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")


def test_six_steps_of_dpo(folder):
    theirs = by_trl(load(folder), folder / "trl")
    ours = by_ours(load(folder), load(folder), folder / "ours")
    assert len(ours) == len(theirs) == STEPS
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        for name in SAME:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    (folder / "both.json").write_text(json.dumps([ours, theirs]))
    assert ours[-1]["rewards/margins"] > 0.1  # there was something to agree on
