"""Newton's method for the optimality equation on panels: from a rough start to machine accuracy.

Unknowns are F and log p at the Gauss nodes of each panel and at the edges. Within a panel both are
integrals of the equation; the panels meet in a pentadiagonal system. Boundary conditions say that
the density is flat beyond the first and last edge, where the reference policy or the policy has
next to no mass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicHermiteSpline
from scipy.linalg import solve_banded

from ctrl_dpo.theory.panels import CUMULATIVE, ORDER, WEIGHTS, Panels, Points
from ctrl_dpo.theory.shooting import Equation, Trajectory

FloatArray = NDArray[np.float64]

_ITERATIONS = 60
_CONVERGED = 1e-9  # Newton's method squares the step, so the next one is at rounding level
_LARGEST_STEP = 3.0  # nats of log p where the policy has mass
_RESOLVED = 1e-12
_MARGIN = 42.0  # nats: mass beyond the outer edges is below exp(-42) = 6e-19
_ROUNDS = 12


@dataclass(frozen=True)
class Solution:
    """A stationary density: panels, log p and F at nodes and edges."""

    panels: Panels
    log_density: FloatArray
    cdf: FloatArray
    log_density_edges: FloatArray
    cdf_edges: FloatArray

    @property
    def trajectory(self) -> Trajectory:
        """The solution along its edges, as a start for another beta."""
        return Trajectory(self.panels.edges, self.log_density_edges, self.cdf_edges, 0.0)


def solve(equation: Equation, start: Trajectory) -> Solution | None:
    """Return the stationary density next to a trajectory, or None if Newton's method leaves it."""
    panels = _panels_for(equation, start)
    guess = _interpolated(equation, start, panels)
    for _ in range(_ROUNDS):
        solution = _newton(equation, guess)
        if solution is None:
            return None
        bad = solution.panels.unresolved(_watched(equation, solution), _RESOLVED)
        if not bad.any():
            return solution
        guess = _resampled(solution, solution.panels.bisected(bad))
    return solution


def _slope(equation: Equation, cdf: FloatArray, points: Points) -> tuple[FloatArray, FloatArray]:
    """Return d log p / dt and its derivative in F."""
    below, above = np.clip(cdf, 0.0, 1.0), np.clip(1.0 - cdf, 0.0, 1.0)
    weight = equation.against.density_at(points.u, points.complement)
    weight = weight * points.jacobian / equation.beta
    return (
        equation.procedure.density_at(below, above) * weight,
        equation.procedure.slope_at(below, above) * weight,
    )


def _newton(equation: Equation, guess: Solution) -> Solution | None:
    """Iterate to convergence on fixed panels."""
    current = guess
    converged = False
    for _ in range(_ITERATIONS):
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                step = _step(equation, current)
        except np.linalg.LinAlgError:  # overflowed: the start was too far off
            return None
        size, scale = _scale(current, step)
        if not np.isfinite(size):
            return None
        current = Solution(
            current.panels,
            current.log_density + scale * step.log_density,
            current.cdf + scale * step.cdf,
            current.log_density_edges + scale * step.log_density_edges,
            current.cdf_edges + scale * step.cdf_edges,
        )
        if converged:
            return current
        converged = size < _CONVERGED
    return None


def _scale(current: Solution, step: Solution) -> tuple[float, float]:
    """Return the largest step of log p where the policy has mass, and the share of it to take."""
    log_mass = current.log_density + current.panels.points.log_jacobian
    depth = log_mass.max() - log_mass
    change = step.log_density
    # a rise may bring a node up to the peak; a fall is free where there is no mass anyway
    allowed = _LARGEST_STEP + np.where(change > 0, depth, 10.0 * np.maximum(depth - 5.0, 0.0))
    share = 1.0 / max(1.0, float(np.max(np.abs(change) / allowed)))
    size = np.abs(change) * np.exp(-np.maximum(depth - 5.0, 0.0))
    return float(max(size.max(), np.abs(step.cdf).max())), share


