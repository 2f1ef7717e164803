"""What a regression on ranks among k draws should aim at, so that the policy it fits is optimal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from ctrl_dpo._validation import check_integer, check_positive
from ctrl_dpo.theory.panels import Panels
from ctrl_dpo.theory.policies import match_kl
from ctrl_dpo.theory.procedures import Procedure, parse_procedure

FloatArray = NDArray[np.float64]

# a policy of k <= 1000 draws and a log-density that moves by 100 nats is smooth at this spacing
_PANELS = Panels(np.linspace(-40.0, 40.0, 41))
_STARTS = (0.1, 1.0)  # increments from rank to rank, nats
_KL_TOLERANCE = 1e-4
# win rate that a squared nat of step from rank to rank must buy: without it, worst-of-N asks for
# steps of 150 nats that buy 1e-4 and would rule a squared loss
_RIDGE = 2e-6


@dataclass(frozen=True)
class RankTargets:
    """Target log-ratios by rank, and the policy that a regression on them fits.

    Parameters
    ----------
    values : (n_ranks,) ndarray
        Target log-ratio of each rank from the lowest, nats; the fitted policy's normaliser is 1.
    win_rate : float
        Inference-time win rate of the fitted policy.
    kl : float
        Its KL from the reference policy, nats.
    """

    values: FloatArray
    win_rate: float
    kl: float

    def fitted_with(self, anchor: float) -> RankTargets:
        r"""Return the targets by which a squared loss of this anchor fits the same policy.

        .. math:: t'_j = \bar t + \frac{k - 1 + w}{k} (t_j - \bar t)

        The ranks of a group of k draws add up to a constant. So, in the limit of many prompts, a
        loss that weighs the group mean w fits k / (k - 1 + w) times the smoothed targets.

        Parameters
        ----------
        anchor : float
            Weight w of the group mean, >= 0.

        Returns
        -------
        RankTargets
            For a draw among k; win rate and KL as before.
        """
        mean = self.values.mean()
        scaled = mean + (self.values.size - 1 + anchor) / self.values.size * (self.values - mean)
        scaled.setflags(write=False)
        return replace(self, values=scaled)

    def at(self, below: NDArray[np.int64], tied: NDArray[np.int64], inside: bool) -> FloatArray:
        """Return the target of responses by their counts, tied ones sharing their ranks' mean."""
        sums = np.concatenate(([0.0], np.cumsum(self.values)))
        # a draw counts itself among the tied; a new response has one rank more than draws tied
        width = tied if inside else tied + 1
        # rounded far below any meaning, so that ranks of equal targets stay exactly equal
        return np.asarray(np.round((sums[below + width] - sums[below]) / width, 9))


def rank_targets(
    procedure: str | Procedure,
    k: int,
    beta: float,
    *,
    inside: bool = True,
    against: str | Procedure | None = None,
) -> RankTargets:
    r"""Return increasing targets by rank whose regression on fresh groups is the best policy.

    A regression on t_j, the target of rank j among k draws, converges with the number of prompts
    to the mean over the ranks that a response of calibrated reward u can get,

    .. math:: \log p(u) = \sum_{j=0}^{n} t_j \binom{n}{j} u^j (1-u)^{n-j},

    with n = k - 1 for one of the draws and n = k for a new response: t smoothed by Bernstein's
    kernel. So t is chosen to maximise W(p) - beta KL(p || 1) itself, under
    :math:`t_0 \le \dots \le t_n`. Estimates of :math:`\Phi(u)` from the rank are smoothed in the
    same way and fall short of their KL and win rate, by far for steep transformations and small k.

    Parameters
    ----------
    procedure : str or Procedure
        How the policy will be used.
    k : int
        Draws of the reference policy a prompt: >= 2 inside, >= 1 for a new response.
    beta : float
        Strength of the KL penalty, > 0.
    inside : bool
        Whether the ranked response is one of the k draws.
    against : str or Procedure, optional
        Procedure of the reference policy; by default the same.

    Returns
    -------
    RankTargets
        ``n + 1`` targets. Read-only and cached.

    Notes
    -----
    Exact in the limit of many prompts for the pointwise regression (``anchor=1``), and for a new
    response with any anchor; for a draw see :meth:`RankTargets.fitted_with`. The objective is
    maximised from several starts; its maximiser is not proved unique.

    Examples
    --------
    Best-of-4 at 1 nat with 8 draws: all but the highest rank are alike.

    >>> beta = match_rank_kl("best_of_4", 8, 1.0)
    >>> targets = rank_targets("best_of_4", 8, beta)
    >>> print(f"{targets.win_rate:.3f}, {targets.kl:.3f} nats, top {np.ptp(targets.values):.2f}")
    0.928, 1.000 nats, top 4.08
    """
    served = parse_procedure(procedure)
    opponent = served if against is None else parse_procedure(against)
    degree = check_integer("k", k, 2 if inside else 1) - (1 if inside else 0)
    return _solve(served, opponent, degree, check_positive("beta", beta))


