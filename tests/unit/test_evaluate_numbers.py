"""Evaluation by hand arithmetic, the record, and refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats

from ctrl_dpo.evaluate import calibration_error, compare, evaluate, kl_divergence
from ctrl_dpo.measures.estimates import Estimate, mean_over_prompts, paired_difference
from ctrl_dpo.measures.win_rates import inference_win_rate


def test_best_of_two_by_hand():
    """Policy (1, 3, 5), reference (2, 4): subsets of 2 serve 3, 5, 5 against 4: 0 + 1 + 1 of 3."""
    result = inference_win_rate([[1, 3, 5]] * 2, [[2, 4]] * 2, "best_of_2")
    assert result.per_prompt.tolist() == pytest.approx([2 / 3, 2 / 3])
    assert (result.low, result.high, result.standard_error) == (result.value, result.value, 0)


def test_worst_of_two_with_a_tie_by_hand():
    """Policy (1, 2, 3) serves 1, 1, 2 against the worst of (2, 9), which is 2: 0 + 0 + 1/2 of 3."""
    result = inference_win_rate([[1, 2, 3]] * 2, [[2, 9]] * 2, "worst_of_2")
    assert result.value == pytest.approx(1 / 6)


def test_ragged_rows():
    """Prompt 0: 2 beats 1 and ties 2: 3/4. Prompt 1: 1, 5, 6 against 5: (0 + 1/2 + 1) / 3."""
    result = inference_win_rate([[2], [1, 5, 6]], [[1, 2], [5]], "single_draw")
    assert result.per_prompt.tolist() == pytest.approx([0.75, 0.5])


def test_kl_by_hand():
    """Log-ratios (1, 3) and (0, 0): means 2 and 0, KL 1, standard error sqrt(2) / sqrt(2) = 1."""
    result = kl_divergence([[-1, -2], [-3, -4]], [[-2, -5], [-3, -4]])
    assert (result.value, result.standard_error) == (1.0, 1.0)
    assert result.per_prompt.tolist() == [2.0, 0.0]


def test_prompts_weigh_the_same_whatever_their_draws():
    """Prompt means 4 and 0, from one draw and from three."""
    assert kl_divergence([[4.0], [0.0, 0.0, 0.0]], [[0.0], [0.0, 0.0, 0.0]]).value == 2.0


def test_paired_difference_is_narrower_than_the_two_intervals(rng):
    shared = rng.normal(size=64)
    first = mean_over_prompts(shared + 0.1 + 0.01 * rng.normal(size=64))
    second = mean_over_prompts(shared)
    difference = paired_difference(first, second)
    assert difference.low > 0
    assert first.low < second.high
    assert difference.high - difference.low < 0.05 * (first.high - first.low)


def test_the_seed_decides_the_interval_and_nothing_else(rng):
    values = rng.random(32)
    one, again, other = (mean_over_prompts(values, seed=seed) for seed in (0, 0, 1))
    assert (one.low, one.high) == (again.low, again.high) != (other.low, other.high)
    assert one.value == other.value


def test_more_confidence_is_wider(rng):
    values = rng.random(32)
    narrow, wide = (mean_over_prompts(values, confidence=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("shape", [(1,), (17,), (40, 25)])
def test_calibration_error_is_that_of_scipy(rng, shape):
    values = rng.beta(2, 1, shape).round(2)
    error = calibration_error(values)
    assert error.n == values.size
    if values.size == 1:  # scipy has no answer; at u the distances are max(u, 1 - u)
        assert error.kolmogorov_smirnov == max(values[0], 1 - values[0])
        return
    ks = stats.kstest(values.ravel(), "uniform").statistic
    cvm = stats.cramervonmises(values.ravel(), "uniform").statistic / values.size
    assert error.kolmogorov_smirnov == pytest.approx(ks, abs=1e-12)
    assert error.cramer_von_mises == pytest.approx(cvm, abs=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_distances_from_uniform_by_quadrature(weighted, rng):
    values, weights = rng.integers(0, 7, 12) / 6, rng.integers(0, 4, 12) + (0.0 if weighted else 1)
    weights = weights if weighted else np.ones(12)
    error = calibration_error(values, weights if weighted else None)
    grid = (np.arange(600_000) + 0.5) / 600_000
    share = np.array([weights[values <= v].sum() for v in np.unique(values)]) / weights.sum()
    below = np.concatenate([[0], share])[np.searchsorted(np.unique(values), grid, side="right")]
    assert error.mean_absolute_deviation == pytest.approx(np.abs(below - grid).mean(), abs=1e-5)
    assert error.cramer_von_mises == pytest.approx(((below - grid) ** 2).mean(), abs=1e-5)
    assert error.kolmogorov_smirnov == pytest.approx(np.abs(below - grid).max(), abs=1e-5)
    for bad in ([1.0], -np.ones(12), np.zeros(12)):
        with pytest.raises(ValueError, match="weights must be >= 0, not all 0, and one per calib"):
            calibration_error(values, bad)


def test_calibration_error_of_perfect_calibration_with_k_rewards():
    """Equal mass on 0, 1/4, ..., 1 (k = 4): the distance at 0 and at 1 is 1/5."""
    error = calibration_error(np.linspace(0, 1, 5))
    assert error.kolmogorov_smirnov == pytest.approx(0.2)


# --- the record


def rows(rewards, **columns):
    return [
        {"prompt": f"p{i}", "rewards": list(r), **{k: v[i] for k, v in columns.items()}}
        for i, r in enumerate(rewards)
    ]


def test_the_record_is_json_with_every_measure(rng):
    logps = -rng.random((6, 8))
    policy = rows(
        rng.random((6, 8)) + 0.2,
        policy_logps=(logps + 1).tolist(),
        reference_logps=logps.tolist(),
        response_ids=[[[1] * (j + 1) for j in range(8)]] * 6,
    )
    reference = rows(rng.random((6, 5)), response_ids=[[[1, 2]] * 5] * 6)
    record = json.loads(json.dumps(evaluate(policy, reference, name="mine"), allow_nan=False))
    assert (record["name"], record["n_prompts"]) == ("mine", 6)
    assert (record["n_draws"], record["n_reference_draws"]) == (48, 30)
    assert list(record["win_rates"]) == ["single_draw", "best_of_4", "worst_of_4"]
    assert record["kl"]["value"] == pytest.approx(1)
    assert record["length"]["value"] == 4.5
    assert record["reference_length"]["value"] == 2
    assert record["tied"] == 0
    means = np.mean([row["rewards"] for row in policy])
    assert record["rewards"]["value"] == pytest.approx(means)
    attained = record["attainment"]["best_of_4"]
    assert attained["low"] < attained["value"] < attained["high"]


def test_what_the_columns_do_not_give_is_none():
    record = evaluate(rows([[1, 2]] * 3), rows([[1, 3]] * 3), procedures=["best_of_2"])
    for key in ("kl", "length", "reference_length"):
        assert record[key] is None
    assert record["attainment"] == {"best_of_2": None}
    assert record["tied"] == 0.25


def test_a_policy_that_wins_and_loses_alike_everywhere_attains_exactly_nothing():
    """All rewards tie, so W is 1/2 on every prompt, whatever KL each prompt paid."""
    logps = {
        "policy_logps": [[1.0 + i, 2.0] for i in range(4)],
        "reference_logps": [[0.0, 0.0]] * 4,
    }
    record = evaluate(rows([[1, 1]] * 4, **logps), rows([[1, 1]] * 4), procedures=["best_of_2"])
    assert record["attainment"] == {"best_of_2": {"value": 0.0, "low": 0.0, "high": 0.0}}


def test_attainment_at_a_kl_that_may_be_zero_is_none():
    logps = [[0.0, 1.0]] * 2 + [[1.0, 0.0]]
    policy = rows([[1, 2]] * 3, policy_logps=logps, reference_logps=[[0.5, 0.5]] * 3)
    record = evaluate(policy, rows([[1, 3]] * 3), procedures=["single_draw"])
    assert record["kl"]["value"] == 0
    assert record["attainment"] == {"single_draw": None}


def test_rows_of_one_prompt_are_taken_together_in_any_order():
    policy = [{"prompt": p, "rewards": [r]} for r in (1.0, 4.0) for p in ("a", "b")]
    reference = rows([[2, 3]] * 2)
    for number, prompt in enumerate("ba"):
        reference[number]["prompt"] = prompt
    record = evaluate(policy, reference, procedures=["best_of_2"])
    assert record["n_prompts"] == 2
    assert record["win_rates"]["best_of_2"]["value"] == 1.0


def test_datasets_and_message_prompts_are_read():
    messages = [[{"role": "user", "content": c}] for c in "ab"]
    policy = Dataset.from_dict({"prompt": messages, "rewards": [[1.0], [2.0]]})
    reference = Dataset.from_dict({"prompt": messages[::-1], "rewards": [[1.0], [2.0]]})
    record = evaluate(policy, reference, procedures=["single_draw"])
    assert record["win_rates"]["single_draw"]["per_prompt"] == [0.0, 1.0]


def test_policies_are_compared_by_prompt(rng):
    reference = rows(rng.normal(size=(40, 16)))
    shift = rng.normal(size=(40, 1))  # prompts differ more than policies do
    draws = rng.normal(size=(40, 16))
    better = evaluate(rows(draws + shift + 0.3), reference, name="better")
    worse = evaluate(rows(draws + shift), reference, name="worse")
    for procedure, difference in compare(better, worse).items():
        expected = better["win_rates"][procedure]["value"] - worse["win_rates"][procedure]["value"]
        assert difference["value"] == pytest.approx(expected)
        assert difference["low"] > 0
    assert better["win_rates"]["best_of_4"]["low"] < worse["win_rates"]["best_of_4"]["high"]


def test_an_estimate_survives_json(rng):
    estimate = mean_over_prompts(rng.random(5))
    again = Estimate.from_dict(json.loads(json.dumps(estimate.as_dict())))
    assert again.per_prompt.tolist() == estimate.per_prompt.tolist()
    assert (again.low, again.value, again.high) == (estimate.low, estimate.value, estimate.high)


# --- refusals


@pytest.mark.parametrize(
    ("policy", "reference", "message"),
    [
        (
            [[1, 2]],
            [[1, 2, 3, 4]],
            r"policy_rewards must hold >= 4 draws .* best_of_4; got 2 at row 0",
        ),
        ([[1] * 4, [1] * 4], [[1] * 4, [1] * 3], r"reference_rewards must .*; got 3 at row 1"),
        ([[1] * 4], [[1] * 4] * 2, "same prompts; got 1 and 2 rows"),
        ([], [], r"policy_rewards must hold at least one prompt; got 0"),
        ([[1] * 4, []], [[1] * 4] * 2, r"policy_rewards must .* one draw a prompt; got 0 at row 1"),
        (
            [[1] * 4, [1, 2, math.nan, 3]],
            [[1] * 4] * 2,
            r"policy_rewards\[1\] must be finite.*index 2",
        ),
        ([1, 2, 3, 4], [1, 2, 3, 4], r"policy_rewards\[0\] must have 1 dimensions; got shape \(\)"),
        ([[1] * 4], [[1] * 4], "win rate must cover >= 2 prompts .* got 1"),
    ],
)
def test_bad_rewards_are_refused(policy, reference, message):
    with pytest.raises(ValueError, match=message):
        inference_win_rate(policy, reference, "best_of_4")


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -1, math.nan])
def test_a_confidence_that_is_no_probability_is_refused(confidence):
    with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\); got {confidence}"):
        mean_over_prompts([1.0, 2.0], confidence=confidence)


def test_log_probabilities_of_other_draws_are_refused():
    with pytest.raises(ValueError, match="same draws; got 3 draws on 2 prompts and 4 on 2"):
        kl_divergence([[1.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]])


def test_unpaired_prompts_are_refused():
    with pytest.raises(ValueError, match="same prompts; got 2 and 3 prompts"):
        paired_difference(mean_over_prompts([1, 2]), mean_over_prompts([1, 2, 3]))


@pytest.mark.parametrize("bad", [[-0.1, 0.5], [0.5, 1.5], []])
def test_values_that_are_no_calibrated_rewards_are_refused(bad):
    with pytest.raises(ValueError, match=r"calibrated_rewards must be in \[0, 1\]; got"):
        calibration_error(bad)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([], "at least one row; got 0"),
        ([{"prompt": "p0"}], "column 'rewards' is missing from the dataset; found"),
        (rows([[1, 2]]), "got 0 in policy only and 1 in reference only"),
        (
            rows([[1, 2]] * 2, policy_logps=[[0.1, 0.2], [0.1]]),
            r"one entry a draw; got \{'rewards': 2, 'policy_logps': 1\} at row 1",
        ),
        (
            [*rows([[1, 2]], response_ids=[[[1], [2]]]), {"prompt": "p1", "rewards": [1, 2]}],
            r"same columns; got \['rewards'\] at row 1, \['length', 'rewards'\] at row 0",
        ),
        (
            [{"prompt": "p0", "rewards": None, "length": [3]}],
            "must hold rewards; got None at row 0",
        ),
        (rows([[1, 2], [1, "N/A"]]), r"column 'rewards' .* got 'N/A' at draw 1 of row 1"),
        (rows([[1, 2], [1, None]]), r"column 'rewards' .* got None at draw 1 of row 1"),
        (rows([[1, 2]], policy_logps=[[0.1, np.inf]]), r"'policy_logps' .* got inf at draw 1"),
        (rows([[1, 2]], response_ids=[[5, 6]]), r"list of tokens a draw; got 5 at row 0"),
        (rows([[1, 2]], response_ids=[[[5], None]]), r"list of tokens a draw; got None at row 0"),
        (
            [{"prompt": ["p0"], "rewards": [1.0]}],
            r"message must have .* got 'p0' at message 0 of row 0",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        evaluate(policy, rows([[1, 2]] * 2), procedures=["single_draw"])


@pytest.mark.parametrize("prompt", ["你好 “hé”", [{"role": "user", "content": "你好"}]])
def test_prompts_are_shown_as_they_are_written(prompt):
    draws = [{"prompt": prompt, "rewards": [1.0, 2.0]}]
    with pytest.raises(ValueError, match=r"你好") as error:
        evaluate(draws, draws, procedures=["best_of_4"])
    assert "\\u" not in str(error.value)


def test_a_prompt_that_is_nothing_is_refused():
    with pytest.raises(TypeError, match="prompt must be text; got None at row 1"):
        evaluate([*rows([[1, 2]]), {"prompt": None, "rewards": [1, 2]}], rows([[1, 2]] * 2))


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"seed must be an integer >= 0; got -1"):
        evaluate(rows([[1, 2], [2, 3]]), rows([[1, 1], [2, 2]]), seed=-1)


def test_records_of_other_prompts_are_not_compared():
    records = [
        evaluate(rows([[1, 2]] * n), rows([[1, 2]] * n), name=str(n), procedures=["single_draw"])
        for n in (2, 3)
    ]
    with pytest.raises(ValueError, match=r"same prompts_hash; got .* for '2' and .* for '3'"):
        compare(*records)


def drawn(logps: bool = False, **origin) -> list[dict]:
    """Two prompts with draws that say where they come from."""
    origin = {"model": "m", "template": "t", "temperature": 1.0, "top_k": 0, "top_p": 1.0} | origin
    rows = [{"prompt": p, "rewards": [0.0, 1.0], "sampled_from": json.dumps(origin)} for p in "ab"]
    values = {"policy_logps": [-1.0, -2.0], "reference_logps": [-2.0, -2.0]} if logps else {}
    return [row | values for row in rows]


def test_draws_of_one_sampler_are_evaluated_and_of_none_known_too():
    bare = [{"prompt": p, "rewards": [0.0, 1.0]} for p in "ab"]
    hot = {"temperature": 0.7, "top_p": 0.9}
    sides = [(drawn(logps=True, model="p"), drawn()), (drawn(temperature=1), drawn())]
    sides += [(drawn(**hot), drawn(**hot)), (drawn(logps=True), bare)]
    found = [evaluate(*pair, procedures=["single_draw"]) for pair in sides]
    assert [r["kl"] and r["kl"]["value"] for r in found] == [0.5, None, None, 0.5]
    assert [r["win_rates"]["single_draw"]["value"] for r in found] == [0.5] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.7}, r"same temperature; got \[0\.7\] for the policy and \[1\.0\] for"),
        (
            {"top_k": 5},
            r"drawn with the same top_k; got \[5\] for the policy and \[0\] for",
        ),
        ({"top_p": 0.9}, r"drawn with the same top_p; got \[0\.9\] for the policy and \[1\.0\]"),
        (
            {"template": "u"},
            r"drawn with the same template; got \['u'\] for .* and \['t'\] for",
        ),
    ],
)
def test_draws_that_were_not_made_alike_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate(drawn(**change), drawn(), procedures=["single_draw"])
    mixed = [*drawn(**change), *drawn()]
    with pytest.raises(ValueError, match=r"drawn with the same .* for the policy and \[\] for the"):
        evaluate(mixed, [{"prompt": p, "rewards": [0.0]} for p in "ab"])


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
def test_the_mean_log_ratio_over_draws_of_a_changed_sampler_is_not_called_kl(change):
    ((name, value),) = change.items()
    message = rf"policy_logps must be of draws with {name} \d to give the KL; got {value}\. Remove"
    with pytest.raises(ValueError, match=message):
        evaluate(drawn(logps=True, **change), drawn(**change), procedures=["single_draw"])


def test_what_is_no_record_of_draws_is_named():
    rows = [row | {"sampled_from": "gpt"} for row in drawn()]
    with pytest.raises(ValueError, match=r"'sampled_from' must hold what .*; got 'gpt'\. Remove"):
        evaluate(rows, drawn())