def _step(equation: Equation, current: Solution) -> Solution:
    """Solve the linearised equations."""
    panels = current.panels
    points, half = panels.points, panels.half_widths
    density = np.exp(np.minimum(current.log_density, 600.0)) * points.jacobian
    slope, slope_f = _slope(equation, current.cdf, points)
    integral = half[:, :, None] * CUMULATIVE
    to_cdf = integral * density[:, None, :]
    to_log = integral * slope_f[:, None, :]
    # residuals of the integral equations on each panel
    miss_f = current.cdf - current.cdf_edges[:-1, None] - (integral @ density[..., None])[..., 0]
    miss_l = (
        current.log_density
        - current.log_density_edges[:-1, None]
        - (integral @ slope[..., None])[..., 0]
    )
    right = np.empty((*density.shape, 3))
    right[..., 0] = -(to_log @ miss_f[..., None])[..., 0] - miss_l
    right[..., 1] = to_log.sum(axis=-1)
    right[..., 2] = 1.0
    log_parts = np.linalg.solve(np.eye(ORDER) - to_log @ to_cdf, right)
    cdf_parts = to_cdf @ log_parts
    cdf_parts[..., 0] -= miss_f
    cdf_parts[..., 1] += 1.0
    weights = half * WEIGHTS
    into_f = ((weights * density)[:, None, :] @ log_parts)[:, 0]
    into_l = ((weights * slope_f)[:, None, :] @ cdf_parts)[:, 0]
    gap_f = np.diff(current.cdf_edges) - (weights * density).sum(axis=1)
    gap_l = np.diff(current.log_density_edges) - (weights * slope).sum(axis=1)
    edges = _solve_edges(current, into_f, into_l, gap_f, gap_l)
    coefficients = np.concatenate((np.ones((len(half), 1)), edges[:-1]), axis=1)[..., None]
    return Solution(
        panels,
        (log_parts @ coefficients)[..., 0],
        (cdf_parts @ coefficients)[..., 0],
        edges[:, 1],
        edges[:, 0],
    )


def _solve_edges(
    current: Solution,
    into_f: FloatArray,
    into_l: FloatArray,
    gap_f: FloatArray,
    gap_l: FloatArray,
) -> FloatArray:
    """Solve the pentadiagonal system for the steps of (F, log p) at the edges."""
    n = len(gap_f)
    band = np.zeros((5, 2 * n + 2))  # row 2 + i - j holds entry (i, j)
    right = np.empty(2 * n + 2)
    first, last = Points(current.panels.edges[0]), Points(current.panels.edges[-1])
    low = float(np.exp(current.log_density_edges[0]) * first.u)
    high = float(np.exp(current.log_density_edges[-1]) * last.complement)
    # F(first) = p u and F(last) = 1 - p (1 - u)
    band[2, 0], band[1, 1], right[0] = 1.0, -low, low - current.cdf_edges[0]
    band[3, 2 * n], band[2, 2 * n + 1] = 1.0, high
    right[-1] = 1.0 - high - current.cdf_edges[-1]
    # rows 1 + 2i and 2 + 2i: the steps at edge i + 1 from those at edge i
    band[3, 0 : 2 * n : 2] = -1.0 - into_f[:, 1]
    band[2, 1 : 2 * n : 2] = -into_f[:, 2]
    band[1, 2::2] = 1.0
    right[1:-1:2] = into_f[:, 0] - gap_f
    band[4, 0 : 2 * n : 2] = -into_l[:, 1]
    band[3, 1 : 2 * n : 2] = -1.0 - into_l[:, 2]
    band[1, 3::2] = 1.0
    right[2:-1:2] = into_l[:, 0] - gap_l
    return solve_banded((2, 2), band, right, check_finite=False).reshape(n + 1, 2)


def _watched(equation: Equation, solution: Solution) -> FloatArray:
    """Return the functions of t that the panels must resolve."""
    points = solution.panels.points
    density = np.exp(solution.log_density) * points.jacobian
    cdf = np.clip(solution.cdf, 0.0, 1.0)
    weight = equation.against.density_at(points.u, points.complement) * points.jacobian
    slope = _slope(equation, solution.cdf, points)[0]
    loss = equation.procedure.distortion(cdf) * weight
    return np.stack((density, loss, slope, slope * cdf))


