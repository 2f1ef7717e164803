"""Transformations of calibrated rewards, and their values at a response's rank."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ctrl_dpo._validation import check_positive
from ctrl_dpo.theory.discrete import optimal_discrete_policy
from ctrl_dpo.theory.finite_sample import ESTIMATORS, transformed_rewards
from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.panels import Points
from ctrl_dpo.theory.procedures import Procedure, parse_procedure
from ctrl_dpo.theory.transformation import Transformation, as_transformation, level_masses

__all__ = [
    "ESTIMATORS",
    "Exponential",
    "Identity",
    "Log",
    "NormalQuantile",
    "Optimal",
    "Transformation",
    "parse_transformation",
    "transformed_rewards",
]

FloatArray = NDArray[np.float64]

_LARGEST_RATE = 300.0  # exp(2 rate) stays a finite float


@dataclass(frozen=True)
class Identity(Transformation):
    """Phi(u) = u: plain win rate, optimal where one draw is served.

    Examples
    --------
    >>> Identity()([0.25, 0.5])
    array([0.25, 0.5 ])
    """

    @property
    def offset(self) -> float:
        """The value at u = 1."""
        return 1.0

    def score(self, points: Points) -> FloatArray:
        """Return u - 1."""
        return -points.complement

    def at(self, points: Points) -> FloatArray:
        """Return u."""
        return points.u

    def log_normaliser(self, beta: float) -> float:
        """Return 1 / beta + log(beta (1 - exp(-1 / beta)))."""
        beta = check_positive("beta", beta)
        return 1 / beta + math.log(-beta * math.expm1(-1 / beta))

    def __str__(self) -> str:
        """Return the name `parse_transformation` reads."""
        return "identity"


@dataclass(frozen=True)
class Log(Transformation):
    """Phi(u) = log u; its policy is best-of-(1 + 1 / beta).

    Examples
    --------
    >>> Log()([0.5, 1.0])
    array([-0.69314718,  0.        ])
    """

    def score(self, points: Points) -> FloatArray:
        """Return log u."""
        return points.log_u

    def log_normaliser(self, beta: float) -> float:
        """Return -log(1 + 1 / beta)."""
        return -math.log1p(1 / check_positive("beta", beta))

    def __str__(self) -> str:
        """Return the name `parse_transformation` reads."""
        return "log"


@dataclass(frozen=True)
class NormalQuantile(Transformation):
    """Phi(u) = z with u the standard normal CDF of z; its policy shifts z by 1 / beta.

    Examples
    --------
    >>> NormalQuantile()([0.5, 0.975]).round(6)
    array([0.      , 1.959964])
    """

    def score(self, points: Points) -> FloatArray:
        """Return the normal quantile, from the nearer end."""
        nearer = np.minimum(points.log_u, points.log_complement)
        return np.asarray(np.where(points.t > 0, -1.0, 1.0) * special.ndtri_exp(nearer))

    def log_normaliser(self, beta: float) -> float:
        """Return 1 / (2 beta^2)."""
        return 0.5 / check_positive("beta", beta) ** 2

    def __str__(self) -> str:
        """Return the name `parse_transformation` reads."""
        return "normal_quantile"


@dataclass(frozen=True)
class Exponential(Transformation):
    """Phi(u) = exp(rate u) for rate > 0, -exp(rate u) for rate < 0.

    Parameters
    ----------
    rate : float
        Steepness, not 0, at most 300 in size. Positive favours the top (best-of-n), negative the
        bottom (worst-of-n).

    References
    ----------
    .. [1] Balashankar et al., "InfAlign", arXiv:2412.19792v5, section 4.

    Examples
    --------
    >>> Exponential(2.0)([0.0, 0.5])
    array([1.        , 2.71828183])
    """

    rate: float

    def __post_init__(self) -> None:
        """Check the rate."""
        number = isinstance(self.rate, Real) and not isinstance(self.rate, bool)
        if not (number and 0 < abs(self.rate) <= _LARGEST_RATE):
            raise ValueError(
                f"rate must be a number other than 0 between -{_LARGEST_RATE:g} and "
                f"{_LARGEST_RATE:g}; got {self.rate!r}."
            )
        object.__setattr__(self, "rate", float(self.rate))

    @property
    def offset(self) -> float:
        """The value at u = 1."""
        return math.copysign(math.exp(self.rate), self.rate)

    def score(self, points: Points) -> FloatArray:
        """Return the difference to the value at u = 1."""
        return np.asarray(self.offset * np.expm1(-self.rate * points.complement))

    def at(self, points: Points) -> FloatArray:
        """Return the transformed rewards, small ones unharmed by the large one at u = 1."""
        return np.copysign(np.exp(self.rate * points.u), self.rate)

    def __str__(self) -> str:
        """Return the text `parse_transformation` reads."""
        return f"exponential:{self.rate!r}"


@dataclass(frozen=True)
class Optimal(Transformation):
    r"""The exact optimum for a procedure at one beta, zero at u = 1.

    .. math:: \Phi(u) = -\int_u^1 h'(F(v)) g'(v) dv

    with F the CDF of `optimal_policy`, h the distortion of ``procedure``, g that of ``against``.

    Parameters
    ----------
    procedure : str or Procedure
        Procedure applied to the policy.
    beta : float
        Strength of the KL penalty; train with the same one.
    against : str or Procedure, optional
        Procedure applied to the reference policy; by default the same.

    Examples
    --------
    For one draw the optimum is the identity, up to a constant.

    >>> Optimal("single_draw", beta=0.5)([0.25, 1.0]).round(6)
    array([-0.75,  0.  ])
    """

    procedure: str | Procedure
    beta: float
    against: str | Procedure | None = None

    def __post_init__(self) -> None:
        """Parse the procedures and check beta."""
        object.__setattr__(self, "procedure", parse_procedure(self.procedure))
        against = self.procedure if self.against is None else parse_procedure(self.against)
        object.__setattr__(self, "against", against)
        object.__setattr__(self, "beta", check_positive("beta", self.beta))

    def score(self, points: Points) -> FloatArray:
        """Return beta times the log-density's difference to its value at u = 1."""
        policy = optimal_policy(self.procedure, self.beta, self.against)
        return self.beta * (policy.log_density_at(points) - policy.log_density(1.0))

    def log_normaliser(self, beta: float) -> float:
        """Return log Z: at the transformation's own beta, minus the log-density at u = 1."""
        if check_positive("beta", beta) == self.beta:
            policy = optimal_policy(self.procedure, self.beta, self.against)
            return -float(policy.log_density(1.0))
        return super().log_normaliser(beta)

    def on_levels(
        self, reference_probs: ArrayLike, rewards: ArrayLike, beta: float
    ) -> tuple[FloatArray, float]:
        """Return the exact optimum for discrete rewards: see `optimal_discrete_policy`."""
        policy = optimal_discrete_policy(
            reference_probs, rewards, self.procedure, self.beta, self.against
        )
        if check_positive("beta", beta) == self.beta:
            return policy.transformed_rewards, policy.log_normaliser
        mass, level = level_masses(reference_probs, rewards)
        values = np.empty(len(mass))
        values[level] = policy.transformed_rewards
        return policy.transformed_rewards, float(special.logsumexp(values / beta, b=mass))

    def __str__(self) -> str:
        """Return the name `parse_transformation` reads, given procedure and beta."""
        return "optimal"


