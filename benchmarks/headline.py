"""Does training for best-of-N win when the model is used through best-of-N? At equal KL.

    python benchmarks/headline.py recipes/configs/headline_harmless.yaml --model MODEL --quick
    python benchmarks/headline.py recipes/configs/headline_harmless.yaml --model MODEL --only main

Trains two reward models, draws from the reference policy, and trains and measures one policy a cell
(method, strength, seed), all under `--runs`. A finished cell is never run again: stop it when you
like, and start it again. `--jobs 2` runs two cells at a time, which is faster on two cores.
`--quick` is the methods that matter most, one seed if the file does not say more; `--others` adds
the rest, `--seeds 0 1` a second seed. Each finished cell adds to `results/headline.csv`, to the
comparisons in `results/headline_equal_kl.csv` (win rates) and `results/headline_learned.csv` (share
of the reward that was learned), if it is an ablation to `results/headline_changed.csv` (that share
with and without the change), and to the figure. `--list` says what is done and what is not;
`--table` writes the results again without running anything. MODEL is a folder or a hub name, such
as HuggingFaceTB/SmolLM2-135M-Instruct; figures need `pip install -e '.[plots]'`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from experiment.cells import Bench, add_options, open_bench
from experiment.changes import changed_rows
from experiment.changes import page as changes_page
from experiment.jobs import run_cells
from experiment.results import (
    cell_rows,
    comparison,
    equal_kl_rows,
    figure,
    flat,
    learned,
    learned_rows,
    main_cells,
    policies,
)
from experiment.settings import Cell, Experiment
from recording import RESULTS, circumstances, merge_rows

from ctrl_dpo._validation import check_choice, check_integer
from ctrl_dpo.data.folders import read_record
from ctrl_dpo.measures.figure_style import matplotlib_or_remedy

_CELL = ("task", "ablation", "method", "strength", "seed", "changes", "n_train", "n_draws")
_POINT = ("task", "n_train", "n_prompts", "n_draws", "judge", "procedure", "kl", "method")
_SHARE = ("experiment", "judge", "method")
_CHANGE = ("experiment", "judge", "ablation", "method", "strength", "changes")


def write_results(bench: Bench, name: str) -> str:
    """Write rows, comparison and figure (of that name) of what is finished; return the tables."""
    experiment, records = bench.experiment, bench.finished()
    if not records:
        return "no cell is finished"
    merge_rows("headline", cell_rows(experiment, records, bench.accuracies), _CELL)
    here = circumstances()
    extra = {"experiment": name} | here
    parts = [policies(experiment, records)]
    if changed := changed_rows(experiment, records):
        merge_rows("headline_changed", flat(changed, extra), _CHANGE)
        parts.append(f"Learned share after a change:\n\n{changes_page(changed)}")
    compared = main_cells(records)
    if not compared:
        return "\n\n".join(parts)
    rows, shares = equal_kl_rows(experiment, compared), learned_rows(experiment, compared)
    merge_rows("headline_equal_kl", flat(rows, here), _POINT)
    merge_rows("headline_learned", flat(shares, extra), _SHARE)
    picture = figure(experiment, compared, RESULTS / f"{name}.png")
    parts += [
        f"{experiment.procedure} at a KL of {kl:g} nat:\n\n{comparison(experiment, rows, kl)}"
        for kl in experiment.kls
    ]
    share = f"Share of the reward that was learned:\n\n{learned(shares)}"
    return "\n\n".join([*parts, share, str(picture)])


def choose(experiment: Experiment, args: argparse.Namespace) -> list[Cell]:
    """Return the cells that were asked for; a name that no cell has is refused."""
    seeded = dataclasses.replace(experiment, seeds=tuple(args.seeds or experiment.seeds))
    cells = [c for c in seeded.cells() if args.others or c.method not in experiment.others]
    for method in args.methods or ():
        check_choice("--methods", method, sorted({cell.method for cell in cells}))
    if args.only is not None:
        check_choice("--only", args.only, sorted({cell.ablation for cell in cells}))
    return [
        cell
        for cell in cells
        if args.only in (None, cell.ablation) and cell.method in (args.methods or {cell.method})
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--others", action="store_true", help="also the file's `others`")
    parser.add_argument("--only", help="ablation to run: main, anchor, ...; all by default")
    parser.add_argument("--methods", nargs="*", help="only these methods")
    parser.add_argument("--seeds", nargs="*", type=int, help="these instead of the file's")
    parser.add_argument("--limit", type=int, help="stop after so many new cells")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, a process each")
    parser.add_argument("--list", action="store_true", help="only say what is done")
    parser.add_argument("--table", action="store_true", help="only write the results")
    args = parser.parse_args()
    check_integer("--jobs", args.jobs, 1)
    if args.limit is not None:
        check_integer("--limit", args.limit, 1)
    bench = open_bench(args)
    name = args.experiment.stem + ("_quick" if args.quick else "")
    chosen = choose(bench.experiment, args)
    folders = {cell: bench.folder / "cells" / cell.name for cell in chosen}
    left = [c for c, path in folders.items() if not read_record(path).get("complete")]
    print(f"{bench.folder.name}: {len(chosen) - len(left)} of {len(chosen)} cells done", flush=True)
    if args.list:
        print("".join(f"{'open' if c in left else 'done'} {c.name}\n" for c in chosen), end="")
        return
    matplotlib_or_remedy()  # before hours of work, not after them
    page, failed, ran = "", [], 0
    for cell, done in run_cells(bench, [] if args.table else left, args.jobs):
        if done:
            page, ran = write_results(bench, name), ran + 1
        else:
            failed.append(cell.name)
        if ran == args.limit:
            break
    print(page or write_results(bench, name))
    if failed:
        sys.exit(f"not run: {', '.join(failed)}")


if __name__ == "__main__":
    main()
