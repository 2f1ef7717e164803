"""What a transformation is, a user's function as one, and the normaliser of its policy."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ctrl_dpo._validation import check_finite, check_positive
from ctrl_dpo.theory.panels import Panels, Points, refined

FloatArray = NDArray[np.float64]

_REACH = 40.0  # logits beyond which the reference policy has mass 4e-18
_ABOVE_ZERO, _BELOW_ONE = 1e-300, 1.0 - 2.0**-53  # where a user's function is evaluated
_ROUNDING = 1e-15  # relative fall that a user's function may show by rounding alone
_NEGLIGIBLE = 45.0  # nats below the peak at which a density no longer counts
_FARTHEST = 1e13  # logits; a density that still has mass there has no usable normaliser


class Transformation(ABC):
    """An increasing map of calibrated rewards; the transformed reward is what alignment maximises.

    Called on an array of calibrated rewards it returns an array of the same shape. ``str`` and
    `ctrl_dpo.transform.parse_transformation`
    are inverses. Only differences of values matter.
    """

    @property
    def offset(self) -> float:
        """Constant that `score` leaves out: the value at u = 1 where that is finite."""
        return 0.0

    @abstractmethod
    def score(self, points: Points) -> FloatArray:
        """Return the transformation minus `offset`, without cancellation next to 0 and 1."""

    def at(self, points: Points) -> FloatArray:
        """Return the transformed rewards at points given by their logit."""
        return self.score(points) + self.offset

    def __call__(self, u: ArrayLike) -> FloatArray:
        """Return the transformed rewards of calibrated rewards in [0, 1]."""
        return self.at(Points.of(check_unit("u", u)))[()]

    def log_normaliser(self, beta: float) -> float:
        r"""Return log Z, the constant of the anchored loss.

        .. math:: \log Z = \log \int_0^1 \exp(\Phi(u) / \beta) du

        The optimal log-ratio of a response is Phi(u) / beta - log Z.

        Parameters
        ----------
        beta : float
            Strength of the KL penalty, > 0.

        Returns
        -------
        float
            log Z; the same for every prompt.

        Examples
        --------
        >>> from ctrl_dpo import Log
        >>> round(Log().log_normaliser(1.0), 6)
        -0.693147
        """
        beta = check_positive("beta", beta)
        return normalise(self, beta)[1] + self.offset / beta

    def on_levels(
        self, reference_probs: ArrayLike, rewards: ArrayLike, beta: float
    ) -> tuple[FloatArray, float]:
        r"""Return the transformed rewards and log Z of one prompt whose rewards are discrete.

        .. math:: \log Z = \log \sum_l q_l \exp(\Phi_l / \beta), \qquad \Phi_l = \Phi(C_l),

        with C the calibrated reward of a level: the reference mass below plus half its own.

        Parameters
        ----------
        reference_probs : (n,) array_like
            Probability of each response under the reference policy, >= 0, sums to 1.
        rewards : (n,) array_like
            Finite rewards; equal ones tie.
        beta : float
            Strength of the KL penalty, > 0.

        Returns
        -------
        transformed_rewards : (n,) ndarray
            Phi of each response.
        log_normaliser : float
            log Z of this prompt.

        Raises
        ------
        ValueError
            If Phi is infinite at a level without reference mass at the bottom or the top.

        Examples
        --------
        >>> from ctrl_dpo import Identity
        >>> transformed, log_normaliser = Identity().on_levels([0.75, 0.25], [0, 1], beta=0.5)
        >>> print(transformed, round(log_normaliser, 6))
        [0.375 0.875] 1.107374
        """
        mass, level = level_masses(reference_probs, rewards)
        calibrated = np.minimum(np.cumsum(mass) - mass / 2, 1.0)
        values = self(calibrated)
        if not np.isfinite(values).all():
            worst = float(calibrated[~np.isfinite(values)][0])
            raise ValueError(
                f"rewards must all have reference mass where {self} is infinite; got a level at "
                f"calibrated reward {worst!r} without."
            )
        beta = check_positive("beta", beta)
        return values[level], float(special.logsumexp(values / beta, b=mass))


def level_masses(
    reference_probs: ArrayLike, rewards: ArrayLike
) -> tuple[FloatArray, NDArray[np.intp]]:
    """Return the reference mass of each distinct reward, rising, and each response's level.

    Parameters
    ----------
    reference_probs : (n,) array_like
        Probabilities, >= 0, sum 1 to within 1e-8.
    rewards : (n,) array_like
        Finite rewards.

    Returns
    -------
    masses : (n_levels,) ndarray
        Sums to 1.
    level : (n,) ndarray of int
        Index into ``masses``.

    Raises
    ------
    ValueError
        If shapes differ, a probability is negative, or they do not sum to 1.
    """
    q = check_finite("reference_probs", reference_probs, ndim=1)
    r = check_finite("rewards", rewards, ndim=1)
    if len(q) == 0 or len(q) != len(r):
        raise ValueError(
            f"reference_probs must be one per reward, at least one; got {len(q)} for {len(r)}."
        )
    if (q < 0).any():
        raise ValueError(f"reference_probs must be >= 0; got {float(q.min())!r}.")
    if abs(q.sum() - 1) > 1e-8:
        raise ValueError(f"reference_probs must sum to 1; got a sum of {float(q.sum())!r}.")
    values, level = np.unique(r, return_inverse=True)
    mass = np.zeros(len(values))
    np.add.at(mass, level, q / q.sum())
    return mass, level


@dataclass(frozen=True)
class UserFunction(Transformation):
    """A user's function of the calibrated reward as a transformation, checked when built.

    Parameters
    ----------
    function : callable
        Maps an array of calibrated rewards in (0, 1) to transformed rewards of the same shape.
    """

    function: Callable[[FloatArray], Any]

    def __post_init__(self) -> None:
        """Evaluate the function on a grid: NaN is an error, a decrease is a warning."""
        # a policy may have its mass in the last millionth; less far out steps drown in rounding
        ends = special.expit(np.linspace(-14.0, 14.0, 281))
        u = np.unique(np.concatenate((np.linspace(0.0, 1.0, 1025)[1:-1], ends)))
        values = self(u)
        falls = np.diff(values) < -_ROUNDING * np.abs(values[1:])
        if falls.any():
            worst = int(np.argmax(falls))
            warnings.warn(
                f"transformation must be increasing; got {values[worst]:.6g} then "
                f"{values[worst + 1]:.6g} at u = {u[worst + 1]:.8g}. Relabelling with it reverses "
                "preferences.",
                UserWarning,
                stacklevel=2,
            )

    def __call__(self, u: ArrayLike) -> FloatArray:
        """Return the function's values, or raise if one is NaN or the shape is wrong."""
        u = check_unit("u", u)
        with np.errstate(divide="ignore"):
            values = np.asarray(self.function(u))
        if values.dtype.kind not in "biuf":
            raise TypeError(f"transformation must return real numbers; got dtype {values.dtype}.")
        values = values.astype(np.float64, copy=False)
        if values.shape != u.shape:
            raise ValueError(
                f"transformation must return one value per u; got shape {values.shape} "
                f"for u of shape {u.shape}."
            )
        bad = np.isnan(values) | (values == np.inf) & (u < 1)
        if bad.any():
            raise ValueError(
                f"transformation must return a number for every u in (0, 1); "
                f"got {values[bad].flat[0]} at u = {u[bad].flat[0]:.6g}."
            )
        return values

    @cached_property
    def offset(self) -> float:
        """The value next to u = 1, so that scores stay exact where the policy has its mass."""
        return float(self(_BELOW_ONE))

    def score(self, points: Points) -> FloatArray:
        """Return the difference to the value next to u = 1."""
        return self(np.clip(points.u, _ABOVE_ZERO, _BELOW_ONE)) - self.offset

    def __str__(self) -> str:
        """Return the function's name."""
        return str(getattr(self.function, "__name__", self.function))


