"""May the responses of a group share the computation of their prompt? Measured on the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_token_logps

logger = logging.getLogger(__name__)

# tokens of each text that is compared: past this, nothing new can go wrong but a sliding window
_LONGEST = 64
# nats by which one function's tokens may differ between two layouts of a row, by rounding. Of the
# mean, because the largest of 128 tokens is an extreme value: SmolLM2-135M in bfloat16 differs by
# 0.003 to 0.055 in the mean and by up to 0.5 in one token, with wrong positions by 0.17 to 0.48
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# nats per token by which a response may depend on its neighbour: nothing but the order of a sum
_LEAK = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@torch.no_grad()
def can_share_prompt(model: Any, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a row that holds a prompt and all its responses gives the model's own numbers.

    A group is computed in one shared row, in a row per response, and in a shared row whose first
    response is another text. Sharing is exact where the tokens of the first two agree, in the mean
    and but for rounding, and the last response does not see the first. It is not for models with a
    state that runs along the row (Mamba, RWKV, linear attention), or that take neither a mask of
    ``(s, s)`` nor positions.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Causal language model, in evaluation mode.
    rows : sequence of mapping
        Training rows; the first one gives the tokens, its texts cut to 64 tokens or to a little
        more than the model's sliding window.

    Returns
    -------
    bool
        False with a logged warning that says what was found.
    """
    group = _probe(rows[0], model)
    other = {**group, "response_ids": [group["response_ids"][0][::-1], *group["response_ids"][1:]]}
    counts = [len(r) for r in group["response_ids"]]
    try:
        shared = _logps(model, group, share=True)
        changed = _logps(model, other, share=True)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        return _refuse(f"it refuses the row: {type(error).__name__}: {error}")
    apart = (shared - _logps(model, group, share=False)).abs().mean().item()
    leaked = (shared - changed)[counts[0] :].abs().max().item()
    if not leaked <= _LEAK[model.dtype]:
        return _refuse(f"a response changes another by {leaked:.3g} nats per token")
    if not apart <= _ROUNDING[model.dtype]:
        return _refuse(f"both layouts differ by {apart:.3g} nats per token in the mean")
    return True


def _probe(row: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Make a group of two responses of two tokens or more that differ from their own reverse."""
    config = model.config.get_text_config()
    longest = max(_LONGEST, min(8 + (getattr(config, "sliding_window", None) or 0), 8192))
    prompt = row["prompt_ids"][-longest:]
    first = [*row["response_ids"][0][:longest], prompt[0]]
    last = row["response_ids"][-1][:longest]
    if first == first[::-1]:
        first = [*first, (first[-1] + 1) % config.vocab_size]
    return {"prompt_ids": prompt, "response_ids": [first, [*last, first[0]]]}


def _logps(model: Any, group: Mapping[str, Any], *, share: bool) -> torch.Tensor:
    batch = collate([group], share)
    device = next(model.parameters()).device
    return response_token_logps(model, {name: value.to(device) for name, value in batch.items()})


def _refuse(reason: str) -> bool:
    logger.warning(
        "share_prompt: set to False, because this model cannot share a prompt between responses "
        "(%s). Each response is computed with its own prompt: right, but slower.",
        reason,
    )
    return False