def parse_transformation(
    transformation: Any,
    procedure: str | Procedure | None = None,
    beta: float | None = None,
    against: str | Procedure | None = None,
) -> Transformation:
    """Return the transformation a text names.

    Parameters
    ----------
    transformation : str, Transformation or callable
        ``identity``, ``log``, ``normal_quantile``, ``exponential:5`` or ``optimal``. A
        Transformation is returned as it is, a function of u is checked and wrapped.
    procedure : str or Procedure, optional
        Needed for ``optimal``.
    beta : float, optional
        Needed for ``optimal``.
    against : str or Procedure, optional
        For ``optimal``: the reference policy's procedure; by default the policy's.

    Returns
    -------
    Transformation
        ``str`` of it gives the text back.

    Raises
    ------
    ValueError
        If the text names no transformation, or ``optimal`` lacks its procedure or beta.

    Examples
    --------
    >>> parse_transformation("exponential:5")
    Exponential(rate=5.0)
    """
    if not isinstance(transformation, str):
        return as_transformation(transformation)
    name, _, argument = transformation.strip().partition(":")
    simple: dict[str, Callable[[], Transformation]] = {
        "identity": Identity,
        "log": Log,
        "normal_quantile": NormalQuantile,
    }
    if name in simple and not argument:
        return simple[name]()
    if name == "exponential" and re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", argument):
        return Exponential(float(argument))
    if name == "optimal" and not argument:
        if procedure is None or beta is None:
            raise ValueError(
                f"transformation 'optimal' must have a procedure and a beta; got procedure = "
                f"{procedure!r}, beta = {beta!r}."
            )
        return Optimal(parse_procedure(procedure), beta, against)
    raise ValueError(
        f"transformation must be identity, log, normal_quantile, exponential:RATE or optimal; "
        f"got {transformation!r}."
    )
