"""Procedures: distortions by hand, text round trips, selection, mixtures, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ctrl_dpo import BestOfN, OrderStatistic, SingleDraw, WorstOfN
from ctrl_dpo.theory.procedures import Mixture, parse_procedure

Q = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
MIXED = Mixture([SingleDraw(), BestOfN(8)], [0.25, 0.75])
ALL = [SingleDraw(), BestOfN(4), WorstOfN(3), OrderStatistic(2, 5), MIXED]


def test_distortions_by_hand():
    assert SingleDraw().distortion(Q) == pytest.approx(Q)
    assert BestOfN(4).distortion(Q) == pytest.approx(Q**4)
    assert WorstOfN(3).distortion(Q) == pytest.approx(1 - (1 - Q) ** 3)
    assert OrderStatistic(2, 5).distortion(Q) == pytest.approx(stats.beta(4, 2).cdf(Q))
    assert MIXED.distortion(Q) == pytest.approx(0.25 * Q + 0.75 * Q**8)
    assert BestOfN(4).density(Q) == pytest.approx(4 * Q**3)
    assert WorstOfN(3).density(Q) == pytest.approx(3 * (1 - Q) ** 2)
    assert OrderStatistic(2, 5).density(Q) == pytest.approx(stats.beta(4, 2).pdf(Q))


@pytest.mark.parametrize("procedure", ALL, ids=str)
def test_the_density_is_the_distortions_derivative(procedure):
    for q in (0.2, 0.5, 0.93):
        area, _ = integrate.quad(lambda x: float(procedure.density(x)), 0, q)
        assert float(procedure.distortion(q)) == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("procedure", ALL, ids=str)
def test_text_comes_back(procedure):
    assert parse_procedure(str(procedure)) == procedure
    assert parse_procedure(procedure) is procedure
    assert hash(parse_procedure(str(procedure))) == hash(procedure)


def test_order_statistics_meet_their_relatives():
    assert OrderStatistic(1, 4).distortion(Q) == pytest.approx(BestOfN(4).distortion(Q))
    assert OrderStatistic(4, 4).distortion(Q) == pytest.approx(WorstOfN(4).distortion(Q))
    for k, suffix in ((1, "st"), (2, "nd"), (3, "rd"), (4, "th"), (11, "th"), (12, "th")):
        assert str(OrderStatistic(k, 20)) == f"{k}{suffix}_best_of_20"
        assert parse_procedure(f"{k}{suffix}_best_of_20") == OrderStatistic(k, 20)


@pytest.mark.parametrize(
    "text", ["0.25*best_of_2+0.75*worst_of_2", " 0.25 * best_of_2 + .75*worst_of_2"]
)
def test_mixtures_are_read_with_and_without_spaces(text):
    assert parse_procedure(text) == Mixture([BestOfN(2), WorstOfN(2)], [0.25, 0.75])


@pytest.mark.parametrize("procedure", [*ALL[:4], WorstOfN(4)], ids=str)
@given(seed=st.integers(0, 2**32 - 1))
def test_selection_is_sorting(procedure, seed):
    (_, k, n), *_ = procedure.order_statistics
    rewards = np.random.default_rng(seed).normal(size=(6, n))
    chosen = procedure.select(rewards)
    served = np.take_along_axis(rewards, chosen[:, None], axis=1)[:, 0]
    assert served == pytest.approx(np.sort(rewards, axis=1)[:, n - k])
    assert (procedure.select(rewards.T, axis=0) == chosen).all()


@pytest.mark.parametrize("procedure", ALL, ids=str)
def test_served_draws_have_the_distorted_distribution(procedure):
    rng = np.random.default_rng(7)
    draws = rng.random((40_000, procedure.n_draws))
    chosen = procedure.select(draws, rng=rng)
    served = np.take_along_axis(draws, chosen[:, None], axis=1)[:, 0]
    distance = stats.kstest(served, lambda q: procedure.distortion(np.clip(q, 0, 1)))
    assert distance.pvalue > 1e-4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BestOfN(0), "n must be an integer >= 1 .*; got 0"),
        (lambda: BestOfN(2.5), "n must be an integer >= 1 .*; got 2.5"),
        (lambda: WorstOfN(-1), "n must be an integer >= 1 .*; got -1"),
        (lambda: WorstOfN(True), "n must be an integer >= 1 .*; got True"),
        (lambda: OrderStatistic(0, 3), "k must be an integer >= 1"),
        (lambda: OrderStatistic(4, 3), "k must be .*; got "),
        (lambda: Mixture([], []), "got"),
        (lambda: Mixture([SingleDraw()], [0.5]), "weights must be > 0 and sum to 1; got"),
        (lambda: Mixture([SingleDraw(), BestOfN(2)], [1.5, -0.5]), "weights must be .*; got"),
        (lambda: Mixture([SingleDraw(), BestOfN(2)], [1.0]), "got"),
        (lambda: parse_procedure("best_of_x"), "procedure must be like .*; got 'best_of_x'"),
        (lambda: parse_procedure("0.5*single_draw+x"), "got '0.5.single_draw.x'"),
        (lambda: parse_procedure("1e-*best_of_2+0.5*best_of_4"), "got '1e-.best_of_2"),
        (lambda: parse_procedure("best_of_0"), "got 0"),
        (lambda: BestOfN(2).distortion(1.5), r"q must lie in \[0, 1\]; got .*1.5"),
        (lambda: BestOfN(2).density([0.5, np.nan]), "q must be finite"),
        (lambda: BestOfN(3).select([1.0, 2.0]), "rewards must hold 3 draws .*; got shape"),
        (lambda: MIXED.select(np.zeros(8)), "rng must be a numpy Generator for .*; got None"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()
    with pytest.raises(TypeError, match="procedure must be text or a Procedure; got 4"):
        parse_procedure(4)
