"""Inference-aware offline preference optimisation.

Rewards are calibrated under the reference policy, transformed for the inference-time procedure the
model will serve under, and fitted offline by a contrastive trainer. Names load on first use, so that
``import ctrl_dpo`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ctrl_dpo.theory.procedures": ["SingleDraw", "BestOfN", "WorstOfN", "OrderStatistic"],
    "ctrl_dpo.theory.optimum": ["optimal_policy"],
    "ctrl_dpo.theory.policies": ["policy_of", "match_kl", "frontier"],
    "ctrl_dpo.theory.discrete": ["optimal_discrete_policy"],
    "ctrl_dpo.transform": ["Identity", "Log", "NormalQuantile", "Exponential", "Optimal"],
    "ctrl_dpo.calibrate": ["calibrated_reward", "RewardCalibrator"],
    "ctrl_dpo.relabel": ["relabel", "pairs"],
    "ctrl_dpo.data.layouts": ["to_groups"],
    "ctrl_dpo.config": ["CTRLDPOConfig"],
    "ctrl_dpo.train": ["CTRLDPOTrainer"],
    "ctrl_dpo.evaluate": ["inference_win_rate", "kl_divergence", "attainment"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` and return the attribute (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ctrl_dpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return [*__all__, "__version__"]
