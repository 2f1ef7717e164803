"""Policies on the calibrated scale: a density on [0, 1], its win rate and its KL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrl_dpo.theory.distortion import Procedure
from ctrl_dpo.theory.panels import Panels, Points, refined
from ctrl_dpo.theory.transformation import check_unit

FloatArray = NDArray[np.float64]
PointFunction = Callable[[Points], FloatArray]


@dataclass(frozen=True)
class CalibratedPolicy:
    r"""A policy as its density on the calibrated scale, with win rate and KL.

    .. math::

        W = 1 - \int_0^1 h(F(u)) g'(u) du, \qquad
        \mathrm{KL} = \int_0^1 p(u) \log p(u) du,

    with p the density of the calibrated reward of one draw, F its CDF, h the distortion of the
    policy's procedure and g that of the reference policy's.

    Parameters
    ----------
    procedure : Procedure
        Procedure applied to the policy.
    against : Procedure
        Procedure applied to the reference policy.
    beta : float
        Strength of the KL penalty the policy was solved for, > 0.
    win_rate : float
        Inference-time win rate against the reference policy, in [0, 1].
    loss_rate : float
        1 - win_rate, with full relative accuracy where it is tiny.
    kl : float
        KL of the policy from the reference policy, nats.
    """

    procedure: Procedure
    against: Procedure
    beta: float
    win_rate: float
    loss_rate: float
    kl: float
    _log_density: PointFunction = field(repr=False, compare=False)
    _panels: Panels = field(repr=False, compare=False)
    _cdf: FloatArray = field(repr=False, compare=False)

    @property
    def objective(self) -> float:
        """Win rate minus beta times KL."""
        return self.win_rate - self.beta * self.kl

    def cdf(self, u: ArrayLike) -> FloatArray:
        """Return F(u), the probability that one draw's calibrated reward is at most ``u``.

        Parameters
        ----------
        u : array_like
            Calibrated rewards in [0, 1], any shape.

        Returns
        -------
        ndarray of float64
            Same shape, in [0, 1].
        """
        u = check_unit("u", u)
        edges = self._panels.edges
        t = np.clip(Points.of(u).t, edges[0], edges[-1])
        values = self._panels.evaluate(self._panels.coefficients(self._cdf), t)
        values = np.where(u == 1, 1.0, np.where(u == 0, 0.0, values))
        return np.clip(values, 0.0, 1.0)[()]

    def log_density(self, u: ArrayLike) -> FloatArray:
        """Return log p(u): the optimal log-ratio, in nats, of a response with calibrated reward u.

        Parameters
        ----------
        u : array_like
            Calibrated rewards in [0, 1], any shape.

        Returns
        -------
        ndarray of float64
            Same shape; -inf or inf where the density has no finite limit at an end.
        """
        return self.log_density_at(Points.of(check_unit("u", u)))[()]

    def log_density_at(self, points: Points) -> FloatArray:
        """Return log p at points given by their logit, as accurate next to 0 and 1 as between."""
        return self._log_density(points)

    def served_by(self, procedure: Procedure, against: Procedure | None = None) -> CalibratedPolicy:
        """Return the same policy with its win rate under another procedure.

        Parameters
        ----------
        procedure : Procedure
            Procedure applied to the policy.
        against : Procedure, optional
            Procedure applied to the reference policy; by default the same.

        Returns
        -------
        CalibratedPolicy
            Same density, KL and beta.
        """
        against = procedure if against is None else against
        return assemble(self._log_density, self._panels, procedure, against, self.beta)


def assemble(
    log_density: PointFunction,
    panels: Panels,
    procedure: Procedure,
    against: Procedure,
    beta: float,
) -> CalibratedPolicy:
    """Integrate a normalised log-density to a policy, refining panels where the loss is steep."""
    coarse, cdf = panels, _cdf_at_nodes(log_density, panels)
    coefficients = coarse.coefficients(cdf)

    def loss(points: Points) -> FloatArray:
        below = np.clip(coarse.evaluate(coefficients, points.t), 0.0, 1.0)
        density = against.density_at(points.u, points.complement)
        return np.asarray(procedure.distortion(below) * density * points.jacobian)

    panels = refined(panels, loss)
    if panels is not coarse:
        cdf = _cdf_at_nodes(log_density, panels)
    points = panels.points
    weight = against.density_at(points.u, points.complement) * points.jacobian
    loss_rate = float(panels.integral(procedure.distortion(np.clip(cdf, 0.0, 1.0)) * weight))
    return CalibratedPolicy(
        procedure, against, beta, 1.0 - loss_rate, loss_rate,
        kl_of(log_density(points), panels), log_density, panels, cdf,
    )  # fmt: skip


def kl_of(log_density: FloatArray, panels: Panels) -> float:
    """Return KL in nats from a log-density at the nodes."""
    points = panels.points
    mass = np.exp(log_density + points.log_jacobian)
    # p log p - p + 1 is never negative: nothing cancels for a policy close to the reference policy
    moderate = np.clip(log_density, -1.0, 1.0)
    close = points.jacobian * (np.exp(moderate) * moderate - np.expm1(moderate))
    far = mass * (np.maximum(log_density, -1e300) - 1.0) + points.jacobian
    return float(panels.integral(np.where(log_density == moderate, close, far)))


def _cdf_at_nodes(log_density: PointFunction, panels: Panels) -> FloatArray:
    """Integrate the density from the left to each node."""
    points = panels.points
    return panels.cumulative(np.exp(log_density(points) + points.log_jacobian))
