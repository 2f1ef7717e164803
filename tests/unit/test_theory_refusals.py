"""What the theory refuses, by name of argument, rule and value."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl_dpo import (
    Exponential,
    Identity,
    Log,
    Optimal,
    match_kl,
    optimal_discrete_policy,
    optimal_policy,
    policy_of,
)
from ctrl_dpo.theory.transformation import as_transformation, level_masses
from ctrl_dpo.transform import parse_transformation, transformed_rewards


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_beta_must_be_positive_and_finite(beta):
    for call in (
        lambda: optimal_policy("best_of_4", beta),
        lambda: policy_of(Identity(), beta, "best_of_4"),
        lambda: optimal_discrete_policy([0.5, 0.5], [0, 1], "best_of_4", beta),
        lambda: Optimal("best_of_4", beta),
        lambda: Identity().log_normaliser(beta),
    ):
        with pytest.raises(ValueError, match="beta must be finite and > 0; got"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: optimal_policy("best_of_4", 1e-200),
            "beta must be >= .* for an exact optimum; got",
        ),
        (lambda: match_kl("optimal", "best_of_4", -1.0), "kl must be finite and > 0; got -1.0"),
        (lambda: Exponential(0.0), "rate must be .*; got 0"),
        (lambda: Exponential(float("nan")), "rate must be .*; got nan"),
        (lambda: Identity()(1.5), "u must lie in .*; got"),
        (lambda: parse_transformation("cubic"), "transformation must be identity.*; got 'cubic'"),
        (lambda: parse_transformation("exponential:x"), "got 'exponential:x'"),
        (
            lambda: parse_transformation("optimal"),
            "'optimal' must have a procedure and a beta; got procedure = None",
        ),
        (
            lambda: optimal_discrete_policy([0.5, 0.4], [0, 1], "best_of_4", 1.0),
            "reference_probs must sum to 1; got a sum of 0.9",
        ),
        (lambda: level_masses([1.5, -0.5], [0, 1]), "reference_probs must be >= 0; got -0.5"),
        (lambda: level_masses([1.0], [0, 1]), "must be one per reward, at least one; got 1 for 2"),
        (
            lambda: Log().on_levels([0.0, 1.0], [0, 1], 1.0),
            "rewards must all have reference mass where log is infinite; got a level at",
        ),
        (
            lambda: as_transformation(lambda u: np.where(u > 0.5, np.nan, u)),
            "must return a number for every u .*; got nan at u = 0.50",
        ),
        (lambda: as_transformation(lambda u: u.sum()), "one value per u; got shape"),
        (
            lambda: transformed_rewards(Log(), [0], [0], 3, False, "plug_in"),
            "estimator must be 'posterior' where log is infinite; got 'plug_in'",
        ),
        (lambda: transformed_rewards(Log(), [0], [0], 3, True), "tied must be >= 1 .*; got 0"),
        (lambda: transformed_rewards(Log(), [3], [1], 3, True), "below . tied must be <= k = 3"),
        (lambda: transformed_rewards(Log(), [0], [1], 0, True), "k must be an integer >= 1; got 0"),
        (
            lambda: transformed_rewards(Log(), [0], [1], 3, True, "median"),
            "estimator must be one of .*; got 'median'",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="must be a Transformation or a function of u; got 3"):
        as_transformation(3)
    with pytest.raises(TypeError, match="below must hold integers; got dtype float64"):
        transformed_rewards(Log(), [0.5], [1], 3, True)


@pytest.mark.parametrize("value", [1j, "a"])
def test_a_function_returns_real_numbers(value):
    with pytest.raises(TypeError, match="transformation must return real numbers; got dtype [c<]"):
        as_transformation(lambda u: np.full(u.shape, value))


def test_a_number_that_is_not_finite_is_shown_plainly():
    with pytest.raises(ValueError, match="first nan at index 1"):
        optimal_discrete_policy([0.5, 0.5], [0, float("nan")], "best_of_2", 1.0)


@pytest.mark.parametrize(
    ("function", "kl", "message"),
    [
        (lambda u: 0 * u + 3, 0.5, "policy reaches; got 0.5, beyond the 0 nats at beta"),
        (lambda u: np.minimum(u, 0.5), 2.0, "got 2.0, beyond the 0.693147 nats at beta"),
        (lambda u: np.log(u / (1 - u)), 0.5, "beta must leave the policy .* with a share of"),
    ],
)
def test_the_kls_that_a_function_cannot_reach(function, kl, message):
    with pytest.raises(ValueError, match=message):
        match_kl(function, "best_of_4", kl)


def test_an_optimum_that_jumps_tells_from_where_to_where():
    message = "got 1.0, where the KL goes from 0.0306.* to 1.531.* at beta = 0.3356"
    with pytest.raises(ValueError, match=message):
        match_kl("optimal", "worst_of_4", 1.0, against="best_of_4")


def test_a_fall_in_the_last_thousandth_is_noticed():
    def dips(u):
        return u - 2 * np.exp(-(((u - 0.99995) / 1e-5) ** 2))

    with pytest.warns(UserWarning, match="must be increasing; got .* at u = 0.9999"):
        as_transformation(dips)
    # saturated, with nothing but rounding in its steps
    as_transformation(lambda u: 1 - 0.1 * np.exp(-300 * u))


def test_a_decreasing_function_is_used_with_a_warning():
    with pytest.warns(UserWarning, match="must be increasing; got .* reverses preferences"):
        made = as_transformation(lambda u: -u)
    assert made(0.25) == -0.25


@pytest.mark.parametrize("text", ["identity", "log", "normal_quantile", "exponential:-2.5"])
def test_names_come_back(text):
    made = parse_transformation(text)
    assert str(made) == text
    assert parse_transformation(made) is made
    assert str(parse_transformation("optimal", "best_of_4", 0.3)) == "optimal"


def test_a_named_function_keeps_its_name():
    def square(u):
        return u**2

    made = as_transformation(square)
    assert str(made) == "square"
    assert made.log_normaliser(0.5) == pytest.approx(
        np.log(np.mean(np.exp(2 * ((np.arange(10**6) + 0.5) / 10**6) ** 2))), abs=1e-9
    )


def test_levels_at_another_beta_than_the_optimums():
    optimal = Optimal("best_of_4", 0.3)
    values, log_z = optimal.on_levels([0.5, 0.5], [0, 1], 0.3)
    again, other = optimal.on_levels([0.5, 0.5], [0, 1], 0.6)
    assert (values == again).all()
    assert other == pytest.approx(np.log(np.mean(np.exp(values / 0.6))))
    assert log_z == pytest.approx(np.log(np.mean(np.exp(values / 0.3))))
