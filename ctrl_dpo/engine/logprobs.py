"""Log-probabilities of responses: backbone once per token, head on response tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ctrl_dpo.engine.batches import visible

# small enough that a chunk's float32 logits stay in the allocator's and the processor's caches
_CHUNK = 256


def response_logps(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    r"""Sum the log-probabilities of each response's tokens.

    .. math:: \log \pi(y|x) = \sum_t \log \pi(y_t \mid x, y_{<t})

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Causal language model.
    batch : mapping of str to Tensor
        From :func:`ctrl_dpo.engine.batches.collate`.

    Returns
    -------
    (n_responses,) float32 Tensor
        Nats per response, end token included where there is one.
    """
    owners = batch["owners"]
    token_logps = response_token_logps(model, batch)
    sums = token_logps.new_zeros(len(batch["group_of"]))
    return sums.index_add(0, owners, token_logps)


def response_token_logps(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probability of every response token, ``(n_tokens,)`` float32, nats."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=visible(batch["segments"]),
        use_cache=False,
    ).last_hidden_state
    needed = hidden.flatten(0, 1)[batch["predictors"]]
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    parts = []
    for start in range(0, len(needed), _CHUNK):
        piece = needed[start : start + _CHUNK], batch["token_ids"][start : start + _CHUNK]
        parts.append(checkpoint(_head_logps, head, config, *piece, use_reentrant=False))
    return torch.cat(parts)


def _head_logps(
    head: Any, config: Any, hidden: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Apply the head to a chunk; its logits live only here, and again in the backward pass."""
    logits = head(hidden).float()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    logps: torch.Tensor = chosen - torch.logsumexp(logits, dim=1)
    return logps
