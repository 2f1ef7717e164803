"""Passes hold every group once, within their limits; pools of similar lengths repeat by seed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrl_dpo.engine.batches import collate, row_lengths
from ctrl_dpo.engine.metrics import token_metrics
from ctrl_dpo.engine.passes import LengthPools, collate_passes, split

HH_LENGTHS = Path(__file__).parents[2] / "benchmarks" / "data" / "hh_lengths.csv"
groups_of_rows = st.lists(
    st.lists(st.integers(1, 500), min_size=1, max_size=4), min_size=1, max_size=30
)


@given(groups_of_rows, st.integers(1, 5000))
def test_passes_hold_every_group_once_within_the_limits(lengths, limit):
    passes = split(lengths, limit)
    assert sorted(i for part in passes for i in part) == list(range(len(lengths)))
    longest = [max(lengths[i]) for part in passes for i in part]
    assert longest == sorted(longest, reverse=True)
    for part in passes:
        sizes = [(len(lengths[i]), max(lengths[i])) for i in part]
        together = sum(count for count, _ in sizes) * max(longest for _, longest in sizes)
        if len(part) > 1:
            assert together <= limit
            assert sum(count * longest for count, longest in sizes) / together >= 0.95


def test_groups_of_one_length_fill_a_pass_and_no_more():
    assert [len(part) for part in split([[100, 100]] * 7, 600)] == [3, 3, 1]
    assert split([[100]] * 3, 1) == [[0], [1], [2]]
    # what a group's own rows are padded by does not keep it apart
    assert split([[300, 100]] * 3, 10**6) == [[0, 1, 2]]


def test_rows_are_as_long_as_collate_lays_them_out():
    group = {"prompt_ids": [1] * 9, "response_ids": [[2] * 3, [3] * 5], "targets": [0.0, 1.0]}
    for share in (True, False):
        segments = collate([group], share)["segments"]
        assert row_lengths(group, share) == (segments >= 0).sum(1).tolist()


def hh_groups() -> list[dict]:
    """Make groups of the lengths of 1,154 real pairs."""
    with HH_LENGTHS.open(newline="") as file:
        lengths = [[int(n) for n in row] for row in csv.reader(file)]
    return [
        {
            "prompt_ids": [5] * prompt,
            "response_ids": [[6] * max(a, 1), [7] * max(b, 1)],
            "targets": [1.0, 0.0],
            "truncated": [False, False],
        }
        for prompt, a, b in lengths
    ]


@pytest.mark.parametrize("size", [8, 32])
def test_real_lengths_leave_less_than_5_percent_of_padding(size):
    """Counted as an accelerator computes: every row of a pass at the width of the longest."""
    groups = hh_groups()
    useful = computed = whole = 0
    for start in range(0, len(groups), size):
        batch = collate_passes(groups[start : start + size], True, 16384)
        assert len(batch["weights"]) == len(groups[start : start + size])
        useful += sum(int((p["segments"] >= 0).sum()) for p in batch["passes"])
        computed += sum(p["segments"].numel() for p in batch["passes"])
        (one,) = collate_passes(groups[start : start + size], True, None)["passes"]
        whole += one["segments"].numel()
    assert useful / computed >= 0.95
    assert useful / whole < 0.7  # what the rows would be padded by in one pass


def test_the_share_of_useful_tokens_is_that_of_the_device():
    groups = [
        {"prompt_ids": [1] * n, "response_ids": [[2, 3]], "targets": [0.0], "truncated": [False]}
        for n in (9, 4)
    ]
    batch = collate(groups)
    here = token_metrics(batch)["useful_tokens"]
    assert [float(x) for x in here] == [15.0, 15.0]  # rows are computed one by one
    there = token_metrics({name: value.to("meta") for name, value in batch.items()})
    assert {t.device.type for t in there["useful_tokens"]} == {"meta"}


@given(st.lists(st.integers(1, 900), min_size=1, max_size=300), st.integers(1, 9), st.integers(0))
def test_pools_are_an_order_of_all_rows(lengths, size, seed):
    order = list(LengthPools(lengths, size, seed))
    assert sorted(order) == list(range(len(lengths)))
    again = LengthPools(lengths, size, seed)
    assert order == list(again) == list(again)


def test_pools_sort_and_each_epoch_has_its_own_order():
    lengths = np.random.default_rng(0).integers(1, 1000, size=1203).tolist()
    pools = LengthPools(lengths, 8, seed=3)
    first = list(pools)
    pools.set_epoch(1)
    second = list(pools)
    assert first != second
    for order in (first, second):
        batches = np.array(lengths)[np.array(order[:1200])].reshape(-1, 8)
        # 50 batches a pool: a batch spans about a fiftieth of the range, a random one most of it
        assert np.ptp(batches, axis=1).mean() < 40
        assert abs(np.corrcoef(np.arange(150), batches.mean(axis=1))[0, 1]) < 0.3
