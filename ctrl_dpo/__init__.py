"""Inference-aware offline preference optimisation.

Rewards are calibrated under the reference policy, transformed for the inference-time procedure the
model will serve under, and fitted offline by a contrastive trainer. Names load on first use, so
that ``import ctrl_dpo`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# the one function named like its module: bound now, because a later import would bind the module
from ctrl_dpo.relabel import relabel

if TYPE_CHECKING:
    from ctrl_dpo.calibrate import RewardCalibrator, calibrated_reward
    from ctrl_dpo.config import CTRLDPOConfig
    from ctrl_dpo.data.layouts import to_groups
    from ctrl_dpo.evaluate import attainment, inference_win_rate, kl_divergence
    from ctrl_dpo.relabel import pairs
    from ctrl_dpo.theory.discrete import optimal_discrete_policy
    from ctrl_dpo.theory.optimum import optimal_policy
    from ctrl_dpo.theory.policies import frontier, match_kl, policy_of
    from ctrl_dpo.theory.procedures import BestOfN, OrderStatistic, SingleDraw, WorstOfN
    from ctrl_dpo.train import CTRLDPOTrainer
    from ctrl_dpo.transform import Exponential, Identity, Log, NormalQuantile, Optimal

__version__ = "0.1.0"

_HOMES = {
    "ctrl_dpo.theory.procedures": ["SingleDraw", "BestOfN", "WorstOfN", "OrderStatistic"],
    "ctrl_dpo.theory.optimum": ["optimal_policy"],
    "ctrl_dpo.theory.policies": ["policy_of", "match_kl", "frontier"],
    "ctrl_dpo.theory.discrete": ["optimal_discrete_policy"],
    "ctrl_dpo.transform": ["Identity", "Log", "NormalQuantile", "Exponential", "Optimal"],
    "ctrl_dpo.calibrate": ["calibrated_reward", "RewardCalibrator"],
    "ctrl_dpo.relabel": ["pairs"],
    "ctrl_dpo.data.layouts": ["to_groups"],
    "ctrl_dpo.config": ["CTRLDPOConfig"],
    "ctrl_dpo.train": ["CTRLDPOTrainer"],
    "ctrl_dpo.evaluate": ["inference_win_rate", "kl_divergence", "attainment"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BestOfN",
    "CTRLDPOConfig",
    "CTRLDPOTrainer",
    "Exponential",
    "Identity",
    "Log",
    "NormalQuantile",
    "Optimal",
    "OrderStatistic",
    "RewardCalibrator",
    "SingleDraw",
    "WorstOfN",
    "attainment",
    "calibrated_reward",
    "frontier",
    "inference_win_rate",
    "kl_divergence",
    "match_kl",
    "optimal_discrete_policy",
    "optimal_policy",
    "pairs",
    "policy_of",
    "relabel",
    "to_groups",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` and return the attribute (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ctrl_dpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return [*__all__, "__version__"]
