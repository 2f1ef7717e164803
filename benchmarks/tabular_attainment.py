"""How near training comes to the exact optimum of a model that can be enumerated.

Per loss and procedure, with the functions of the test: exact labels (share of the possible gain in
win rate - beta KL over the reference), draws as groups and as pairs (share of the possible value),
and hard-label DPO over beta (share of the gain in win rate possible at its own KL). A finished cell
is not repeated. Usage: python benchmarks/tabular_attainment.py
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path

from recording import RESULTS, append_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tabular

NAME = "tabular_attainment"
EXACT, GROUPS, PAIRS, HARD = "exact labels", "drawn groups", "drawn pairs", "hard labels"


def cells() -> list[tuple[str, str, str, float]]:
    """List data, loss, procedure and the loss's number: anchor, or beta of DPO."""
    made = [(EXACT, loss, p, anchor) for loss, anchor in tabular.FITS for p in tabular.BETAS]
    made += [
        (d, loss, p, 0.0) for d in (GROUPS, PAIRS) for loss in tabular.LOSSES for p in tabular.BETAS
    ]
    return made + [(HARD, "dpo", p, beta) for p in tabular.BETAS for beta in tabular.HARD_BETAS]


def compute(data: str, loss: str, procedure: str, number: float) -> tuple[float, float]:
    """Train one cell; its share, and for DPO the KL it paid."""
    with tempfile.TemporaryDirectory() as folder:
        if data == EXACT:
            return tabular.exact_share(folder, loss, number, procedure), 0.0
        if data == HARD:
            return tabular.hard_label_share(folder, number, procedure, steps=200)
        return tabular.drawn_share(folder, loss, data.split()[1], procedure), 0.0


def finished() -> dict[tuple[str, str, str, float], float]:
    """Read the cells that are there."""
    path = RESULTS / f"{NAME}.csv"
    rows = csv.DictReader(path.open(newline="")) if path.exists() else []
    return {
        (r["data"], r["loss"], r["procedure"], float(r["number"])): float(r["share"]) for r in rows
    }


def main() -> None:
    """Compute what is missing, then print the table."""
    for cell in cells():
        if cell not in finished():
            share, kl = compute(*cell)
            row = dict(zip(("data", "loss", "procedure", "number"), cell, strict=True))
            append_rows(NAME, [row | {"share": round(share, 6), "kl": round(kl, 4)}])
    found = finished()
    print(f"| data | loss | {' | '.join(tabular.BETAS)} |\n|---|---|---|---|---|")
    kinds = dict.fromkeys((data, loss, number) for data, loss, _, number in cells())
    for data, loss, number in kinds:
        name = f"{loss}, beta {number:g}" if data == HARD else loss + ", anchored" * (number > 0)
        shares = [f"{100 * found[data, loss, p, number]:.2f} %" for p in tabular.BETAS]
        print(f"| {data} | {name} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
