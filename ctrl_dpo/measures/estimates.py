"""Means over prompts with bootstrap intervals: the unit of every measured number is the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ctrl_dpo._validation import check_finite, check_integer

N_RESAMPLES = 9999
_BATCH_ENTRIES = 4_000_000  # resampled values held at once: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its interval.

    Parameters
    ----------
    value : float
        Mean over prompts, each prompt with equal weight.
    low, high : float
        Ends of the bootstrap interval over prompts.
    standard_error : float
        Sample standard deviation over prompts divided by the root of their number: draws of one
        prompt are dependent, so the prompt is the cluster.
    per_prompt : (n_prompts,) ndarray
        What was averaged.
    """

    value: float
    low: float
    high: float
    standard_error: float
    per_prompt: NDArray[np.float64] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain numbers and lists, ready for JSON."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "standard_error": self.standard_error,
            "per_prompt": self.per_prompt.tolist(),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Estimate:
        """Read back what :meth:`as_dict` wrote.

        Parameters
        ----------
        fields : mapping
            All five fields.

        Returns
        -------
        Estimate
            Equal to the one written.
        """
        return cls(**{**fields, "per_prompt": np.asarray(fields["per_prompt"], dtype=np.float64)})


def mean_over_prompts(
    per_prompt: ArrayLike, confidence: float = 0.95, seed: int = 0, name: str = "per_prompt"
) -> Estimate:
    r"""Average a number over prompts, with a bias-corrected accelerated bootstrap interval.

    .. math::

        \bar v = \frac1n \sum_{i=1}^{n} v_i, \qquad
        \text{level used} = 1 - 2\,\Phi\!\Big(-\sqrt{\tfrac{n}{n-1}}\; t_{n-1,\,(1+c)/2}\Big)

    Parameters
    ----------
    per_prompt : (n_prompts,) array_like
        One number a prompt, any unit; at least two prompts.
    confidence : float
        Nominal coverage ``c`` in (0, 1).
    seed : int
        Seed of the resampling.
    name : str
        What errors call the numbers.

    Returns
    -------
    Estimate
        Mean, interval, standard error and the numbers averaged.

    Raises
    ------
    ValueError
        If there are fewer than two prompts, a number is not finite, or ``confidence`` is not
        in (0, 1).

    Notes
    -----
    Resampling ``n`` prompts understates the spread of a mean by ``sqrt((n - 1) / n)`` and uses a
    normal in place of a Student quantile; the level is widened by both factors [2]_. In simulations
    of win rates with 32 prompts of 16 draws the plain percentile interval covered 92.1 to 95.0 % at
    nominal 95 %, plain BCa 92.8 to 95.4 %, and this one 94.3 to 96.2 %; with 128 prompts of 32
    draws it covered 94.0 to 95.8 % (``benchmarks/interval_coverage.py``). With fewer than 6 prompts
    it cannot cover 95 %, see :func:`largest_coverage`. Numbers that are all equal have an interval
    of width zero.

    References
    ----------
    .. [1] Efron, "Better bootstrap confidence intervals", JASA 82 (1987).
    .. [2] Hesterberg, "What teachers should know about the bootstrap", The American Statistician
       69 (2015), section 5.3.

    Examples
    --------
    >>> estimate = mean_over_prompts([0.2, 0.4, 0.6, 0.8])
    >>> round(estimate.value, 3), round(estimate.standard_error, 4)
    (0.5, 0.1291)
    >>> 0.1 < estimate.low < 0.4 and 0.6 < estimate.high < 0.9
    True
    """
    values = check_finite(name, per_prompt, ndim=1)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence!r}.")
    n = values.size
    if n < 2:
        raise ValueError(f"{name} must cover >= 2 prompts to have an interval; got {n}.")
    # powers of two: exact, and squares of deviations neither overflow nor vanish in any unit
    exponent = int(np.frexp(np.abs(values).max())[1])
    unit = np.ldexp(values, -exponent)
    mean = float(unit.mean())
    spread = int(np.frexp(np.abs(unit - mean).max())[1])
    low, high = bootstrap_interval((np.ldexp(unit - mean, -spread),), _mean, confidence, seed)
    return Estimate(
        value=math.ldexp(mean, exponent),
        low=math.ldexp(mean + math.ldexp(low, spread), exponent),
        high=math.ldexp(mean + math.ldexp(high, spread), exponent),
        standard_error=math.ldexp(float(np.std(unit, ddof=1)) / math.sqrt(n), exponent),
        per_prompt=values,
    )


