"""Losses against loops over pairs, their minimisers, gradients, and extreme margins."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_dpo.engine import losses
from ctrl_dpo.engine.losses import group_loss, pad_groups

NAMES = ["squared", "softmax", "soft_label", "dpo", "ipo"]
FITS = ["squared", "softmax", "soft_label"]
BETA = 0.3


def compute(name, d, t, mask=None, anchor=0.0) -> torch.Tensor:
    d, t = (torch.as_tensor(x, dtype=torch.float64) for x in (d, t))
    mask = torch.ones_like(d, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    return group_loss(name, d, t, mask, beta=BETA, anchor=anchor)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def by_loops(name: str, d: list[float], t: list[float], anchor: float) -> float:
    """One group's loss by its definition over pairs or responses, in plain Python."""
    k = len(d)
    pairs = [(a, b) for a in range(k) for b in range(k) if a != b]
    if name == "squared":
        e = [x - y for x, y in zip(d, t, strict=True)]
        spread = sum((e[a] - e[b]) ** 2 for a, b in pairs) / (2 * k * k)
        return spread + anchor * (sum(e) / k) ** 2
    if name == "softmax":
        top = max(t), max(d)
        goal = [math.exp(x - top[0]) for x in t]
        log_z = top[1] + math.log(sum(math.exp(x - top[1]) for x in d))
        return -sum(q / sum(goal) * (x - log_z) for q, x in zip(goal, d, strict=True))
    if name == "soft_label":
        terms = []
        for a, b in pairs:
            goal = 1 / (1 + math.exp(-BETA * (t[a] - t[b])))
            x = BETA * (d[a] - d[b])
            terms.append(-goal * log_sigmoid(x) - (1 - goal) * log_sigmoid(-x))
        return sum(terms) / max(1, len(terms))
    ordered = [(a, b) for a, b in pairs if t[a] > t[b]]
    if name == "dpo":
        terms = [-log_sigmoid(BETA * (d[a] - d[b])) for a, b in ordered]
    else:
        terms = [(d[a] - d[b] - 1 / (2 * BETA)) ** 2 for a, b in ordered]
    return sum(terms) / max(1, len(terms))


