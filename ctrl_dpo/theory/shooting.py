"""Rough solutions of the optimality equation by shooting from the top: starts for `collocation`.

The equation (log F')' = h'(F) g'(u) / beta is integrated from u = 1 down, where p = F' only falls,
so no trajectory blows up. One unknown, log p(1), decides it: each zero of the mass mismatch is a
stationary point, and a scan over log p(1) finds them all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.integrate import ode

from ctrl_dpo.theory.distortion import Procedure

FloatArray = NDArray[np.float64]

ROUGH = 1e-4  # tolerance of the integrator; Newton's method makes the result exact afterwards
_MISMATCH = 10.0  # log mass mismatch that is close enough, in tolerances of the integrator
_SLOPE = 1e-3  # slope of log p in the logit below which the integration may start
_LEFT = -14.0  # logit at which a trajectory that has not died out ends
_DEAD = -32.0  # log of the mass left below u at which a trajectory ends
_EXCESS = 0.1  # log of a total mass beyond which a trajectory is of no use
_LARGE = 600.0
_JUMP = 1e-2  # log mass mismatch that closing in cannot lower: the integrator missed a fall
_SOLVERS = threading.local()
_SCAN = 49  # values of log p(1) tried where uniqueness is not proved


@dataclass(frozen=True)
class Equation:
    """The optimality equation of one procedure against another at one beta."""

    procedure: Procedure
    against: Procedure
    beta: float

    @property
    def log_density_bound(self) -> float:
        """Upper bound of log p(1): p(1) - p(0) is the integral of h'(F) g'(u) / beta over F."""
        return math.log1p(self.against.density_maximum / self.beta)


@dataclass(frozen=True)
class Trajectory:
    """Logits in increasing order with log p and F along them, and log of the total mass."""

    t: FloatArray
    log_density: FloatArray
    cdf: FloatArray
    mismatch: float


def shoot(equation: Equation, log_top: float, tolerance: float = ROUGH) -> Trajectory:
    """Integrate from u = 1 down with p(1) = exp(log_top)."""
    h_density, g_density = equation.procedure.density_at, equation.against.density_at
    beta, exp, h_at_zero = equation.beta, math.exp, h_density(0.0, 1.0)

    def derivative(t: float, state: FloatArray) -> list[float]:
        log_above, log_density = state.item(0), state.item(1)
        if t > 0:
            ratio = exp(-t)
            u = 1 / (1 + ratio)
            complement = ratio * u
        else:
            ratio = exp(t)
            complement = 1 / (1 + ratio)
            u = ratio * complement
        jacobian = u * complement
        above = exp(min(log_above, _LARGE))
        h = h_density(1.0 - above, above) if above < 1.0 else h_at_zero
        slope = h * g_density(u, complement) * jacobian / beta
        # a trial stage of a step that will be rejected may overshoot: keep exp finite
        return [-exp(min(log_density - log_above, _LARGE)) * jacobian, slope]

    path: list[tuple[float, float, float]] = []

    def record(t: float, state: FloatArray) -> Literal[-1, 0]:
        log_above, log_density = state.item(0), state.item(1)
        path.append((t, log_above, log_density))
        return -1 if log_above > _EXCESS or log_density + t < _DEAD else 0

    start = _start(equation, log_top)
    solver, callbacks = _solver(tolerance)
    callbacks[:] = derivative, record
    solver.set_initial_value([log_top - math.log1p(math.exp(start)), log_top], start)
    solver.integrate(_LEFT)
    t, log_above, log_density = np.array(path[::-1]).T
    u = 1 / (1 + math.exp(-t[0]))
    mismatch = float(np.logaddexp(log_above[0], log_density[0] + math.log(u)))
    return Trajectory(t, log_density, -np.expm1(log_above), mismatch)


def _solver(tolerance: float) -> tuple[Any, list[Callable[..., Any]]]:
    """Return this thread's solver of a tolerance, and a list of the two callbacks it runs."""
    # scipy 1.17 never frees a solver's callbacks: one of its own for every shot would keep its path
    made: dict[float, tuple[Any, list[Callable[..., Any]]]]
    made = vars(_SOLVERS).setdefault("by_tolerance", {})
    if tolerance not in made:
        callbacks: list[Callable[..., Any]] = []
        solver = ode(lambda t, state: callbacks[0](t, state))
        solver.set_integrator("dopri5", rtol=tolerance, atol=tolerance, nsteps=5000)
        solver.set_solout(lambda t, state: callbacks[1](t, state))
        made[tolerance] = solver, callbacks
    return made[tolerance]


def _start(equation: Equation, log_top: float) -> float:
    """Return a logit above which log p is flat: 1 - F = p(1) (1 - u) there."""
    t = log_top + 3.0
    while True:
        complement = math.exp(-t)
        above = math.exp(log_top) * complement
        slope = (
            equation.procedure.density_at(1 - above, above)
            * equation.against.density_at(1 - complement, complement)
            * complement
            / equation.beta
        )
        if slope < _SLOPE:
            return t
        t += 1.0


def stationary_starts(
    equation: Equation, unique: bool, tolerance: float = ROUGH
) -> list[Trajectory]:
    """Return a trajectory close to each stationary point; one where it is known to be unique."""
    # one more than the bound leaves room for the error of a rough trajectory
    bound = equation.log_density_bound + 1.0
    grid = np.array([0.0, bound]) if unique else np.linspace(0.0, bound, _SCAN)
    excess = [shoot(equation, log_top, tolerance).mismatch > 0 for log_top in grid[1:-1]]
    signs = np.array([False, *excess, True])
    brackets = np.flatnonzero(signs[1:] != signs[:-1])
    starts = []
    for i in brackets:
        starts.append(_close_in(equation, grid[i], grid[i + 1], tolerance))
        if not unique and abs(starts[-1].mismatch) > _JUMP:
            return []  # for another try with a smaller tolerance
    return starts


def _close_in(equation: Equation, low: float, high: float, tolerance: float) -> Trajectory:
    """Return a trajectory between two whose mismatches differ in sign."""
    tried: list[Trajectory] = []

    def mismatch(log_top: float) -> float:
        tried.append(shoot(equation, log_top, tolerance))
        value = tried[-1].mismatch
        # brentq stops at an exact zero
        return 0.0 if 0 <= value < _MISMATCH * tolerance else value

    if mismatch(low) * mismatch(high) < 0:
        optimize.brentq(mismatch, low, high, xtol=1e-13, rtol=1e-15)
    # too much mass, never too little: the flat bottom of a spiked density is then overestimated,
    # and Newton's method in log p comes down to it; from below the exponential would overshoot
    enough = [each for each in tried if each.mismatch >= 0]
    return min(enough or tried, key=lambda each: abs(each.mismatch))