def largest_coverage(n: int) -> float:
    r"""Return how often a bootstrap interval over ``n`` prompts can cover the mean at most.

    .. math:: 1 - 2^{1 - n}

    Parameters
    ----------
    n : int
        Number of prompts.

    Returns
    -------
    float
        A probability, for numbers with a symmetric continuous distribution: no mean of resamples
        leaves the range of the numbers, and all of them lie on one side of their expectation with
        probability :math:`2 \cdot 2^{-n}`.

    Examples
    --------
    >>> [largest_coverage(n) for n in (2, 3, 4, 5, 6)]
    [0.5, 0.75, 0.875, 0.9375, 0.96875]
    """
    return 1 - 2.0 ** (1 - n)


def paired_difference(
    first: Estimate, second: Estimate, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Estimate first minus second over the same prompts, in the same order.

    Prompts differ more than policies do, so the interval of the difference is narrower than the
    two intervals suggest.

    Parameters
    ----------
    first, second : Estimate
        Two results of one measure, for instance of :func:`~ctrl_dpo.evaluate.inference_win_rate`
        for two policies against the same reference draws.
    confidence : float
        Nominal coverage in (0, 1).
    seed : int
        Seed of the resampling.

    Returns
    -------
    Estimate
        Mean difference; an interval that excludes 0 tells the two apart.

    Raises
    ------
    ValueError
        If the two do not have the same number of prompts.

    Examples
    --------
    >>> a, b = mean_over_prompts([0.6, 0.9, 0.3]), mean_over_prompts([0.5, 0.8, 0.2])
    >>> round(paired_difference(a, b).value, 3)
    0.1
    """
    n_first, n_second = first.per_prompt.size, second.per_prompt.size
    if n_first != n_second:
        raise ValueError(
            f"first and second must hold the same prompts; got {n_first} and {n_second} prompts."
        )
    return mean_over_prompts(first.per_prompt - second.per_prompt, confidence, seed, "difference")


def bootstrap_interval(
    samples: tuple[NDArray[np.float64], ...], statistic: Any, confidence: float, seed: int
) -> tuple[float, float]:
    """Return the BCa interval of a statistic of paired samples, one entry a prompt in each.

    Parameters
    ----------
    samples : tuple of (n_prompts,) ndarray
        Numbers resampled together, by prompt.
    statistic : callable
        Takes the samples and ``axis``, reduces that axis.
    confidence : float
        Nominal coverage in (0, 1).
    seed : int
        Seed of the resampling.

    Returns
    -------
    tuple of float
        Low and high end.
    """
    check_integer("seed", seed, 0)
    n = samples[0].size
    left_out = [statistic(*(np.delete(sample, i) for sample in samples), axis=-1) for i in range(n)]
    if np.ptp(left_out) == 0 or all(np.ptp(sample) == 0 for sample in samples):
        point = float(statistic(*samples, axis=-1))
        return point, point  # BCa divides by the spread of the jackknife
    quantile = stats.t.ppf((1 + confidence) / 2, n - 1)
    # capped where two prompts round it to 1: the quantiles are then the extreme resamples anyway
    level = min(1 - 2 * stats.norm.cdf(-math.sqrt(n / (n - 1)) * quantile), 1 - 1e-9)
    interval = stats.bootstrap(
        samples,
        statistic,
        n_resamples=N_RESAMPLES,
        batch=max(1, _BATCH_ENTRIES // n),
        vectorized=True,
        paired=True,
        axis=-1,
        confidence_level=float(level),
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _mean(values: NDArray[np.float64], axis: int) -> Any:
    """Average along an axis, in the form that the bootstrap calls."""
    return values.mean(axis=axis)
