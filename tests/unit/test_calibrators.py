"""Calibrators: limits by hand, laws, oracles written differently, state on disk, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from ctrl_dpo import RewardCalibrator, calibrated_reward
from ctrl_dpo.calibration.features import predict_locations
from ctrl_dpo.calibration.pooled import Population, estimate_population
from ctrl_dpo.calibration.ranks import COMPARISONS
from ctrl_dpo.calibration.weighted import effective_sample_size, normalised_weights

METHODS = ["empirical", "pooled", "weighted"]
REWARDS = arrays(np.float64, (5, 6), elements=st.integers(-40, 40).map(float))


def fitted(method: str, reference, seed: int = 0) -> RewardCalibrator:
    shape = np.shape(reference)
    weights = np.random.default_rng(seed).normal(size=shape) * 0.3 if method == "weighted" else None
    return RewardCalibrator(method).fit(reference, weights)


def hierarchical(rng, prompts: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    centre, scale = rng.normal(size=(prompts, 1)), np.exp(0.3 * rng.normal(size=(prompts, 1)))
    return centre + scale * rng.normal(size=(prompts, k)), np.hstack([centre, scale])


def test_empirical_is_the_mid_rank(rng):
    reference, new = rng.integers(0, 5, (7, 4)), rng.integers(0, 5, (7, 3))
    made = RewardCalibrator().fit(reference).transform(new)
    assert made == pytest.approx(calibrated_reward(new, reference), abs=1e-15)


def test_a_draw_is_compared_with_the_others():
    made = (
        RewardCalibrator().fit([[1.0, 2.0, 2.0], [7.0]]).transform([[1.0, 2.0, 2.0], [7.0]], True)
    )
    assert made[0] == pytest.approx([0.0, 0.75, 0.75])
    assert made[1, 0] == 0.5
    assert np.isnan(made[1, 1:]).all()


@pytest.mark.parametrize("method", METHODS)
def test_leaving_out_by_hand_is_leaving_out(method, rng):
    reference, _ = hierarchical(rng, 20, 5)
    calibrator = fitted(method, reference)
    inside = calibrator.transform(reference, inside=True)
    # the same prompt without its second draw, that draw as a new response
    others = np.delete(reference, 1, axis=1)
    apart = RewardCalibrator(method)
    apart.__dict__.update(calibrator.__dict__)
    apart.reference_ = others
    if method == "weighted":
        apart.weights_ = np.delete(calibrator.weights_, 1, axis=1)
    alone = apart.transform(reference[:, [1]])
    assert inside[:, 1] == pytest.approx(alone[:, 0], abs=1e-12)


def test_pooled_goes_from_the_shared_value_to_the_own_one(rng):
    reference, truth = hierarchical(rng, 400, 3)
    calibrator = RewardCalibrator("pooled").fit(reference)
    strength = calibrator.strength_
    assert 0.5 < strength < 1e3
    # no draw at all: the CDF of the whole population, by brute force over the residuals
    apart = RewardCalibrator("pooled")
    apart.__dict__.update(calibrator.__dict__)
    apart.reference_, apart.trend_ = np.full((1, 1), np.nan), np.zeros(1)
    population = calibrator.population_
    scale = np.sqrt(population.within + population.between)
    for reward in (-1.0, 0.3, 2.0):
        standard = (reward - population.mean) / scale
        shared = np.mean(calibrator.residuals_ < standard)
        assert apart.transform([[reward]])[0, 0] == pytest.approx(shared, abs=2e-3)
    # many draws: their own mid-rank
    apart.reference_ = rng.normal(size=(1, 200_000))
    made = apart.transform([[0.7]])[0, 0]
    assert made == pytest.approx(np.mean(apart.reference_ < 0.7), abs=strength / 200_000)
    del truth


@pytest.mark.parametrize("k", [2, 4, 8, 32])
def test_pooled_is_closer_to_the_truth(k, rng):
    reference, truth = hierarchical(rng, 500, k + 4)
    draws, new = reference[:, :k], reference[:, k:]
    exact = stats.norm.cdf((new - truth[:, [0]]) / truth[:, [1]])
    error = {
        method: np.mean((RewardCalibrator(method).fit(draws).transform(new) - exact) ** 2)
        for method in ("empirical", "pooled")
    }
    assert error["pooled"] < 0.9 * error["empirical"]


def test_moments_of_a_known_population():
    rng = np.random.default_rng(3)
    scale = np.sqrt(8 / rng.chisquare(8, size=(40_000, 1)))
    rewards = 1.5 + 2.0 * rng.normal(size=(40_000, 1)) + scale * rng.normal(size=(40_000, 6))
    found = estimate_population(rewards)
    assert found.mean == pytest.approx(1.5, abs=0.04)
    assert found.between == pytest.approx(4.0, rel=0.03)
    assert found.within == pytest.approx(8 / 6, rel=0.05)  # E[8 / chi2_8]
    assert 5 < found.degrees < 11


def test_equal_weights_are_no_weights(rng):
    reference, new = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))
    calibrator = RewardCalibrator("weighted").fit(reference, np.zeros((6, 5)))
    assert calibrator.transform(new) == pytest.approx(calibrated_reward(new, reference))
    assert calibrator.effective_sample_size_ == pytest.approx(np.full(6, 5.0))


def test_weights_undo_another_policy():
    """Draw from one normal, weight to another: the calibrated reward is the other's CDF."""
    rng = np.random.default_rng(1)
    drawn = rng.normal(0.5, 1.2, size=(1, 400_000))
    log_weights = stats.norm(0, 1).logpdf(drawn) - stats.norm(0.5, 1.2).logpdf(drawn)
    calibrator = RewardCalibrator("weighted").fit(drawn, log_weights)
    points = np.array([[-1.0, 0.0, 1.3]])
    assert calibrator.transform(points) == pytest.approx(stats.norm.cdf(points), abs=5e-3)
    weights = np.exp(log_weights[0])
    size = weights.sum() ** 2 / (weights**2).sum()
    assert calibrator.effective_sample_size_[0] == pytest.approx(size, rel=1e-9)


