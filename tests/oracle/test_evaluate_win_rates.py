"""Inference-time win rates against enumeration of all subsets, and against known distributions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from ctrl_dpo.measures.win_rates import inference_win_rate, selection_weights
from ctrl_dpo.theory.procedures import parse_procedure

PROCEDURES = [
    "single_draw",
    "best_of_2",
    "best_of_4",
    "worst_of_3",
    "2nd_best_of_3",
    "3rd_best_of_4",
    "0.25*single_draw+0.75*best_of_3",
]


def served(rewards, procedure) -> dict[float, Fraction]:
    """Enumerate the reward served over every subset, for each part of a procedure."""
    shares: dict[float, Fraction] = {}
    for weight, k, n in parse_procedure(procedure).order_statistics:
        subsets = list(itertools.combinations(rewards, n))
        for subset in subsets:
            reward = sorted(subset, reverse=True)[k - 1]
            shares[reward] = shares.get(reward, Fraction(0)) + Fraction(weight) / len(subsets)
    return shares


def enumerated(policy, reference, procedure, against) -> float:
    total = Fraction(0)
    for (a, p), (b, q) in itertools.product(
        served(policy, procedure).items(), served(reference, against).items()
    ):
        total += p * q * Fraction(2 * int(a > b) + int(a == b), 2)
    return float(total)


@pytest.mark.parametrize("against", PROCEDURES)
@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("levels", [3, 1000], ids=["many ties", "few ties"])
def test_every_pair_of_subsets(rng, procedure, against, levels):
    """Four prompts of 6 policy and 5 reference draws with integer rewards."""
    policy = rng.integers(0, levels, (4, 6)).astype(float)
    reference = rng.integers(0, levels, (4, 5)).astype(float)
    found = inference_win_rate(policy, reference, procedure, against=against).per_prompt
    expected = [
        enumerated(a, b, procedure, against) for a, b in zip(policy, reference, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("k", "n", "m"), [(1, 1, 7), (1, 4, 7), (4, 4, 7), (2, 5, 7), (3, 7, 7)])
def test_weights_count_the_subsets(k, n, m):
    subsets = list(itertools.combinations(range(m), n))
    counts = np.bincount([sorted(s, reverse=True)[k - 1] for s in subsets], minlength=m)
    weights = selection_weights(parse_procedure(f"{k}th_best_of_{n}"), m)
    np.testing.assert_array_equal(weights, counts / len(subsets))


def test_weights_of_large_n_neither_overflow_nor_lose_digits():
    """C(999, 499) / C(1000, 500) = 1/2: the best of half of the draws is the best of all."""
    weights = selection_weights(parse_procedure("best_of_500"), 1000)
    assert weights[-1] == 0.5
    assert math.fsum(weights) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("strength", [1.0, 2.0, 0.4])
@pytest.mark.parametrize("keep", ["best", "worst"])
def test_known_distributions(rng, n, strength, keep):
    """The maximum of ``a`` reference draws against one, best of N on both sides: W = a / (1 + a).

    With CDFs u^(aN) and u^N, W is the integral of (1 - u^(aN)) N u^(N-1) = 1 - N / (aN + N).
    Negated, it is the worst-of-N case. 4000 prompts of 8 draws; 4.5 standard errors.
    """
    policy = rng.random((4000, 8)) ** (1 / strength)
    reference = rng.random((4000, 12))
    if keep == "worst":
        policy, reference = -policy, -reference
    result = inference_win_rate(policy, reference, f"{keep}_of_{n}")
    expected = strength / (1 + strength)
    expected = expected if keep == "best" else 1 - expected
    assert result.value == pytest.approx(expected, abs=4.5 * result.standard_error)
    assert result.standard_error < 0.005


def test_procedures_that_differ(rng):
    """Best of 4 of the reference policy against its single draw wins 4/5, worst of 4 wins 1/5."""
    draws, reference = rng.random((4000, 8)), rng.random((4000, 8))
    for procedure, expected in (("best_of_4", 0.8), ("worst_of_4", 0.2)):
        result = inference_win_rate(draws, reference, procedure, against="single_draw")
        assert result.value == pytest.approx(expected, abs=4.5 * result.standard_error)


def test_subsets_of_many_draws_are_unbiased_for_m_draws_exactly(rng):
    """Averaging the estimate over all 4-subsets of 6 draws gives the estimate from the 6."""
    policy, reference = rng.random(6), rng.random(5)
    whole = inference_win_rate([policy] * 2, [reference] * 2, "best_of_3").value
    parts = [
        inference_win_rate([list(subset)] * 2, [reference] * 2, "best_of_3").value
        for subset in itertools.combinations(policy, 4)
    ]
    assert np.mean(parts) == pytest.approx(whole, abs=1e-14)
