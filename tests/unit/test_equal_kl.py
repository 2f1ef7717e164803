"""Win rates at equal KL: hand arithmetic, an interpolation written otherwise, coverage of noise."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl_dpo.measures.equal_kl import Curve, difference_at_kl, win_rate_at_kl


def constant(points, n=4):
    kls, rates = (
        np.repeat(np.array(column)[:, None], n, axis=1) for column in zip(*points, strict=True)
    )
    return Curve(kls, rates)


def test_the_chord_from_the_reference_policy_by_hand():
    """One policy at 1.21 nats and 0.83: at 1 nat, 10 of 11 parts of its root and its gain."""
    found = win_rate_at_kl(constant([(1.21, 0.83)]), 1.0, "best_of_4")
    assert found == pytest.approx({"value": 0.8, "low": 0.8, "high": 0.8})


def test_the_start_is_the_untrained_policy_of_unequal_procedures():
    """Best of 4 against one draw starts at 4/5: at 0.81 of the KL, 9/10 of the way to 0.9."""
    found = win_rate_at_kl(constant([(1.0, 0.9)]), 0.81, "best_of_4", "single_draw")
    assert found["value"] == pytest.approx(0.89)


def test_strengths_may_come_in_any_order(rng):
    kls = np.array([0.1, 0.5, 1.2, 2.5])
    rates = np.array([0.55, 0.62, 0.71, 0.69])
    roots = np.concatenate(([0], np.sqrt(kls)))
    for kl in (0.08, 0.5, 0.7, 2.4):
        expected = np.interp(np.sqrt(kl), roots, [0.5, *rates])
        for _ in range(3):
            order = rng.permutation(4)
            points = list(zip(kls[order], rates[order], strict=True))
            found = win_rate_at_kl(constant(points), kl, "best_of_4")
            assert found["value"] == pytest.approx(expected, abs=1e-12)


def test_a_method_that_does_not_reach_the_kl_has_no_number():
    short, long = constant([(0.9, 0.7)]), constant([(1.1, 0.7)])
    assert win_rate_at_kl(short, 1.0, "best_of_4") is None
    assert difference_at_kl(long, short, 1.0, "best_of_4") is None


def test_a_method_whose_first_policy_is_far_above_has_no_number():
    """The chord to a policy of more than sqrt(2) times the KL underrates its method."""
    for kl, known in ((1.41, True), (1.42, False)):
        assert (win_rate_at_kl(constant([(kl, 0.7)]), 1.0, "best_of_4") is not None) == known
    assert win_rate_at_kl(constant([(1.42, 0.7), (0.9, 0.65)]), 1.0, "best_of_4") is not None


def test_two_policies_of_the_same_kl_are_no_division_by_zero():
    found = win_rate_at_kl(constant([(1.0, 0.7), (1.0, 0.8)]), 1.0, "best_of_4")
    assert 0.7 <= found["value"] <= 0.8


def test_noise_shared_by_prompts_cancels_in_the_difference(rng):
    """Both methods have the prompts' own noise, of sd 0.1; they differ by 0.03 everywhere."""
    noise = 0.1 * rng.normal(size=64)
    kls = np.array([[0.5], [1.5]]) + 0.1 * rng.normal(size=(2, 64))
    rates = np.array([[0.6], [0.7]]) + noise
    first, second = Curve(kls, rates + 0.03), Curve(kls, rates)
    difference = difference_at_kl(first, second, 1.0, "best_of_4")
    assert difference["value"] == pytest.approx(0.03, abs=1e-12)
    assert difference["high"] - difference["low"] < 1e-12
    alone = win_rate_at_kl(first, 1.0, "best_of_4")
    assert alone["high"] - alone["low"] > 0.03


def test_the_spread_of_the_kl_widens_the_interval(rng):
    """W is the same on every prompt, so all of the interval is that of the KL: slope dW/dKL."""
    kls = rng.normal(1.0, 0.4, size=(1, 400)) + 0.1
    found = win_rate_at_kl(Curve(kls, np.full((1, 400), 0.8)), 1.0, "best_of_4")
    # W(1) = 1/2 + 0.3 / sqrt(mean KL), by the delta method
    mean, error = kls.mean(), kls.std(ddof=1) / 20
    width = 2 * 1.96 * 0.15 * mean**-1.5 * error
    assert found["value"] == pytest.approx(0.5 + 0.3 / np.sqrt(mean), abs=1e-12)
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.1)


def test_refusals():
    with pytest.raises(ValueError, match=r"kls and win_rates must have one shape .*got \(1, 2\)"):
        Curve(np.ones((1, 2)), np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"kl must be finite and > 0; got 0"):
        win_rate_at_kl(constant([(1.0, 0.7)]), 0.0, "best_of_4")
    with pytest.raises(ValueError, match=r"same prompts; got 4 and 3 prompts"):
        difference_at_kl(constant([(2, 0.7)]), constant([(2, 0.7)], 3), 1.0, "best_of_4")
