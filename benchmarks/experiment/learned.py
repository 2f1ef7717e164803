"""How much of the reward a policy has learned: a number that does not depend on its KL.

Attainment rises with the KL for one and the same direction of learning, so it cannot compare
policies of unequal KL. Let a response have a reward and a feature, standard normal under the
reference policy and with correlation sqrt(r2), and let the policy tilt the feature by an
exponential. That costs s^2 / (2 r2) nats and moves the reward by s. The learned share r2 of a
measured policy is the one that gives its win rate at its KL.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ctrl_dpo.measures.equal_kl import Curve, read_curves
from ctrl_dpo.theory.procedures import parse_procedure

FloatArray = NDArray[np.float64]
_SHIFTS = np.linspace(-4, 6, 401)
_REWARDS = np.linspace(-12, 12, 4801)


@functools.cache
def win_rates_of_shifts(procedure: str) -> FloatArray:
    """Return the inference-time win rate of a normal reward moved by each of ``_SHIFTS``."""
    served = parse_procedure(procedure).distortion
    edges = (_REWARDS[1:] + _REWARDS[:-1]) / 2
    beaten = np.diff(served(stats.norm.cdf(edges)), prepend=0.0, append=1.0)
    below = np.concatenate(([0.0], np.cumsum(beaten)[:-1])) + beaten / 2
    rates = []
    for shift in _SHIFTS:
        mine = np.diff(served(stats.norm.cdf(edges - shift)), prepend=0.0, append=1.0)
        rates.append(float(mine @ below))
    return np.array(rates)


def share_of(win_rates: FloatArray, kls: FloatArray, procedure: str) -> FloatArray:
    """Return r2, below 0 for a policy that loses; a KL that noise puts below 0 counts as 0.001."""
    shifts = np.interp(win_rates, win_rates_of_shifts(procedure), _SHIFTS)
    return shifts * np.abs(shifts) / (2 * np.maximum(kls, 1e-3))


def learned_share(curves: Sequence[Curve], procedure: str) -> dict[str, float]:
    """Return the mean r2 of a method's policies, less that of a second method if there is one."""
    return read_curves(curves, lambda kls, rates: share_of(rates, kls, procedure).mean(axis=0))
