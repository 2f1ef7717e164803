"""What a step reports, against plain numpy; and the refusals before the first step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import tiny_llama

from ctrl_dpo.engine.checks import check_model, check_step_zero
from ctrl_dpo.engine.metrics import RunningMeans, batch_metrics


def test_metrics_by_numpy(rng):
    d, t, logps = (rng.normal(size=(3, 4)) for _ in range(3))
    sizes, beta = [4, 2, 3], 0.3
    mask = np.arange(4) < np.array(sizes)[:, None]
    tensors = [torch.tensor(np.where(mask, x, 99.0)) for x in (d, t)]
    found = batch_metrics(*tensors, torch.tensor(mask), torch.tensor(logps), beta)
    means = {name: float(a / b) for name, (a, b) in found.items()}
    rows = [(d[i, :n], t[i, :n], logps[i, :n]) for i, n in enumerate(sizes)]
    best, worst = [int(np.argmax(r[1])) for r in rows], [int(np.argmin(r[1])) for r in rows]
    chosen = np.array([r[0][i] for r, i in zip(rows, best, strict=True)])
    rejected = np.array([r[0][i] for r, i in zip(rows, worst, strict=True)])
    weights = [np.exp(r[0]) for r in rows]
    kl = [np.sum(w * r[0]) / w.sum() - np.log(w.mean()) for w, r in zip(weights, rows, strict=True)]
    spread = sum(np.sum((r[1] - r[1].mean()) ** 2) for r in rows)
    rest = sum(np.sum((r[0] - r[0].mean() - r[1] + r[1].mean()) ** 2) for r in rows)
    wanted = {
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margins": beta * (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "logps/chosen": np.mean([r[2][i] for r, i in zip(rows, best, strict=True)]),
        "logps/rejected": np.mean([r[2][i] for r, i in zip(rows, worst, strict=True)]),
        "logratios/margins": (chosen - rejected).mean(),
        "logratios/chosen_below_0": (chosen < 0).mean(),
        "kl": np.mean(kl),
        "normalisation": np.mean([w.mean() for w in weights]),
        "fit/r2": 1 - rest / spread,
    }
    assert means == pytest.approx(wanted)


def test_running_means_add_batches_by_their_weights():
    means = RunningMeans()
    means.add({"a": (torch.tensor(3.0), torch.tensor(1.0)), "b": (torch.tensor(1.0),) * 2})
    means.add({"a": (torch.tensor(1.0), torch.tensor(3.0))})
    assert means.means() == {"a": 1.0, "b": 1.0}
    assert means.means() == {}


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | settings)


def test_models_that_cannot_be_trained_are_refused():
    adapted = get_peft_model(tiny_llama(), lora())
    check_model(adapted, None)
    check_model(tiny_llama(), tiny_llama())
    frozen = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable weights; got none. Give peft_config"):
        check_model(frozen, None)
    with pytest.raises(ValueError, match="ref_model must be given .*; got None"):
        check_model(tiny_llama(), None)
    prompt = get_peft_model(
        tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="must not be prompt learning; got .*PROMPT_TUNING"):
        check_model(prompt, None)
    head = get_peft_model(
        tiny_llama(tie_word_embeddings=False), lora(target_modules=["q_proj", "lm_head"])
    )
    with pytest.raises(ValueError, match="must leave the output embeddings as they are"):
        check_model(head, None)


def test_another_reference_is_refused():
    check_step_zero(torch.tensor([0.0, 1e-4]), torch.float32)
    check_step_zero(torch.tensor([0.3]), torch.bfloat16)
    with pytest.raises(ValueError, match="must be within 0.001 nats; got 0.002"):
        check_step_zero(torch.tensor([0.0, 0.002]), torch.float32)
    with pytest.raises(ValueError, match="within 0.5 nats; got nan"):
        check_step_zero(torch.tensor([float("nan")]), torch.bfloat16)
