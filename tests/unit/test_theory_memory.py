"""Solving for many optima keeps no paths, and threads do not disturb each other."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ctrl_dpo.theory.procedures import parse_procedure
from ctrl_dpo.theory.shooting import Equation, shoot


def equation(name: str, beta: float) -> Equation:
    procedure = parse_procedure(name)
    return Equation(procedure, procedure, beta)


def test_shots_do_not_keep_their_paths():
    """A path has about 3 KB here; scipy keeps every callback that it is given, and its path."""
    best_of_4 = equation("best_of_4", 0.1)

    def kept(shots: int) -> int:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(shots):
            shoot(best_of_4, 1.0)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        kept(20)
        assert kept(200) < 200 * 250
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
def test_shots_of_threads_are_those_of_one(tolerance):
    cases = [(equation(n, b), b) for n in ("best_of_4", "worst_of_4") for b in (0.05, 0.1, 0.3, 1)]
    alone = [shoot(each, top, tolerance) for each, top in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda case: shoot(*case, tolerance), cases))
            for one, other in zip(alone, found, strict=True):
                for name, value in vars(one).items():
                    assert np.array_equal(value, getattr(other, name))
