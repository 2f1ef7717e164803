"""The fast sampler against a slow one: no cache, no batch, inversion by numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo.engine.generation import (
    InverseCDF,
    Sampler,
    draw_responses,
    end_tokens,
)
from ctrl_dpo.engine.kv_cache import (
    ATTENTION,
    block_cache,
    decode_attention,
    use_decode_attention,
    use_training_attention,
)

PROMPTS = [[1, 40, 41, 42], [1], [1, 60, 61, 62, 63, 64, 65], [1, 70, 71]]


@pytest.fixture(params=["llama", "llama_no_groups"])
def drawing_model(request):
    heads = 4 if request.param == "llama_no_groups" else 2
    model = tiny_llama(num_key_value_heads=heads)
    use_decode_attention(model)
    return model


def test_a_policy_gets_back_the_attention_that_it_came_with():
    model = tiny_llama(attn_implementation="eager")
    for _ in range(2):
        use_decode_attention(model)
        assert model.config._attn_implementation == ATTENTION
    use_training_attention(model)
    assert model.config._attn_implementation == "eager"


def slow_draw(model, prompt, sampler, draw, end_ids, occurrence=0):
    """Draw once by the definition: invert the distribution of the full forward pass."""
    uniforms = sampler.uniforms(prompt, occurrence)[draw]
    ids, total = list(prompt), 0.0
    for uniform in uniforms:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy() / sampler.temperature
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        token = int(np.searchsorted(np.cumsum(probs), uniform, side="right"))
        ids.append(token)
        total += float(np.log(probs[token]))
        if token in end_ids:
            break
    return ids[len(prompt) :], total


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_are_those_of_the_definition(drawing_model, temperature):
    sampler = Sampler(draws=3, max_new_tokens=70, temperature=temperature, seed=5)
    plain = tiny_llama(num_key_value_heads=drawing_model.config.num_key_value_heads)
    drawn = draw_responses(drawing_model, PROMPTS, sampler, [2, 9, 17])
    for prompt, draws in zip(PROMPTS, drawn, strict=True):
        for k in range(sampler.draws):
            ids, logp = slow_draw(plain, prompt, sampler, k, {2, 9, 17})
            assert draws.response_ids[k] == ids
            assert draws.sampler_logps[k] == pytest.approx(logp, abs=2e-4)
            assert draws.finished[k] == (ids[-1] in {2, 9, 17})


def test_some_draws_end_early_so_that_rows_are_dropped():
    """The comparison above covers the dropping of finished rows: with three end tokens many end."""
    model = tiny_llama()
    use_decode_attention(model)
    drawn = draw_responses(model, PROMPTS, Sampler(draws=3, max_new_tokens=70, seed=5), [2, 9, 17])
    lengths = [len(r) for d in drawn for r in d.response_ids]
    assert min(lengths) < 20 < max(lengths)


def test_a_prompt_is_drawn_alike_alone_and_in_company(drawing_model):
    sampler = Sampler(draws=4, max_new_tokens=12, seed=3)
    together = draw_responses(drawing_model, PROMPTS, sampler, [2])
    for prompt, draws in zip(PROMPTS, together, strict=True):
        assert draw_responses(drawing_model, [prompt], sampler, [2])[0].response_ids == (
            draws.response_ids
        )


def test_top_k_one_is_greedy_decoding_by_generate(drawing_model):
    sampler = Sampler(draws=2, max_new_tokens=10, top_k=1)
    plain = tiny_llama(num_key_value_heads=drawing_model.config.num_key_value_heads)
    for prompt in PROMPTS:
        drawn = draw_responses(drawing_model, [prompt], sampler, [2])[0]
        ids = torch.tensor([prompt])
        generated = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10
        )
        expected = generated[0, len(prompt) :].tolist()
        assert drawn.response_ids == [expected, expected]
        assert drawn.sampler_logps == pytest.approx([0.0, 0.0], abs=1e-6)


def test_top_p_draws_only_from_the_nucleus(drawing_model):
    sampler = Sampler(draws=40, max_new_tokens=1, top_p=0.3)
    with torch.no_grad():
        probs = drawing_model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    ordered = probs.sort(descending=True)
    nucleus = ordered.indices[: int((ordered.values.cumsum(0) < 0.3).sum()) + 1].tolist()
    drawn = draw_responses(drawing_model, [PROMPTS[0]], sampler, [2])[0]
    assert {ids[0] for ids in drawn.response_ids} <= set(nucleus)
    mass = probs[nucleus].sum().item()
    for ids, logp in zip(drawn.response_ids, drawn.sampler_logps, strict=True):
        assert logp == pytest.approx(np.log(probs[ids[0]].item() / mass), abs=1e-5)


def test_equal_prompts_get_draws_of_their_own(drawing_model):
    sampler = Sampler(draws=2, max_new_tokens=8)
    drawn = draw_responses(drawing_model, [PROMPTS[0]] * 2, sampler, [2], occurrences=[0, 1])
    assert drawn[0].response_ids != drawn[1].response_ids


@pytest.mark.parametrize("vocabulary", [3, 256, 259, 1000])
def test_inverse_cdf_equals_numpy_inversion(vocabulary, rng):
    scores = rng.normal(scale=3.0, size=(64, vocabulary))
    scores[:, 1] = -np.inf
    uniforms = rng.random(64)
    uniforms[:2] = [0.0, np.nextafter(1.0, 0.0)]
    token, logp = InverseCDF(64, vocabulary, torch.device("cpu")).draw(
        torch.tensor(scores, dtype=torch.float32), torch.from_numpy(uniforms)
    )
    probs = np.exp(scores - scores.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    expected = [
        int(np.searchsorted(np.cumsum(p), u, side="right"))
        for p, u in zip(probs, uniforms, strict=True)
    ]
    expected[1] = vocabulary - 1
    assert token.tolist() == expected
    np.testing.assert_allclose(
        logp.numpy(), np.log(probs[np.arange(64), expected]), rtol=1e-5, atol=1e-6
    )


def test_inverse_cdf_never_draws_a_token_without_mass():
    scores = torch.full((3, 600), float("-inf"))
    scores[:, 299] = 0.0
    uniforms = torch.tensor([0.0, 0.5, float(np.nextafter(1.0, 0.0))], dtype=torch.float64)
    token, logp = InverseCDF(3, 600, torch.device("cpu")).draw(scores, uniforms)
    assert token.tolist() == [299, 299, 299]
    assert logp.tolist() == [0.0, 0.0, 0.0]


def test_end_tokens_are_those_of_the_model_and_the_tokenizer():
    model = tiny_llama()
    model.generation_config.eos_token_id = [5, 7]
    assert end_tokens(model, tiny_tokenizer()) == [2, 5, 7]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("draws", 0, r"draws must be an integer >= 1; got 0"),
        ("max_new_tokens", 1.5, r"max_new_tokens must be an integer >= 1; got 1\.5"),
        ("temperature", 0.0, r"temperature must be finite and > 0; got 0\.0"),
        ("top_p", 0.0, r"top_p must be in \(0, 1\]; got 0\.0"),
        ("top_k", -1, r"top_k must be an integer >= 0; got -1"),
    ],
)
def test_sampler_settings_are_checked_when_built(field, value, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**{field: value})


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5], [1, 2, 5], [3, 4, 5], [4]])
def test_attention_to_a_shared_prompt_equals_attention_to_copies_of_it(kept):
    """Two prompts with three draws each, of which some are left: against transformers' kernel."""
    generator = torch.Generator().manual_seed(0)

    def states(rows, heads, length):
        return torch.randn(rows, heads, length, 8, generator=generator)

    cache = block_cache(1, copies=3, capacity=40)
    prompts = states(2, 2, 5), states(2, 2, 5)
    cache.update(*prompts, 0)
    layer, module = cache.layers[0], SimpleNamespace(layer_idx=0, is_causal=False, training=False)
    first, second = (states(6, 2, 1), states(6, 2, 1)), (states(6, 2, 1), states(6, 2, 1))
    cache.update(*first, 0)
    rows = torch.tensor(kept)
    layer.keep_rows(rows)
    own = cache.update(*(x[rows] for x in second), 0)
    query, mask = states(len(kept), 4, 1), torch.zeros(len(kept), 1, 1, 37, dtype=torch.bool)
    mask[..., 1:7] = True  # one position of padding, four of the prompt, two drawn
    made, _ = decode_attention(module, query, *own, mask, decode_cache=cache)
    keys, values = (
        torch.cat([p.repeat_interleave(3, 0), a, b], dim=2)[rows].repeat_interleave(2, 1)
        for p, a, b in zip(prompts, first, second, strict=True)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys[:, :, 1:], values[:, :, 1:]
    )
    torch.testing.assert_close(made, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert len(layer.prompt_keys) == len({row // 3 for row in kept})
