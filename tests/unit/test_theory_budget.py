"""The search for the beta of a KL: exact, cheap along a frontier, safe where the KL jumps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ctrl_dpo import optimal_policy
from ctrl_dpo.theory.budget import Budget, is_exact

KLS = np.geomspace(0.02, 3.0, 50).tolist()


def counted(kl_at):
    """A budget of a KL by beta, and the betas it asked for."""
    asked = []

    def asking(beta):
        asked.append(beta)
        return kl_at(beta)

    return Budget("test", lambda beta: optimal_policy("single_draw", beta), asking, 0.3), asked


def best_of_n(beta):
    """KL of the density n u^(n-1) with n = 1 + 1 / beta: log n - (n - 1) / n."""
    return math.log1p(1 / beta) - 1 / (1 + beta)


@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_a_dense_frontier_asks_for_few_policies(order):
    budget, asked = counted(best_of_n)
    kls = {"rising": KLS, "falling": KLS[::-1]}.get(order)
    for kl in kls or np.random.default_rng(0).permutation(KLS).tolist():
        beta, reached = budget.nearest(kl)
        assert reached == pytest.approx(kl, rel=1e-10)
        assert best_of_n(beta) == pytest.approx(kl, rel=1e-10)
    assert len(asked) < (3 if order != "shuffled" else 4) * len(KLS)


def test_budgets_met_before_do_not_mislead():
    """A kink in the KL: polynomials through one side are wrong on the other."""

    def kinked(beta):
        return beta**-0.5 if beta > 0.1 else 0.1**-0.5 * (beta / 0.1) ** -4

    budget, _ = counted(kinked)
    for kl in (*np.geomspace(0.5, 3.0, 12).tolist(), 4.0, 3.3, 3.1, 900.0, 2.0):
        beta, reached = budget.nearest(kl)
        assert is_exact(reached, kl)
        assert kinked(beta) == pytest.approx(kl, rel=1e-9)


def test_a_jump_is_reported_and_the_search_goes_on():
    budget, _ = counted(lambda beta: 1 / beta if beta > 1 else 3 / beta)
    for kl in (0.1, 0.2, 0.4):
        assert is_exact(budget.nearest(kl)[1], kl)
    beta, reached = budget.nearest(2.0)
    assert beta == pytest.approx(1.0, rel=1e-9)
    assert not is_exact(reached, 2.0)
    assert budget.nearest(6.0)[0] == pytest.approx(0.5, rel=1e-10)