def test_weights_survive_large_logs():
    weights = normalised_weights(np.array([[1e4, 1e4, -1e4], [np.nan, -5e3, -5e3]]))
    assert weights == pytest.approx(np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]))
    assert effective_sample_size(weights) == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize("method", METHODS)
@given(reference=REWARDS, new=REWARDS)
def test_negation_mirrors_and_permutation_permutes(method, reference, new):
    order = np.random.default_rng(0).permutation(6)
    made = fitted(method, reference).transform(new)
    mirrored = fitted(method, -reference).transform(-new)
    assert mirrored == pytest.approx(1 - made, abs=1e-9)
    assert fitted(method, reference).transform(new[:, order]) == pytest.approx(made[:, order])
    assert (made >= 0).all()
    assert (made <= 1).all()


@pytest.mark.parametrize("method", METHODS)
@given(reference=REWARDS, new=REWARDS)
def test_units_change_nothing(method, reference, new):
    made = fitted(method, reference).transform(new)
    scaled = fitted(method, 4 * reference + 32).transform(4 * new + 32)
    assert scaled == pytest.approx(made, abs=1e-9)
    if method != "pooled":
        # any increasing map is a change of unit, where only the order counts
        assert fitted(method, reference**3).transform(new**3) == pytest.approx(made, abs=1e-12)