def match_rank_kl(
    procedure: str | Procedure,
    k: int,
    kl: float,
    *,
    inside: bool = True,
    against: str | Procedure | None = None,
) -> float:
    """Return the beta at which the policy fitted to :func:`rank_targets` has this KL.

    Parameters
    ----------
    procedure, k, inside, against
        As for :func:`rank_targets`.
    kl : float
        KL budget, nats, > 0.

    Returns
    -------
    float
        The penalty; the KL is met to a relative 1e-4.

    Raises
    ------
    ValueError
        If no beta reaches the KL with k draws.

    Examples
    --------
    >>> beta = match_rank_kl("worst_of_4", 4, 0.3)
    >>> print(f"{rank_targets('worst_of_4', 4, beta).win_rate:.3f}")
    0.874
    """
    budget = check_positive("kl", kl)

    def gap(log_beta: float) -> float:
        found = rank_targets(procedure, k, float(np.exp(log_beta)), inside=inside, against=against)
        return float(np.log(found.kl + 1e-300) - np.log(budget))

    exact = np.log(match_kl("optimal", parse_procedure(procedure), budget, against=against))
    ends = [exact - 3, exact + 1]
    while gap(ends[0]) < 0:
        ends[0] -= 3
        if ends[0] < exact - 16:
            raise ValueError(f"kl must be within reach of k={k} draws; got {kl!r}. Draw more.")
    while gap(ends[1]) > 0:
        ends[1] += 1
    found = optimize.brentq(gap, ends[0], ends[1], xtol=_KL_TOLERANCE / 4)
    return float(np.exp(found))


@lru_cache(maxsize=4096)
def _solve(procedure: Procedure, against: Procedure, degree: int, beta: float) -> RankTargets:
    """Maximise the objective over increments >= 0 from rank to rank."""
    problem = _Problem(procedure, against, degree)
    fits = [
        optimize.minimize(
            problem.loss,
            np.full(degree, start),
            args=(beta,),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0, None)] * degree,
            options={"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9},
        )
        for start in _STARTS
    ]
    increments = min(fits, key=lambda fit: float(fit.fun)).x
    _, normaliser, win_rate, kl = problem.fitted(increments)
    values = np.concatenate(([0.0], np.cumsum(increments))) - normaliser
    values.setflags(write=False)
    return RankTargets(values, win_rate, kl)


