"""Pairs of one prompt in one row: the loss and gradients of pairs apart, at a response each."""

from __future__ import annotations

import itertools

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.losses import group_loss, pad_groups
from ctrl_dpo.engine.merged_pairs import merge_pairs
from ctrl_dpo.engine.rows import training_rows

RESPONSES = [[10, 11, 2], [12, 2], [13, 14, 15, 16, 2], [20, 2]]


def pair_rows(known: bool = False):
    """All pairs of four responses of one prompt, and one pair of another, between them."""
    rows = [
        {
            "prompt_ids": [5, 6, 7],
            "response_ids": [RESPONSES[a], RESPONSES[b]],
            "targets": [0.5 * (b - a), 0.0],
            "order": [1, 0],
            "dataset_rows": [0, 0],
            "weight": 1.0 + a,
            "truncated": [False, False],
            "reference_logps": [-1.0 - a, -1.0 - b] if known else None,
        }
        for a, b in itertools.combinations(range(4), 2)
    ]
    other = {
        "prompt_ids": [5, 6],
        "response_ids": RESPONSES[:2],
        "targets": [1.0, 0.0],
        "order": [1, 0],
        "dataset_rows": [0, 0],
        "weight": 0.5,
        "truncated": [False, False],
        "reference_logps": [-3.0, -4.0] if known else None,
    }
    return [*rows[:2], other, *rows[2:]]


def loss_of(name, rows, share_prompt):
    model = tiny_llama(dtype=torch.float64)
    batch = collate(rows, share_prompt)
    members, where = batch["members"], (batch["group_of"], batch["slot_of"])
    values = (response_logps(model, batch) - batch["reference_logps"])[members]
    logratios, mask = pad_groups(values, *where)
    targets, _ = pad_groups(batch["targets"], *where)
    options = {"beta": 0.3, "anchor": 0.0, "weights": batch["weights"]}
    loss = group_loss(name, logratios, targets, mask, **options).mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", ["squared", "soft_label", "softmax", "dpo", "ipo"])
def test_the_loss_is_the_mean_over_exactly_the_given_pairs(name):
    rows = pair_rows(known=True)
    merged = merge_pairs(rows)
    wanted, gradient = loss_of(name, rows, share_prompt=False)
    for share_prompt in (True, False):
        found, other = loss_of(name, merged, share_prompt)
        assert found == pytest.approx(wanted, rel=1e-6)
        assert (other - gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_all_pairs_of_four_responses_compute_four_responses():
    merged = merge_pairs(pair_rows())
    assert [len(row["response_ids"]) for row in merged] == [4, 2]
    assert len(merged[0]["members"]) == 6
    assert merged[1] == pair_rows()[2]
    batch = collate(merged)
    computed = (batch["segments"] >= 0).sum().item()
    prompts, inputs = 3 + 2, sum(len(r) - 1 for r in [*RESPONSES, *RESPONSES[:2]])
    assert computed == prompts + inputs
    apart = collate(pair_rows())
    assert computed < 0.5 * (apart["segments"] >= 0).sum().item()
    assert batch["members"].tolist()[-2:] == [4, 5]


def test_rows_of_pairs_are_merged_and_counted(tmp_path):
    data = Dataset.from_dict(
        {
            "prompt": ["q", "p", "q"],
            "chosen": ["a", "a", "a"],
            "rejected": ["b", "b", "c"],
        }
    )
    settings = {"loss": "dpo", "beta": 0.1}
    rows, counts = training_rows(data, tiny_tokenizer(), CTRLDPOConfig(tmp_path, **settings), 0.1)
    assert [row.get("members") for row in rows] == [[[0, 1], [0, 2]], None]
    assert counts["rows"] == 3
    assert counts["pairs_merged_by_prompt"] == 1
    apart = CTRLDPOConfig(tmp_path, share_prompt=False, **settings)
    rows, counts = training_rows(data, tiny_tokenizer(), apart, 0.1)
    assert len(rows) == 3
    assert "pairs_merged_by_prompt" not in counts
