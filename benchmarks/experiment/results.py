"""Records of cells -> rows, the comparison at equal KL, and the figure."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_dpo.measures import plots
from ctrl_dpo.measures.equal_kl import Curve, difference_at_kl, win_rate_at_kl
from ctrl_dpo.measures.figure_style import (
    COLOURS,
    DASHES,
    DPI,
    MARKERS,
    legend_below,
    panels,
    styled,
)
from ctrl_dpo.measures.planning import frontier_rows
from ctrl_dpo.measures.tables import cell as text_of
from ctrl_dpo.measures.tables import table
from experiment.cells import JUDGES
from experiment.learned import learned_share
from experiment.settings import Experiment

Record = Mapping[str, Any]
_PIECES = 20  # straight pieces of a line between two policies
OURS = "optimal"
_INTERVALS = ("win_rate", "r2", "ours_minus_method", "changed_minus_unchanged")
SHOWN = ("single_draw", "best_of_4", "best_of_8", "worst_of_4")


def cell_rows(
    experiment: Experiment, records: Iterable[Record], accuracies: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return one row a cell: win rates under both reward models, KL, attainment, length."""
    served, rows = experiment.procedure, []
    for record in records:
        cell, measured = record["cell"], record["training"]
        row = {
            "task": experiment.task,
            "ablation": cell["ablation"],
            "method": cell["method"],
            "strength": cell["strength"],
            "seed": cell["seed"],
            "changes": changes_of(record),
            "n_train": record["n_train"],
            "n_prompts": measured["n_prompts"],
            "n_draws": measured["n_draws"],
            **_interval("kl", measured["kl"]),
        }
        for judge in JUDGES:
            for procedure, rate in record[judge]["win_rates"].items():
                row |= _interval(f"{judge} {procedure}", rate)
            curve = Curve(*(np.array([v]) for v in per_prompt(record, judge, served)))
            share = learned_share([curve], served)
            row |= _interval(f"{judge} r2", share)
            row[f"{judge} accuracy"] = accuracies.get(judge, "")
        for procedure, share in measured["attainment"].items():
            row |= _interval(f"attainment {procedure}", share)
        row["length"] = round(measured["length"]["value"], 2)
        row["reference_length"] = round(measured["reference_length"]["value"], 2)
        row |= {f"{k}_seconds": round(v) for k, v in record["seconds"].items()}
        rows.append(row | record["circumstances"])
    return rows


def changes_of(record: Record) -> str:
    """Write the settings that a cell changes."""
    return ";".join(f"{key}={value}" for key, value in record["cell"]["changes"])


def compared_as(record: Record) -> str:
    """Return the method's name in comparisons, with what a cell changes: dpo as_pairs=all."""
    return " ".join(filter(None, (record["cell"]["method"], changes_of(record))))


def _interval(name: str, numbers: Mapping[str, float] | None) -> dict[str, Any]:
    """Lay an estimate out as three columns, empty where there is none."""
    ends = {"": "value", " low": "low", " high": "high"}
    return {
        name + end: "" if numbers is None else round(numbers[key], 4) for end, key in ends.items()
    }


def per_prompt(record: Record, judge: str, procedure: str) -> list[list[float]]:
    """Return a policy's KL and its win rate on each prompt."""
    pair = record[judge]["kl"], record[judge]["win_rates"][procedure]
    return [numbers["per_prompt"] for numbers in pair]


