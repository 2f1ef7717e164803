"""Losses that TRL also has, on the same log-probabilities: values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo.engine.losses import group_loss

pytestmark = pytest.mark.bench
BETA = 0.3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("ours", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_values_and_gradients_are_those_of_trl(ours, theirs, tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(
        str(tmp_path), loss_type=theirs, beta=BETA, use_cpu=True, bf16=False, report_to="none"
    )
    data = Dataset.from_dict({"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]})
    trainer = trl.DPOTrainer(
        tiny_llama(), tiny_llama(), args, train_dataset=data, processing_class=tiny_tokenizer()
    )
    trainer.precompute_ref_logps = True
    n = 64
    generator = torch.Generator().manual_seed(0)
    logps, reference = (torch.randn(n, 2, generator=generator) * 8 for _ in range(2))
    logps.requires_grad_(True)
    # responses of one token, so that TRL's IPO, which divides by length, is that of the paper
    per_token = logps.T.reshape(-1, 1)

    def model(**_):
        shape = {"entropy": per_token * 0, "mean_logits": per_token * 0, "is_top1": per_token > 0}
        return SimpleNamespace(log_probs=per_token, **shape)

    ids = torch.ones(2 * n, 2, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "completion_mask": ids * torch.tensor([0, 1]),
    }
    inputs |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    theirs_value = trainer._compute_loss(model, inputs, return_outputs=False)
    (theirs_grad,) = torch.autograd.grad(theirs_value, logps)
    targets = torch.tensor([[1.0, 0.0]]).expand(n, 2)
    mask = torch.ones(n, 2, dtype=torch.bool)
    value = group_loss(ours, logps - reference, targets, mask, beta=BETA, anchor=0.0).mean()
    (grad,) = torch.autograd.grad(value, logps)
    assert value.item() == pytest.approx(theirs_value.item(), rel=1e-6)
    assert torch.allclose(grad, theirs_grad, rtol=1e-5, atol=1e-8)
