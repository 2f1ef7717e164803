"""The trainer on the tiny model: every input and loss, its guards, resuming, equal gradients."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from plain import plain_logps
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import CTRLDPOConfig, CTRLDPOTrainer, pairs, relabel
from ctrl_dpo.engine.footprint import optimizer_footprint
from ctrl_dpo.engine.generation import Sampler
from ctrl_dpo.engine.reference import add_reference_logps
from ctrl_dpo.sample import sample

# many updates of whole batches: nothing here is about memory, which passes of one prompt save
FIT = {"per_device_train_batch_size": 4, "max_tokens_per_pass": 1024}


def scored(count: int = 4, k: int = 3) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": [f"question {i}" for i in range(count)],
            "responses": [[f"{'abc'[j]}{i}" * (j + 1) for j in range(k)] for i in range(count)],
            "rewards": [[float((i + 2 * j) % 5) for j in range(k)] for i in range(count)],
        }
    )


def labels(**options) -> Dataset:
    settings = {"procedure": "single_draw", "transformation": "identity", "beta": 0.2} | options
    return relabel(scored(), **settings)


def trainer(
    tmp_path, data=None, model=None, ref_model=None, adapter=True, eval_data=None, **settings
):
    defaults = {
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    args = CTRLDPOConfig(str(tmp_path), **defaults | settings)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return CTRLDPOTrainer(
        model if model is not None else tiny_llama(),
        args,
        labels() if data is None else data,
        eval_data,
        processing_class=tiny_tokenizer(),
        ref_model=ref_model,
        peft_config=lora if adapter else None,
    )


def logged(tmp_path) -> list[dict]:
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def weights(made) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}


def test_the_fit_reaches_its_targets(tmp_path):
    made = trainer(tmp_path, max_steps=60, anchor=1.0, **FIT)
    made.train()
    last = logged(tmp_path)[-1]
    assert last["fit/r2"] > 0.99
    assert last["loss"] < 0.02
    assert last["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("loss", ["squared", "softmax", "soft_label"])
def test_every_fit_orders_the_responses(loss, tmp_path):
    made = trainer(tmp_path, max_steps=60, loss=loss, **FIT)
    made.train()
    rows = logged(tmp_path)
    assert rows[0]["fit/r2"] < 0.2
    assert rows[-1]["fit/r2"] > 0.9


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_plain_pairs_train_with_hard_labels(loss, tmp_path):
    data = Dataset.from_dict({"prompt": ["q"] * 4, "chosen": ["aa"] * 4, "rejected": ["bb"] * 4})
    trainer(tmp_path, data, max_steps=20, loss=loss, beta=0.1).train()
    rows = logged(tmp_path)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["rewards/margins"] > 0.2
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


FOUR_PAIRS = Dataset.from_dict(  # of each prompt
    {
        "prompt": [f"q{i // 4}" for i in range(16)],
        "chosen": [f"a{i}" for i in range(16)],
        "rejected": [f"b{i}" for i in range(16)],
    }
)
AN_EPOCH = {"loss": "dpo", "beta": 0.1, "max_steps": -1, "num_train_epochs": 1}


def test_pairs_of_a_prompt_are_one_row_aloud(tmp_path, caplog):
    """16 pairs of 4 prompts in batches of two: 4 rows and 2 updates an epoch, apart 16 and 8."""
    for share, updates in ((True, 2), (False, 8)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = trainer(tmp_path / str(share), FOUR_PAIRS, share_prompt=share, **AN_EPOCH)
        told = "16 pairs are 4 rows of batches" in caplog.text
        assert told is share
        assert ("share_prompt=False" in caplog.text) is share
        assert made.train().global_step == updates


def test_a_batch_that_is_never_full_is_refused_before_training(tmp_path):
    """16 pairs of 4 prompts are 4 rows: no batch of 8, of which only full ones are kept."""
    settings = AN_EPOCH | {"per_device_train_batch_size": 8, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match=r"got 4 rows of batches, and a batch is 8 .*=1\)\. L"):
        trainer(tmp_path, FOUR_PAIRS, **settings)
    trainer(tmp_path, FOUR_PAIRS, **settings | {"per_device_train_batch_size": 4})  # just full
    apart = trainer(tmp_path, FOUR_PAIRS, share_prompt=False, **settings)
    assert apart.train().global_step == 2


def test_pairs_with_margins_and_scored_groups_train(tmp_path):
    made = trainer(tmp_path / "pairs", pairs(labels()), max_steps=40)
    made.train()
    assert logged(tmp_path / "pairs")[-1]["fit/r2"] > 0.8
    settings = {"procedure": "best_of_2", "target_kl": 0.2, "max_steps": 2}
    made = trainer(tmp_path / "scored", scored(), **settings)
    made.train()
    assert made.beta == pytest.approx(
        relabel(scored(), procedure="best_of_2", target_kl=0.2)["beta"][0]
    )


def test_all_weights_are_trained_against_a_reference_model(tmp_path):
    settings = {"max_steps": 60, "learning_rate": 3e-3, **FIT}
    made = trainer(tmp_path, ref_model=tiny_llama(), adapter=False, **settings)
    made.train()
    assert logged(tmp_path)[-1]["fit/r2"] > 0.9
    with pytest.raises(ValueError, match="ref_model must be given"):
        trainer(tmp_path / "none", adapter=False)


def test_a_folder_is_loaded_in_8_bits_and_trained(tmp_path, tiny_model_folder):
    from bitsandbytes.nn import Linear8bitLt

    made = trainer(
        tmp_path,
        model=str(tiny_model_folder),
        load_in_8bit=True,
        model_dtype="float32",
        max_steps=60,
        **FIT,
    )
    layers = [m for m in made.model.modules() if isinstance(m, Linear8bitLt)]
    assert len(layers) == 14
    assert {layer.weight.dtype for layer in layers} == {torch.int8}
    made.train()
    assert logged(tmp_path)[-1]["fit/r2"] > 0.8
    assert "AdamW" in type(made.optimizer.optimizer).__name__


def test_shared_prompts_change_nothing(tmp_path):
    found = []
    for share in (True, False):
        made = trainer(tmp_path / str(share), share_prompt=share, max_steps=3)
        made.train()
        found.append((logged(tmp_path / str(share)), weights(made)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_accumulation_is_the_large_batch(tmp_path):
    norms = []
    for size, steps in ((4, 1), (1, 4)):
        folder = tmp_path / str(size)
        made = trainer(
            folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
        )
        made.train()
        norms.append((logged(folder)[0]["loss"], logged(folder)[0]["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_attention_is_as_configured(tmp_path, tiny_model_folder):
    found = {}
    for kind in ("sdpa", "eager"):
        folder = tmp_path / kind
        settings = {"attn_implementation": kind, "model_dtype": "float32"}
        made = trainer(folder, model=str(tiny_model_folder), **settings)
        assert made.model.config._attn_implementation == kind
        made.train()
        found[kind] = [(row["loss"], row["grad_norm"]) for row in logged(folder)]
    np.testing.assert_allclose(found["eager"], found["sdpa"], rtol=1e-3)
    with pytest.raises(ValueError, match=r"given as an object; got 'eager' for 'sdpa'"):
        trainer(tmp_path, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"must not be 'flex_attention' .*; got device 'cpu'"):
        trainer(tmp_path, attn_implementation="flex_attention")


def test_the_reference_pass_has_the_limit_of_passes(tmp_path, monkeypatch):
    limits = []

    def spied(model, rows, key, folder, max_tokens, share):
        limits.append(max_tokens)
        return add_reference_logps(model, rows, key, folder, max_tokens, share)

    monkeypatch.setattr("ctrl_dpo.train.add_reference_logps", spied)
    trainer(tmp_path, max_tokens_per_pass=77)
    trainer(tmp_path)
    assert limits == [77, 1]


def test_sharded_weights_take_no_evaluation_data_later(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    monkeypatch.setattr(type(made), "_is_sharded", lambda _: True)
    with pytest.raises(ValueError, match=r"must be given when the trainer is built .* 4 rows"):
        made.evaluate(labels())


@pytest.mark.parametrize(
    ("loss", "anchor"),
    [(loss, 0.0) for loss in ("squared", "softmax", "soft_label", "dpo", "ipo")]
    + [("squared", 0.5)],
)
def test_passes_change_nothing_but_memory(loss, anchor, tmp_path):
    data = labels().add_column("weight", [1.0, 0.5, 2.0, 0.0]) if anchor else labels()
    found = []
    for limit in (1, 50, 10**6):
        folder = tmp_path / str(limit)
        settings = {"loss": loss, "beta": 0.2} if loss in ("dpo", "ipo") else {"loss": loss}
        settings |= {"anchor": anchor} if anchor else {}
        settings |= {"max_tokens_per_pass": limit, "per_device_train_batch_size": 4}
        made = trainer(folder, data, max_steps=3, **settings)
        batch = next(iter(made.get_train_dataloader()))
        assert len(batch["passes"]) == {1: 4, 50: 2, 10**6: 1}[limit]
        made.train()
        found.append([(row["loss"], row["grad_norm"]) for row in logged(folder)])
        assert logged(folder)[0]["useful_tokens"] == 1.0
        made.evaluate(labels())
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found[-1].append((rows[-1]["eval_loss"], rows[-1]["eval_fit/r2"]))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=2e-5)


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(order, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    settings |= {"train_sampling_strategy": order}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    sorts = type(whole._get_train_sampler()).__name__ == "LengthPools"
    assert sorts == (order == "group_by_length")


def test_an_order_of_training_is_none_of_evaluation(tmp_path):
    """Evaluated before the first update, in batches of two, the losses are the same to the bit."""
    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    losses = []
    for order in ("random", "sequential", "group_by_length"):
        settings |= {"per_device_eval_batch_size": 2, "train_sampling_strategy": order}
        made = trainer(tmp_path / order, eval_data=labels(), **settings)
        made.train()
        rows = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
        assert len(rows) == 2
        losses.append(rows[0])
    assert losses[0] == losses[1] == losses[2]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    made = trainer(tmp_path)
    for name, weight in made.model.named_parameters():
        if "lora_A" in name:
            weight.data.fill_(float("inf"))
    made._is_fresh = False
    with pytest.raises(FloatingPointError, match="loss must be finite; got nan at step 0"):
        made.train()


def test_raw_rewards_are_fitted_as_they_are(tmp_path):
    settings = {"transformation": "raw", "beta": 2.0, "max_steps": 60}
    made = trainer(tmp_path, scored(), **FIT, **settings)
    assert made.train_dataset[0]["targets"] == [0.0, 1.0, 2.0]  # rewards over beta
    made.train()
    assert logged(tmp_path)[-1]["fit/r2"] > 0.95


def test_unpaired_responses_train_with_an_anchor(tmp_path):
    data = Dataset.from_dict(
        {
            "prompt": [f"q{i}" for i in range(4)],
            "response": ["a", "b", "c", "d"],
            "reward": [0.0, 1.0, 2.0, 3.0],
            "reference_rewards": [np.arange(4.0).repeat(8).tolist()] * 4,
        }
    )
    settings = {"procedure": "best_of_2", "transformation": "identity", "beta": 0.3}
    settings |= {"anchor": 1.0, "max_steps": 60, "per_device_train_batch_size": 4}
    made = trainer(tmp_path, data, **settings)
    made.train()
    assert logged(tmp_path)[-1]["loss"] < 1e-2 < logged(tmp_path)[0]["loss"]
    # the only response of its prompt is at its own target: nothing else could place it
    wanted = sum(row["targets"][0] for row in made.train_dataset) / 4
    assert logged(tmp_path)[-1]["rewards/chosen"] / 0.3 == pytest.approx(wanted, abs=0.1)


def test_a_row_of_weight_0_is_not_learned(tmp_path):
    # passes of one prompt; clipping would scale one run and not the other
    steps = {"max_steps": 8, "per_device_train_batch_size": 4, "max_grad_norm": 0.0}
    weighted = labels().add_column("weight", [1.0, 1.0, 0.0, 0.0])
    losses = []
    for name, data in (("weighted", weighted), ("half", labels().select([0, 1]))):
        trainer(tmp_path / name, data, **steps).train()
        losses.append([row["loss"] for row in logged(tmp_path / name)])
    # the mean divides by all four rows; but for its epsilon, Adam's step has no scale
    assert losses[0][0] == pytest.approx(losses[1][0] / 2, rel=1e-6)
    assert losses[0] == pytest.approx([loss / 2 for loss in losses[1]], rel=1e-3)
    assert losses[0][-1] < losses[0][0] / 2


def drawn_by_another_policy() -> Dataset:
    """Draw from an adapter, whose base is the reference policy; the reward is the first byte."""
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0.0, 0.03)
    prompts = Dataset.from_list([{"prompt": f"question {i}"} for i in range(4)])
    settings = Sampler(draws=5, max_new_tokens=6, seed=1)
    drawn = sample(prompts, adapted, settings, tokenizer=tiny_tokenizer(), log_ratios=True)
    return drawn.map(lambda row: {"rewards": [float(ids[0]) for ids in row["response_ids"]]})


@pytest.mark.parametrize("where", ["trainer", "relabel"])
def test_draws_of_another_policy_train_by_their_weights(where, tmp_path):
    data = drawn_by_another_policy()
    with pytest.raises(ValueError, match="must be draws of the reference policy; got model"):
        trainer(tmp_path, data.remove_columns("reference_logps"), procedure="single_draw", beta=0.3)
    settings = {"procedure": "single_draw", "transformation": "identity", "beta": 0.3}
    settings["calibration"] = "weighted"
    given, options = (data, settings) if where == "trainer" else (relabel(data, **settings), {})
    options |= {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    made = trainer(tmp_path, given, eval_data=given, **options)
    shift = np.log(0.3 * np.expm1(1 / 0.3))  # log of the mean of exp(u / beta)
    for row, group in zip(made.train_dataset, data, strict=True):
        rewards = np.array(group["rewards"])
        weights = np.exp(np.subtract(group["reference_logps"], group["sampler_logps"]))
        lower = (rewards < rewards[:, None]) + 0.5 * (rewards == rewards[:, None])
        others = weights * (1 - np.eye(5))
        wanted = (lower * others).sum(axis=1) / others.sum(axis=1)
        np.testing.assert_allclose(row["targets"], wanted / 0.3 - shift, rtol=1e-12)
        assert abs(wanted - (lower.sum(axis=1) - 0.5) / 4).max() > 0.01  # what no weights give
    with torch.no_grad():
        start = plain_logps(tiny_llama(), made.train_dataset)
    found = [logp for row in made.train_dataset for logp in row["reference_logps"]]
    np.testing.assert_allclose(found, start, rtol=1e-5)
    made.train()
    first, last = (row["loss"] for row in logged(tmp_path) if "loss" in row)
    assert last < first
    assert made.evaluate(given)["eval_loss"] == pytest.approx(made.evaluate()["eval_loss"])


BEST = {"procedure": "best_of_2", "transformation": "optimal", "beta": 0.2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"procedure": "worst_of_2"}, "procedure .* 'best_of_2'; got 'worst_of_2' at row 0"),
        ({"transformation": "identity"}, "transformation .* 'optimal'; got 'identity' at row 0"),
        ({"beta": 0.3}, r"beta .* 0\.2; got 0\.3 at row 0"),
        ({"anchor": 1.0}, r"anchor .* 0\.0; got 1\.0 at row 0"),
    ],
    ids=["procedure", "transformation", "beta", "anchor"],
)
def test_evaluation_labels_are_those_of_training(change, message, tmp_path):
    train, other = labels(**BEST), labels(**BEST | change)
    message = message.replace(" .*", " of eval_dataset must be that of the training labels,", 1)
    part = message.replace("eval_dataset", r"eval_dataset\['b'\]", 1)
    for given, told in ((other, message), ({"a": train, "b": other}, part)):
        with pytest.raises(ValueError, match=rf"^{told}\. Relabel its scored groups with"):
            trainer(tmp_path, train, eval_data=given)
    made = trainer(tmp_path, train, eval_data=train)
    with pytest.raises(ValueError, match=message):
        made.evaluate(other)
    mixed = concatenate_datasets([train, other])
    with pytest.raises(ValueError, match=message.replace("row 0", "row 4")):
        made.evaluate(mixed)


def test_evaluation_labels_that_say_less_or_do_not_count(tmp_path):
    train, told = labels(**BEST), ["procedure", "transformation", "beta", "anchor"]
    made = trainer(tmp_path, train, eval_data={"same": train, "bare": train.remove_columns(told)})
    found = made.evaluate()
    assert found["eval_same_loss"] == found["eval_bare_loss"] > 0
    assert made.evaluate(pairs(train))["eval_loss"] > 0
    # beta is known without a column of it
    with pytest.raises(ValueError, match=r"^beta of eval_dataset .* 0\.3; got 0\.2 at row 0"):
        trainer(tmp_path, train.remove_columns(told), eval_data=train, beta=0.3)
    other = labels(**BEST | {"procedure": "worst_of_2", "beta": 0.4})
    trainer(tmp_path, train, eval_data=other, loss="dpo", beta=0.1)  # of which the order is used
    trainer(tmp_path, train, eval_data=other, beta=0.1, accept_other_labels=True)


def test_draws_to_evaluate_on_are_those_of_the_reference_policy(tmp_path):
    prompts = Dataset.from_dict({"prompt": ["x", "y"]})

    def drawn(seed: int) -> Dataset:
        sampler = Sampler(3, max_new_tokens=4)
        data = sample(prompts, tiny_llama(seed=seed), sampler, tokenizer=tiny_tokenizer())
        return relabel(data.add_column("rewards", [[0.0, 1.0, 2.0]] * 2), **BEST)

    train, other = labels(**BEST), drawn(seed=1)
    message = "^responses of eval_dataset must be draws of the reference policy; got model 'tensors"
    made = trainer(tmp_path, train, eval_data=drawn(seed=0))
    with pytest.raises(ValueError, match=message):
        made.evaluate(other)
    part = message.replace("eval_dataset", r"eval_dataset\['b'\]")
    for given, told in ((other, message), ({"a": train, "b": other}, part)):
        with pytest.raises(ValueError, match=told):
            trainer(tmp_path, train, eval_data=given)
    with pytest.raises(ValueError, match="^responses of train_dataset must be draws of the refer"):
        trainer(tmp_path, other)


def test_metrics_of_a_step(tmp_path):
    data = labels(procedure="best_of_4", transformation="optimal", beta=0.2)
    made = trainer(tmp_path, data, max_steps=1, gradient_accumulation_steps=2)
    made.train()
    row = logged(tmp_path)[0]
    assert row["win_rate/predicted"] == pytest.approx(0.5, abs=1e-6)
    assert row["kl/self_normalised"] == pytest.approx(0.0, abs=1e-6)
    assert row["normalisation"] == 1.0
    # letters and digits, and the end token: 3, 5, 7 tokens in each of the four groups
    assert row["response_length"] == 5.0
    assert row["truncated"] == 0.0
    assert row["tokens_per_second"] > 0
    logps = [x for group in made.train_dataset for x in group["reference_logps"]]
    best = [max(range(3), key=g["targets"].__getitem__) for g in made.train_dataset]
    chosen = [logps[3 * i + j] for i, j in enumerate(best)]
    assert row["logps/chosen"] == pytest.approx(np.mean(chosen), rel=1e-5)


def test_metrics_rank_by_the_rewards_where_targets_tie(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        "ctrl_dpo.train.batch_metrics",
        lambda *tensors: found.append([x.tolist() for x in tensors[1:3]]) or {},
    )
    data = labels(procedure="best_of_4", transformation="optimal").select([0])
    trainer(tmp_path, data, max_steps=1, per_device_train_batch_size=1).train()
    (((targets,), (order,)),) = found
    assert targets[0] == targets[1] < targets[2]
    assert order == [0.0, 1.0, 2.0]


def test_bytes_and_bits_are_logged(tmp_path, tiny_model_folder, caplog):
    settings = {"load_in_8bit": True, "model_dtype": "bfloat16", "max_steps": 1}
    with caplog.at_level(logging.INFO, "ctrl_dpo"):
        made = trainer(tmp_path, model=str(tiny_model_folder), **settings)
        made.train()
    # q and o 32 x 32, k and v 16 x 32, three of 64 x 32; a float32 scale for each output row
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    size = weights + 4 * 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32)
    assert f"weights, linear: {size} bytes, {8 * size / weights:.2f} bits each" in caplog.text
    assert f"weights, embedding: {259 * 32 * 2} bytes, 16.00 bits each" in caplog.text
    # no tensor of this adapter has the 4096 elements from which bitsandbytes keeps 8 bits
    assert "optimiser state" in caplog.text
    assert ", 0.0 % of it in 8 bits" in caplog.text
    large = torch.nn.Parameter(torch.ones(64, 64))
    small = torch.nn.Parameter(torch.ones(64))
    large.grad, small.grad = torch.ones(64, 64), torch.ones(64)
    optimizer = AdamW8bit([large, small])
    optimizer.step()
    assert optimizer_footprint(optimizer)["share_8bit"] == pytest.approx(4096 / (4096 + 64))


def test_evaluation_reports_its_own_metrics(tmp_path):
    args = CTRLDPOConfig(str(tmp_path), max_steps=2, report_to="none", save_strategy="no")
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    made = CTRLDPOTrainer(
        tiny_llama(), args, labels(), labels(), processing_class=tiny_tokenizer(), peft_config=lora
    )
    found = made.evaluate()
    assert found["eval_loss"] > 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval_fit/r2"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_adapter_is_saved_and_is_the_trained_one(tmp_path):
    made = trainer(tmp_path)
    made.train()
    made.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = weights(made)
    assert len(saved) == len(trained) == 28
    for name, value in saved.items():
        whole = name.replace(".weight", ".default.weight")
        assert torch.equal(value, trained[whole]), name


def test_reference_values_are_shared_by_runs_of_other_settings(tmp_path, caplog):
    """LoRA rank, learning rate, seed and output folder compute nothing again; a limit does."""
    caplog.set_level("INFO", logger="ctrl_dpo")

    def computed(name, rank=8, **settings):
        caplog.clear()
        args = CTRLDPOConfig(str(tmp_path / name), report_to="none", **settings)
        lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        options = {"processing_class": tiny_tokenizer(), "peft_config": lora}
        CTRLDPOTrainer(tiny_llama(), args, labels(), **options)
        return caplog.text.partition("found, ")[2].partition(" to compute")[0]

    assert computed("first") == "4"
    assert computed("second", rank=2, learning_rate=1e-4, seed=7) == "0"
    assert computed("third", max_response_length=3) != "0"