class _Problem:
    """Objective of fitted policies as a function of the increments of their targets."""

    def __init__(self, procedure: Procedure, against: Procedure, degree: int) -> None:
        points = _PANELS.points
        j = np.arange(degree + 1)[:, None, None]
        log_choose = -special.betaln(degree - j + 1, j + 1) - np.log(degree + 1)
        log_basis = log_choose + j * points.log_u + (degree - j) * points.log_complement
        basis = np.exp(log_basis)
        # an increment raises its rank and all above it
        self._steps = np.cumsum(basis[::-1], axis=0)[::-1][1:]
        self._jacobian = points.jacobian
        self._opponent = against.density(points.u) * points.jacobian
        self._procedure = procedure

    def fitted(self, increments: FloatArray) -> tuple[FloatArray, float, float, float]:
        """Return log-density at the nodes, log normaliser, win rate and KL."""
        log_density = np.tensordot(increments, self._steps, axes=1)
        top = float(log_density.max())
        mass = _PANELS.integral(np.exp(log_density - top) * self._jacobian)
        normaliser = top + float(np.log(mass))
        log_density = log_density - normaliser
        density = np.exp(log_density) * self._jacobian
        served = self._procedure.distortion(self._cdf(density))
        win_rate = 1 - float(_PANELS.integral(served * self._opponent))
        kl = float(_PANELS.integral(density * log_density))
        return log_density, normaliser, win_rate, kl

    def loss(self, increments: FloatArray, beta: float) -> tuple[float, FloatArray]:
        """Return beta KL - W and its gradient."""
        log_density, _, win_rate, kl = self.fitted(increments)
        density = np.exp(log_density) * self._jacobian
        slope = self._procedure.density(self._cdf(density)) * self._opponent
        phi = _PANELS.cumulative(slope)  # the functional derivative of W, up to a constant
        pull = density * (phi - beta * log_density)
        together = _PANELS.integral(self._steps * pull)
        apart = _PANELS.integral(self._steps * density) * _PANELS.integral(pull)
        value = beta * kl - win_rate + _RIDGE * float(increments @ increments)
        return value, np.asarray(apart - together + 2 * _RIDGE * increments)

    @staticmethod
    def _cdf(density: FloatArray) -> FloatArray:
        return np.asarray(np.clip(_PANELS.cumulative(density), 0.0, 1.0))


@dataclass(frozen=True)
class RankOptimal:
    """Which :func:`rank_targets` to aim at, whatever the number of draws.

    Parameters
    ----------
    procedure, against : Procedure
        Of the policy and of the reference policy.
    beta : float
        Strength of the KL penalty, used where there is no budget.
    kl : float, optional
        KL budget of the fitted policy, nats.
    anchor : float, optional
        Of the squared loss that fits the targets to all draws of a group; None for a loss that sees
        some of them, which no factor makes exact.
    """

    procedure: Procedure
    against: Procedure
    beta: float
    kl: float | None = None
    anchor: float | None = 0.0

    def targets(self, k: int, inside: bool) -> RankTargets:
        """Return the targets for ``k`` draws; a draw alone has no rank and the target 0."""
        if inside and k == 1:
            return RankTargets(np.zeros(1), 0.5, 0.0)
        found = _of_budget(self, k, inside)
        if self.anchor is None or not inside:
            return found
        return found.fitted_with(self.anchor)


@lru_cache(maxsize=4096)
def _of_budget(wanted: RankOptimal, k: int, inside: bool) -> RankTargets:
    """Return the targets, with beta solved for where there is a budget."""
    beta, against = wanted.beta, wanted.against
    if wanted.kl is not None:
        beta = match_rank_kl(wanted.procedure, k, wanted.kl, inside=inside, against=against)
    return rank_targets(wanted.procedure, k, beta, inside=inside, against=against)


def expected_log_density(targets: ArrayLike, u: ArrayLike) -> FloatArray:
    """Return the log-ratio that a regression on targets by rank fits at calibrated rewards u."""
    values = np.asarray(targets, dtype=np.float64)
    j = np.arange(values.size)
    x = np.asarray(u, dtype=np.float64)[..., None]
    degree = values.size - 1
    return np.asarray((special.comb(degree, j) * x**j * (1 - x) ** (degree - j)) @ values)
