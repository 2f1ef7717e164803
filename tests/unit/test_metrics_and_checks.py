"""What a step reports, against plain numpy; and the refusals before the first step."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy import special
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.checks import check_model, check_step_zero, check_tokenizer
from ctrl_dpo.engine.metrics import (
    RunningMeans,
    batch_metrics,
    distortion,
    predicted_win_rate,
    token_metrics,
)
from ctrl_dpo.engine.models import load_model
from ctrl_dpo.engine.policies import (
    ADAPTER_OFF,
    FROM_DATASET,
    SECOND_MODEL,
    ReferencePolicy,
)
from ctrl_dpo.theory.procedures import parse_procedure


def test_metrics_by_numpy(rng):
    d, t, logps = (rng.normal(size=(3, 4)) for _ in range(3))
    sizes, beta = [4, 2, 1], 0.3
    mask = np.arange(4) < np.array(sizes)[:, None]
    tensors = [torch.tensor(np.where(mask, x, 99.0)) for x in (d, t)]
    found = batch_metrics(*tensors, tensors[1], torch.tensor(mask), torch.tensor(logps), beta)
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
        # the group of one has no margin
        "rewards/margins": beta * (chosen - rejected)[:2].mean(),
        "rewards/accuracies": (chosen > rejected)[:2].mean(),
        "logps/chosen": np.mean([r[2][i] for r, i in zip(rows, best, strict=True)]),
        "logps/rejected": np.mean([r[2][i] for r, i in zip(rows, worst, strict=True)]),
        "logratios/margins": (chosen - rejected)[:2].mean(),
        "logratios/chosen_below_0": (chosen < 0).mean(),
        "kl/self_normalised": np.mean(kl),
        "normalisation": np.mean([w.mean() for w in weights]),
        "fit/r2": 1 - rest / spread,
    }
    assert means == pytest.approx(wanted)


def test_ties_have_no_arbitrary_best_or_worst():
    """Three groups: a tie at the bottom, two rewards that the targets tie, a tie of all."""
    d = torch.tensor([[2.0, 1.0, -5.0], [3.0, 1.0, 0.0], [0.5, -0.5, 4.0]])
    order = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [7.0, 7.0, 7.0]])
    targets = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    logps, mask = 10 * d, torch.ones(3, 3) > 0
    procedure = parse_procedure("single_draw")
    found = batch_metrics(d, targets, order, mask, logps, 1.0, procedure)
    means = {name: float(a / b) for name, (a, b) in found.items()}
    assert means["rewards/chosen"] == pytest.approx((2 + 3 + 4 / 3) / 3)
    assert means["rewards/rejected"] == pytest.approx((-2 + 0 + 4 / 3) / 3)
    assert means["logps/rejected"] == pytest.approx(10 * (-2 + 0 + 4 / 3) / 3)
    # the third group has no margin, and is neither right nor wrong
    assert means["rewards/margins"] == pytest.approx((4 + 3) / 2)
    assert means["rewards/accuracies"] == 1.0
    # one draw against one: the chance to be above, ties one half
    win = 0.0
    for row, rewards in zip(d.tolist(), order.tolist(), strict=True):
        for p, mine in zip(special.softmax(row), rewards, strict=True):
            win += p * np.mean([(mine > other) + 0.5 * (mine == other) for other in rewards]) / 3
    assert means["win_rate/predicted"] == pytest.approx(win)


def test_running_means_add_batches_by_their_weights():
    means = RunningMeans()
    means.add({"a": (torch.tensor(3.0), torch.tensor(1.0)), "b": (torch.tensor(1.0),) * 2})
    means.add({"a": (torch.tensor(1.0), torch.tensor(3.0)), "b": (torch.tensor(0.0),) * 2})
    assert means.means() == {"a": 1.0, "b": 1.0}
    assert means.means() == {}


@pytest.mark.parametrize("text", ["single_draw", "best_of_4", "worst_of_4", "2nd_best_of_3"])
def test_the_predicted_win_rate_is_that_of_the_enumerated_policy(text, rng):
    procedure = parse_procedure(text)
    d, rewards = rng.normal(size=(3, 6)), rng.integers(0, 4, size=(3, 6)).astype(float)
    mask = np.arange(6) < np.array([6, 4, 1])[:, None]
    tensors = (torch.tensor(np.where(mask, x, 7.0)) for x in (d, rewards))
    found = predicted_win_rate(*tensors, torch.tensor(mask), procedure)
    for row, size in enumerate(mask.sum(1)):
        p, r = special.softmax(d[row, :size]), rewards[row, :size]
        win = 0.0
        h = procedure.distortion
        for level in np.unique(r):  # by the definition, over distinct rewards
            served = h(min(1.0, p[r <= level].sum())) - h(p[r < level].sum())
            beaten = (h((r <= level).mean()) + h((r < level).mean())) / 2
            win += served * beaten
        assert found[row].item() == pytest.approx(win, abs=1e-12)
    still = predicted_win_rate(torch.zeros(1, 4), torch.rand(1, 4), torch.ones(1, 4) > 0, procedure)
    assert still.item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    "text", ["single_draw", "best_of_1000", "worst_of_1000", "3rd_best_of_9", "900th_best_of_2000"]
)
def test_the_distortion_on_the_device_is_that_of_the_theory(text):
    q = np.linspace(0, 1, 101)
    found = distortion(parse_procedure(text), torch.tensor(q))
    assert found.numpy() == pytest.approx(parse_procedure(text).distortion(q), abs=1e-9)


def test_tokens_are_counted_and_timed(monkeypatch):
    rows = [
        {"prompt_ids": [5, 6], "response_ids": [[7, 2], [8, 9, 2]], "truncated": [False, True]},
        {"prompt_ids": [5], "response_ids": [[7, 2]], "truncated": [False]},
    ]
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("ctrl_dpo.engine.metrics.time.perf_counter", lambda: next(clock))
    means = RunningMeans()
    means.start()
    means.start()  # it runs
    means.add(token_metrics(collate([rows[0]])))
    means.add(token_metrics(collate([rows[1]])))
    # what is computed: 2 + 1 + 2 and 1 + 1 tokens, the last of a response predicts nothing
    wanted = {"response_length": 7 / 3, "truncated": 1 / 3, "tokens_per_second": 7 / 4}
    wanted["useful_tokens"] = 1.0
    assert means.means() == pytest.approx(wanted)


def test_metrics_are_summed_over_processes_in_one_call():
    calls = []

    class Two:
        num_processes = 2

        def reduce(self, sums, how):
            calls.append(how)
            return sums + torch.tensor([1.0, 3.0, 5.0, 1.0])

    means = RunningMeans()
    means.add({"a": (torch.tensor(3.0), torch.tensor(1.0)), "b": (torch.tensor(1.0),) * 2})
    assert means.means(Two()) == {"a": 1.0, "b": 3.0}
    assert calls == ["sum"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"]} | settings)


def adapted(config=None, **llama):
    return get_peft_model(tiny_llama(**llama), config or lora())


def refuse(model, message, kind=ADAPTER_OFF):
    with pytest.raises(ValueError, match=message):
        check_model(model, ReferencePolicy(kind, "x", "x", model if kind == ADAPTER_OFF else None))


def test_models_that_can_be_trained_pass():
    check_model(adapted(), ReferencePolicy(ADAPTER_OFF, "x", "x"))
    check_model(tiny_llama(), ReferencePolicy(SECOND_MODEL, "x", "x", tiny_llama()))
    check_model(tiny_llama(), ReferencePolicy(FROM_DATASET, "x", "x"))
    bias = adapted(lora(bias="all"), attention_bias=True)
    check_model(bias, ReferencePolicy(SECOND_MODEL, "x", "x", tiny_llama()))


def test_models_that_cannot_be_trained_are_refused():
    frozen = tiny_llama().requires_grad_(False)
    refuse(frozen, "must have trainable weights; got none. Give peft_config")
    refuse(tiny_llama(), "ref_model must be given .*; got None")
    blocks = tiny_llama(attn_implementation="flex_attention")
    refuse(blocks, "must not be .flex_attention. .*; got device .cpu.")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refuse(adapted(prompt), "must not be prompt learning; got .*PROMPT_TUNING")
    refuse(adapted(lora(bias="all"), attention_bias=True), "must be frozen .*; got 8 trainable")
    several = adapted()
    several.add_adapter("other", lora())
    several.base_model.set_adapter(["default", "other"])
    refuse(several, "must have one active adapter; got .'default', 'other'")
    same = tiny_llama()
    with pytest.raises(ValueError, match="must be a model of its own; got the one that is trained"):
        check_model(same, ReferencePolicy(SECOND_MODEL, "x", "x", same))
    native = tiny_llama()
    native.add_adapter(lora())
    refuse(native, "must be a PeftModel .*; got one that transformers loaded")


@pytest.mark.parametrize(
    ("settings", "tied", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False, "leave the output embeddings as they"),
        ({"modules_to_save": ["lm_head"]}, False, "leave the output embeddings as they are"),
        ({"modules_to_save": ["embed_tokens"]}, True, "leave the .* embeddings as they are"),
        (
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            True,
            "must not have target_parameters; got",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapters_on_the_head_or_on_bare_parameters_are_refused(settings, tied, message):
    refuse(adapted(lora(**settings), tie_word_embeddings=tied), message)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    check_tokenizer(tokenizer, tiny_llama(), "model")
    with pytest.raises(ValueError, match="must fit ref_model; got 259 tokens for 200 embeddings"):
        check_tokenizer(tokenizer, tiny_llama(vocab_size=200), "ref_model")
    other = tiny_tokenizer()
    tiny_llama().save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    check_tokenizer(tokenizer, load_model(tmp_path, dtype="float32"), "model")
    text = (tmp_path / "tokenizer.json").read_text()
    vocab = json.loads(text)
    letters = vocab["model"]["vocab"]
    letters["a"], letters["b"] = letters["b"], letters["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="the tokenizer of model; got another id for 2 of its 259"):
        check_tokenizer(tokenizer, load_model(tmp_path, dtype="float32"), "model")


def test_another_reference_is_refused():
    check_step_zero(torch.tensor([0.0, -0.0]), torch.bfloat16)
    with pytest.raises(ValueError, match="must be within 0 nats; got 1e-07"):
        check_step_zero(torch.tensor([0.0, 1e-7]), torch.float32)
    with pytest.raises(ValueError, match="within 0 nats; got nan"):
        check_step_zero(torch.tensor([float("nan")]), torch.bfloat16)