def learned_rows(experiment: Experiment, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Compare how much of each reward the methods' policies have learned, on average."""
    rows, data = [], _data(experiment, records)
    procedure = experiment.procedure
    for judge in JUDGES:
        found = curves(records, judge, procedure)
        for method, curve in found.items():
            both = [found[OURS], curve] if method != OURS and OURS in found else None
            rows.append(
                {
                    **data[method],
                    "judge": judge,
                    "procedure": procedure,
                    "method": method,
                    "strengths": len(curve.kls),
                    "r2": learned_share([curve], procedure),
                    "ours_minus_method": None if both is None else learned_share(both, procedure),
                }
            )
    return rows


def learned(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write what :func:`learned_rows` returns as a Markdown table."""
    by = {(row["method"], row["judge"]): row for row in rows}
    lines = []
    for method in dict.fromkeys(method for method, _ in by):
        line = [method, str(by[method, JUDGES[0]]["strengths"])]
        for judge in JUDGES:
            row = by[method, judge]
            line.append(text_of(row["r2"], "{:.3f}"))
            line.append(text_of(row["ours_minus_method"], "{:+.3f}"))
        lines.append(line)
    heads = (f"r2, {judge} reward" for judge in JUDGES)
    columns = itertools.chain.from_iterable((head, f"{OURS} minus method") for head in heads)
    return table(["method", "strengths", *columns], lines)


def _data(experiment: Experiment, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return what the rows of each method in a comparison say of their data."""
    seeds: dict[str, set[int]] = defaultdict(set)
    for record in records:
        seeds[compared_as(record)].add(record["cell"]["seed"])
    size = {name: records[0]["training"][name] for name in ("n_prompts", "n_draws")}
    of = {"task": experiment.task, "n_train": records[0]["n_train"]}
    return {method: {**of, "seeds": len(found), **size} for method, found in seeds.items()}


def main_cells(records: Iterable[Record]) -> list[Record]:
    """Return the records of the comparison itself: ablations are compared with their method."""
    return [record for record in records if record["cell"]["ablation"] == "main"]


def curves(records: Iterable[Record], judge: str, procedure: str) -> dict[str, Curve]:
    """Return the curve of each method, seeds of a strength averaged."""
    points: dict[str, dict[float, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        cell, found = record["cell"], per_prompt(record, judge, procedure)
        points[compared_as(record)][cell["strength"]].append(found)
    return {method: curve_of(strengths) for method, strengths in points.items()}


def curve_of(settings: Mapping[Any, Sequence[Any]]) -> Curve:
    """Return the curve through a method's settings, each a list of KLs and win rates by seed."""
    means = np.array([np.mean(seeds, axis=0) for _, seeds in sorted(settings.items())])
    return Curve(means[:, 0], means[:, 1])


def equal_kl_rows(experiment: Experiment, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Compare every method with ours at equal measured KL, by procedure and reward model."""
    rows, data = [], _data(experiment, records)
    for judge in JUDGES:
        for procedure in experiment.measured:
            found = curves(records, judge, procedure)
            for kl in experiment.kls:
                for method, curve in found.items():
                    rate = win_rate_at_kl(curve, kl, procedure)
                    less = None
                    if method != OURS and OURS in found:
                        less = difference_at_kl(found[OURS], curve, kl, procedure)
                    rows.append(
                        {
                            **data[method],
                            "judge": judge,
                            "procedure": procedure,
                            "kl": kl,
                            "method": method,
                            "win_rate": rate,
                            "ours_minus_method": less,
                            "reach": curve.reach,
                        }
                    )
    return rows


def flat(rows: Iterable[Mapping[str, Any]], extra: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay intervals out as columns, for a file."""
    made = []
    for row in rows:
        line: dict[str, Any] = {}
        for name, found in row.items():
            if name in _INTERVALS:
                ends = found or dict.fromkeys(("value", "low", "high"), "")
                line |= {f"{name} {end}": v and round(v, 4) for end, v in ends.items()}
            else:
                line[name] = round(found, 4) if isinstance(found, float) else found
        made.append(line | extra)
    return made


def comparison(experiment: Experiment, rows: Sequence[Mapping[str, Any]], kl: float) -> str:
    """Write the comparison at one KL for the procedure trained for, as a Markdown table."""
    chosen = {
        (row["method"], row["judge"]): row
        for row in rows
        if row["kl"] == kl and row["procedure"] == experiment.procedure
    }
    lines = []
    for method in dict.fromkeys(method for method, _ in chosen):
        cells = []
        for judge in JUDGES:
            row = chosen[method, judge]
            cells += [
                text_of(row["win_rate"], "{:.1%}"),
                text_of(row["ours_minus_method"], "{:+.1%}"),
            ]
        lines.append([method, f"{chosen[method, JUDGES[0]]['reach']:.2f}", *cells])
    header = ["method", "largest KL"]
    for judge in JUDGES:
        header += [f"win rate, {judge} reward", f"{OURS} minus method"]
    return table(header, lines)


def policies(experiment: Experiment, records: Iterable[Record]) -> str:
    """Write what each policy of the main comparison paid and won, as a Markdown table."""
    procedures = [p for p in SHOWN if p in experiment.measured]
    lines = []
    for record in records:
        cell, measured = record["cell"], record[JUDGES[0]]
        name = f"{compared_as(record)} {cell['strength']:g}, seed {cell['seed']}"
        if cell["ablation"] != "main":
            name += f" ({cell['ablation']})"
        share = measured["attainment"][experiment.procedure]
        lines.append(
            [
                name,
                text_of(measured["kl"], "{:.2f}"),
                *(text_of(measured["win_rates"][p], "{:.1%}") for p in procedures),
                text_of(share, "{:.2f}"),
                text_of(measured["length"], "{:.1f}"),
            ]
        )
    names = [plots.words(p) for p in procedures]
    return table(["policy", "KL (nats)", *names, "attainment", "length (tokens)"], lines)


def figure(experiment: Experiment, records: Sequence[Record], path: Path) -> Path:
    """Draw win rate against KL for every method under the exact frontier."""
    procedures = [p for p in SHOWN if p in experiment.measured]
    drawn = {p: curves(records, JUDGES[0], p) for p in procedures}
    end = 1.05 * max(curve.reach for curve in drawn[procedures[0]].values())
    kls = (end * np.linspace(0.02, 1, 40) ** 2).tolist()
    rows = [r for r in frontier_rows(procedures, kls) if r["transformation"] == "optimal"]
    made = _curve_figure(rows, drawn, f"{experiment.task}: win rate at the KL paid for it")
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=DPI)
    return path


def _joined(curve: Curve) -> tuple[Any, Any]:
    """Join a method's policies as they are compared: win rates linear in the root of the KL."""
    points = np.array(
        [(0, 0.5), *zip(np.sqrt(curve.kls.mean(1)), curve.win_rates.mean(1), strict=True)]
    )
    roots, rates = points[np.argsort(points[:, 0])].T
    places = np.arange(len(roots))
    fine = np.linspace(0, len(roots) - 1, (len(roots) - 1) * _PIECES + 1)
    return np.interp(fine, places, roots) ** 2, np.interp(fine, places, rates)


@styled
def _curve_figure(
    rows: Sequence[Mapping[str, Any]], drawn: Mapping[str, Mapping[str, Curve]], title: str
) -> Any:
    """Draw one panel a procedure: the frontier, and each method's strengths joined by a line."""
    made, axes = panels(len(drawn), title, share_y=True)
    for axis, (procedure, found) in zip(axes, drawn.items(), strict=True):
        frontier = [(r["kl"], 100 * r["win_rate"]) for r in rows if r["procedure"] == procedure]
        limit = "exact optimum (upper limit)"
        axis.plot(*zip(*frontier, strict=True), color="0.6", linewidth=4, label=limit)
        for number, (method, curve) in enumerate(found.items()):
            kls, rates = _joined(curve)
            axis.plot(
                kls,
                100 * rates,
                marker=MARKERS[number % len(MARKERS)],
                markevery=_PIECES,
                color=COLOURS[number % len(COLOURS)],
                linestyle=DASHES[number // len(COLOURS)],
                label=method,
            )
        axis.set_title(f"used through {plots.words(procedure)}")
        axis.set_xlabel("KL from the reference policy\n(nats per response)")
    axes[0].set_ylabel("inference-time win rate\nagainst the reference policy (%)")
    legend_below(made, axes)
    return made
