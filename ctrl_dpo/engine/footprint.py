"""What a run holds in memory: bytes and bits of the weights, and of the optimiser's state."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


def weight_footprint(model: Any) -> dict[str, dict[str, float]]:
    """Measure the weights by kind of layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy, its adapter attached.

    Returns
    -------
    dict of str to dict
        For ``linear``, ``embedding``, ``other`` (norms) and ``adapter``: ``bytes`` and ``bits`` per
        weight, the float scales of 8-bit rows included. Tied weights count once.
    """
    prefix = model.base_model.prefix if hasattr(model, "get_base_model") else None
    bytes_of: dict[str, int] = defaultdict(int)
    count_of: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "adapter" if prefix is not None and prefix in name else _kind(module)
            bytes_of[kind] += parameter.nbytes + _scale_bytes(module, parameter)
            count_of[kind] += parameter.numel()
    return {
        kind: {"bytes": bytes_of[kind], "bits": 8 * bytes_of[kind] / count_of[kind]}
        for kind in bytes_of
    }


def _kind(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, torch.nn.Linear) else "other"


def _scale_bytes(module: Any, parameter: torch.nn.Parameter) -> int:
    """Return the size of the scales that an int8 weight needs; before and after its first use."""
    if parameter.dtype != torch.int8:
        return 0
    scales = module.state.SCB if module.state.SCB is not None else module.weight.SCB
    return int(scales.nbytes)


def optimizer_footprint(optimizer: Any) -> dict[str, float]:
    """Measure the state that an optimiser keeps for each weight.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        After its first update; also inside accelerate's wrapper.

    Returns
    -------
    dict of str to float
        ``bytes`` of all state tensors, and ``share_8bit``: of the numbers kept per weight, the
        share in one byte. bitsandbytes keeps tensors of under 4096 elements in 32 bits.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    total, per_weight, in_8bit = 0, 0, 0
    for parameter, state in inner.state.items():
        for value in state.values():
            if not torch.is_tensor(value):
                continue
            total += value.nbytes
            if value.numel() == parameter.numel():
                per_weight += value.numel()
                in_8bit += value.numel() * (value.dtype == torch.uint8)
    return {"bytes": total, "share_8bit": in_8bit / max(1, per_weight)}


class FootprintCallback(TrainerCallback):
    """Log the weights when training begins, and the optimiser's state after the first update."""

    def __init__(self) -> None:
        self._is_logged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log bytes and bits of the weights."""
        if state.is_world_process_zero:
            for kind, found in weight_footprint(kwargs["model"]).items():
                logger.info("weights, %s: %d bytes, %.2f bits each", kind, *found.values())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the share of optimiser state in 8 bits, once."""
        if self._is_logged or not state.is_world_process_zero:
            return
        self._is_logged = True
        found = optimizer_footprint(kwargs["optimizer"])
        logger.info(
            "optimiser state: %d bytes, %.1f %% of it in 8 bits",
            found["bytes"],
            100 * found["share_8bit"],
        )
