"""Laws of labels: only the order of rewards counts, and the order of responses does not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_dpo.labels.groups import relabel_batch
from ctrl_dpo.labels.pairs import parse_strategy, select_pairs
from ctrl_dpo.theory.procedures import BestOfN
from ctrl_dpo.theory.rank_targets import RankOptimal
from ctrl_dpo.transform import Exponential, Identity

FEW = settings(max_examples=40)
LEVELS = st.integers(-8, 8).map(float)
GROUPS = st.lists(st.lists(LEVELS, min_size=1, max_size=6), min_size=1, max_size=4)
OPTIMAL = RankOptimal(BestOfN(4), BestOfN(4), 0.2, None)
SETTINGS = {
    "rank_optimal": (Identity(), OPTIMAL),
    "posterior": (Exponential(3.0), "posterior"),
    "plug_in": (Exponential(-3.0), "plug_in"),
    "levels": (Identity(), "levels"),
}


def labels(rewards, reference=None, name: str = "posterior") -> dict[str, list]:
    texts = [[f"{j}" for j, _ in enumerate(row)] for row in rewards]
    columns = {"responses": texts, "rewards": rewards}
    if reference is not None:
        columns["reference_rewards"] = reference
    transformation, estimator = SETTINGS[name]
    settings = {"procedure": "best_of_4", "beta": 0.2, "estimator": estimator}
    made = relabel_batch(
        pa.table(columns), list(range(len(rewards))), transformation=transformation, **settings
    )
    return {n: made[n].to_pylist() for n in ("calibrated_rewards", "transformed_rewards")}


@pytest.mark.parametrize("name", SETTINGS)
@FEW
@given(rewards=GROUPS)
def test_increasing_maps_of_rewards_change_nothing(name, rewards):
    cubed = [[np.sinh(r / 2) * 100 + 3 for r in row] for row in rewards]
    assert labels(cubed, name=name) == labels(rewards, name=name)
    assert labels(cubed, cubed[::-1], name) == labels(rewards, rewards[::-1], name)


@FEW
@given(rewards=GROUPS)
def test_negation_mirrors_calibrated_rewards(rewards):
    turned = [[-r for r in row] for row in rewards]
    for reference in (None, rewards[::-1]):
        other = None if reference is None else [[-r for r in row] for row in reference]
        made = labels(rewards, reference)["calibrated_rewards"]
        mirrored = labels(turned, other)["calibrated_rewards"]
        for row, back in zip(made, mirrored, strict=True):
            assert back == pytest.approx([1 - c for c in row], abs=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
@FEW
@given(rewards=GROUPS, seed=st.integers(0, 99))
def test_permuted_responses_have_permuted_labels(name, rewards, seed):
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(len(row)) for row in rewards]
    moved = [[row[i] for i in order] for row, order in zip(rewards, orders, strict=True)]
    made, after = labels(rewards, name=name), labels(moved, name=name)
    for column, rows in made.items():
        for row, order, found in zip(rows, orders, after[column], strict=True):
            assert found == pytest.approx([row[i] for i in order], abs=1e-13)


@pytest.mark.parametrize("strategy", ["all", "best_worst", "adjacent", "margin:0.4", "random:2"])
@FEW
@given(rewards=GROUPS, ties=st.sampled_from(["drop", "keep"]), seed=st.integers(0, 9))
def test_pairs_are_those_of_a_double_loop(strategy, rewards, ties, seed):
    texts = [[f"{int(r) % 3}" for r in row] for row in rewards]  # equal texts among them
    phi = [[r / 8 for r in row] for row in rewards]
    table = pa.table({"responses": texts, "transformed_rewards": phi, "calibrated_rewards": phi})
    parsed = parse_strategy(strategy)
    found = select_pairs(table, list(range(len(rewards))), parsed, ties, seed)
    assert (found.margin >= 0).all()
    made = {}
    columns = found.row, found.chosen, found.rejected, found.margin
    for row, a, b, margin in zip(*columns, strict=True):
        assert margin == phi[row][a] - phi[row][b]
        assert texts[row][a] != texts[row][b]
        made.setdefault(int(row), []).append((margin, *sorted((int(a), int(b)))))
    for row, values in enumerate(phi):
        everything = [
            (abs(values[a] - values[b]), a, b)
            for a in range(len(values))
            for b in range(a + 1, len(values))
            if texts[row][a] != texts[row][b] and (ties == "keep" or values[a] != values[b])
        ]
        mine = made.get(row, [])
        assert len(mine) == len(set(mine))
        assert set(mine) <= set(everything)
        if strategy == "all":
            assert sorted(mine) == sorted(everything)
        if strategy == "margin:0.4":
            assert sorted(mine) == sorted(p for p in everything if p[0] >= 0.4)
        if strategy == "random:2":
            assert len(mine) == min(2, len(everything))
        if strategy == "best_worst" and mine:
            assert [p[0] for p in mine] == [max(values) - min(values)]
        if strategy == "adjacent":
            assert sum(p[0] for p in mine) <= max(values) - min(values) + 1e-12
