"""Pairs that this library exports train in TRL's DPOTrainer."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from ctrl_dpo import pairs, relabel

pytestmark = pytest.mark.bench


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}]])
def test_one_step_of_trl(prompt, tmp_path):
    trl = pytest.importorskip("trl")
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": prompt, "responses": list("abcd"), "rewards": rng.normal(size=4).tolist()}
        for _ in range(4)
    ]
    made = pairs(relabel(Dataset.from_list(rows), procedure="best_of_4", beta=0.1), "all")
    args = trl.DPOConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
    )
    folder = tmp_path / "model"  # TRL loads its reference policy again, by name
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        args=args,
        train_dataset=made,
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    logged = [row for row in trainer.state.log_history if "rewards/margins" in row]
    assert logged[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert logged[0]["logps/chosen"] < 0
