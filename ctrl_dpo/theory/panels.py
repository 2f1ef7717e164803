"""Integration and interpolation over [0, 1] in the logit coordinate, on panels of Gauss nodes.

A calibrated reward u is held as t = log(u / (1 - u)). Both u and 1 - u keep full relative accuracy,
so a density that lives within 1e-20 of an end is as easy as the uniform one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

ORDER = 16  # Gauss-Legendre nodes a panel: exact to degree 31
_MAX_PANELS = 4000
_TAIL = 3  # trailing Legendre coefficients that must be small where a function is resolved

_X, _W = legendre.leggauss(ORDER)
_VANDERMONDE = legendre.legvander(_X, ORDER - 1)
_TO_COEFFICIENTS = (np.arange(ORDER)[:, None] + 0.5) * _VANDERMONDE.T * _W


def _cumulative_matrix() -> FloatArray:
    """Return the matrix from values at the nodes to integrals from -1 to each node."""
    integrals = np.empty((ORDER, ORDER))
    for degree in range(ORDER):
        series = legendre.legint(np.eye(ORDER)[degree], lbnd=-1)
        integrals[:, degree] = legendre.legval(_X, series)
    return integrals @ _TO_COEFFICIENTS


CUMULATIVE = _cumulative_matrix()
WEIGHTS = _W


@dataclass(frozen=True)
class Points:
    """Calibrated rewards, any shape, by their logit.

    Parameters
    ----------
    t : ndarray of float64
        Logits; -inf is u = 0 and inf is u = 1.
    """

    t: FloatArray

    @classmethod
    def of(cls, u: ArrayLike) -> Points:
        """Return the points of calibrated rewards in [0, 1]."""
        u = np.asarray(u, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return cls(np.log(u) - np.log1p(-u))

    @cached_property
    def log_u(self) -> FloatArray:
        """Return log u."""
        return np.asarray(-np.logaddexp(0.0, -self.t))

    @cached_property
    def log_complement(self) -> FloatArray:
        """Return log(1 - u)."""
        return np.asarray(-np.logaddexp(0.0, self.t))

    @cached_property
    def u(self) -> FloatArray:
        """Return u."""
        return np.asarray(np.exp(self.log_u))

    @cached_property
    def complement(self) -> FloatArray:
        """Return 1 - u."""
        return np.asarray(np.exp(self.log_complement))

    @cached_property
    def log_jacobian(self) -> FloatArray:
        """Return log du/dt = log u + log(1 - u)."""
        return self.log_u + self.log_complement

    @cached_property
    def jacobian(self) -> FloatArray:
        """Return du/dt = u (1 - u)."""
        return np.asarray(np.exp(self.log_jacobian))


@dataclass(frozen=True)
class Panels:
    """Consecutive intervals of the logit coordinate, each with its Gauss-Legendre nodes.

    Parameters
    ----------
    edges : (n_panels + 1,) ndarray
        Increasing logits.
    """

    edges: FloatArray

    @cached_property
    def half_widths(self) -> FloatArray:
        """Half of each panel's width, (n_panels, 1)."""
        return 0.5 * np.diff(self.edges)[:, None]

    @cached_property
    def points(self) -> Points:
        """The nodes, (n_panels, ORDER)."""
        centres = 0.5 * (self.edges[1:] + self.edges[:-1])
        return Points(centres[:, None] + self.half_widths * _X)

    def integral(self, values: FloatArray) -> Any:
        """Integrate over t the function with these values at the nodes, (..., n_panels, ORDER)."""
        return ((values @ _W) * self.half_widths[:, 0]).sum(axis=-1)

    def cumulative(self, values: FloatArray) -> FloatArray:
        """Return the integral from the first edge to each node, (n_panels, ORDER)."""
        totals = (values @ _W) * self.half_widths[:, 0]
        before = np.concatenate(([0.0], np.cumsum(totals)[:-1]))
        return np.asarray(before[:, None] + (values @ CUMULATIVE.T) * self.half_widths)

    def coefficients(self, values: FloatArray) -> FloatArray:
        """Return the Legendre coefficients on each panel, same shape."""
        return np.asarray(values @ _TO_COEFFICIENTS.T)

    def evaluate(self, coefficients: FloatArray, t: FloatArray) -> FloatArray:
        """Evaluate a piecewise Legendre series at logits within the edges."""
        last = len(self.edges) - 2
        panel = np.clip(np.searchsorted(self.edges, t, side="right") - 1, 0, last)
        x = (t - self.edges[panel]) / self.half_widths[panel, 0] - 1.0
        basis = legendre.legvander(x, ORDER - 1).reshape(*np.shape(t), ORDER)
        return np.asarray((coefficients[panel] * basis).sum(axis=-1))

    def bisected(self, which: NDArray[np.bool_]) -> Panels:
        """Return the panels with the marked ones cut in half."""
        middles = 0.5 * (self.edges[1:] + self.edges[:-1])[which]
        return Panels(np.sort(np.concatenate((self.edges, middles))))

    def unresolved(self, values: FloatArray, tolerance: float) -> NDArray[np.bool_]:
        """Mark panels on which functions, (..., n_panels, ORDER), are not yet polynomials."""
        # trailing coefficients times width against the integral of the function's absolute value
        scale = self.integral(np.abs(values))
        tail = np.abs(values @ _TO_COEFFICIENTS[-_TAIL:].T).max(axis=-1)
        error = tail * self.half_widths[:, 0]
        too_large = error > tolerance * np.asarray(scale)[..., None]
        # a jump is followed down to the spacing of floats, not further
        splittable = self.half_widths[:, 0] > 1e-13 * (1 + np.abs(self.edges[1:]))
        return np.asarray(too_large.reshape(-1, len(splittable)).any(axis=0) & splittable)


def refined(
    panels: Panels, functions: Callable[[Points], FloatArray], tolerance: float = 1e-13
) -> Panels:
    """Bisect panels until functions of t are resolved on each, or 4000 panels are used."""
    while len(panels.edges) <= _MAX_PANELS:
        bad = panels.unresolved(functions(panels.points), tolerance)
        if not bad.any():
            break
        panels = panels.bisected(bad)
    return panels
