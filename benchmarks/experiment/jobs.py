"""Cells one after the other, or several at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from experiment.cells import JUDGES, Bench
from experiment.settings import Cell

# a method of the bench and what it is called with
Task = tuple[str, tuple[Any, ...]]


def run_cells(bench: Bench, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, bool]]:
    """Yield each cell when it has ended, and whether it could be run.

    Parameters
    ----------
    bench : Bench
        The experiment.
    cells : sequence of Cell
        What is left to run.
    jobs : int
        Processes. On a processor two of one thread do more in an hour than one of two threads.
    """
    if jobs == 1 or not cells:
        yield from ((cell, run_cell(bench, cell)) for cell in cells)
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        for tasks in shared_stages(bench, cells):
            for done in [pool.submit(_call, bench, *task) for task in tasks]:
                done.result()
        ended = {pool.submit(run_cell, bench, cell): cell for cell in cells}
        yield from ((ended[done], done.result()) for done in as_completed(ended))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted worker would take the next cell


def run_cell(bench: Bench, cell: Cell) -> bool:
    """Run one cell and say what came out; what cannot be run is said too, and left open."""
    start = time.perf_counter()
    try:
        record = bench.run(cell)["training"]
    except (ValueError, FloatingPointError) as error:
        print(f"{cell.name}: not run: {error}", flush=True)
        return False
    procedure = bench.experiment.procedure
    rate, kl = record["win_rates"][procedure]["value"], record["kl"]["value"]
    seconds = time.perf_counter() - start
    print(f"{cell.name}: KL {kl:.3f}, {procedure} {rate:.3f}, {seconds:.0f} s", flush=True)
    return True


def shared_stages(bench: Bench, cells: Sequence[Cell]) -> list[list[Task]]:
    """List what several cells read, which one process has to make: stage by stage."""
    bench.write_inputs()
    draws = {}
    for experiment in map(bench.experiment.changed, cells):
        draws["train", experiment.draws, False] = experiment
        draws[experiment.where, experiment.held_out_draws, True] = experiment
    drawn = [(split, experiment, measured) for (split, _, measured), experiment in draws.items()]
    models: list[Task] = [("reward_model", (judge,)) for judge in JUDGES]
    made: list[Task] = [("reference_draws", each) for each in drawn]
    scored: list[Task] = [
        ("scored_reference", (judge, *each))
        for each in drawn
        for judge in (JUDGES if each[2] else JUDGES[:1])
    ]
    # the draws to train on take longest, so they come first
    return [[made[0], *models, *made[1:]], scored]


def _call(bench: Bench, name: str, arguments: tuple[Any, ...]) -> None:
    """Make what stays on disk; what is returned there would be copied between processes."""
    getattr(bench, name)(*arguments)