NUMBERS = st.lists(st.floats(-8, 8), min_size=1, max_size=6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=1000)
@given(values=NUMBERS, seed=st.integers(0, 2**32 - 1), anchor=st.sampled_from([0.0, 0.3, 1.0]))
def test_values_are_those_of_loops_over_pairs(name, values, seed, anchor):
    targets = np.random.default_rng(seed).normal(0, 3, len(values)).tolist()
    found = compute(name, [values], [targets], anchor=anchor).item()
    assert found == pytest.approx(by_loops(name, values, targets, anchor), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_gradients(name, anchor, rng):
    d = torch.tensor(rng.normal(size=(4, 5)), requires_grad=True)
    t = torch.tensor(rng.normal(size=(4, 5)))
    mask = torch.tensor(rng.random((4, 5)) < 0.8)
    mask[:, :2] = True
    options = {"beta": BETA, "anchor": anchor if name == "squared" else 0.0}

    def loss(x):
        return group_loss(name, x, t, mask, **options)

    assert torch.autograd.gradcheck(loss, (d,), rtol=1e-6, atol=1e-9, eps=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_extreme_margins_are_finite_in_value_and_gradient(name, margin):
    d = torch.tensor([[margin, 0.0, -margin]], dtype=torch.float32, requires_grad=True)
    t = torch.tensor([[1.0, -1e4, 1e4]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    value = group_loss(name, d, t, mask, beta=BETA, anchor=0.0)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(d.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_neither_value_nor_gradient(name, rng):
    d, t = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    short = torch.tensor(d[:, :2], requires_grad=True)
    compute_short = group_loss(
        name,
        short,
        torch.tensor(t[:, :2]),
        torch.ones(3, 2, dtype=torch.bool),
        beta=BETA,
        anchor=0.0,
    )
    compute_short.sum().backward()
    # what lies in the padding is not even a number
    filled = np.where([True, True, False, False], d, np.nan)
    long = torch.tensor(filled, requires_grad=True)
    targets = torch.tensor(np.where([True, True, False, False], t, np.inf))
    mask = torch.tensor([[True, True, False, False]] * 3)
    value = group_loss(name, long, targets, mask, beta=BETA, anchor=0.0)
    value.sum().backward()
    assert value.detach() == pytest.approx(compute_short.detach(), abs=1e-12)
    assert long.grad[:, :2] == pytest.approx(short.grad, abs=1e-12)
    assert (long.grad[:, 2:] == 0).all()


@pytest.mark.parametrize("name", FITS)
def test_the_minimiser_has_the_targets_differences(name, rng):
    t = torch.tensor(rng.normal(size=(2, 5)) * 2)
    d = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    optimiser = torch.optim.LBFGS([d], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimiser.zero_grad()
        value = group_loss(name, d, t, mask, beta=BETA, anchor=0.0).sum()
        value.backward()
        return value

    optimiser.step(closure)
    found = (d - t).detach()
    assert found - found.mean(1, keepdim=True) == pytest.approx(torch.zeros(2, 5), abs=1e-5)


def test_the_anchor_pins_every_response(rng):
    t = rng.normal(size=(1, 4))
    shifted = t + 3.0
    assert compute("squared", shifted, t).item() == pytest.approx(0.0, abs=1e-12)
    assert compute("squared", shifted, t, anchor=0.5).item() == pytest.approx(4.5)
    # w = 1 is the plain mean of squares, which is QRPO's pointwise regression
    d = rng.normal(size=(1, 4))
    mean_square = float(np.mean((d - t) ** 2))
    assert compute("squared", d, t, anchor=1.0).item() == pytest.approx(mean_square)


def test_ipo_by_hand():
    # differences of 1 / (2 beta) cost nothing
    assert compute("ipo", [[0.5 / BETA, 0.0]], [[1.0, 0.0]]).item() == pytest.approx(0.0, abs=1e-12)
    assert compute("ipo", [[0.0, 0.0]], [[1.0, 0.0]]).item() == pytest.approx((0.5 / BETA) ** 2)
    assert compute("dpo", [[0.0, 0.0]], [[1.0, 0.0]]).item() == pytest.approx(math.log(2))
    # groups that the targets do not order cost nothing and pull nowhere
    assert compute("dpo", [[4.0, 1.0]], [[2.0, 2.0]]).item() == 0.0


def test_numbers_are_arranged_by_group_and_place():
    padded, mask = pad_groups(
        torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    )
    assert padded.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_says_what_minimises_it(name):
    assert "inimiser" in getattr(losses, name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_a_factor_of_value_and_gradient(name, rng):
    t = torch.tensor(rng.normal(size=(3, 4)))
    d = torch.tensor(rng.normal(size=(3, 4)), requires_grad=True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    weights = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)
    plain = group_loss(name, d, t, mask, beta=BETA, anchor=0.0)
    (plain_grad,) = torch.autograd.grad(plain.sum(), d)
    weighted = group_loss(name, d, t, mask, beta=BETA, anchor=0.0, weights=weights)
    (grad,) = torch.autograd.grad(weighted.sum(), d)
    assert torch.equal(weighted, weights * plain)
    assert grad == pytest.approx(weights.unsqueeze(1) * plain_grad, abs=1e-12)


def test_on_raw_rewards_the_fits_are_rebel_and_rpo(rng):
    """With targets r / beta, by the formulas of their papers for one pair."""
    (d1, d2), (r1, r2) = rng.normal(size=2), rng.normal(size=2)
    targets = [[r1 / BETA, r2 / BETA]]
    rebel = ((d1 - d2) / (1 / BETA) - (r1 - r2)) ** 2  # eta = 1 / beta
    found = compute("squared", [[d1, d2]], targets).item()
    # a group of two averages over four ordered pairs, of which two count, each halved
    assert found == pytest.approx(rebel / BETA**2 / 4)
    a, b = 1 / (1 + math.exp(r2 - r1)), 1 / (1 + math.exp(BETA * (d2 - d1)))
    entropy = -a * math.log(a) - (1 - a) * math.log(1 - a)
    rpo = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
    assert compute("soft_label", [[d1, d2]], targets).item() == pytest.approx(rpo + entropy)
