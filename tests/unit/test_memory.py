"""The bound holds for every batch, follows the settings, and is compared with the machine."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from weakref import WeakSet

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from ctrl_dpo.engine import memory
from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.memory import MemoryCallback, activation_bytes, memory_bound


def make_rows(count: int = 12) -> list[dict]:
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.integers(3, 259, size=n).tolist()

    return [
        {
            "prompt_ids": draw(rng.integers(4, 60)),
            "response_ids": [draw(rng.integers(2, 40)) for _ in range(3)],
        }
        for _ in range(count)
    ]


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_llama(num_hidden_layers=4),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    speed_up_adapters(model)
    return model.train()


def settings(**changes):
    defaults = {"per_device_train_batch_size": 2, "share_prompt": True, "optim": "adamw_torch"}
    defaults |= {"max_tokens_per_pass": 10**9}
    return SimpleNamespace(**defaults | {"activation_checkpointing": False} | changes)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_the_bound_holds_for_every_batch_and_is_not_twice_the_truth(share_prompt):
    model, rows = adapted(), make_rows()
    bound = memory_bound(model, rows, settings(share_prompt=share_prompt))["activations"]
    sizes = [
        activation_bytes(model, a, share_prompt) + activation_bytes(model, b, share_prompt)
        for a in rows
        for b in rows
        if a is not b
    ]
    assert max(sizes) <= bound < 2 * max(sizes)


def test_counted_bytes_by_hand():
    """One linear layer after another: each keeps its input, and nothing twice."""
    model = adapted()
    row = {"prompt_ids": [5, 6, 7], "response_ids": [[8, 9]]}
    twice = {"prompt_ids": [5, 6, 7] * 2, "response_ids": [[8, 9] * 2]}
    small, large = (activation_bytes(model, r, True) for r in (row, twice))
    tokens = 4, 9
    # four layers of width 32: at least 7 inputs of 32 or 64 numbers each, in float32
    assert small > tokens[0] * 4 * (6 * 32 + 64) * 4
    assert large == pytest.approx(small * tokens[1] / tokens[0], rel=0.15)


def kept_by_the_graph(model, row, share_prompt) -> int:
    """Count what the nodes of the autograd graph say they saved: no hook, and nothing is freed.

    For a frozen head: a trained one is recomputed when a node is asked what it saved.
    """
    model.eval()
    output = response_logps(model, collate([row], share_prompt))
    seen, nodes, sizes = set(), [output.grad_fn], {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        saved = [n for n in dir(node) if n.startswith("_saved_") or n == "saved_tensors"]
        for value in [getattr(node, name) for name in saved]:
            tensors = value if isinstance(value, (tuple, list)) else [value]
            for storage in [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]:
                sizes[storage.data_ptr()] = storage.nbytes()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in sizes.items() if place not in weights)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_counted_bytes_are_those_that_the_graph_holds(share_prompt):
    model = adapted()
    for row in make_rows(4):
        found = activation_bytes(model, row, share_prompt)
        assert found == kept_by_the_graph(model, row, share_prompt)


def test_nothing_that_was_counted_stays(monkeypatch):
    """A node that saves its own output must not be kept by it."""
    made = WeakSet()

    class Watched(memory._Kept):
        def __init__(self, tensor):
            super().__init__(tensor)
            made.add(self)
            created.append(1)

    created = []
    monkeypatch.setattr(memory, "_Kept", Watched)
    assert activation_bytes(adapted(), make_rows(1)[0], True) > 0
    gc.collect()
    assert created
    assert not made


def test_weights_gradients_and_state_by_hand():
    model = adapted()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = memory_bound(model, make_rows(), settings())
    assert found["weights"] == 4 * sum(p.numel() for p in model.parameters())
    assert found["gradients"] == 4 * trained
    assert found["optimiser"] == 8 * trained
    small = memory_bound(model, make_rows(), settings(optim="adamw_8bit"))
    assert small["optimiser"] < 0.3 * found["optimiser"]


def test_what_lowers_it():
    model, rows = adapted(), make_rows()
    whole = memory_bound(model, rows, settings())["activations"]
    one = memory_bound(model, rows, settings(max_tokens_per_pass=1))["activations"]
    assert one == memory_bound(model, rows, settings(per_device_train_batch_size=1))["activations"]
    again = memory_bound(model, rows, settings(activation_checkpointing=True))["activations"]
    assert 0.45 * whole < one < 0.75 * whole
    assert again < 0.4 * whole


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {},
            "activation_checkpointing=True, a smaller max_tokens_per_pass, down to a group in each",
        ),
        (
            {"max_tokens_per_pass": None, "activation_checkpointing": True},
            "a smaller per_device_train_batch_size",
        ),
        ({"max_tokens_per_pass": 1}, "activation_checkpointing=True"),
        (
            {"max_tokens_per_pass": 1, "activation_checkpointing": True},
            "a smaller max_prompt_length or max_response_length",
        ),
    ],
)
def test_a_small_machine_is_warned_of_with_the_remedy(changes, remedy, monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    caplog.set_level(logging.INFO)
    loader = SimpleNamespace(dataset=make_rows())
    call = {"model": adapted(), "train_dataloader": loader}
    MemoryCallback().on_train_begin(settings(**changes), None, None, **call)
    assert "memory: at most" in caplog.text
    assert f"To lower it: {remedy}." in caplog.text


@pytest.mark.parametrize(
    ("checkpointing", "given_back", "library"),
    [
        (True, False, "glibc"),
        (False, False, "glibc"),
        (True, True, "glibc"),
        (True, False, ""),
    ],
)
def test_glibc_s_setting_is_named_where_it_helps(
    checkpointing, given_back, library, monkeypatch, caplog
):
    name = "MALLOC_MMAP_THRESHOLD_"
    monkeypatch.setattr("platform.libc_ver", lambda: (library, ""))
    monkeypatch.delenv(name, raising=False)
    if given_back:
        monkeypatch.setenv(name, "65536")
    caplog.set_level(logging.INFO)
    loader = SimpleNamespace(dataset=make_rows(2))
    call = {"model": adapted(), "train_dataloader": loader}
    arguments = settings(activation_checkpointing=checkpointing)
    MemoryCallback().on_train_begin(arguments, None, None, **call)
    helps = checkpointing and not given_back and library == "glibc"
    assert (f"{name}=65536" in caplog.text) == helps


def test_a_large_machine_is_not_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**40)
    loader = SimpleNamespace(dataset=make_rows())
    call = {"model": adapted(), "train_dataloader": loader}
    MemoryCallback().on_train_begin(settings(), None, None, **call)
    assert "To lower it" not in caplog.text


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = adapted()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        response_logps(model, collate(make_rows(3))).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    # a layer's branches add their gradients in another order
    assert (found[0] - found[1]).abs().max() < 1e-6 * found[0].abs().max()
