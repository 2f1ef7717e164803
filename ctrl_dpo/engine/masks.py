"""Which token of a row sees which: responses see the prompt and themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

if TYPE_CHECKING:
    from collections.abc import Callable


def visible(
    segments: torch.Tensor, positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Return the ``(rows, 1, s, s)`` mask: True where a token may see another.

    Parameters
    ----------
    segments : (rows, s) Tensor
        0 for the prompt, one number per response, -1 for padding.
    positions : (rows, s) Tensor
        Position of each token in its own text, for ``window``.
    window : int, optional
        How far back a token sees, in positions: the place in the row says nothing.

    Returns
    -------
    (rows, 1, s, s) bool Tensor
        Causal within the prompt and within a response; responses see the prompt.
    """
    row = torch.arange(len(segments), device=segments.device).view(-1, 1, 1, 1)
    place = torch.arange(segments.shape[1], device=segments.device)
    return _rule(segments, positions, window)(row, None, place.unsqueeze(1), place)


def _rule(
    segments: torch.Tensor, positions: torch.Tensor, window: int | None
) -> Callable[..., torch.Tensor]:
    """Return the function of row, head, query and key that says what is seen."""

    def seen(row: Any, _head: Any, query: Any, key: Any) -> torch.Tensor:
        # padding sees itself: a row of the mask without any True would give NaN
        same = (segments[row, key] == 0) | (segments[row, key] == segments[row, query])
        allowed: torch.Tensor = same & (key <= query)
        if window is not None:
            allowed = allowed & (positions[row, query] - positions[row, key] < window)
        return allowed

    return seen


def attention_mask(base: Any, segments: torch.Tensor, positions: torch.Tensor) -> Any:
    """Return the mask in the form that the model takes.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        Causal language model.
    segments, positions : (rows, s) Tensor
        See :func:`visible`.

    Returns
    -------
    None, Tensor, BlockMask, or dict of str to either
        Where every row is one text, the model makes the mask itself: None for one row, else the
        usual ``(rows, s)`` mask of padding. One mask for each kind of layer where a model mixes
        them. A ``BlockMask`` where the model computes attention by FlexAttention.
    """
    if int(segments.max()) <= 1:
        return None if len(segments) == 1 else (segments >= 0).long()
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    windows = {"full_attention": None, "sliding_attention": window}
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds and kinds <= set(windows) and kinds != {"full_attention"}:
        return {kind: _as_taken(base, segments, positions, windows[kind]) for kind in windows}
    # a model with a window and no kinds of layers has it in all of them (Mistral, Phi-3)
    return _as_taken(base, segments, positions, None if kinds else window)


def _as_taken(
    base: Any, segments: torch.Tensor, positions: torch.Tensor, window: int | None
) -> Any:
    """Return blocks for FlexAttention, what is added for the plain implementation, else a mask."""
    implementation = base.config._attn_implementation
    if implementation == "flex_attention":
        rows, width = segments.shape
        rule = _rule(segments, positions, window)
        # blocks that no token sees into, such as all of another response, are never computed
        return create_block_mask(rule, rows, None, width, width, device=str(segments.device))
    mask = visible(segments, positions, window)
    if implementation != "eager":
        return mask
    lowest = torch.finfo(base.dtype).min
    return torch.zeros_like(mask, dtype=base.dtype).masked_fill(~mask, lowest)
