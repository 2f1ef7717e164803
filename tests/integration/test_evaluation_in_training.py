"""Evaluation by the trainer: a loss over pairs, however batched, and metrics of every dataset."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from plain import plain_logps
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer

SIX = [{"prompt": "A", "chosen": f"x{i}", "rejected": "y"} for i in range(6)]
TWO = [{"prompt": "B", "chosen": "good", "rejected": "bad bad"}]
PAIRS = Dataset.from_list([*SIX, *TWO, {"prompt": "C", "chosen": "yes", "rejected": "no"}])


def trainer(folder, evaluated=None, **settings):
    defaults = {"loss": "dpo", "beta": 0.3, "learning_rate": 2e-2, "max_steps": 3}
    defaults |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1}
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return CTRLDPOTrainer(
        tiny_llama(),
        CTRLDPOConfig(str(folder), **defaults | settings),
        PAIRS,
        evaluated,
        processing_class=tiny_tokenizer(),
        peft_config=lora,
    )


def logratios(model, rows) -> torch.Tensor:
    """Return the pairs' log-ratios, chosen and rejected, by one plain forward pass a response."""
    groups = [
        {
            "prompt_ids": tokens["prompt_ids"],
            "response_ids": [tokens["response_ids"][j] for j in pair],
        }
        for tokens, pair in rows
    ]
    with torch.no_grad():
        policy = plain_logps(model, groups)
        with model.disable_adapter():
            return (policy - plain_logps(model, groups)).view(-1, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_loss_is_a_mean_over_pairs_however_they_are_batched(size, tmp_path):
    made = trainer(tmp_path, per_device_eval_batch_size=size)
    made.train()
    found = made.evaluate(PAIRS)
    apart = trainer(tmp_path / "apart", share_prompt=False)
    rows = [(row, (0, 1)) for row in apart.train_dataset]
    assert len(rows) == 8 > len(made.train_dataset) == 3
    d = logratios(made.model.eval(), rows)
    each = -torch.nn.functional.logsigmoid(0.3 * (d[:, 0] - d[:, 1]))
    assert found["eval_loss"] == pytest.approx(each.mean().item(), rel=1e-5)
    over_prompts = (each[:6].mean() + each[6] + each[7]) / 3
    assert over_prompts.item() != pytest.approx(each.mean().item(), rel=0.03)
    assert found["eval_rewards/margins"] == pytest.approx(
        0.3 * (d[:, 0] - d[:, 1]).mean().item(), rel=1e-4
    )


def test_every_dataset_and_prefix_has_its_own_metrics(tmp_path):
    parts = {"six": PAIRS.select(range(6)), "rest": PAIRS.select([6, 7])}
    made = trainer(tmp_path, parts)
    made.train()
    alone = {name: made.evaluate(part) for name, part in parts.items()}
    assert alone["six"]["eval_logps/chosen"] != alone["rest"]["eval_logps/chosen"]
    both = made.evaluate()
    dictionary = made.evaluate(DatasetDict(parts))
    predicted = {n: made.predict(p, metric_key_prefix="test") for n, p in parts.items()}
    for name, part in parts.items():
        assert made.evaluate(part, metric_key_prefix="other")["other_loss"] > 0
        kept = [key for key in alone[name] if not key.endswith(("second", "runtime", "epoch"))]
        assert {"eval_loss", "eval_logps/chosen", "eval_rewards/accuracies"} <= set(kept)
        for key in kept:
            wanted = alone[name][key]
            assert both[key.replace("eval", f"eval_{name}", 1)] == wanted
            assert dictionary[key.replace("eval", f"eval_{name}", 1)] == wanted
            assert predicted[name].metrics[key.replace("eval", "test", 1)] == wanted


def test_rows_that_the_trainer_has_are_evaluated_again(tmp_path):
    parts = {"six": PAIRS.select(range(6)), "rest": PAIRS.select([6, 7])}
    made = trainer(tmp_path, parts)
    wanted = made.evaluate()["eval_six_loss"]
    assert made.evaluate(made.eval_dataset)["eval_six_loss"] == wanted
    assert made.predict(made.eval_dataset["six"]).metrics["test_loss"] == wanted
    assert made.evaluate(made.train_dataset)["eval_loss"] == made.evaluate(PAIRS)["eval_loss"]


def test_the_best_model_may_be_chosen_by_any_metric_of_a_named_dataset(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"}
    name = "eval_six_rewards/margins"
    made = trainer(tmp_path, {"six": PAIRS}, metric_for_best_model=name, **settings)
    made.train()
    found = [row[name] for row in made.state.log_history if name in row]
    assert len(found) == 3
    assert made.state.best_metric == max(found)
