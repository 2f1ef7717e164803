"""The sample stage over a dataset: columns, shards, interruption, refusals."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from plain import plain_logps
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo import sample as sample_module
from ctrl_dpo.data.folders import read_record, read_shards
from ctrl_dpo.data.tokens import prompt_tokens
from ctrl_dpo.engine.generation import Sampler
from ctrl_dpo.sample import sample

SAMPLER = Sampler(draws=3, max_new_tokens=6, seed=4)
TEXTS = ["one", "a second one", "three", "the fourth of them", "five", "one"]


def prompts() -> Dataset:
    return Dataset.from_list(
        [{"id": i, "prompt": [{"role": "user", "content": t}]} for i, t in enumerate(TEXTS)]
    )


def run(output=None, sampler=SAMPLER, **options) -> Dataset:
    return sample(
        prompts(),
        tiny_llama(),
        sampler,
        tokenizer=tiny_tokenizer(),
        output=output,
        shard_prompts=2,
        batch_rows=6,
        **options,
    )


def test_columns_agree_with_one_another():
    rows = run()
    tokenizer = tiny_tokenizer()
    assert rows["id"] == list(range(6))
    for row in rows:
        assert len(row["responses"]) == SAMPLER.draws == len(row["sampler_logps"])
        for text, ids, finished in zip(
            row["responses"], row["response_ids"], row["finished"], strict=True
        ):
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
            assert finished == (ids[-1] == tokenizer.eos_token_id)
            assert len(ids) == SAMPLER.max_new_tokens or finished


def test_an_interrupted_run_goes_on_and_gives_what_an_uninterrupted_one_gives(
    tmp_path, monkeypatch
):
    whole = run(tmp_path / "whole")
    drawn: list[int] = []
    original = sample_module.draw_responses

    def failing(model, ids, *rest):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(len(ids))
        return original(model, ids, *rest)

    monkeypatch.setattr(sample_module, "draw_responses", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    assert len(read_shards(tmp_path / "parts")) == 4
    drawn.clear()
    resumed = run(tmp_path / "parts")
    assert drawn == [2]  # only the shard that was missing
    assert resumed.to_list() == whole.to_list()
    assert (
        read_record(tmp_path / "parts")["content_hash"]
        == (read_record(tmp_path / "whole")["content_hash"])
    )
    drawn.clear()
    run(tmp_path / "parts")
    assert drawn == []


def test_the_record_says_what_was_drawn_and_how(tmp_path):
    run(tmp_path / "out", Sampler(draws=3, max_new_tokens=6, temperature=0.5, seed=9))
    record = read_record(tmp_path / "out")
    assert record["settings"]["temperature"] == 0.5
    assert record["settings"]["seed"] == 9
    assert record["summary"]["prompts"] == 6
    assert record["summary"]["responses"] == 18


def test_equal_prompts_have_draws_of_their_own():
    rows = run()
    assert rows[0]["prompt"] == rows[5]["prompt"]
    assert rows[0]["response_ids"] != rows[5]["response_ids"]


def test_the_folder_of_another_seed_is_refused(tmp_path):
    run(tmp_path / "out")
    with pytest.raises(ValueError, match=r"where settings\.seed is 4, not 5"):
        run(tmp_path / "out", Sampler(draws=3, max_new_tokens=6, seed=5))


def test_another_model_is_refused(tmp_path):
    run(tmp_path / "out")
    with pytest.raises(ValueError, match=r"where inputs\.model is"):
        sample(
            prompts(),
            tiny_llama(seed=1),
            SAMPLER,
            tokenizer=tiny_tokenizer(),
            output=tmp_path / "out",
            batch_rows=6,
            shard_prompts=2,
        )


def test_a_folder_that_another_call_draws_into_is_refused(tmp_path, monkeypatch, held_by_another):
    drawn: list[int] = []
    original = sample_module.draw_responses

    def counted(model, ids, *rest):
        drawn.append(len(ids))
        return original(model, ids, *rest)

    monkeypatch.setattr(sample_module, "draw_responses", counted)
    message = r"output folder must not be in use; got .*out.*another process"
    with held_by_another(tmp_path / "out"), pytest.raises(ValueError, match=message):
        run(tmp_path / "out")
    assert drawn == []
    rows = run(tmp_path / "out")
    assert drawn == [2, 2, 2]
    with held_by_another(tmp_path / "out"):
        assert run(tmp_path / "out").to_list() == rows.to_list()  # finished: only read
    assert drawn == [2, 2, 2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"prompts must have at least one row; got 0"),
        ([{"question": "?"}], r"column 'prompt' is missing .* found \['question'\]"),
        ([{"prompt": "x" * 600}], r"at most 506 tokens \(context 512 .* got 600 at row 0"),
    ],
)
def test_bad_prompts_are_refused_before_anything_is_drawn(rows, message):
    data = Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": []})
    with pytest.raises(ValueError, match=message):
        sample(data, tiny_llama(), SAMPLER, tokenizer=tiny_tokenizer())


def test_log_ratios_need_a_reference_policy():
    message = r"log_ratios of a policy without an adapter \(LlamaForCausalLM\); got None, .*MODEL"
    with pytest.raises(ValueError, match=message):
        run(log_ratios=True)


def adapted(**settings):
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    return get_peft_model(tiny_llama(), lora)


def plain(model, row) -> list[float]:
    prompt = prompt_tokens(tiny_tokenizer(), row["prompt"])
    group = {"prompt_ids": prompt, "response_ids": row["response_ids"]}
    return plain_logps(model, [group]).tolist()


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
def test_log_ratios_of_a_changed_sampler_are_refused(change, tmp_path):
    """Their mean over such draws is not the KL."""
    ((name, value),) = change.items()
    whole = {"temperature": "1", "top_k": "0", "top_p": "1"}[name]
    message = rf"^{name} must be {whole} with log_ratios; got {value}: .* for win rates at that"
    sampler = Sampler(draws=3, max_new_tokens=6, **change)
    with pytest.raises(ValueError, match=message):
        # before the model is looked at
        sample(prompts(), "a/model", sampler, output=tmp_path / "out", log_ratios=True)
    assert not (tmp_path / "out").exists()


def test_log_ratios_are_of_policy_and_reference():
    model, tokenizer = adapted(init_lora_weights=False), tiny_tokenizer()
    rows = sample(prompts(), model, SAMPLER, tokenizer=tokenizer, log_ratios=True)
    again = adapted(init_lora_weights=False)
    for row in rows:
        assert row["policy_logps"] == pytest.approx(plain(again, row), abs=1e-4)
        with again.disable_adapter():
            expected = plain(again, row)
        assert row["reference_logps"] == pytest.approx(expected, abs=1e-4)


def test_an_adapter_that_does_nothing_has_log_ratios_of_zero():
    rows = sample(prompts(), adapted(), SAMPLER, tokenizer=tiny_tokenizer(), log_ratios=True)
    assert rows["policy_logps"] == rows["reference_logps"]
