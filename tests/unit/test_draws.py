"""Scored draws of other people's tools: what is read as numbers, and what refusals name."""

from __future__ import annotations

import decimal
import math

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from ctrl_dpo.commands.options import assigned
from ctrl_dpo.evaluate import evaluate
from ctrl_dpo.measures.draws import gather_draws


def rows(*rewards, **columns):
    return [
        {"prompt": f"p{i}", "rewards": r, **{k: v[i] for k, v in columns.items()}}
        for i, r in enumerate(rewards)
    ]


def measured(policy, reference=None, **options):
    return evaluate(policy, reference or rows([1, 2], [1, 2]), procedures=["best_of_2"], **options)


# --- what is read


@pytest.mark.parametrize(
    "as_given",
    [
        lambda values: [decimal.Decimal(str(v)) for v in values],
        np.array,
        lambda values: np.array(values, dtype=np.float32),
        lambda values: [np.float16(v) for v in values],
    ],
    ids=["decimal", "array", "float32", "float16"],
)
def test_numbers_of_any_kind_are_floats(as_given):
    values = [0.5, 2.0], [1.5, 0.25]
    assert list(gather_draws(rows(*map(as_given, values))).values()) == [
        {"rewards": [0.5, 2.0]},
        {"rewards": [1.5, 0.25]},
    ]
    record = measured(rows(*map(as_given, values)), rows(*map(as_given, values[::-1])))
    assert record["win_rates"]["best_of_2"]["per_prompt"] == [1.0, 0.0]
    found = gather_draws(rows(*map(as_given, values)))
    assert {type(v) for draws in found.values() for v in draws["rewards"]} == {float}


def test_decimals_tie_with_the_floats_they_are_written_as():
    policy = rows([decimal.Decimal("0.1")], [decimal.Decimal("0.3")])
    record = evaluate(policy, rows([0.1], [0.3]), procedures=["single_draw"])
    assert record["tied"] == 1.0
    assert record["win_rates"]["single_draw"]["value"] == 0.5


def test_tokens_in_arrays_give_the_lengths():
    ids = [np.array([5, 6, 7]), np.array([5])]
    listed = rows(np.array([1.0, 2.0]), response_ids=[ids])
    assert gather_draws(listed)['"p0"']["length"] == [3, 1]
    square = rows(np.array([1.0, 2.0]), response_ids=[np.array([[5, 6], [7, 8]])])
    assert gather_draws(square)['"p0"']["length"] == [2, 2]
    assert gather_draws(rows(1.0, response_ids=[ids[0]]))['"p0"']["length"] == [3]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (10**400, "1000"),
        (decimal.Decimal("sNaN"), r"Decimal\('sNaN'\)"),
        (decimal.Decimal("1e400"), r"Decimal\('1E\+400'\)"),
        (math.nan, "nan"),
        ("3", "'3'"),
    ],
)
def test_what_is_no_finite_float_is_named_with_its_file(value, shown):
    with pytest.raises(ValueError, match=rf"got {shown}.* at draw 1 of row 1 of reference\. Score"):
        measured(rows([1, 2], [1, 2]), rows([1, 2], [1, value]))


# --- what refusals name


def test_a_frame_and_a_dictionary_of_splits_are_no_rows():
    data = Dataset.from_list(rows([1.0, 2.0], [1.0, 2.0]))
    frame = pd.DataFrame(rows([1.0, 2.0], [1.0, 2.0]))
    assert measured(frame.to_dict("records"))["n_prompts"] == 2
    for given, first in ((frame, "prompt"), (DatasetDict(train=data), "train")):
        message = rf"rows must be mappings .*; got '{first}' at row 0 of policy\. Take one split"
        with pytest.raises(TypeError, match=message):
            measured(given)
        with pytest.raises(TypeError, match=r"got 'prompt' at row 0 of draws"):
            gather_draws(frame)


