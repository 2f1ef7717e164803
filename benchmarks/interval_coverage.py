"""How often do the intervals hold the truth? Nominal 95 % must cover 93 to 97 %.

    python benchmarks/interval_coverage.py [--runs 1000]

Policies whose strength differs from prompt to prompt, with known expected win rates: the CDF of the
calibrated reward on a prompt is u^a, so that best-of-N on both sides wins a / (1 + a), whatever N;
worst-of-N is its mirror image. `log a` is normal, or skewed toward strong prompts. Log-ratios are
exponential about the prompt's own mean, which has a gamma law. Three other intervals are computed
from the same numbers: the percentile bootstrap, Student's t, and BCa at its nominal level.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from experiment.learned import learned_share, share_of
from numpy.typing import NDArray
from recording import append_rows
from scipy import stats

from ctrl_dpo._validation import check_choice
from ctrl_dpo.evaluate import (
    attainment,
    attainment_interval,
    inference_win_rate,
    kl_divergence,
    paired_difference,
)
from ctrl_dpo.measures.equal_kl import Curve, difference_at_kl
from ctrl_dpo.measures.estimates import Estimate
from ctrl_dpo.measures.tables import table

FloatArray = NDArray[np.float64]

CENTRE, SPREAD, ADVANTAGE = 0.8, 0.7, 0.3
RESAMPLES = 1999
PROCEDURES = ("single_draw", "best_of_4", "best_of_8", "worst_of_4")


def log_strengths(n: int, skew: bool, rng: np.random.Generator) -> FloatArray:
    """Return the log-strength of each prompt; mean `CENTRE`, standard deviation `SPREAD`."""
    noise = rng.exponential(size=n) - 1 if skew else rng.normal(size=n)
    return CENTRE + SPREAD * noise


def expected(skew: bool, shift: float = 0.0) -> float:
    """Return the expected win rate of a / (1 + a) over prompts."""
    law = stats.expon(CENTRE - SPREAD, SPREAD) if skew else stats.norm(CENTRE, SPREAD)
    return float(law.expect(lambda x: 1 / (1 + np.exp(-(x + shift)))))


def rewards(log_a: FloatArray, draws: int, rng: np.random.Generator) -> FloatArray:
    """Return rewards of draws with CDF u^a."""
    return rng.random((log_a.size, draws)) ** np.exp(-log_a)[:, None]


def win_rate(procedure: str, n: int, draws: int, skew: bool, rng: np.random.Generator) -> Any:
    log_a = log_strengths(n, skew, rng)
    base = rng.random((n, draws))
    if procedure.startswith("worst"):
        found = inference_win_rate(-rewards(-log_a, draws, rng), -base, procedure)
    else:
        found = inference_win_rate(rewards(log_a, draws, rng), base, procedure)
    return found, expected(skew)


def kl(n: int, draws: int, skew: bool, rng: np.random.Generator) -> Any:
    means = rng.gamma(*((1.5, 1 / 1.5) if skew else (6.0, 1 / 6.0)), size=n)
    logratios = means[:, None] * (1 + 2 * (rng.exponential(size=(n, draws)) - 1))
    return kl_divergence(logratios, np.zeros_like(logratios)), 1.0


def difference(n: int, draws: int, skew: bool, rng: np.random.Generator) -> Any:
    log_a = log_strengths(n, skew, rng)
    base = rng.random((n, draws))
    pair = [
        inference_win_rate(rewards(log_a + s, draws, rng), base, "best_of_4")
        for s in (ADVANTAGE, 0.0)
    ]
    return paired_difference(*pair), expected(skew, ADVANTAGE) - expected(skew)


def equal_kl(n: int, draws: int, skew: bool, rng: np.random.Generator) -> Any:
    """Two methods of two strengths each; the first method wins more at every KL."""
    log_a = log_strengths(n, skew, rng)
    base = rng.random((n, draws))
    made, truth = [], []
    for advantage in (ADVANTAGE, 0.0):
        shifts, budgets = (advantage - 0.5, advantage + 0.5), (0.6, 1.7)
        rates = [
            inference_win_rate(rewards(log_a + s, draws, rng), base, "best_of_4").per_prompt
            for s in shifts
        ]
        kls = [b * rng.gamma(3.0, 1 / 3.0, size=n) for b in budgets]
        made.append(Curve(np.array(kls), np.array(rates)))
        truth.append(np.interp(1, np.sqrt(budgets), [expected(skew, s) for s in shifts]))
    return difference_at_kl(*made, kl=1.0, procedure="best_of_4"), truth[0] - truth[1]


def of_win_rate_and_kl(n: int, draws: int, skew: bool, rng: np.random.Generator) -> Any:
    """Return the estimates that attainment and learned share are made of, and what they expect."""
    rate, won = win_rate("best_of_4", n, draws, skew, rng)
    paid, spent = kl(n, draws, skew, rng)
    return rate, paid, won, spent


def attained(*sample: Any) -> Any:
    rate, paid, won, spent = of_win_rate_and_kl(*sample)
    return attainment_interval(rate, paid, "best_of_4"), attainment(won, spent, "best_of_4")


def learned(*sample: Any) -> Any:
    rate, paid, won, spent = of_win_rate_and_kl(*sample)
    curve = Curve(paid.per_prompt[None], rate.per_prompt[None])
    truth = share_of(np.array(won), np.array(spent), "best_of_4")
    return learned_share([curve], "best_of_4"), float(truth)


def others(values: FloatArray, seed: int) -> dict[str, tuple[float, float]]:
    """Return the intervals of a mean that are usual elsewhere."""
    found = {}
    for method in ("percentile", "BCa"):
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=RESAMPLES,
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
        found[method] = (interval.low, interval.high)
    error = stats.sem(values)
    found["t"] = stats.t.interval(0.95, values.size - 1, values.mean(), error)
    return found


def coverage(make: Callable[..., Any], n: int, draws: int, skew: bool, runs: int) -> dict[str, Any]:
    """Return the share of intervals that hold the truth."""
    rng = np.random.default_rng([n, draws, skew])
    held: dict[str, list[bool]] = {}
    for run in range(runs):
        found, truth = make(n, draws, skew, rng)
        if isinstance(found, Estimate):
            ends = {"ours": (found.low, found.high), **others(found.per_prompt, run)}
        else:
            ends = {"ours": (found["low"], found["high"])}
        for name, (low, high) in ends.items():
            held.setdefault(name, []).append(bool(low <= truth <= high))
    return {name: round(float(np.mean(hits)), 4) for name, hits in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--measures", nargs="*", help="only these")
    args = parser.parse_args()
    measures: dict[str, Callable[..., Any]] = {
        **{f"win rate, {p}": lambda *a, procedure=p: win_rate(procedure, *a) for p in PROCEDURES},
        "KL": kl,
        "paired difference": difference,
        "difference at equal KL": equal_kl,
        "attainment": attained,
        "learned share": learned,
    }
    for name in args.measures or ():
        check_choice("--measures", name, sorted(measures))
    chosen = [
        (name, make) for name, make in measures.items() if name in (args.measures or measures)
    ]
    rows = []
    sizes = ((32, 16), (64, 16), (128, 32))
    for (name, make), (n, draws), skew in itertools.product(chosen, sizes, (False, True)):
        found = coverage(make, n, draws, skew, args.runs)
        row = {"measure": name, "n_prompts": n, "n_draws": draws, "skew": skew, "runs": args.runs}
        row |= {m: found.get(m, "") for m in ("ours", "percentile", "BCa", "t")}
        rows.append(row)
        print(row, flush=True)
    print(table(list(rows[0]), [[str(v) for v in row.values()] for row in rows]))
    append_rows("interval_coverage", rows)


if __name__ == "__main__":
    main()
