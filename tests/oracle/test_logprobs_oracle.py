"""Shared-prompt rows against plain forward passes of transformers, values and gradients."""

from __future__ import annotations

import pytest
import torch
from plain import plain_logps
from tiny import tiny_llama

from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_logps, response_token_logps
from ctrl_dpo.engine.masks import visible

GROUPS = [
    {"prompt_ids": [5, 6, 7], "response_ids": [[10, 11, 2], [12, 2], [13, 14, 15, 16, 2]]},
    {"prompt_ids": [9], "response_ids": [[20, 2]]},
    {"prompt_ids": [30, 31, 32, 33, 34, 35], "response_ids": [[40], [41, 42]]},
]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_values_are_those_of_plain_forward_passes(share_prompt):
    model = tiny_llama()
    found = response_logps(model, collate(GROUPS, share_prompt))
    wanted = plain_logps(model, GROUPS).float()
    assert found.dtype == torch.float32
    assert found.detach() == pytest.approx(wanted.detach(), abs=2e-5)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_gradients_are_those_of_plain_forward_passes(share_prompt):
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25])
    model, other = tiny_llama(dtype=torch.float64), tiny_llama(dtype=torch.float64)
    (response_logps(model, collate(GROUPS, share_prompt)) * weights).sum().backward()
    (plain_logps(other, GROUPS) * weights).sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        # the head's own log-softmax is float32 by design
        assert (mine.grad - theirs.grad).abs().max() < 2e-6 * scale + 1e-9, name


def test_logits_are_capped_where_the_model_caps_them():
    model = tiny_llama()
    model.config.final_logit_softcapping = 0.5
    batch = collate(GROUPS[1:2])
    ids = torch.tensor([[9, 20]])
    logits = torch.tanh(model(ids).logits[0] / 0.5) * 0.5
    logps = torch.log_softmax(logits, dim=-1)
    wanted = torch.stack([logps[0, 20], logps[1, 2]])
    found = response_token_logps(model, batch).detach()
    assert found == pytest.approx(wanted.detach(), abs=1e-5)


def test_the_layout_of_a_row_by_hand():
    batch = collate([{"prompt_ids": [5, 6], "response_ids": [[7, 8, 2], [9, 2]]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2]]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 2]]
    assert batch["predictors"].tolist() == [1, 2, 3, 1, 4]
    assert batch["token_ids"].tolist() == [7, 8, 2, 9, 2]
    assert batch["owners"].tolist() == [0, 0, 0, 1, 1]
    seen = visible(batch["segments"], batch["position_ids"])[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_numbers_follow_their_responses():
    groups = [{**g, "targets": [float(len(r)) for r in g["response_ids"]]} for g in GROUPS]
    batch = collate(groups)
    assert batch["targets"].tolist() == [3.0, 2.0, 5.0, 2.0, 1.0, 2.0]
    assert batch["group_of"].tolist() == [0, 0, 0, 1, 2, 2]
    assert batch["slot_of"].tolist() == [0, 1, 2, 0, 0, 1]
    assert "reference_logps" not in batch


def test_long_responses_to_a_short_prompt_have_rows_of_their_own():
    def rows(prompt, lengths):
        responses = [[7] * n for n in lengths]
        return len(collate([{"prompt_ids": [5] * prompt, "response_ids": responses}])["input_ids"])

    assert rows(128, [48, 48]) == 1
    assert rows(128, [512, 512]) == 2
    assert rows(1024, [512, 512]) == 1
    # two rows of 640 tokens: 1280 tokens and 640^2 pairs, against 1152 tokens and 1152^2 pairs
    assert (1280 - 1152) * 2048 < 1152**2 - 640**2
    group = {"prompt_ids": [5] * 4, "response_ids": [[7] * 100, [8] * 90]}
    model, batch = tiny_llama(), collate([group])
    assert batch["owners"].bincount().tolist() == [100, 90]
    wanted = plain_logps(model, [group]).float().detach()
    # 100 tokens of float32
    assert response_logps(model, batch).detach() == pytest.approx(wanted, abs=1e-3)
