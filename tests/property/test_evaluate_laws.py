"""Laws of win rates, KL and intervals."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ctrl_dpo.evaluate import calibration_error, kl_divergence
from ctrl_dpo.measures.estimates import mean_over_prompts, paired_difference
from ctrl_dpo.measures.win_rates import inference_win_rate, selection_weights
from ctrl_dpo.theory.procedures import BestOfN, Mixture, OrderStatistic, SingleDraw, WorstOfN

SMALL = st.integers(-6, 6).map(float)  # small integers: many ties, and exact under maps


@st.composite
def two_sides(draw, elements=SMALL):
    n_prompts = draw(st.integers(2, 4))
    sides = [
        draw(arrays(np.float64, (n_prompts, draw(st.integers(4, 9))), elements=elements))
        for _ in range(2)
    ]
    return sides[0], sides[1]


@st.composite
def procedures(draw):
    n = draw(st.integers(1, 4))
    simple = draw(
        st.sampled_from(
            [SingleDraw(), BestOfN(n), WorstOfN(n), OrderStatistic(draw(st.integers(1, n)), n)]
        )
    )
    return draw(st.sampled_from([simple, Mixture([simple, BestOfN(3)], [0.25, 0.75])]))


def per_prompt(policy, reference, procedure, against=None):
    return inference_win_rate(policy, reference, procedure, against=against).per_prompt


@given(two_sides(), procedures(), procedures())
def test_swapping_the_sides_gives_the_complement(sides, procedure, against):
    a, b = sides
    forward, back = per_prompt(a, b, procedure, against), per_prompt(b, a, against, procedure)
    np.testing.assert_allclose(forward, 1 - back, rtol=0, atol=1e-14)


@given(two_sides(), procedures())
def test_increasing_maps_change_nothing(sides, procedure):
    a, b = sides
    expected = per_prompt(a, b, procedure)
    for increasing in (lambda r: 3 * r - 100, lambda r: r**3, lambda r: 1e300 * r, np.exp):
        np.testing.assert_array_equal(per_prompt(increasing(a), increasing(b), procedure), expected)


@given(two_sides(), st.integers(1, 4))
def test_best_of_n_mirrors_worst_of_n(sides, n):
    a, b = sides
    best, worst = per_prompt(a, b, BestOfN(n)), per_prompt(-a, -b, WorstOfN(n))
    np.testing.assert_allclose(best, 1 - worst, rtol=0, atol=1e-14)


@given(two_sides(), procedures(), st.randoms(use_true_random=False))
def test_the_order_of_draws_changes_nothing(sides, procedure, random):
    a, b = sides
    shuffled = a[:, random.sample(range(a.shape[1]), a.shape[1])]
    np.testing.assert_array_equal(per_prompt(shuffled, b, procedure), per_prompt(a, b, procedure))


@given(two_sides(), procedures())
def test_win_rates_are_fractions_and_better_rewards_never_lose(sides, procedure):
    a, b = sides
    rates = per_prompt(a, b, procedure)
    assert (rates >= 0).all()
    assert (rates <= 1).all()
    assert (per_prompt(a + 1, b, procedure) >= rates - 1e-14).all()
    np.testing.assert_allclose(per_prompt(a, a, procedure), 0.5, rtol=0, atol=1e-14)


@given(procedures(), st.integers(4, 64))
def test_weights_are_probabilities_with_the_mean_of_the_order_statistic(procedure, m):
    """The k-th best of n of the ranks 1..m has mean (n - k + 1) (m + 1) / (n + 1)."""
    weights = selection_weights(procedure, m)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-12)
    mean = sum(w * (n - k + 1) * (m + 1) / (n + 1) for w, k, n in procedure.order_statistics)
    np.testing.assert_allclose(weights @ np.arange(1, m + 1), mean, rtol=1e-12)


VALUES = arrays(np.float64, st.integers(2, 20), elements=st.integers(-50, 50).map(lambda i: i / 8))


@given(VALUES, st.integers(-900, 900))
def test_intervals_hold_the_mean_and_scale_with_the_unit(values, exponent):
    estimate = mean_over_prompts(values)
    assert estimate.low <= estimate.value + 1e-12
    assert estimate.high >= estimate.value - 1e-12
    assert values.min() - 1e-12 <= estimate.low
    assert estimate.high <= values.max() + 1e-12
    scaled = mean_over_prompts(np.ldexp(values, exponent))
    assert (scaled.value, scaled.low) == (
        np.ldexp(estimate.value, exponent),
        np.ldexp(estimate.low, exponent),
    )


@given(VALUES)
def test_a_policy_differs_from_itself_by_nothing(values):
    difference = paired_difference(mean_over_prompts(values), mean_over_prompts(values))
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


@given(two_sides())
def test_kl_changes_sign_with_the_models_and_is_zero_on_equal_ones(sides):
    a, b = (side[:, :4] for side in sides)
    assert kl_divergence(a, b).value == -kl_divergence(b, a).value
    assert kl_divergence(a, a).value == 0


@given(arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1)))
def test_calibration_error_is_symmetric_and_bounded(values):
    """Mirrored rewards are as far from uniform; the mean square is below the largest square."""
    error, mirrored = calibration_error(values), calibration_error(1 - values)
    np.testing.assert_allclose(error.kolmogorov_smirnov, mirrored.kolmogorov_smirnov, atol=1e-12)
    np.testing.assert_allclose(error.cramer_von_mises, mirrored.cramer_von_mises, atol=1e-12)
    assert 0 < error.cramer_von_mises <= error.kolmogorov_smirnov**2 <= 1