def as_transformation(transformation: Any) -> Transformation:
    """Return a transformation as it is, a plain function of u checked and wrapped.

    Parameters
    ----------
    transformation : Transformation or callable
        A callable maps an array of calibrated rewards in (0, 1) to numbers of the same shape.

    Returns
    -------
    Transformation
        With ``str`` the callable's name.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(transformation, Transformation):
        return transformation
    if not callable(transformation):
        raise TypeError(
            f"transformation must be a Transformation or a function of u; got {transformation!r}."
        )
    return UserFunction(transformation)


def normalise(transformation: Transformation, beta: float) -> tuple[Panels, float]:
    """Return panels that resolve exp(score / beta), and log of its integral."""
    panels, peak = _spanning(transformation, beta)

    def masses(points: Points) -> FloatArray:
        log_mass = transformation.score(points) / beta + points.log_jacobian - peak
        return np.stack((np.exp(log_mass), points.jacobian))

    panels = refined(panels, masses)
    total = float(panels.integral(masses(panels.points)[0]))
    return panels, float(np.log(total) + peak)


def standard_deviation(transformation: Transformation) -> float:
    """Return the transformation's standard deviation under the reference policy, roughly."""
    panels = Panels(np.linspace(-_REACH, _REACH, 81))
    weight = panels.points.jacobian
    score = transformation.score(panels.points)
    largest = float(np.abs(score).max()) or 1.0
    score = score / largest
    mean = panels.integral(score * weight)
    return largest * float(np.sqrt(panels.integral((score - mean) ** 2 * weight)))


def _spanning(transformation: Transformation, beta: float) -> tuple[Panels, float]:
    """Return first panels that cover the mass of policy and reference policy, and its log peak."""
    reach = 64.0
    while True:
        edges = _graded_edges(reach)
        points = Points(edges)
        log_mass = transformation.score(points) / beta + points.log_jacobian
        peak = float(log_mass.max())
        if not np.isfinite(peak):
            raise ValueError(
                f"transformation must be finite over beta in (0, 1); got a log-density of {peak} "
                f"at beta = {beta!r}."
            )
        if max(log_mass[0], log_mass[-1]) < peak - _NEGLIGIBLE:
            break
        reach *= 4
        if reach > _FARTHEST:
            raise ValueError(
                f"beta must be large enough that exp(transformation / beta) has a finite integral "
                f"over u; got beta = {beta!r} for {transformation}."
            )
    counted = (log_mass > peak - _NEGLIGIBLE) | (np.abs(edges) < _REACH)
    first, last = np.flatnonzero(counted)[[0, -1]]
    return Panels(edges[max(first - 1, 0) : last + 2]), peak


def _graded_edges(reach: float) -> FloatArray:
    """Return logits spaced by 2 in the middle and by a fifth of their size towards the ends."""
    n_outer = int(np.ceil(np.log(reach / 10.0) / np.log(1.2)))
    outer = 10.0 * (reach / 10.0) ** (np.arange(1, n_outer + 1) / n_outer)
    return np.concatenate((-outer[::-1], np.linspace(-10.0, 10.0, 11), outer))


def check_unit(name: str, values: ArrayLike) -> FloatArray:
    """Return values as float64, or raise unless they lie in [0, 1]."""
    array = check_finite(name, values)
    outside = (array < 0) | (array > 1)
    if outside.any():
        raise ValueError(f"{name} must lie in [0, 1]; got {float(array[outside].flat[0])!r}.")
    return array
