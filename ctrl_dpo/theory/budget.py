"""The beta of a KL budget: a search that starts from the budgets met before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from scipy import interpolate, optimize

from ctrl_dpo.theory.density import CalibratedPolicy
from ctrl_dpo.theory.optimum import SMALLEST_BETA, NoOptimumError

_FIRST_STEP = 0.3  # in log beta; tripled until the budget is bracketed
_SEARCHED = 300.0
_EXACT = 1e-9  # relative error of the KL beyond which no beta gives it: the KL jumps there
_ENOUGH = _EXACT / 100  # error at which a search ends
_NODES = 8  # nearest points that a guess interpolates
_SHRINKS = 0.25  # error of a guess in errors of the one before, else bisection takes over


@dataclass
class Budget:
    """Policies of falling KL as beta rises, and the betas found so far.

    Parameters
    ----------
    name : str
        Name of the transformation.
    policy_at : callable
        The policy at a beta.
    kl_at : callable
        Its KL, nats; may raise `NoOptimumError`.
    guess : float
        Beta where the first search starts.
    """

    name: str
    policy_at: Callable[[float], CalibratedPolicy]
    kl_at: Callable[[float], float]
    guess: float
    _met: dict[float, float] = field(default_factory=dict)  # log KL to log beta, one a budget

    def nearest(self, kl: float) -> tuple[float, float]:
        """Return the beta of a KL and the KL there, which differs where no beta gives it.

        Parameters
        ----------
        kl : float
            KL budget, nats, > 0.

        Returns
        -------
        beta, reached : float
            NaN where no optimum could be solved; see `is_exact`.
        """
        try:
            log_beta, log_kl = self._interpolated(math.log(kl)) or self._bracketed(math.log(kl))
        except NoOptimumError:
            return math.nan, math.nan
        reached = math.exp(log_kl)
        if is_exact(reached, kl):
            self._met[log_kl] = log_beta
            self.guess = math.exp(log_beta)
        return math.exp(log_beta), reached

    def _log_kl(self, log_beta: float) -> float:
        return math.log(max(self.kl_at(math.exp(log_beta)), 1e-300))

    def _interpolated(self, goal: float) -> tuple[float, float] | None:
        """Return log beta and log KL from the budgets met before, or None if they mislead."""
        # log beta is smooth in log KL: a dense frontier predicts its next point to many digits
        known, error = dict(self._met), math.inf
        while len(known) > 1:
            nodes = sorted(known, key=lambda log_kl: abs(log_kl - goal))[:_NODES]
            betas = [known[log_kl] for log_kl in nodes]
            log_beta = float(interpolate.krogh_interpolate(nodes, betas, goal))
            span = max(betas) - min(betas)
            if not min(betas) - span <= log_beta <= max(betas) + span:
                break
            log_beta = max(log_beta, math.log(SMALLEST_BETA))
            log_kl = self._log_kl(log_beta)
            if abs(log_kl - goal) < _ENOUGH:
                return log_beta, log_kl
            if abs(log_kl - goal) > _SHRINKS * error:
                break
            error, known[log_kl] = abs(log_kl - goal), log_beta
        return None

    def _bracketed(self, goal: float) -> tuple[float, float]:
        """Return log beta and log KL by bisection and secants from the guess."""

        @cache
        def gap(log_beta: float) -> float:
            value = self._log_kl(log_beta) - goal
            return 0.0 if abs(value) < _ENOUGH else value  # brentq stops at an exact zero

        low, high = self._bracket(gap)
        log_beta = min(low, high, key=lambda end: abs(gap(end)))
        if gap(low) * gap(high) < 0:
            log_beta = float(optimize.brentq(gap, low, high, xtol=1e-12, rtol=1e-13))
        return log_beta, self._log_kl(log_beta)

    def _bracket(self, gap: Callable[[float], float]) -> tuple[float, float]:
        """Return log betas with a KL above and below the budget, or the last two tried."""
        near = math.log(self.guess)
        rising = gap(near) > 0
        step = _FIRST_STEP
        while step < _SEARCHED:
            far = near + step if rising else max(near - step, math.log(SMALLEST_BETA))
            if (gap(far) > 0) != rising:
                break
            near, step = far, 3 * step
        return min(near, far), max(near, far)


def is_exact(reached: float, kl: float) -> bool:
    """Return whether a KL is the one asked for, to rounding."""
    return abs(reached / kl - 1) < _EXACT