def _panels_for(equation: Equation, start: Trajectory) -> Panels:
    """Return panels along a trajectory, extended until what lies outside is negligible."""
    left, right = _left_edge(equation, start), float(start.t[-1])
    top = float(start.log_density[-1])
    while True:
        complement = np.exp(-right)
        above = np.exp(top - right)
        slope = equation.procedure.density_at(1 - above, above) * complement / equation.beta
        slope = slope * equation.against.density_at(1 - complement, complement)
        if top - right < -_MARGIN and slope < 1e-18:
            break
        right += 1.0
    inner = start.t[(start.t > left) & (start.t < right)]
    edges = np.unique(np.concatenate(([left, right], inner)))
    pieces = np.maximum(1, np.ceil(np.diff(edges) / 3.0).astype(int))
    parts = [
        np.linspace(a, b, n, endpoint=False)
        for a, b, n in zip(edges[:-1], edges[1:], pieces, strict=True)
    ]
    return Panels(np.concatenate((*parts, [right])))


def _left_edge(equation: Equation, start: Trajectory) -> float:
    """Return a logit with next to no mass below it, but not far into a precipitous fall."""
    first = float(start.t[0])
    t = first - np.arange(max(first + _MARGIN, 0.0) + 1.0)
    while True:
        log_mass = _log_density_left(equation, first, start.log_density[0], t) + t  # first order
        enough = log_mass <= -_MARGIN
        enough[-1] = True
        i = int(enough.argmax())
        # a polynomial cannot follow log p from -40 to -1e11, and its wiggles would have mass
        if i == 0 or log_mass[i] >= -2 * _MARGIN or t[i - 1] - t[i] < 1e-9:
            return float(t[i])
        t = np.linspace(t[i - 1], t[i], 33)


def _log_density_left(
    equation: Equation, t0: float, log_density: float, t: FloatArray
) -> FloatArray:
    """Continue log p to the left of t0, where F is next to nothing: h'(F) = h'(0)."""
    steepness = float(equation.procedure.density_at(0.0, 1.0)) / equation.beta
    fall = equation.against.rise(Points(t), Points(np.array(t0)))
    return np.asarray(log_density - steepness * fall)


def _interpolated(equation: Equation, start: Trajectory, panels: Panels) -> Solution:
    """Carry a trajectory over to the nodes and edges of panels."""
    along = Points(start.t)
    slope = _slope(equation, start.cdf, along)[0]
    log_density = CubicHermiteSpline(start.t, start.log_density, slope)
    density = np.exp(start.log_density + along.log_jacobian)
    cdf = CubicHermiteSpline(start.t, start.cdf, density)

    def values(t: FloatArray) -> tuple[FloatArray, FloatArray]:
        inside = np.clip(t, start.t[0], start.t[-1])
        points = Points(t)
        logs = log_density(inside)
        left = t < start.t[0]
        logs[left] = _log_density_left(equation, start.t[0], start.log_density[0], t[left])
        below = np.where(left, np.exp(np.minimum(logs, 0.0)) * points.u, cdf(inside))
        above = np.exp(start.log_density[-1]) * points.complement
        return logs, np.where(t > start.t[-1], 1.0 - above, below)

    logs, below = values(panels.points.t)
    logs_edges, below_edges = values(panels.edges)
    return Solution(panels, logs, below, logs_edges, below_edges)


def _resampled(solution: Solution, panels: Panels) -> Solution:
    """Interpolate a solution to other panels over the same range."""
    old = solution.panels
    log_density = old.coefficients(solution.log_density)
    cdf = old.coefficients(solution.cdf)
    t, edges = panels.points.t, panels.edges
    return Solution(
        panels,
        old.evaluate(log_density, t),
        old.evaluate(cdf, t),
        old.evaluate(log_density, edges),
        old.evaluate(cdf, edges),
    )
