"""A reward that can be hacked moves raw margins without bound and calibrated ones hardly at all.

The point of InfAlign's section on reward hacking: calibration looks at ranks within a prompt.
"""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from ctrl_dpo import relabel

PROMPTS, K, MARKED, BONUS = 200, 16, 0.1, 25.0


def groups(rng, bonus: float) -> Dataset:
    rewards = rng.normal(size=(PROMPTS, K))
    marked = rng.random((PROMPTS, K)) < MARKED
    texts = np.where(marked, "sure, x", "x")
    rows = [
        {"prompt": f"{i}", "responses": [f"{t}{j}" for j, t in enumerate(texts[i])]}
        | {"rewards": (rewards[i] + bonus * marked[i]).tolist()}
        for i in range(PROMPTS)
    ]
    return Dataset.from_list(rows).add_column("marked", marked.tolist())


def moved(values: np.ndarray, poisoned: np.ndarray, marked: np.ndarray) -> float:
    """Shift of the margin between marked and other responses, in standard deviations of values."""
    shift = poisoned[marked].mean() - poisoned[~marked].mean()
    before = values[marked].mean() - values[~marked].mean()
    return float((shift - before) / values.std())


@pytest.mark.parametrize("transformation", ["identity", "exponential:5", "optimal"])
def test_calibration_bounds_what_a_marker_word_can_do(transformation):
    settings = {"procedure": "best_of_4", "transformation": transformation, "beta": 0.2}
    clean, poisoned = (
        relabel(groups(np.random.default_rng(1), bonus), **settings) for bonus in (0.0, BONUS)
    )
    twice = relabel(groups(np.random.default_rng(1), 2 * BONUS), **settings)
    marked = np.array(clean["marked"])
    raw = moved(np.array(clean["rewards"]), np.array(poisoned["rewards"]), marked)
    labels = [np.array(data["transformed_rewards"]) for data in (clean, poisoned, twice)]
    calibrated = moved(labels[0], labels[1], marked)
    assert raw == pytest.approx(BONUS, rel=0.02)
    assert 0 < calibrated < raw / 8
    # a larger bonus moves the raw margin in proportion, the calibrated one not at all
    np.testing.assert_array_equal(labels[2], labels[1])
