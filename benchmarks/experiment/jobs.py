"""Cells one after the other, or several at a time, each in a process of its own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch

from experiment.cells import JUDGES, Bench
from experiment.settings import Cell, Experiment

# a method of the bench and what it is called with
Task = tuple[str, tuple[Any, ...]]
Item = TypeVar("Item")
Result = TypeVar("Result")
# what concerns one cell or stage: others can go on
_OWN = (ValueError, FloatingPointError)


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
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=_end_with_parent) as pool:
        for tasks in shared_stages(bench, cells):
            for _ in in_turn(pool, jobs, partial(_make, bench), tasks):
                pass
        yield from in_turn(pool, jobs, partial(run_cell, bench), cells)


def in_turn(
    pool: Executor, jobs: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, as they end.

    No more are submitted than run: what waits in a pool's queue is begun even after an error or an
    interruption.
    """
    left = iter(items)
    running: dict[Future[Result], Item] = {}
    ended: list[tuple[Item, Result]] = []
    while True:
        for item in itertools.islice(left, jobs - len(running)):
            running[pool.submit(function, item)] = item
        yield from ended
        if not running:
            return
        done = wait(running, return_when=FIRST_COMPLETED).done
        ended = [(running.pop(future), future.result()) for future in done]


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, however that was."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)  # whatever is written is renamed into place, so nothing is left half

    threading.Thread(target=watch, daemon=True).start()


def run_cell(bench: Bench, cell: Cell) -> bool:
    """Run one cell and say what came out; what cannot be run is said too, and left open."""
    start = time.perf_counter()
    try:
        record = bench.run(cell)["training"]
    except _OWN as error:
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
    draws: dict[tuple[str, int, bool], Experiment] = {}
    for experiment in map(bench.experiment.changed, cells):
        draws.setdefault(("train", experiment.draws, False), experiment)
        draws.setdefault((experiment.where, experiment.held_out_draws, True), experiment)
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


def _make(bench: Bench, task: Task) -> None:
    """Make what stays on disk; a cell that needs what cannot be made will say so."""
    name, arguments = task
    try:
        getattr(bench, name)(*arguments)
    except _OWN as error:
        print(f"{name}: {error}", flush=True)
