"""Inference-time win rates of two sets of draws, procedures applied to both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import integrate

from ctrl_dpo._validation import check_finite
from ctrl_dpo.measures.estimates import Estimate, mean_over_prompts
from ctrl_dpo.theory.procedures import (
    Procedure,
    parse_procedure,
)

Rows = Iterable[ArrayLike]  # one sequence a prompt: the rows of a matrix, or of different lengths


def inference_win_rate(
    policy_rewards: Rows,
    reference_rewards: Rows,
    procedure: str | Procedure,
    confidence: float = 0.95,
    against: str | Procedure | None = None,
    seed: int = 0,
) -> Estimate:
    r"""Estimate how often the policy beats the reference policy, a procedure applied to both sides.

    With the sorted rewards ``a_1 <= a_2 <= ...`` of the policy and ``b_1 <= ...`` of the reference,

    .. math::

        \hat W = \sum_{i,j} w_i\, v_j \left( \mathbf 1[a_i > b_j]
            + \tfrac12 \mathbf 1[a_i = b_j] \right),

    where :math:`w_i` is the probability that the procedure, given a random subset of the draws,
    serves the i-th smallest (:func:`selection_weights`), and :math:`v_j` is the reference's.

    Parameters
    ----------
    policy_rewards : (n_prompts, m) array_like, or one sequence of rewards a prompt
        Rewards of independent draws from the policy; any unit, only their order matters.
    reference_rewards : (n_prompts, m_reference) array_like, or one sequence of rewards a prompt
        Rewards of independent draws from the reference policy, same prompts in the same order.
    procedure : str or Procedure
        What is done with the policy's draws at use: ``"best_of_4"``, ``BestOfN(4)``.
    confidence : float
        Nominal coverage of the interval, in (0, 1).
    against : str or Procedure, optional
        Procedure on the reference side, where it is another one.
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Estimate
        ``.value``, ``.low``, ``.high``, ``.standard_error`` and ``.per_prompt``, all fractions.

    Raises
    ------
    ValueError
        If the numbers of prompts differ, or a prompt has too few draws.

    Notes
    -----
    It is the average over all pairs of subsets, so it is unbiased for every ``m >= N``, and uses
    every draw. Swapping the sides maps W to 1 - W; a strictly increasing map of the rewards changes
    nothing; best-of-N of the rewards mirrors worst-of-N of their negatives. Cost is O(m log m) a
    prompt. The interval is described in :func:`~ctrl_dpo.measures.estimates.mean_over_prompts`.

    References
    ----------
    .. [1] Balashankar et al., "InfAlign", arXiv:2412.19792v5, section 2.
    .. [2] Hoeffding, "A class of statistics with asymptotically normal distribution", 1948.

    Examples
    --------
    >>> result = inference_win_rate([[1.0, 3.0], [0.0, 5.0]], [[2.0, 2.0], [2.0, 2.0]], "best_of_2")
    >>> result.value, result.per_prompt.tolist()
    (1.0, [1.0, 1.0])
    """
    policy = checked_rows("policy_rewards", policy_rewards)
    reference = checked_rows("reference_rewards", reference_rewards)
    if len(policy) != len(reference):
        raise ValueError(
            "policy_rewards and reference_rewards must cover the same prompts; got "
            f"{len(policy)} and {len(reference)} rows."
        )
    mine, theirs = _both(procedure, against)
    check_draws("policy_rewards", policy, mine, "row {}".format)
    check_draws("reference_rewards", reference, theirs, "row {}".format)
    pairs = zip(policy, reference, strict=True)
    per_prompt = [_win_rate(a, b, mine, theirs) for a, b in pairs]
    return mean_over_prompts(per_prompt, confidence, seed, "win rate")


def check_draws(
    name: str, rows: Sequence[Sized], procedure: Procedure, place: Callable[[int], str]
) -> None:
    """Raise where a prompt has fewer draws than a procedure looks at.

    Parameters
    ----------
    name : str
        What the error calls the rewards.
    rows : sequence of sized
        The draws of each prompt.
    procedure : Procedure
        Inference-time procedure.
    place : callable
        What the error calls a prompt, by its number.

    Raises
    ------
    ValueError
        If a prompt has too few.
    """
    for number, row in enumerate(rows):
        if len(row) < procedure.n_draws:
            raise ValueError(
                f"{name} must hold >= {procedure.n_draws} draws a prompt for {procedure}; got "
                f"{len(row)} at {place(number)}. Draw more, or evaluate a smaller N."
            )


def _win_rate(
    policy: NDArray[np.float64],
    reference: NDArray[np.float64],
    mine: Procedure,
    theirs: Procedure,
) -> float:
    """Return the win rate on one prompt."""
    ordered = np.sort(reference)
    # weight of the reference rewards below each boundary of the sorted list
    below = np.concatenate(([0.0], np.cumsum(selection_weights(theirs, reference.size))))
    below[-1] = 1.0
    mine_sorted = np.sort(policy)
    beaten = below[np.searchsorted(ordered, mine_sorted, side="left")]
    beaten_or_tied = below[np.searchsorted(ordered, mine_sorted, side="right")]
    won = selection_weights(mine, policy.size) @ (beaten + beaten_or_tied) / 2
    return min(float(won), 1.0)  # the weights sum to 1 up to rounding


@lru_cache(maxsize=512)
def selection_weights(procedure: Procedure, m: int) -> NDArray[np.float64]:
    r"""Return how likely each of ``m`` sorted draws is the one a procedure serves.

    The k-th best of a random ``n`` of ``m`` draws is the i-th smallest with probability

    .. math:: w_i = \binom{i-1}{n-k} \binom{m-i}{k-1} \Big/ \binom{m}{n};

    for best-of-N this is C(i-1, N-1) / C(m, N), and a mixture averages its parts' weights.

    Parameters
    ----------
    procedure : Procedure
        Inference-time procedure.
    m : int
        Number of draws; at least as many as the procedure looks at.

    Returns
    -------
    (m,) ndarray of float64
        Probabilities from the smallest draw to the largest, summing to 1; read-only.

    Examples
    --------
    >>> selection_weights(parse_procedure("best_of_2"), 4).round(4)
    array([0.    , 0.1667, 0.3333, 0.5   ])
    """
    total = np.zeros(m)
    for share, k, n in procedure.order_statistics:
        subsets = math.comb(m, n)
        # integers until the last division, so that no binomial overflows or loses digits
        counts = (math.comb(i, n - k) * math.comb(m - 1 - i, k - 1) for i in range(m))
        total += share * np.array([count / subsets for count in counts])
    total.setflags(write=False)
    return total


def checked_rows(name: str, rows: Rows) -> list[NDArray[np.float64]]:
    """Return one float64 array a prompt.

    Parameters
    ----------
    name : str
        What errors call the numbers.
    rows : (n_prompts, m) array_like, or one sequence a prompt
        Finite numbers; prompts may have different numbers of draws.

    Returns
    -------
    list of (m,) ndarray
        The rows.

    Raises
    ------
    ValueError
        If there is no prompt, a prompt has no draw, or a number is not finite.
    """
    checked = [check_finite(f"{name}[{i}]", row, ndim=1) for i, row in enumerate(rows)]
    if not checked:
        raise ValueError(f"{name} must hold at least one prompt; got 0.")
    for i, row in enumerate(checked):
        if row.size == 0:
            raise ValueError(f"{name} must hold at least one draw a prompt; got 0 at row {i}.")
    return checked


def _both(
    procedure: str | Procedure, against: str | Procedure | None
) -> tuple[Procedure, Procedure]:
    """Return the procedures of the policy's and of the reference's side."""
    mine = parse_procedure(procedure)
    return mine, mine if against is None else parse_procedure(against)


def untrained_win_rate(procedure: str | Procedure, against: str | Procedure | None = None) -> float:
    """Return the win rate of the reference policy itself, by theory.

    Parameters
    ----------
    procedure : str or Procedure
        Inference-time procedure.
    against : str or Procedure, optional
        Procedure on the other side, where it is another one.

    Returns
    -------
    float
        1/2 if the procedures are equal.

    Examples
    --------
    >>> round(untrained_win_rate("best_of_4", against="single_draw"), 12)
    0.8
    """
    mine, theirs = _both(procedure, against)
    if mine == theirs:
        return 0.5
    lost, _ = integrate.quad(lambda u: float(mine.distortion(u) * theirs.density(u)), 0, 1)
    return float(1 - lost)
