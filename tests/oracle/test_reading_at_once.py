"""A batch of canonical groups that is judged at once, against the same rows judged one by one."""

from __future__ import annotations

import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from ctrl_dpo.data.layout_rows import read_canonical
from ctrl_dpo.data.row_reader import RowReader, clean_numbers

NUMBERS = st.one_of(
    st.floats(width=64), st.none(), st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1)
)
TEXTS = st.sampled_from(["", "a", "b c", "a", "x", None])


@st.composite
def rows(draw: st.DrawFn) -> dict[str, object]:
    n = draw(st.integers(0, 3))
    row = {
        "prompt": draw(st.sampled_from(["p", "q", "p", "", None])),
        "responses": [draw(TEXTS) for _ in range(n)],
        "rewards": [draw(NUMBERS) for _ in range(draw(st.sampled_from([n, n, n, 1])))],
        "reference_rewards": draw(st.lists(NUMBERS, max_size=2)),
        "finished": [True] * draw(st.sampled_from([n, n, n, 2])),
    }
    empty = draw(st.sampled_from([None, None, None, None, "responses", "rewards", "finished"]))
    return row | ({} if empty is None else {empty: None})


SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "responses": pa.list_(pa.string()),
        "rewards": pa.list_(pa.float64()),
        "reference_rewards": pa.list_(pa.float64()),
        "finished": pa.list_(pa.bool_()),
    }
)
READER = RowReader(read_canonical, "drop", ["rewards", "reference_rewards", "finished"])


@given(st.lists(rows(), min_size=1, max_size=3))
def test_both_ways_agree(batch):
    table = pa.Table.from_pylist(batch, schema=SCHEMA)
    indices = list(range(len(batch)))
    one_by_one = [READER.judge(row, i) for i, row in enumerate(table.to_pylist())]
    assert READER.judge_canonical(table, indices).to_pylist() == one_by_one
    if clean_numbers(table, indices) is not None:
        assert all(row["dropped_reason"] is None for row in one_by_one)


@pytest.mark.parametrize("kind", [pa.int8(), pa.float32(), pa.bool_(), pa.decimal128(5)])
def test_a_clean_batch_is_read_at_once_whatever_its_numbers(kind):
    numbers = pa.array([[0, 1], [1, 0]], pa.list_(pa.int8())).cast(pa.list_(kind))
    made = clean_numbers(
        pa.table({"prompt": ["p", "q"], "responses": [["a", "b"]] * 2, "rewards": numbers}), [0, 1]
    )
    assert made["rewards"].to_pylist() == [[0.0, 1.0], [1.0, 0.0]]
    assert made["rewards"].type == pa.list_(pa.float64())


def test_conversations_and_half_scored_groups_go_row_by_row():
    chat = {"prompt": [{"role": "user", "content": "Hi"}], "responses": ["a"], "rewards": [1.0]}
    table = Dataset.from_list([chat]).with_format("arrow")[:]
    assert clean_numbers(table, [0]) is None
    reader = RowReader(read_canonical, "error", ["rewards"])
    assert reader.judge_canonical(table, [0]).to_pylist()[0]["rewards"] == [1.0]
