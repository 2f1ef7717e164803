"""Log-probabilities of responses: backbone once per token, head on response tokens only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ctrl_dpo.engine.masks import attention_mask

# small enough that a chunk's float32 logits stay in the allocator's and the processor's caches
HEAD_TOKENS = 256
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
    sums = token_logps.new_zeros(len(batch["lengths"]))
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
    with _logps_for_logits(base, batch):
        # through the model's own forward, on which wrappers for several processes rely
        logps: torch.Tensor = model(**_forward_arguments(base, batch)).logits
    return logps


def causal_model(model: Any) -> Any:
    """Return the causal language model inside wrappers and adapters."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _forward_arguments(base: Any, batch: Batch) -> dict[str, Any]:
    """Build what the model takes; one without positions (RWKV, Mamba) counts them itself."""
    segments, positions = batch["segments"], batch["position_ids"]
    arguments = {
        "input_ids": batch["input_ids"],
        "position_ids": positions,
        "attention_mask": attention_mask(base, segments, positions),
        "use_cache": False,
    }
    taken = inspect.signature(base.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in taken}


@contextmanager
def _logps_for_logits(base: Any, batch: Batch) -> Iterator[None]:
    """Make a forward pass return log-probabilities where its logits would be.

    Sharded weights are whole only inside the forward pass, and are gathered again in the backward
    pass only for what the forward pass returned: the head's products are made, and leave, there.
    """
    found: list[torch.Tensor] = []

    def take(_module: Any, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
        found.append(args[0])
        return args[0][:, :0]  # the model gives its head no token

    def replace(_module: Any, _args: Any, output: Any) -> Any:
        before_head.remove()
        output.logits = _chunked_logps(base, found[0].flatten(0, 1)[batch["predictors"]], batch)
        return output

    before_head = base.get_output_embeddings().register_forward_pre_hook(take)
    # before the hook that shards the weights again
    after_model = base.register_forward_hook(replace, prepend=True)
    try:
        yield
    finally:
        before_head.remove()
        after_model.remove()


def _chunked_logps(base: Any, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the log-probabilities of the batch's tokens from the outputs that predict them."""
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    trained = any(p.requires_grad for p in head.parameters())
    parts = []
    for start in range(0, len(hidden), HEAD_TOKENS):
        piece = hidden[start : start + HEAD_TOKENS], batch["token_ids"][start : start + HEAD_TOKENS]
        if not torch.is_grad_enabled():
            parts.append(_head_logps(head, config, *piece))
        elif trained:
            parts.append(checkpoint(_head_logps, head, config, *piece, use_reentrant=False))
        else:
            parts.append(_FrozenHeadLogps.apply(head, config, *piece))  # type: ignore[no-untyped-call]
    return torch.cat(parts)


def _head_logps(
    head: Any, config: Any, hidden: torch.Tensor, token_ids: torch.Tensor
) -> torch.Tensor:
    """Apply the head to a chunk; its logits live only here."""
    logits = scaled_logits(head(hidden).float(), config)
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    logps: torch.Tensor = chosen - torch.logsumexp(logits, dim=1)
    return logps


class _FrozenHeadLogps(torch.autograd.Function):
    """Take the gradient of each token's log-probability at once, while its logits exist.

    A token's log-probability depends on its own hidden state only, so its gradient is one vector,
    by which the backward pass multiplies: two products with the head instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, head: Any, config: Any, hidden: torch.Tensor, token_ids: torch.Tensor
    ) -> torch.Tensor:
        with torch.enable_grad():
            states = hidden.detach().requires_grad_()
            logps = _head_logps(head, config, states, token_ids)
            torch.autograd.backward(logps.sum())
        ctx.save_for_backward(states.grad)
        return logps.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return None, None, (grad.unsqueeze(1) * slopes).to(slopes.dtype), None


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
