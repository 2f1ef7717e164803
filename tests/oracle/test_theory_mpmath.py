"""The exact optimum against 34-digit Taylor integration with mpmath, another method altogether.

For best-of-m against best-of-n, and worst-of-m against worst-of-n from the other end, the equation
of the optimum has a scaling law: with y(0) = 0, y'(0) = 1 and (log y')' = +-y^(m-1) x^(n-1), the
optimum at beta is y(kappa x) / y(kappa) where m n / beta = kappa^n y(kappa)^(m-1). One integration
of y gives the optimum at every beta, without a boundary-value problem. Other procedures are shot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mpmath
import numpy as np
import pytest
from mpmath import mp, mpf

from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.procedures import parse_procedure

ORDER, DIGITS = 34, 34  # `benchmarks/theory_accuracy.py` takes 50
GRID = np.array([0.001, 0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999])
BETAS = ["0.01", "0.1", "1", "10"]


@pytest.fixture(autouse=True)
def enough_digits():
    with mp.workdps(DIGITS + 5):
        yield


def power(x, exponent, k, y):
    """Append the k-th Taylor coefficient of x^exponent to y (J. C. P. Miller's recurrence)."""
    if k == 0 or exponent == 0:
        y.append(x[0] ** exponent if k == 0 else mpf(0))
        return
    terms = [(i * (exponent + 1) - k) * x[i] for i in range(1, min(k + 1, len(x)))]
    y.append(mpmath.fdot(terms, y[::-1]) / (k * x[0]))


@dataclass
class Step:
    """Taylor coefficients about x0: y, p = y', l = log p, and two running integrals."""

    x0: mpf
    y: list
    p: list
    log_p: list
    loss: list
    entropy: list

    def y_at(self, x):
        return mpmath.polyval(self.y[::-1], x - self.x0)

    def at(self, x):
        t = x - self.x0
        return [
            mpmath.polyval(series[::-1], t)
            for series in (self.y, self.p, self.log_p, self.loss, self.entropy)
        ]


def taylor(x0, state, h_terms, g_terms, sign):
    """Expand (log y')' = sign h(y) g(x), with loss' = H(y) g, H' = h, and entropy' = y' log y'."""
    y, p, log_p, loss, entropy = ([value] for value in state[:5])
    h_integral = [state[5]]
    at_zero = x0 == 0
    # at y = 0 powers of y are taken of y / x and shifted, since y(x) = x (p(0) + ...)
    powers = [([], []) for _ in h_terms]
    x, one_minus_x = [x0, mpf(1)], [1 - x0, mpf(-1)]
    g_powers = [([], []) for _ in g_terms]
    h_series, g_series, slope = [], [], []
    one_minus_y, y_over_x = [], []
    for k in range(ORDER):
        y.append(p[k] / (k + 1))
        one_minus_y.append((1 if k == 0 else 0) - y[k])
        y_over_x.append(y[k + 1])
        h, g = mpf(0), mpf(0)
        for (scale, a, b), (below, above) in zip(h_terms, powers, strict=True):
            shift = a if at_zero else 0
            if k >= shift:
                power(y_over_x if at_zero else y, a, k - shift, below)
            power(one_minus_y, b, k, above)
            if k >= shift:
                h += scale * mpmath.fdot(below, above[k - shift :: -1][: k - shift + 1])
        for (scale, a, b), (below, above) in zip(g_terms, g_powers, strict=True):
            if at_zero:
                below.append(mpf(1 if k == a else 0))
            else:
                power(x, a, k, below)
            power(one_minus_x, b, k, above)
            g += scale * mpmath.fdot(below, above[::-1])
        h_series.append(h)
        g_series.append(g)
        slope.append(sign * mpmath.fdot(h_series, g_series[::-1]))
        h_integral.append(mpmath.fdot(h_series, p[k::-1]) / (k + 1))
        loss.append(mpmath.fdot(h_integral[: k + 1], g_series[::-1]) / (k + 1))
        entropy.append(mpmath.fdot(log_p, p[::-1]) / (k + 1))
        log_p.append(slope[k] / (k + 1))
        p.append(mpmath.fdot(slope, p[::-1]) / (k + 1))
    return Step(x0, y, p, log_p, loss, entropy), h_integral


def stride(step, first):
    """Return how far a Taylor expansion is good to DIGITS digits."""
    size = first if step.x0 == 0 else mpf("inf")
    for series, scale in ((step.p, max(abs(step.p[0]), mpf("1e-10"))), (step.log_p, mpf(1))):
        for n in range(ORDER - 9, ORDER + 1):  # some vanish by symmetry
            if series[n]:
                size = min(size, (mpf(10) ** -DIGITS * scale / abs(series[n])) ** (mpf(1) / n))
    return size * mpf("0.8")


def march(h_terms, g_terms, sign, start_slope, stop):
    """Yield Taylor steps from x = 0 until stop(step, x) or the density is gone."""
    lowest = min(a for _, a, _ in h_terms) + min(a for _, a, _ in g_terms) + 1
    first = mpf(10) ** (-mpf(DIGITS) / max(lowest, ORDER + 1))  # a first term beyond ORDER
    x = mpf(0)
    state = [mpf(0), start_slope, mpmath.log(start_slope), mpf(0), mpf(0), mpf(0)]
    while True:
        step, h_integral = taylor(x, state, h_terms, g_terms, sign)
        end = x + stride(step, first)
        yield step, end
        state = step.at(end)
        if stop(step, end) or state[1] < mpf(10) ** -(DIGITS + 5):
            return
        state = [*state, mpmath.polyval(h_integral[::-1], end - x)]
        x = end


@cache
def universal(m, n, sign, target):
    """Return the steps of y for (m, n) up to where kappa^n y^(m-1) passes the target."""

    def passed(step, x):
        return n * mpmath.log(x) + (m - 1) * mpmath.log(step.y_at(x)) > mpmath.log(target)

    with mp.workdps(DIGITS + 5):
        return list(march([(mpf(1), m - 1, 0)], [(mpf(1), n - 1, 0)], sign, mpf(1), passed))


def optimum(m, n, best, beta):
    """Return win rate, KL and CDF at GRID of the optimum for best-of or worst-of m against n."""
    steps = universal(m, n, 1 if best else -1, mpf(m * n) / mpf(BETAS[0]))
    goal = mpmath.log(m * n / mpf(beta))

    def gap(x, y):
        return n * mpmath.log(x) + (m - 1) * mpmath.log(y) - goal

    last, end = next(((s, e) for s, e in steps if gap(e, s.y_at(e)) > 0), steps[-1])
    if gap(end, last.y_at(end)) > 0:
        start = max(last.x0, mpf("1e-20"))
        kappa = mpmath.findroot(
            lambda x: gap(x, last.y_at(x)),
            (start, end),
            solver="anderson",
            tol=mpf(10) ** -(2 * DIGITS - 10),
        )
        y, _, _, loss, entropy = last.at(kappa)
    else:  # the density was gone before kappa: y is constant from there on
        y, _, _, loss, entropy = last.at(end)
        kappa = mpmath.exp((goal - (m - 1) * mpmath.log(y)) / n)
        loss += y**m / m * (kappa**n - end**n) / n
    share = m * n * loss / (kappa**n * y**m)
    kl = mpmath.log(kappa / y) + entropy / y

    def scaled(u):
        x = kappa * mpf(float(u))
        step = next((s for s, e in steps if x <= e), None)
        return (step.y_at(x) if step else last.y_at(end)) / y

    cdf = [scaled(u) if best else 1 - scaled(mpf(1) - mpf(float(u))) for u in GRID]
    return 1 - share if best else share, kl, cdf


PAIRS = [(1, 1), (4, 4), (64, 64), (8, 1), (1, 4)]


@pytest.mark.parametrize("best", [True, False], ids=["best", "worst"])
@pytest.mark.parametrize(("m", "n"), PAIRS)
def test_optimum_of_powers_agrees_with_mpmath(m, n, best):
    word = "best" if best else "worst"
    for beta in BETAS:
        win_rate, kl, cdf = optimum(m, n, best, beta)
        policy = optimal_policy(f"{word}_of_{m}", float(beta), against=f"{word}_of_{n}")
        assert policy.win_rate == pytest.approx(float(win_rate), abs=1e-11)
        assert policy.kl == pytest.approx(float(kl), abs=1e-11, rel=1e-11)
        np.testing.assert_allclose(policy.cdf(GRID), np.array(cdf, dtype=float), atol=1e-11)


def monomials(procedure):
    """Return a procedure's density as terms (scale, power of q, power of 1 - q), exactly."""
    return [
        (mpf(weight) * k * mpmath.binomial(n, k), n - k, k - 1)
        for weight, k, n in parse_procedure(procedure).order_statistics
    ]


def shot_optimum(procedure, against, beta, log_slope):
    """Return win rate, KL and CDF at GRID of the stationary point next to a start, by secants."""
    h_terms = [(scale / mpf(beta), a, b) for scale, a, b in monomials(procedure)]
    g_terms = monomials(against)

    @cache
    def steps(log_slope):
        return list(march(h_terms, g_terms, 1, mpmath.exp(log_slope), lambda step, x: x >= 1))

    def miss(log_slope):
        return steps(log_slope)[-1][0].y_at(mpf(1)) - 1

    guess = mpf(log_slope)
    log_slope = mpmath.findroot(miss, (guess, guess + mpf("1e-14")), tol=mpf(10) ** -DIGITS)
    assert abs(miss(log_slope)) < mpf(10) ** -DIGITS
    solved = steps(log_slope)
    _, _, _, loss, entropy = solved[-1][0].at(mpf(1))
    cdf = [next(s for s, e in solved if u <= e).y_at(mpf(float(u))) for u in GRID]
    return 1 - loss * mpf(beta), entropy, cdf


OTHERS = [
    ("2nd_best_of_4", "2nd_best_of_4", "0.3"),
    ("0.5*single_draw+0.5*best_of_4", "0.5*single_draw+0.5*best_of_4", "0.2"),
    ("worst_of_3", "best_of_3", "0.5"),
    ("2nd_best_of_3", "single_draw", "0.1"),
]


@pytest.mark.parametrize(("procedure", "against", "beta"), OTHERS)
def test_optimum_of_other_procedures_agrees_with_mpmath(procedure, against, beta):
    policy = optimal_policy(procedure, float(beta), against=against)
    win_rate, kl, cdf = shot_optimum(procedure, against, beta, float(policy.log_density(0.0)))
    assert policy.win_rate == pytest.approx(float(win_rate), abs=1e-11)
    assert policy.kl == pytest.approx(float(kl), abs=1e-11)
    np.testing.assert_allclose(policy.cdf(GRID), np.array(cdf, dtype=float), atol=1e-11)


def test_the_integrator_reproduces_the_exponential_density():
    """One draw at beta = 1/2: F(u) = (exp(2 u) - 1) / (exp(2) - 1), to all digits but five."""
    last, end = list(march([(mpf(1), 0, 0)], [(mpf(1), 0, 0)], 1, mpf(1), lambda s, x: x > 2))[-1]
    y = last.y_at(mpf(2))
    assert end > 2
    assert abs(y - mpmath.expm1(2)) < mpf(10) ** -(DIGITS - 5)
