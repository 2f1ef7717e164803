"""How much memory will training take? A bound before the first update, checked on the machine."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ctrl_dpo.engine.batches import collate, row_lengths
from ctrl_dpo.engine.logprobs import HEAD_TOKENS, causal_model, response_logps

logger = logging.getLogger(__name__)

_GIB = 2**30
# tokens of the row on which activations are measured
_PROBE = 256
# bytes of optimiser state per weight: two moments in float32, or in 8 bits with their scales
_STATE_32, _STATE_8 = 8.0, 2.1
# logits of a chunk, their float32 copy, its exponentials and both gradients
_HEAD_COPIES = 5
# what the allocator keeps beyond what is alive, and gradients that pass through the backward pass
_ALLOCATOR = 1.35
# glibc's setting: buffers from this size on are given back to the system when they are freed
_MMAP = "MALLOC_MMAP_THRESHOLD_"


def memory_bound(model: Any, rows: Sequence[Mapping[str, Any]], args: Any) -> dict[str, int]:
    r"""Bound the memory of training beyond the weights, from the model's own activations.

    .. math:: G + O + 1.35 \, (a \, T + V)

    with G the gradients, O the optimiser's state, a the bytes that one token keeps for the backward
    pass (counted in one pass over one row), T the tokens of the largest pass, V the logits
    of one chunk of the head. With activation checkpointing a token keeps its input of each layer,
    and one layer of one row is alive at a time.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Policy, as it will be trained.
    rows : sequence of mapping
        Training rows.
    args : CTRLDPOConfig
        Its batch size, ``max_tokens_per_pass``, ``share_prompt``, ``optim`` and
        ``activation_checkpointing``.

    Returns
    -------
    dict of str to int
        ``weights`` (which are there already), ``gradients``, ``optimiser``, ``activations`` and
        ``head``, bytes on one device.

    Notes
    -----
    The factor 1.35 covers what the allocator holds but does not use, 1.24 times at most in what was
    measured. With activation checkpointing on a processor glibc can hold more, and the bound can be
    passed (1.2 to 2.4 times, in all three cases measured): freed buffers between live ones are not
    returned. With ``MALLOC_MMAP_THRESHOLD_=65536`` in the environment the bound held in the two
    cases tried, and updates took longer (``benchmarks/memory_bound.py``).
    """
    base = causal_model(model)
    config = base.config.get_text_config()
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    state = _STATE_8 if "8bit" in args.optim else _STATE_32
    share = args.share_prompt
    lengths = sorted((_length(row, share) for row in rows), reverse=True)
    size, limit = args.per_device_train_batch_size, args.max_tokens_per_pass
    tokens = lengths[0] * size
    if limit is not None:
        tokens = max(lengths[0], min(tokens, limit))
    one_row = lengths[0] if base.device.type == "cpu" else tokens
    probe = min(rows, key=lambda row: abs(_length(row, share) - _PROBE))
    per_token = activation_bytes(model, probe, share) / _length(probe, share)
    kept = per_token * tokens
    if args.activation_checkpointing:
        layers = config.num_hidden_layers
        inputs = config.hidden_size * base.dtype.itemsize * layers
        kept = inputs * tokens + per_token / layers * one_row
    logits = _HEAD_COPIES * 4 * HEAD_TOKENS * config.vocab_size
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimiser": round(state * count),
        "activations": round(_ALLOCATOR * kept),
        "head": round(_ALLOCATOR * logits),
    }


def activation_bytes(model: Any, row: Mapping[str, Any], share_prompt: bool) -> int:
    """Count the bytes that the backward pass of one row will need, weights aside.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Policy; left in the mode it was in.
    row : mapping
        Training row.
    share_prompt : bool
        Row layout.

    Returns
    -------
    int
        Bytes of the distinct storages that are kept.
    """
    batch = collate([{k: row[k] for k in ("prompt_ids", "response_ids")}], share_prompt)
    device = next(model.parameters()).device
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: WeakSet[_Kept] = WeakSet()
    was_training = model.training
    model.eval()  # every activation is then kept, whatever is recomputed in training
    with torch.enable_grad(), saved_tensors_hooks(_counter(kept), lambda saved: saved.tensor):
        alive = response_logps(model, {name: value.to(device) for name, value in batch.items()})
    model.train(was_training)
    # only storages that are alive together have distinct addresses: one freed on the way (the
    # head's logits) may leave its address to another, and is no longer in the set
    storages = [saved.tensor.untyped_storage() for saved in kept]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del alive
    return sum(size for place, size in sizes.items() if place not in weights)


class _Kept:
    """A tensor that the graph keeps; it lives as long as the graph needs it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # with its history, a node's own output would keep that node, and itself, for good
        self.tensor = tensor.detach()


def _counter(kept: WeakSet[_Kept]) -> Callable[[torch.Tensor], _Kept]:
    def keep(tensor: torch.Tensor) -> _Kept:
        saved = _Kept(tensor)
        kept.add(saved)
        return saved

    return keep


def _length(row: Mapping[str, Any], share_prompt: bool) -> int:
    """Count the tokens of a group, with those that its own rows are padded by."""
    lengths = row_lengths(row, share_prompt)
    return len(lengths) * max(lengths)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


class MemoryCallback(TrainerCallback):
    """Log the bound when training begins; warn, with what lowers it, where it is not there."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the bound with the memory that is free."""
        model = kwargs["model"]
        if any(isinstance(p, DTensor) for p in model.parameters()):
            logger.info("memory: no bound is made where weights are sharded over processes")
            return
        device = next(model.parameters()).device
        free = free_memory(device)
        bound = memory_bound(model, kwargs["train_dataloader"].dataset, args)
        needed = sum(size for part, size in bound.items() if part != "weights")
        parts = ", ".join(f"{part} {size / _GIB:.2f}" for part, size in bound.items())
        logger.info("memory: at most %.2f GiB beyond the weights (%s)", needed / _GIB, parts)
        glibc = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
        if args.activation_checkpointing and glibc and _MMAP not in os.environ:
            logger.info(
                "memory: with activation checkpointing glibc may hold more than that; %s=65536 in "
                "the environment avoids it, and is slower",
                _MMAP,
            )
        if needed > free:
            logger.warning(
                "memory: training may take %.2f GiB beyond the weights, and %.2f GiB are free. "
                "To lower it: %s.",
                needed / _GIB,
                free / _GIB,
                _remedy(bound, args),
            )


def _remedy(bound: Mapping[str, int], args: Any) -> str:
    """Name the setting that lowers the largest part."""
    if bound["gradients"] + bound["optimiser"] > bound["activations"]:
        return "a smaller lora_r, or optim=adamw_8bit"
    several = args.per_device_train_batch_size > 1
    remedies = [] if args.activation_checkpointing else ["activation_checkpointing=True"]
    if args.max_tokens_per_pass is None and several:
        remedies.append("a smaller per_device_train_batch_size")
    elif args.max_tokens_per_pass != 1 and several:
        remedies.append("a smaller max_tokens_per_pass, down to a group in each")
    if remedies:
        return ", ".join(remedies)
    return "a smaller max_prompt_length or max_response_length"
