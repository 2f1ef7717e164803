"""The central test: a language model that can be enumerated reaches the exact optimum.

`python benchmarks/tabular_attainment.py` prints the figures, and fits draws as groups and as pairs
for every loss and procedure; here each loss meets each procedure once, in groups or in pairs.
"""

from __future__ import annotations

import pytest
from tabular import (
    BETAS,
    FITS,
    HARD_BETAS,
    LOSSES,
    drawn_share,
    exact_share,
    hard_label_share,
)

GROUPS = {("squared", "best_of_4"), ("softmax", "single_draw"), ("soft_label", "worst_of_4")}
DRAWN = [(loss, procedure) for loss in LOSSES for procedure in BETAS]

# long fits, of what other tests cover
pytestmark = pytest.mark.no_cover


@pytest.mark.parametrize("procedure", BETAS)
@pytest.mark.parametrize(("loss", "anchor"), FITS)
def test_exact_labels_reach_the_optimum(loss, anchor, procedure, tmp_path):
    assert exact_share(tmp_path, loss, anchor, procedure) > 0.999


@pytest.mark.parametrize(("loss", "procedure"), DRAWN)
def test_draws_come_within_a_hundredth(loss, procedure, tmp_path):
    form = "groups" if (loss, procedure) in GROUPS else "pairs"
    assert drawn_share(tmp_path, loss, form, procedure) > 0.99


def test_hard_labels_do_not_whatever_their_beta(tmp_path):
    """DPO on the same exact data, its beta tuned: at its own KL it stays below the optimum."""
    found = [hard_label_share(tmp_path / str(b), b, "best_of_4", 100)[0] for b in HARD_BETAS]
    assert 0.5 < max(found) < 0.97
