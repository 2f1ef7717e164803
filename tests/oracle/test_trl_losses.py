"""Losses against TRL's on the same log-probabilities, where it has the loss: value and gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ctrl_dpo.engine.losses import group_loss

pytestmark = pytest.mark.bench

PAIRS = 6


def by_trl(name: str, logps: Tensor, reference: Tensor, lengths: Tensor, **options) -> Tensor:
    """Return TRL's loss for log-probabilities ``(pairs, 2)`` of chosen and rejected responses.

    TRL computes it in a method of its trainer that calls the model. A table stands in for the
    model: the first of a response's tokens has all its log-probability.
    """
    trl = pytest.importorskip("trl")

    def rows(pairs: Tensor) -> Tensor:
        return pairs.T.reshape(-1)  # TRL's batch: all chosen responses, then all rejected

    width = int(lengths.max())
    first = torch.zeros(width, dtype=logps.dtype)
    first[0] = 1.0
    log_probs = rows(logps).unsqueeze(1) * first
    nothing = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    prompt = torch.zeros(len(log_probs), 1)
    tokens = torch.arange(width) < rows(lengths).unsqueeze(1)
    batch = {
        "input_ids": torch.zeros(len(log_probs), width + 1, dtype=torch.long),
        "attention_mask": torch.ones(len(log_probs), width + 1),
        "completion_mask": torch.cat([prompt, tokens], 1).long(),
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    settings = {
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_types": [name],
        "loss_weights": [1.0],
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    trainer = SimpleNamespace(**settings | options)
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)


def by_ours(name: str, logratios: Tensor, targets: list[float], beta: float, anchor=0.0) -> Tensor:
    mask = torch.ones_like(logratios, dtype=torch.bool)
    wanted = torch.tensor(targets, dtype=logratios.dtype).expand_as(logratios)
    return group_loss(name, logratios, wanted, mask, beta=beta, anchor=anchor).mean()


def compare(rng, ours: Callable[[Tensor, Tensor], Tensor], pairs: int = PAIRS, **trl) -> None:
    """Compare value and gradient of our function of log-ratios and lengths with TRL's loss."""
    logps = torch.tensor(rng.normal(-40, 8, (pairs, 2)), requires_grad=True)
    reference = torch.tensor(rng.normal(-40, 8, (pairs, 2)))
    lengths = torch.tensor(rng.integers(1, 9, (pairs, 2)))
    theirs = by_trl(logps=logps, reference=reference, lengths=lengths, **trl)
    mine = ours(logps - reference, lengths)
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, logps)[0] for loss in (mine, theirs)]
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-10, atol=1e-14)


BETAS = pytest.mark.parametrize("beta", [0.02, 0.1, 1.0])


@BETAS
def test_dpo_is_sigmoid(beta, rng):
    compare(rng, lambda d, _: by_ours("dpo", d, [1.0, 0.0], beta), name="sigmoid", beta=beta)


@BETAS
def test_ipo_is_ipo_of_log_ratios_per_token(beta, rng):
    # TRL divides log-ratios by the response's length, which the paper does not
    def ours(d: Tensor, lengths: Tensor) -> Tensor:
        return by_ours("ipo", d / lengths, [1.0, 0.0], beta)

    compare(rng, ours, name="ipo", beta=beta)


@BETAS
def test_soft_labels_are_smoothed_labels(beta, rng):
    # of TRL's losses only aot smooths labels as cDPO does; on one pair its sorting does nothing
    smoothing = 0.2
    margin = math.log((1 - smoothing) / smoothing) / beta
    options = {"name": "aot", "beta": beta, "label_smoothing": smoothing}
    compare(rng, lambda d, _: by_ours("soft_label", d, [margin, 0.0], beta), pairs=1, **options)


@BETAS
@pytest.mark.parametrize("loss", ["soft_label", "softmax"])
def test_certain_targets_are_hard_labels(loss, beta, rng):
    # the softmax of two is a sigmoid; beta belongs to the log-ratios, which it has not
    def ours(d: Tensor, _lengths: Tensor) -> Tensor:
        return by_ours(loss, d if loss == "soft_label" else beta * d, [1e6, 0.0], beta)

    compare(rng, ours, name="sigmoid", beta=beta)


@BETAS
def test_the_pointwise_regression_is_sppo_for_its_targets(beta, rng):
    # anchor 1 is the mean of two squares, SPPO their sum
    targets = [0.5 / beta, -0.5 / beta]

    def ours(d: Tensor, _lengths: Tensor) -> Tensor:
        return 2 * by_ours("squared", d, targets, beta, anchor=1.0)

    compare(rng, ours, name="sppo_hard", beta=beta)
