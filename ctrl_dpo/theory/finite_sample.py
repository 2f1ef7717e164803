"""Expected transformed reward of a draw whose rank among k reference draws is known."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ctrl_dpo._validation import check_choice, check_integer
from ctrl_dpo.theory.panels import Panels, Points, refined
from ctrl_dpo.theory.transformation import Transformation, as_transformation

FloatArray = NDArray[np.float64]

ESTIMATORS = ("posterior", "plug_in")
_REACH = 50.0  # logits; a uniform draw lies outside with probability 4e-22


@lru_cache(maxsize=256)
def posterior_means(transformation: Transformation, k: int) -> FloatArray:
    r"""Return the expected transformed reward at each rank among ``k`` draws.

    The draw with j - 1 of k independent uniform draws below it has the law Beta(j, k + 1 - j), so

    .. math::

        E[\Phi(U) \mid j] = \int_0^1 \Phi(u) \frac{u^{j-1} (1-u)^{k-j}}{B(j, k+1-j)} du,

    the least-squares estimate of the transformed reward from the rank.

    Parameters
    ----------
    transformation : Transformation
        Phi.
    k : int
        Number of draws, the one in question included.

    Returns
    -------
    (k,) ndarray of float64
        Read-only, from the lowest rank to the highest; relative error 1e-11. Cached.

    Examples
    --------
    >>> from ctrl_dpo import Identity
    >>> posterior_means(Identity(), 3).round(12)
    array([0.25, 0.5 , 0.75])
    """
    rank = np.arange(1, k + 1)[:, None, None]
    log_beta = special.betaln(rank, k + 1 - rank)

    def weights(points: Points) -> FloatArray:
        log_weight = rank * points.log_u + (k + 1 - rank) * points.log_complement
        return np.asarray(np.exp(log_weight - log_beta))

    def integrand(points: Points) -> FloatArray:
        return weights(points) * transformation.at(points)

    panels = refined(Panels(np.linspace(-_REACH, _REACH, 51)), integrand, tolerance=1e-12)
    points = panels.points
    # dividing by the weights' own quadrature removes the rounding of log_beta
    means = panels.integral(integrand(points)) / panels.integral(weights(points))
    means.setflags(write=False)
    return np.asarray(means)


@lru_cache(maxsize=64)
def tied_means(transformation: Transformation, k: int) -> FloatArray:
    """Return the mean over ``width`` ranks from ``first`` on, as entry [width - 1, first]."""
    # a running sum, not a difference of two: the largest value may be 1e20 times the smallest
    means = posterior_means(transformation, k)
    table = np.full((k, k), np.nan)
    total = np.zeros(k)
    for width in range(1, k + 1):
        total = total[: k + 1 - width] + means[width - 1 :]
        table[width - 1, : k + 1 - width] = total / width
    table.setflags(write=False)
    return table


def transformed_rewards(
    transformation: Any,
    below: ArrayLike,
    tied: ArrayLike,
    k: int,
    inside: bool,
    estimator: str = "posterior",
) -> FloatArray:
    r"""Return the transformed reward of responses known by their rank among k reference draws.

    .. math::

        \text{posterior: } E[\Phi(U) \mid \text{rank}], \qquad
        \text{plug-in: } \Phi\!\left(\frac{b + t/2}{k}\right),

    with b reference draws below and t tied. A response inside the reference draws has
    :math:`U \sim` Beta(j, k + 1 - j) at rank j; a new one is the extra draw among k + 1.

    Parameters
    ----------
    transformation : Transformation or callable
        Phi.
    below : array_like of int
        Number of reference draws with a smaller reward, any shape.
    tied : array_like of int
        Number with the same reward, same shape; with ``inside`` the response itself counts.
    k : int
        Number of reference draws of the prompt.
    inside : bool
        Whether the responses are themselves among the k reference draws.
    estimator : {"posterior", "plug_in"}
        The posterior mean has the least mean squared error (``benchmarks/theory_estimators.py``).

    Returns
    -------
    ndarray of float64
        Transformed rewards, same shape.

    Raises
    ------
    ValueError
        If the counts do not fit k, or the plug-in value is infinite.

    Notes
    -----
    Tied responses share the mean over the ranks they occupy. The posterior means are cached for
    each transformation and k, so only the first call for a k integrates.

    Examples
    --------
    >>> from ctrl_dpo import Log
    >>> transformed_rewards(Log(), below=[0, 1, 2], tied=[1, 1, 1], k=3, inside=True).round(4)
    array([-1.8333, -0.8333, -0.3333])
    """
    check_choice("estimator", estimator, ESTIMATORS)
    k = check_integer("k", k, 1)
    given = as_transformation(transformation)
    below, tied = _check_counts(below, tied, k, inside)
    if estimator == "plug_in":
        values = given.at(Points.of((below + tied / 2) / k))
        if not np.isfinite(values).all():
            worst = (below + tied / 2)[~np.isfinite(values)].flat[0] / k
            raise ValueError(
                f"estimator must be 'posterior' where {given} is infinite; got 'plug_in' "
                f"and a response outside the reference draws, at calibrated reward {worst:g}."
            )
        return values
    if not inside:
        k, tied = k + 1, tied + 1
    if (tied == 1).all():
        return np.asarray(posterior_means(given, k)[below])
    return np.asarray(tied_means(given, k)[tied - 1, below])


def _check_counts(
    below: ArrayLike, tied: ArrayLike, k: int, inside: bool
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the counts as integer arrays, or raise unless they are possible for k draws."""
    counts = np.broadcast_arrays(np.asarray(below), np.asarray(tied))
    for name, count, least in (("below", counts[0], 0), ("tied", counts[1], int(inside))):
        if not np.issubdtype(count.dtype, np.integer):
            raise TypeError(f"{name} must hold integers; got dtype {count.dtype}.")
        if (count < least).any():
            raise ValueError(
                f"{name} must be >= {least} with inside = {inside}; got {int(count.min())}."
            )
    total = counts[0] + counts[1]
    if (total > k).any():
        raise ValueError(f"below + tied must be <= k = {k}; got {int(total.max())}.")
    return counts[0].astype(np.intp), counts[1].astype(np.intp)