def test_blocks_change_nothing(rng):
    rows = 2 * COMPARISONS // 64 + 3
    reference, new = rng.normal(size=(rows, 8)), rng.normal(size=(rows, 8))
    made = RewardCalibrator().fit(reference).transform(new)
    for i in (0, rows // 2, rows - 1):
        assert made[[i]] == pytest.approx(calibrated_reward(new[[i]], reference[[i]]))


@pytest.mark.parametrize("method", METHODS)
def test_state_comes_back_from_disk(method, rng, tmp_path):
    reference, _ = hierarchical(rng, 9, 4)
    calibrator = fitted(method, reference)
    calibrator.save(tmp_path / "state.npz")
    loaded = RewardCalibrator.load(tmp_path / "state.npz")
    assert vars(loaded).keys() == vars(calibrator).keys()
    new = rng.normal(size=(9, 3))
    assert (loaded.transform(new) == calibrator.transform(new)).all()
    if method == "pooled":
        assert isinstance(loaded.population_, Population)


@pytest.mark.parametrize(
    ("method", "reference", "weights", "message"),
    [
        ("empirical", [], None, r"must hold at least one prompt; got \[\]"),
        ("empirical", [[1.0], []], None, "draw for every prompt; got none at row 1"),
        ("empirical", [[1.0], [np.nan]], None, "at row 1 must be finite; got 1 non-finite"),
        ("empirical", [[1.0]], [[0.0]], "log_weights must be given for method='weighted' only"),
        ("weighted", [[1.0]], None, "log_weights must be given for .*; got None"),
        ("weighted", [[1.0, 2.0]], [[0.0]], "one entry per reference reward; got shapes"),
        ("weighted", [[1.0, 2.0]], [[0.0, np.inf]], "log_weights at row 0 must be finite"),
        ("weighted", [[1.0] * 3] * 2, [[0.0] * 3, [9.0, 0.0, 0.0]], "be >= 2.0; got 1 at row 1"),
        ("pooled", [[1.0], []], None, "must hold two draws at least; got 1"),
    ],
)
def test_bad_input_is_named(method, reference, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardCalibrator(method).fit(reference, weights)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="method must be one of .*; got 'magic'"):
        RewardCalibrator("magic")
    with pytest.raises(ValueError, match="calibrator must be fitted first"):
        RewardCalibrator().transform([[1.0]])
    calibrator = RewardCalibrator().fit([[1.0, 2.0]])
    with pytest.raises(ValueError, match="must be of the fitted prompts; got 2 rows for 1"):
        calibrator.transform([[1.0], [2.0]])
    with pytest.raises(ValueError, match="must be of the fitted prompts; .*inside=True"):
        calibrator.transform([[1.0, 3.0]], inside=True)


def test_prompts_without_variance_or_company():
    # all draws alike, and a single prompt: nothing to pool, and still no division by zero
    made = (
        RewardCalibrator("pooled").fit([[2.0, 2.0], [2.0, 2.0]]).transform([[2.0, 3.0], [1.0, 2.0]])
    )
    assert made[0, 0] == made[1, 1] == pytest.approx(0.5, abs=1e-12)
    assert made[1, 0] < 0.5 < made[0, 1]
    alone = RewardCalibrator("pooled").fit([[1.0, 2.0, 4.0]]).transform([[3.0]])
    assert 0.5 < alone[0, 0] < 1


def with_features(rng, prompts: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make prompts whose locations are known from two of their three features but for 0.3."""
    features = rng.normal(size=(prompts, 3))
    centre = features @ [1.5, -1.0, 0.0] + 0.3 * rng.normal(size=prompts)
    return features, centre[:, None], centre[:, None] + rng.normal(size=(prompts, k))


def test_a_prompt_is_left_out_of_its_own_prediction(rng):
    """The closed form equals a ridge regression on the other prompts, features scaled once."""
    features, _, rewards = with_features(rng, 30, 4)
    made = predict_locations(features, rewards)
    x = (features - features.mean(axis=0)) / features.std(axis=0)
    y = rewards.mean(axis=1)

    def brute(penalty: float) -> np.ndarray:
        found = []
        for i in range(30):
            others = np.arange(30) != i
            design = np.column_stack([np.ones(29), x[others]])
            gram = design.T @ design + penalty * np.diag([0, 1, 1, 1])
            found.append([1, *x[i]] @ np.linalg.solve(gram, design.T @ y[others]))
        return np.array(found)

    largest = np.linalg.norm(x, 2) ** 2
    tried = [brute(largest * p) for p in np.geomspace(1e-8, 1e4, 49)]
    best = min(tried, key=lambda found: np.mean((found - y) ** 2))
    assert made == pytest.approx(best, rel=1e-9)
    # a prompt without draws is predicted by all others
    rewards[7] = np.nan
    assert predict_locations(features, rewards)[7] == pytest.approx(best[7], abs=0.02)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_features_help_where_they_tell_and_do_no_harm_elsewhere(k, rng):
    features, centre, draws = with_features(rng, 600, k + 4)
    new, draws = draws[:, k:], draws[:, :k]
    rows = [row if i % 5 else [] for i, row in enumerate(draws)]  # every fifth has none
    truth = stats.norm.cdf(new - centre)

    def error(given: np.ndarray | None) -> float:
        made = RewardCalibrator("pooled").fit(rows, prompt_features=given).transform(new)
        return float(np.mean((made - truth) ** 2))

    without = error(None)
    assert error(features) < 0.6 * without
    assert error(rng.normal(size=(600, 5))) < 1.02 * without
    assert error(np.ones((600, 1))) == pytest.approx(without, rel=1e-9)


def test_features_are_saved_and_checked(rng, tmp_path):
    features, _, draws = with_features(rng, 20, 3)
    fitted = RewardCalibrator("pooled").fit(draws, prompt_features=features)
    assert fitted.trend_.std() > 0.5
    fitted.save(tmp_path / "state.npz")
    loaded = RewardCalibrator.load(tmp_path / "state.npz")
    assert (loaded.transform(draws) == fitted.transform(draws)).all()
    few = features[1:], "one row per prompt; got 19 for 20"
    for bad, message in (few, (draws * np.inf, "be finite")):
        with pytest.raises(ValueError, match=f"prompt_features must .*{message}"):
            RewardCalibrator("pooled").fit(draws, prompt_features=bad)
    with pytest.raises(ValueError, match="must be for method='pooled' only; got method='empirical"):
        RewardCalibrator().fit(draws, prompt_features=features)


def test_parameters_as_scikit_learn_reads_and_sets_them():
    made = RewardCalibrator("weighted", min_effective_sample_size=1.5)
    assert made.get_params() == {"method": "weighted", "min_effective_sample_size": 1.5}
    assert made.set_params(method="pooled") is made
    assert made.get_params() == {"method": "pooled", "min_effective_sample_size": 1.5}
    with pytest.raises(ValueError, match="method must be one of .*; got 'magic'"):
        made.set_params(method="magic")
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        made.set_params(depth=1)
