"""Bound the attainment of a policy that has learned only a share of the reward.

    python benchmarks/attainment_bound.py

The model of `partial_fit.py` at several KLs: the largest win rate of a policy that knows a share
r2 of the reward, as a share of what the exact optimum gains at that KL, and the r2 that an
attainment of 0.6 or 0.85 needs, whatever the labels and the loss. For worst-of-N the bound is the
stationary point found there.
"""

from __future__ import annotations

import itertools

from partial_fit import PROCEDURES, PartialView
from recording import append_rows
from scipy import optimize

from ctrl_dpo.measures.attainment import attainment
from ctrl_dpo.measures.tables import table
from ctrl_dpo.theory.procedures import parse_procedure

KLS = (0.5, 1.0, 2.0, 4.0)
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)
WANTED = (0.6, 0.85)
LOOKED_AT = (0.01, 0.99)  # shares between which one that is needed is looked for


def largest_attainment(name: str, share: float, kl: float) -> float:
    """Return the attainment of the best policy found that knows so much of the reward."""
    return attainment(PartialView(share, parse_procedure(name)).bound(kl), kl, name)


def share_needed(name: str, wanted: float, kl: float) -> float:
    """Return the share of the reward that an attainment needs."""

    def missing(share: float) -> float:
        return largest_attainment(name, share, kl) - wanted

    return float(optimize.brentq(missing, *LOOKED_AT, xtol=1e-4))


def main() -> None:
    rows: list[dict[str, object]] = []
    for name, kl in itertools.product(PROCEDURES, KLS):
        row: dict[str, object] = {"procedure": name, "kl": kl}
        row |= {f"attainment at {s:g}": round(largest_attainment(name, s, kl), 3) for s in SHARES}
        row |= {f"r2 for {wanted:g}": round(share_needed(name, wanted, kl), 3) for wanted in WANTED}
        rows.append(row)
    append_rows("attainment_bound", rows)
    print(table(list(rows[0]), [[str(v) for v in row.values()] for row in rows]))


if __name__ == "__main__":
    main()
