"""How far win rate, KL and F of the exact optimum are from 50-digit arithmetic.

The reference is the one of tests/oracle/test_theory_mpmath.py, another method altogether, at all
points of that test. F is compared at eight calibrated rewards from 0.001 to 0.999.

Usage: python benchmarks/theory_accuracy.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mpmath import mp
from recording import append_rows

from ctrl_dpo import optimal_policy

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "oracle"))
import test_theory_mpmath as oracle

oracle.ORDER = oracle.DIGITS = 50

Exact = tuple[object, object, list[object]]  # win rate, KL and F


def references() -> Iterator[tuple[str, str, str, Exact]]:
    """Yield procedure, procedure of the reference policy, beta and the 50-digit optimum."""
    for m, n in oracle.PAIRS:
        for word in ("best", "worst"):
            for beta in oracle.BETAS:
                exact = oracle.optimum(m, n, word == "best", beta)
                yield f"{word}_of_{m}", f"{word}_of_{n}", beta, exact
    for procedure, against, beta in oracle.OTHERS:
        start = float(optimal_policy(procedure, float(beta), against).log_density(0.0))
        yield procedure, against, beta, oracle.shot_optimum(procedure, against, beta, start)


def main() -> None:
    """Print the errors of every point and the worst, and append them to the results."""
    rows = []
    with mp.workdps(oracle.DIGITS + 5):
        for procedure, against, beta, (win_rate, kl, cdf) in references():
            policy = optimal_policy(procedure, float(beta), against)
            errors = {
                "error_win_rate": abs(policy.win_rate - win_rate),
                "error_kl": abs(policy.kl - kl),
                "error_cdf": np.abs(policy.cdf(oracle.GRID) - cdf).max(),
            }
            row = {"procedure": procedure, "against": against, "beta": beta}
            rows.append(row | {name: f"{float(error):.1e}" for name, error in errors.items()})
            print(" ".join(rows[-1].values()))
    for name in ("error_win_rate", "error_kl", "error_cdf"):
        worst = max(rows, key=lambda row: float(row[name]))
        print(f"worst of {len(rows)} points, {name}: {worst}")
    append_rows("theory_accuracy", rows)


if __name__ == "__main__":
    main()
