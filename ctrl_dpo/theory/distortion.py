"""What an inference-time procedure is: a distortion of a calibrated reward's CDF."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from ctrl_dpo._validation import check_finite
from ctrl_dpo.theory.panels import Points

FloatArray = NDArray[np.float64]


class Procedure(ABC):
    r"""What is done with the policy at use, as an increasing distortion of [0, 1].

    Every procedure here is a mixture of order statistics: with probability ``w`` it serves the k-th
    best of n draws. If one draw has CDF :math:`F`, the response served has CDF :math:`h(F)`,

    .. math::

        h(q) = \sum w \, I_q(n - k + 1, k), \qquad
        h'(q) = \sum w \, \frac{q^{n-k} (1-q)^{k-1}}{B(n - k + 1, k)}.

    Procedures are frozen, hashable and equal by value; ``str`` and `procedures.parse_procedure` are
    inverses.

    References
    ----------
    .. [1] Balashankar et al., "InfAlign", arXiv:2412.19792v5, section 3.
    """

    @property
    @abstractmethod
    def order_statistics(self) -> tuple[tuple[float, int, int], ...]:
        """Parts of the mixture: ``(weight, k, n)`` for the k-th best of n draws."""

    @property
    def n_draws(self) -> int:
        """Largest number of draws the procedure looks at."""
        return max(n for _, _, n in self.order_statistics)

    def distortion(self, q: ArrayLike) -> FloatArray:
        """Return h(q), the CDF of what is served where one draw has CDF ``q``.

        Parameters
        ----------
        q : array_like
            Probabilities in ``[0, 1]``, any shape.

        Returns
        -------
        ndarray of float64
            Same shape, in ``[0, 1]``.

        Examples
        --------
        >>> from ctrl_dpo import BestOfN
        >>> BestOfN(2).distortion([0.0, 0.5, 1.0])
        array([0.  , 0.25, 1.  ])
        """
        return self._mixed(_check_probabilities(q))[()]

    def density(self, q: ArrayLike) -> FloatArray:
        """Return h'(q), the derivative of the distortion.

        Parameters
        ----------
        q : array_like
            Probabilities in ``[0, 1]``, any shape.

        Returns
        -------
        ndarray of float64
            Same shape, ``>= 0``; integrates to 1 over ``[0, 1]``.

        Examples
        --------
        >>> from ctrl_dpo import WorstOfN
        >>> WorstOfN(4).density([0.0, 0.5, 1.0])
        array([4. , 0.5, 0. ])
        """
        q = _check_probabilities(q)
        return np.asarray(self.density_at(q, 1 - q))[()]

    def rise(self, low: Points, high: Points) -> FloatArray:
        """Return h(high) - h(low), accurate next to h = 0 and h = 1. Unchecked, for solvers."""
        from_below = self._mixed(high.u) - self._mixed(low.u)
        # the k-th best of n of negated rewards is the (n - k + 1)-th
        above_low = self._mixed(low.complement, mirrored=True)
        from_above = above_low - self._mixed(high.complement, mirrored=True)
        return np.where(above_low < 0.5, from_above, from_below)

    def _mixed(self, q: FloatArray, mirrored: bool = False) -> FloatArray:
        """Return h(q), or 1 - h(1 - q)."""
        parts = self.order_statistics
        ranked = [(weight, n + 1 - k if mirrored else k, n) for weight, k, n in parts]
        return np.asarray(sum(weight * _beta_cdf(k, n, q) for weight, k, n in ranked))

    def density_at(self, q: Any, complement: Any) -> Any:
        """Return h'(q) given both q and 1 - q, each accurate near zero. Unchecked, for solvers."""
        return sum(scale * q**below * complement**above for scale, below, above in self._monomials)

    def slope_at(self, q: Any, complement: Any) -> Any:
        """Return h''(q) given both q and 1 - q. Unchecked, for solvers."""
        total = 0.0 * q
        for scale, below, above in self._monomials:
            if below:
                total = total + scale * below * q ** (below - 1) * complement**above
            if above:
                total = total - scale * above * q**below * complement ** (above - 1)
        return total

    @cached_property
    def density_maximum(self) -> float:
        """Upper bound of h' on [0, 1]: the weighted maxima of the parts."""
        bound = 0.0
        for scale, below, above in self._monomials:
            mode = below / max(below + above, 1)
            bound += scale * mode**below * (1 - mode) ** above
        return bound

    @cached_property
    def is_convex(self) -> bool:
        """Whether h is convex: every part keeps the best."""
        return all(k == 1 for _, k, _ in self.order_statistics)

    @cached_property
    def _monomials(self) -> tuple[tuple[float, int, int], ...]:
        """The density as (scale, power of q, power of 1 - q)."""
        return tuple(
            (weight * k * math.comb(n, k), n - k, k - 1) for weight, k, n in self.order_statistics
        )

    def select(
        self, rewards: ArrayLike, axis: int = -1, rng: np.random.Generator | None = None
    ) -> NDArray[np.intp]:
        """Return the index of the response the procedure serves.

        Parameters
        ----------
        rewards : array_like
            Finite rewards of the draws; length n along ``axis`` (a mixture: the largest n of its
            parts, each part looking at its first n draws).
        axis : int
            Axis of the draws.
        rng : numpy.random.Generator, optional
            Picks the part of a `Mixture`, once per request; other procedures do not use it.

        Returns
        -------
        ndarray of int
            Index along ``axis``, which is removed; of equal rewards the first in the order drawn.

        Raises
        ------
        ValueError
            If the number of draws is wrong, or a mixture is given no generator.

        Examples
        --------
        >>> from ctrl_dpo import BestOfN, OrderStatistic
        >>> BestOfN(3).select([0.1, 0.9, 0.5]), OrderStatistic(2, 3).select([0.1, 0.9, 0.5])
        (np.int64(1), np.int64(2))
        """
        draws = np.moveaxis(check_finite("rewards", rewards), axis, -1)
        if draws.shape[-1] != self.n_draws:
            raise ValueError(
                f"rewards must hold {self.n_draws} draws along axis {axis} for {self}; "
                f"got shape {np.shape(rewards)}."
            )
        parts = [
            np.argsort(-draws[..., :n], axis=-1, kind="stable")[..., k - 1]
            for _, k, n in self.order_statistics
        ]
        if len(parts) == 1:
            return np.asarray(parts[0])[()]
        if rng is None:
            raise ValueError(f"rng must be a numpy Generator for {self}; got None.")
        weights = [weight for weight, _, _ in self.order_statistics]
        which = rng.choice(len(parts), size=draws.shape[:-1], p=weights)
        chosen: NDArray[np.intp] = np.take_along_axis(np.stack(parts), np.asarray(which)[None], 0)[
            0
        ]
        return chosen


def _check_probabilities(q: ArrayLike) -> FloatArray:
    """Return q as float64, or raise unless it lies in [0, 1]."""
    array = check_finite("q", q)
    if ((array < 0) | (array > 1)).any():
        worst = array[(array < 0) | (array > 1)].flat[0]
        raise ValueError(f"q must lie in [0, 1]; got {float(worst)!r}.")
    return array


def _beta_cdf(k: int, n: int, q: FloatArray) -> FloatArray:
    """Return I_q(n - k + 1, k), by the elementary form where there is one."""
    if k == 1:
        return np.asarray(q**n)
    if k == n:
        with np.errstate(divide="ignore"):
            return np.asarray(-np.expm1(n * np.log1p(-q)))
    return np.asarray(special.betainc(n - k + 1, k, q))
