"""Log-probabilities of responses: backbone once per token, head on response tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ctrl_dpo.engine.masks import attention_mask

# small enough that a chunk's float32 logits stay in the allocator's and the processor's caches
_CHUNK = 256
Batch = Mapping[str, torch.Tensor]


def response_logps(model: Any, batch: Batch) -> torch.Tensor:
    r"""Sum the log-probabilities of each response's tokens.

    .. math:: \log \pi(y|x) = \sum_t \log \pi(y_t \mid x, y_{<t})

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Causal language model, also wrapped for several processes.
    batch : mapping of str to Tensor
        From :func:`ctrl_dpo.engine.batches.collate`.

    Returns
    -------
    (n_responses,) float32 Tensor
        Nats per response, end token included where there is one.
    """
    token_logps = response_token_logps(model, batch)
    sums = token_logps.new_zeros(len(batch["group_of"]))
    return sums.index_add(0, batch["owners"], token_logps)


def response_token_logps(model: Any, batch: Batch) -> torch.Tensor:
    """Return the log-probability of every response token, ``(n_tokens,)`` float32, nats.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Causal language model.
    batch : mapping of str to Tensor
        From :func:`ctrl_dpo.engine.batches.collate`.

    Returns
    -------
    (n_tokens,) float32 Tensor
        In the order of the batch's ``token_ids``.

    Notes
    -----
    On a processor rows are computed one by one, without padding: wider products gain nothing there,
    and a row's numbers then do not depend on its neighbours, so that policy and reference agree to
    the last bit before the first update.
    """
    if batch["input_ids"].device.type == "cpu":
        return torch.cat([_token_logps(model, row) for row in _single_rows(batch)])
    return _token_logps(model, batch)


def _single_rows(batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """Cut a batch into its rows, each at its own length."""
    width = batch["input_ids"].shape[1]
    lengths = (batch["segments"] >= 0).sum(dim=1).tolist()
    counts = torch.bincount(batch["predictors"] // width, minlength=len(lengths)).tolist()
    tokens = torch.split(batch["token_ids"], counts)
    places = torch.split(batch["predictors"] % width, counts)
    for i, length in enumerate(lengths):
        row = {
            name: batch[name][i : i + 1, :length]
            for name in ("input_ids", "position_ids", "segments")
        }
        yield row | {"token_ids": tokens[i], "predictors": places[i]}


def _token_logps(model: Any, batch: Batch) -> torch.Tensor:
    """Compute the rows of a batch together."""
    base = causal_model(model)
    with _last_hidden_state(base) as found:
        # through the model's own forward, on which wrappers for several processes rely; its head
        # is applied to one token only
        model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=attention_mask(base, batch["segments"], batch["position_ids"]),
            use_cache=False,
            logits_to_keep=1,
        )
    needed = found[0].flatten(0, 1)[batch["predictors"]]
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    parts = []
    for start in range(0, len(needed), _CHUNK):
        piece = needed[start : start + _CHUNK], batch["token_ids"][start : start + _CHUNK]
        if torch.is_grad_enabled():
            parts.append(checkpoint(_head_logps, head, config, *piece, use_reentrant=False))
        else:
            parts.append(_head_logps(head, config, *piece))
    return torch.cat(parts)


def causal_model(model: Any) -> Any:
    """Return the causal language model inside wrappers and adapters."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def _last_hidden_state(base: Any) -> Iterator[list[torch.Tensor]]:
    """Catch what the backbone returns during a forward pass."""
    found: list[torch.Tensor] = []
    hook = base.base_model.register_forward_hook(lambda _m, _args, out: found.append(out[0]))
    try:
        yield found
    finally:
        hook.remove()


def _head_logps(
    head: Any, config: Any, hidden: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Apply the head to a chunk; its logits live only here, and again in the backward pass."""
    logits = scaled_logits(head(hidden).float(), config)
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    logps: torch.Tensor = chosen - torch.logsumexp(logits, dim=1)
    return logps


def scaled_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Apply what some architectures do to logits: a factor (Cohere), a divisor (Granite), a cap."""
    factor = getattr(config, "logit_scale", None)
    if factor is not None:
        logits = logits * factor
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
