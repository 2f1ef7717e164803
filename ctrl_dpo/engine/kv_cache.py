"""Key/value cache for decoding: few allocations, the prompt computed once for all its draws."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "ctrl_dpo_decode"


_BLOCK = 32


class BlockLayer(CacheLayerMixin):
    """Keys and values of one layer in contiguous buffers that grow by blocks of positions.

    Attention reads the whole buffer and the mask hides the positions not yet filled: CPU matrix
    products copy their operands unless they are contiguous, which a view of the filled positions
    is not. The first pass is the prompt pass: its rows are stored ``copies`` times each, so that
    the draws of a prompt start from one computation.
    """

    def __init__(self, copies: int, capacity: int) -> None:
        super().__init__()
        self.copies, self.capacity, self.length = copies, capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Store the prompt pass."""
        self.length = key_states.shape[2]
        self.keys = self._room(key_states, self.copies)
        self.values = self._room(value_states, self.copies)
        self.is_initialized = True

    def allocated(self, length: int) -> int:
        """Return the buffer's positions once ``length`` are filled."""
        return min(-(-length // _BLOCK) * _BLOCK, self.capacity)

    def _room(self, states: torch.Tensor, copies: int = 1) -> torch.Tensor:
        """Copy states into a buffer with room for the current length; the rest is zero."""
        rows, groups, length, width = states.shape
        room = self.allocated(self.length)
        buffer = states.new_zeros(rows, copies, groups, room, width)
        buffer[:, :, :, :length] = states.unsqueeze(1)
        return buffer.flatten(0, 1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append positions in place; return the buffers (the prompt pass: its own states)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = self._room(self.keys), self._room(self.values)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys, self.values

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all rows but these, in this order."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of key positions a mask must cover, and their offset."""
        if not self.is_initialized:
            return query_length, 0
        return self.allocated(self.length + query_length), 0

    def get_seq_length(self) -> int:
        """Return how many positions are filled."""
        return self.length

    def get_max_length(self) -> int:
        """Return the capacity in positions."""
        return self.capacity


def block_cache(n_layers: int, copies: int, capacity: int) -> Cache:
    """Build a cache of :class:`BlockLayer`, one per decoder layer."""
    return Cache(layers=[BlockLayer(copies, capacity) for _ in range(n_layers)])


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with one new position per row, as two products over grouped heads.

    The fused CPU kernel is made for long queries: at one query position it takes five times as
    long. Query heads that share a key head are the rows of one small product, so keys are not
    repeated. Longer queries go to the stock kernel.

    Parameters
    ----------
    module : torch.nn.Module
        Attention layer, as transformers passes it.
    query : (b, n_heads, q, d) Tensor
        Queries.
    key, value : (b, n_key_heads, t, d) Tensor
        Keys and values of all positions so far.
    attention_mask : (b, 1, q, t) bool Tensor or None
        True where a key may be seen.
    scaling : float, optional
        Factor on the products; ``d ** -0.5`` by default.
    **kwargs
        Passed on to the stock kernel; soft-capping is left to it.

    Returns
    -------
    ((b, q, n_heads, d) Tensor, None)
        The attended values; attention weights are not kept.
    """
    rows, heads, length, width = query.shape
    if length != 1 or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups = key.shape[1]
    grouped = query.view(rows, groups, heads // groups, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = (grouped * scale) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(rows, 1, heads, value.shape[-1]), None


def use_decode_attention(model: Any) -> None:
    """Switch a model to :func:`decode_attention`."""
    _base(model).set_attn_implementation(ATTENTION)


def use_training_attention(model: Any) -> None:
    """Switch a model back to the attention it is trained with."""
    _base(model).set_attn_implementation("sdpa")


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


AttentionInterface.register(ATTENTION, decode_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
