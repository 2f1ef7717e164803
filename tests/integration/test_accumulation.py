"""Accumulated micro-batches are the large batch: every loss, unequal groups, unequal lengths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from launched import make_trainer, unequal_groups

LOSSES = ["squared", "softmax", "soft_label", "dpo", "ipo"]


def trained(folder: Path, count: int, size: int, steps: int, **settings) -> tuple[list, dict]:
    """Train one epoch by plain gradient steps: Adam would magnify the rounding of small ones."""
    trainer = make_trainer(
        folder,
        count,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=1e-4,
        max_grad_norm=0.0,
        **settings,
    )
    trainer.train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = {n: w.detach() for n, w in trainer.model.named_parameters() if w.requires_grad}
    return [row for row in rows if "loss" in row], weights


def test_the_groups_are_unequal_in_size_and_length():
    data = unequal_groups(16)
    assert isinstance(data, Dataset)
    assert {len(group) for group in data["responses"]} == {2, 3, 4}
    assert len({len(response) for group in data["responses"] for response in group}) > 6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("count", "size", "steps"), [(16, 1, 8), (13, 2, 4)], ids=["1x8", "2x4 and a rest of 2+2+1"]
)
def test_accumulation_is_the_large_batch(loss, count, size, steps, tmp_path):
    settings = {"loss": loss}
    if loss in ("dpo", "ipo"):
        settings["beta"] = 0.1
    if loss == "squared":
        settings["anchor"] = 0.5
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    rows, weights = trained(whole, count, 8, 1, **settings)
    found_rows, found = trained(parts, count, size, steps, **settings)
    assert len(rows) == len(found_rows) == 2
    for row, other in zip(rows, found_rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-6)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
    moved = max(weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name)
    for name, weight in weights.items():
        # float32 rounding of a weight and of the step that it made
        assert torch.allclose(found[name], weight, rtol=1e-6, atol=1e-5 * moved), name
