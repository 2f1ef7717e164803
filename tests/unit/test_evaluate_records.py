"""Records that are compared: of the same prompts in any order, against the same reference draws."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl_dpo.evaluate import compare, evaluate
from ctrl_dpo.measures.estimates import largest_coverage, mean_over_prompts


def rows(rewards):
    return [{"prompt": f"p{i}", "rewards": list(row)} for i, row in enumerate(rewards)]


def record(policy, reference, **options):
    return evaluate(policy, reference, procedures=["best_of_2"], **options)


@pytest.fixture
def sides(rng):
    """Twelve prompts: two policies and the reference policy, six draws each."""
    return [rows(rng.normal(size=(12, 6)) + shift) for shift in (0.5, 0.0, 0.0)]


def test_records_whose_rows_have_another_order_are_compared_by_prompt(sides, rng):
    first, second, reference = sides
    one, two = record(first, reference, name="one"), record(second, reference, name="two")
    expected = compare(one, two)["best_of_2"]
    for _ in range(3):
        shuffled = [second[i] for i in rng.permutation(12)]
        turned = [row | {"rewards": row["rewards"][::-1]} for row in reference[::-1]]
        other = record(shuffled, turned, name="two")
        assert compare(one, other)["best_of_2"] == expected
        back = compare(other, one)["best_of_2"]
        assert back["value"] == pytest.approx(-expected["value"], abs=1e-15)
        assert sorted(back["per_prompt"]) == sorted(-np.array(expected["per_prompt"]))


def test_per_prompt_numbers_stay_in_the_order_of_the_rows():
    """Prompts p0, p1 and p2 have win rates 0, 1/2 and 1."""
    policy, reference = rows([[0.0], [1.0], [2.0]]), rows([[1.0]] * 3)
    order = [1, 2, 0]
    made = evaluate([policy[i] for i in order], reference, procedures=["single_draw"])
    assert made["win_rates"]["single_draw"]["per_prompt"] == [0.5, 1.0, 0.0]
    assert made["prompt_ranks"] == order


def test_records_against_other_reference_draws_are_not_compared(sides):
    first, second, reference = sides
    moved = [row | {"rewards": [r + 1 for r in row["rewards"]]} for row in reference]
    swapped = [row | {"rewards": reference[i - 1]["rewards"]} for i, row in enumerate(reference)]
    fewer = [row | {"rewards": row["rewards"][:5]} for row in reference]
    one = record(first, reference, name="one")
    for other in (moved, swapped, fewer):
        with pytest.raises(ValueError, match=r"same reference_hash; got '.*' for 'one' and '.*' f"):
            compare(one, record(second, other, name="two"))


def test_zeros_of_both_signs_are_the_same_reference_reward():
    policy = rows([[1.0], [0.5]])
    records = [record(rows([[1, 2]] * 2), rows([[z, 0.0]] * 2)) for z in (0.0, -0.0)]
    assert records[0]["reference_hash"] == records[1]["reference_hash"]
    ones = [evaluate(policy, rows([[one]] * 2), procedures=["single_draw"]) for one in (1, 1.0)]
    assert ones[0]["reference_hash"] == ones[1]["reference_hash"]


def test_records_of_before_are_compared_with_each_other_only(sides):
    first, second, reference = sides
    records = [record(side, reference) for side in (first, second)]
    expected = compare(*records)
    older = [
        {key: value for key, value in r.items() if key not in ("prompt_ranks", "reference_hash")}
        for r in records
    ]
    assert compare(*older) == expected
    with pytest.raises(
        ValueError, match=r"same reference_hash; got None .*\. One is of an older version"
    ):
        compare(older[0], records[1])
    # no procedure against which is a setting of its own
    other = record(second, reference) | {"against": "single_draw"}
    with pytest.raises(ValueError, match=r"same against; got None .*\. Evaluate both on"):
        compare(records[0], other)


# --- few prompts


def test_too_few_prompts_for_the_confidence_are_told_of(rng, caplog):
    few = "are too few for 95% intervals: theirs cover the mean of a symmetric distribution "
    for n, told in ((2, "2 prompts {}50%"), (4, "4 prompts {}87.5%"), (5, "5 prompts {}93.8%")):
        caplog.clear()
        record(rows(rng.random((n, 3))), rows(rng.random((n, 3))))
        (message,) = caplog.messages
        assert message.startswith(told.format(few))
    caplog.clear()
    record(rows(rng.random((6, 3))), rows(rng.random((6, 3))))
    record(rows(rng.random((2, 3))), rows(rng.random((2, 3))), confidence=0.5)
    assert caplog.messages == []
    record(rows(rng.random((6, 3))), rows(rng.random((6, 3))), confidence=0.99)
    assert "6 prompts are too few for 99% intervals" in caplog.text


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_intervals_over_few_prompts_cover_as_often_as_is_said(rng, n):
    """300 samples of a symmetric distribution around 0; 4.5 standard errors."""
    made = [mean_over_prompts(rng.normal(size=n), seed=seed) for seed in range(300)]
    for e in made:
        assert e.per_prompt.min() - 1e-12 <= e.low <= e.high <= e.per_prompt.max() + 1e-12
    covered = np.mean([e.low <= 0 <= e.high for e in made])
    most = largest_coverage(n)
    error = np.sqrt(most * (1 - most) / 300)
    assert most - 0.05 - 4.5 * error < covered < most + 4.5 * error