def test_a_prompt_with_too_few_draws_is_named_by_its_text():
    policy = [{"prompt": p, "rewards": 1.0} for p in ("a", "b", "a", "b")]
    fewer = [{"prompt": p, "rewards": 1.0} for p in ("b", "a", "b")]
    with pytest.raises(ValueError, match=r'reference_rewards .* best_of_2; got 1 at prompt "a"\.'):
        measured(policy, fewer)
    with pytest.raises(ValueError, match=r'policy_rewards .* best_of_2; got 1 at prompt "a"\.'):
        measured(fewer, policy)
    with pytest.raises(ValueError, match=r"reference_rewards .* >= 3 draws .* worst_of_3; got 2 a"):
        measured(policy, policy, against="worst_of_3")
    long = [row | {"prompt": row["prompt"] * 500} for row in fewer]
    with pytest.raises(ValueError, match=r'got 1 at prompt "a{59}\.\.\.\. Draw more'):
        measured(long, [row | {"prompt": row["prompt"] * 500} for row in policy])


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"rewards": None}, "must hold rewards; got None at row 1 of reference"),
        ({"rewards": [1, "x"]}, "got 'x' at draw 1 of row 1 of reference"),
        ({"prompt": 3}, "prompt must be text; got 3 at row 1 of reference"),
        ({"length": [1, 1]}, r"same columns; got \[.*\] at row 1, \[.*\] at row 0 of reference"),
        ({"response_ids": [1, 2]}, "list of tokens a draw; got 1 at row 1 of reference"),
    ],
)
def test_the_file_of_a_row_is_named(broken, message):
    good = rows([1, 2], [1, 2])
    with pytest.raises((ValueError, TypeError), match=message):
        measured(good, [good[0], good[1] | broken])
    with pytest.raises((ValueError, TypeError), match=message.replace("reference", "policy")):
        measured([good[0], good[1] | broken], good)


def test_a_missing_column_and_no_row_name_the_file():
    good = rows([1, 2], [1, 2])
    with pytest.raises(ValueError, match=r"'rewards' is missing .* That is at row 1 of reference"):
        measured(good, [good[0], {"prompt": "p1"}])
    with pytest.raises(ValueError, match="reference must hold at least one row; got 0"):
        evaluate(good, [])


@pytest.mark.parametrize("column", ["response_ids", "length", "policy_logps"])
def test_a_mapped_column_that_is_not_there_is_refused(column):
    message = rf"columns of the policy's rows; got .*'nosuch'.*, and no '{column}' there at row 0"
    with pytest.raises(ValueError, match=message):
        measured(rows([1, 2], [1, 2]), columns={column: "nosuch"})
    given = [[5], [6, 7]] if column == "response_ids" else [0.1, 0.2]
    some = rows([1, 2], [1, 2], nosuch=[given, None])
    with pytest.raises(ValueError, match=rf"no '{column}' there at row 1"):
        measured(some, columns={column: "nosuch"})


@pytest.mark.parametrize(
    ("column", "values"), [("length", [[3, 4]] * 2), ("response_ids", [[[1], [2, 3]]] * 2)]
)
def test_a_mapped_column_that_the_reference_lacks_is_refused(column, values):
    policy = rows([1, 2], [1, 2], theirs=values)
    reference = rows([1, 2], [1, 2], **{column: values})  # under our name, which would not be read
    with pytest.raises(ValueError, match=rf"the reference's rows; .* and no '{column}' there at"):
        measured(policy, reference, columns={column: "theirs"})
    found = measured(policy, policy, columns={column: "theirs"})
    assert found["reference_length"]["value"] == (3.5 if column == "length" else 1.5)


def test_the_reference_needs_no_mapped_log_probabilities():
    logps = {"mine": [[2.0, 3.0]] * 2, "base": [[1.0, 2.0]] * 2}
    columns = {"policy_logps": "mine", "reference_logps": "base", "rewards": "rewards"}
    assert measured(rows([1, 2], [1, 2], **logps), columns=columns)["kl"]["value"] == 1.0


def test_lengths_that_are_not_those_of_the_tokens_are_refused():
    both = {"length": [[3, 1], [2, 2]], "response_ids": [[[5, 6, 7], [5]], [[1], [2, 3]]]}
    message = (
        r"'length' and 'response_ids' must tell the same lengths; got \[2\.0, 2\.0\] and "
        r"\[1\.0, 2\.0\] at row 1 of policy\. Drop one of the two columns"
    )
    with pytest.raises(ValueError, match=message):
        measured(rows([1, 2], [1, 2], **both))
    both["length"][1] = [1, 2]
    assert measured(rows([1, 2], [1, 2], **both))["length"]["value"] == 1.75


def test_a_column_of_something_else_is_to_be_renamed():
    message = r"got \{'rewards': 2, 'length': 1\} at row 0 of policy\. Drop or rename a column"
    with pytest.raises(ValueError, match=message):
        measured(rows([1, 2], [1, 2], length=[10, 20]))


def test_a_key_is_given_once():
    assert assigned("--column", ["rewards=a", "prompt=b=c"]) == {"rewards": "a", "prompt": "b=c"}
    assert assigned("--column", None) is assigned("--column", []) is None
    message = "--column must give each key once; got 'rewards' as 'a' and 'b'. Remove one."
    with pytest.raises(ValueError, match=message):
        assigned("--column", ["rewards=a", "prompt=q", "rewards=b"])
