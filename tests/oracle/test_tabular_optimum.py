"""The central test: a language model that can be enumerated reaches the exact optimum.

`python benchmarks/tabular_attainment.py` prints the figures, and fits draws as groups and as pairs
for every loss and procedure; here each loss meets each procedure once, in groups or in pairs, of
half as many draws.
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


@pytest.mark.parametrize("procedure", BETAS)
@pytest.mark.parametrize(("loss", "anchor"), FITS)
def test_exact_labels_reach_the_optimum(loss, anchor, procedure, tmp_path):
    assert exact_share(tmp_path, loss, anchor, procedure) > 0.999


@pytest.mark.parametrize(("loss", "procedure"), DRAWN)
def test_draws_come_within_a_hundredth(loss, procedure, tmp_path):
    form = "groups" if (loss, procedure) in GROUPS else "pairs"
    assert drawn_share(tmp_path, loss, form, procedure, groups=96) > 0.99


@pytest.mark.parametrize("beta", HARD_BETAS[2:])
def test_hard_labels_do_not_at_a_small_kl(beta, tmp_path):
    """DPO on the same exact data: below 2 nats it gains less than is possible at the KL it paid."""
    share, kl = hard_label_share(tmp_path, beta, "best_of_4", steps=100)
    assert kl < 2
    assert 0.8 < share < 0.97
