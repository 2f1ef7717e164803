"""Scores of a sequence-classification checkpoint against one plain forward pass per response."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from ctrl_dpo.engine.reward_models import SequenceRewardModel
from ctrl_dpo.score import load_reward, score

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def save_reward_model(folder, chat_template=CHAT_TEMPLATE, **overrides):
    options = SIZES | {"num_labels": 1, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**options | overrides))
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_reward_model(tmp_path_factory.mktemp("reward_model"))


def dialogues() -> Dataset:
    prompts = [
        [{"role": "user", "content": "Name a colour."}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ]
    responses = [["Red", "Something like blue, I should say.", ""], ["Hello there", "é🎈\r\n"]]
    return Dataset.from_dict({"prompt": prompts, "responses": responses})


def one_by_one(folder, texts: list[str]) -> np.ndarray:
    """Score rendered texts in batches of one, without padding and in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(t, add_special_tokens=False)["input_ids"]]) for t in texts]
        return np.array([model(input_ids=i).logits.item() for i in ids])


def rendered(data: Dataset) -> list[str]:
    return [
        "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n"
            for m in [*row["prompt"], {"role": "assistant", "content": response}]
        )
        for row in data
        for response in row["responses"]
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_batching_and_padding_change_no_score(checkpoint, batch_size):
    """Float32 against float64 without padding: the differences are rounding, 1e-5 of the spread."""
    scored = score(dialogues(), str(checkpoint), batch_size=batch_size, progress=False)
    found = np.concatenate([np.array(r) for r in scored["rewards"]])
    expected = one_by_one(checkpoint, rendered(dialogues()))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_padding_holds_when_the_padding_token_is_the_end_token(tmp_path):
    """Then trailing end tokens are padding to the model, batched or not."""
    folder = save_reward_model(tmp_path, pad_token_id=2)
    scored = score(dialogues(), str(folder), batch_size=5, progress=False)
    found = np.concatenate([np.array(r) for r in scored["rewards"]])
    expected = one_by_one(folder, rendered(dialogues()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_plain_text_prompts_are_continued_without_a_template(tmp_path):
    folder = save_reward_model(tmp_path, chat_template=None)
    data = Dataset.from_dict({"prompt": ["Roses are"], "responses": [[" red", " grey and sad"]]})
    found = score(data, str(folder), progress=False)["rewards"][0]
    expected = one_by_one(folder, ["Roses are red", "Roses are grey and sad"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))


def test_an_encoder_reads_prompt_and_response_as_two_segments(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**SIZES | {"num_labels": 1, "pad_token_id": 0})
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        sep_token="<|im_end|>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(tmp_path)
    data = Dataset.from_dict({"prompt": ["Roses are"], "responses": [["red", "grey and sad"]]})
    found = score(data, str(tmp_path), progress=False)["rewards"][0]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        encoded = [tokenizer("Roses are", r, return_tensors="pt") for r in ("red", "grey and sad")]
        expected = [model(**e).logits.item() for e in encoded]
        no_segments = [model(e["input_ids"]).logits.item() for e in encoded]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(found, no_segments, rtol=1e-2)


def test_a_cached_rerun_runs_no_forward_pass(checkpoint, tmp_path, monkeypatch):
    cache = tmp_path / "scores.jsonl"
    first = score(dialogues(), str(checkpoint), cache=cache, progress=False)["rewards"][:]

    def refuse(self, sequences):
        raise AssertionError(f"{len(sequences)} sequences scored again")

    monkeypatch.setattr(SequenceRewardModel, "_forward", refuse)
    assert score(dialogues(), str(checkpoint), cache=cache, progress=False)["rewards"][:] == first


def test_the_identity_is_the_content_and_the_settings(checkpoint, tmp_path):
    same = save_reward_model(tmp_path / "copy")
    other = save_reward_model(tmp_path / "other", initializer_range=0.1)
    identity = SequenceRewardModel(checkpoint).identity
    assert SequenceRewardModel(same).identity == identity
    assert SequenceRewardModel(other).identity != identity
    assert SequenceRewardModel(checkpoint, dtype="bfloat16").identity != identity


# --- refusals, each before a forward pass


def test_two_outputs_are_refused_by_the_config_alone(tmp_path):
    save_reward_model(tmp_path, num_labels=2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"num_labels 1; got 2 for .*LlamaForSequenceClassif"):
        load_reward(str(tmp_path))


def test_a_language_model_is_refused(tiny_model_folder):
    with pytest.raises(ValueError, match=r"num_labels 1; got 2 for .*LlamaForCausalLM"):
        load_reward(str(tiny_model_folder))


def test_a_checkpoint_without_its_head_is_refused(tmp_path, model):
    save_reward_model(tmp_path, num_key_value_heads=2)
    model.save_pretrained(tmp_path / "language_model")
    (tmp_path / "language_model" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"every weight of LlamaForSequenceClassification; got .*score"
    ):
        score(dialogues(), str(tmp_path), progress=False)


def test_no_padding_token_is_refused(tmp_path):
    save_reward_model(tmp_path, pad_token_id=None)
    with pytest.raises(ValueError, match=r"padding token in its config.*got pad_token_id None"):
        load_reward(str(tmp_path))


def test_no_chat_template_is_refused(tmp_path):
    save_reward_model(tmp_path, chat_template=None)
    with pytest.raises(ValueError, match=r"must have a chat template .* at row 0, response 0"):
        score(dialogues(), str(tmp_path), progress=False)


def test_truncation_is_refused_with_its_place(checkpoint):
    """The model has 128 positions; row 1, response 1 renders to 129 tokens."""
    data = dialogues()
    frame = len(tiny_tokenizer()(rendered(data)[3])["input_ids"]) - len("Hello there")
    rows = data.to_list()
    rows[1]["responses"][1] = "x" * (129 - frame)
    with pytest.raises(ValueError, match="1 to 128 tokens together; got 129 at row 1, response 1"):
        score(Dataset.from_list(rows), str(checkpoint), progress=False)
    rows[1]["responses"][1] = "x" * (128 - frame)
    assert len(score(Dataset.from_list(rows), str(checkpoint), progress=False)) == 2


def test_the_identity_of_a_hub_checkpoint_is_its_commit(tmp_path, monkeypatch):
    """A hub cache laid out by hand: two commits of one name, the sockets blocked."""
    commits = ["0" * 39 + "1", "0" * 39 + "2"]
    repository = tmp_path / "models--someone--reward"
    (repository / "refs").mkdir(parents=True)
    for commit in commits:
        save_reward_model(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in commits:
        (repository / "refs" / "main").write_text(commit)
        found = SequenceRewardModel("someone/reward").identity
        assert found == f"someone/reward@{commit}:float32"
