"""Key/value cache for decoding: few allocations, a prompt held once for all its draws."""

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
    """Keys and values of one layer: those of the prompts, and those of each draw.

    The first pass is the prompt pass. Its keys and values are held once for the ``copies`` draws of
    a prompt: memory and reads of a long prompt are shared, and its product with the queries of all
    draws is one matrix product. The draws' own are contiguous buffers that grow by blocks of
    positions. Attention reads the whole buffer and the mask hides the positions not yet filled: CPU
    matrix products copy their operands unless they are contiguous, which a view of the filled
    positions is not.
    """

    def __init__(self, copies: int, capacity: int) -> None:
        super().__init__()
        self.copies, self.capacity, self.length = copies, capacity, 0
        self.prompt_keys: torch.Tensor
        self.prompt_values: torch.Tensor
        self.places: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Store the prompt pass."""
        self.prompt_keys, self.prompt_values = key_states, value_states
        n_rows = len(key_states) * self.copies
        # of each row, its place among all draws of the prompts that are held
        self.places = torch.arange(n_rows, device=key_states.device)
        self.keys, self.values = (
            states.new_empty(n_rows, states.shape[1], 0, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    @property
    def prompt_length(self) -> int:
        """Positions of the prompts, padding included."""
        return self.prompt_keys.shape[2] if self.is_initialized else 0

    def allocated(self, length: int) -> int:
        """Return the positions a mask covers once ``length`` are filled."""
        own = -(-(length - self.prompt_length) // _BLOCK) * _BLOCK
        return min(self.prompt_length + own, self.capacity)

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        """Copy states into a buffer with room for the current length; the rest is zero."""
        rows, groups, length, width = states.shape
        room = self.allocated(self.length) - self.prompt_length
        buffer = states.new_zeros(rows, groups, room, width)
        buffer[:, :, :length] = states
        return buffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append positions in place; return the draws' own (the prompt pass: its own states)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.length = key_states.shape[2]
            return key_states, value_states
        start = self.length - self.prompt_length
        self.length += key_states.shape[2]
        if self.length > self.prompt_length + self.keys.shape[2]:
            self.keys, self.values = self._room(self.keys), self._room(self.values)
        self.keys[:, :, start : start + key_states.shape[2]] = key_states
        self.values[:, :, start : start + key_states.shape[2]] = value_states
        return self.keys, self.values

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all rows but these, in this order, and the prompts without any."""
        self.keys, self.values = self.keys[rows], self.values[rows]
        prompts, mine = torch.unique(self.places[rows] // self.copies, return_inverse=True)
        self.places = mine * self.copies + self.places[rows] % self.copies
        if len(prompts) < len(self.prompt_keys):
            self.prompt_keys = self.prompt_keys[prompts]
            self.prompt_values = self.prompt_values[prompts]

    def times_prompt(self, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Multiply each row by the states of its prompt, all draws of a prompt in one product.

        Parameters
        ----------
        rows : (b, groups, n, d) Tensor
            One matrix per row and group of heads.
        states : (n_prompts, groups, d, e) Tensor
            Of the prompts.

        Returns
        -------
        (b, groups, n, e) Tensor
            The products.
        """
        _, groups, n, d = rows.shape
        n_prompts = len(states)
        complete = len(rows) == n_prompts * self.copies  # then the places are in order
        spread = rows
        if not complete:
            spread = rows.new_zeros(n_prompts * self.copies, groups, n, d)
            spread[self.places] = rows
        spread = spread.view(n_prompts, self.copies, groups, n, d).transpose(1, 2)
        product = spread.reshape(n_prompts, groups, self.copies * n, d) @ states
        product = product.view(n_prompts, groups, self.copies, n, -1).transpose(1, 2)
        product = product.flatten(0, 1)
        return product if complete else product[self.places]

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
    decode_cache: Cache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with one new position per row, as products over grouped heads.

    The fused CPU kernel is made for long queries: at one query position it takes five times as
    long. Query heads that share a key head are the rows of one small product, so keys are not
    repeated, and the draws of a prompt those of one larger product with its keys, so that a prompt
    is read once for all of them. The prompt pass goes to the stock kernel.

    Parameters
    ----------
    module : torch.nn.Module
        Attention layer, as transformers passes it.
    query : (b, n_heads, q, d) Tensor
        Queries.
    key, value : (b, n_key_heads, t, d) Tensor
        Keys and values of the draws, or in the prompt pass of the prompts.
    attention_mask : (b, 1, q, t) bool Tensor or None
        True where a key may be seen.
    scaling : float, optional
        Factor on the products; ``d ** -0.5`` by default.
    decode_cache : Cache, optional
        From :func:`block_cache`, which holds the prompts; passed through the model's forward call.
    **kwargs
        Passed on to the stock kernel; soft-capping is left to it.

    Returns
    -------
    ((b, q, n_heads, d) Tensor, None)
        The attended values; attention weights are not kept.
    """
    rows, heads, _, width = query.shape
    layer = None if decode_cache is None else decode_cache.layers[module.layer_idx]
    if layer is None or layer.length == layer.prompt_length or kwargs.get("softcap") is not None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    groups = key.shape[1]
    grouped = query.view(rows, groups, heads // groups, width)
    grouped = grouped * (width**-0.5 if scaling is None else scaling)
    shared = layer.times_prompt(grouped, layer.prompt_keys.transpose(-1, -2))
    scores = torch.cat([shared, grouped @ key.transpose(-1, -2)], dim=-1)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    start = layer.prompt_length
    made = layer.times_prompt(weights[..., :start], layer.prompt_values)
    made = made + weights[..., start:] @ value
    return made.reshape(rows, 1, heads, value.shape[-1]), None


def use_decode_attention(model: Any) -> None:
    """Switch a model to :func:`decode_attention`."""
    base = _base(model)
    if base.config._attn_implementation != ATTENTION:
        base._training_attention = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION)


def training_attention(model: Any) -> str:
    """Return the attention a model is trained with, whichever is on."""
    base = _base(model)
    return str(getattr(base, "_training_attention", base.config._attn_implementation))


def use_training_attention(model: Any) -> None:
    """Switch a model back to the attention it is trained with."""
    _base(model).set_attn_implementation(training_attention(model))


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


AttentionInterface.register(ATTENTION, decode_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
