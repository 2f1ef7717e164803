"""What one changed setting does to what is learned: paired with the same policy unchanged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ctrl_dpo.measures.tables import cell as text_of
from ctrl_dpo.measures.tables import table
from experiment.cells import JUDGES
from experiment.learned import learned_share
from experiment.results import Record, changes_of, curve_of, per_prompt
from experiment.settings import Experiment

Change = tuple[str, str, float, str]


def changed_rows(experiment: Experiment, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Compare each ablation with its unchanged policies of the same seeds and prompts."""
    seeds: dict[Change, dict[int, Record]] = defaultdict(dict)
    for record in records:
        cell, text = record["cell"], changes_of(record)
        if "where" not in dict(cell["changes"]):
            ablation = cell["ablation"] if text else ""
            seeds[ablation, cell["method"], cell["strength"], text][cell["seed"]] = record
    rows = []
    for (ablation, method, strength, text), changed in sorted(seeds.items()):
        unchanged = seeds.get(("", method, strength, ""), {})
        if ablation and (both := sorted(changed.keys() & unchanged.keys())):
            pair = [[of[seed] for seed in both] for of in (changed, unchanged)]
            change = {"ablation": ablation, "method": method, "strength": strength, "changes": text}
            rows += [
                {"task": experiment.task, **change, "seeds": len(both), "judge": judge}
                | _shares(pair, judge, experiment.procedure)
                for judge in JUDGES
            ]
    return rows


def _shares(pair: Sequence[Sequence[Record]], judge: str, procedure: str) -> dict[str, Any]:
    """Return the learned share of changed policies, and less that of unchanged ones."""
    points = [[per_prompt(record, judge, procedure) for record in records] for records in pair]
    both = [curve_of({0: seeds}) for seeds in points]
    return {
        "r2": learned_share(both[:1], procedure),
        "changed_minus_unchanged": learned_share(both, procedure),
    }


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows of the training reward as a Markdown table."""
    lines = [
        [
            f"{row['method']} {row['strength']:g}: {row['changes']}",
            str(row["seeds"]),
            text_of(row["r2"], "{:.3f}"),
            text_of(row["changed_minus_unchanged"], "{:+.3f}"),
        ]
        for row in rows
        if row["judge"] == JUDGES[0]
    ]
    return table(["changed", "seeds", "r2", "minus unchanged"], lines)
