"""Which token of a row sees which: responses see the prompt and themselves."""

from __future__ import annotations

from typing import Any

import torch


def visible(
    segments: torch.Tensor, positions: torch.Tensor | None = None, window: int | None = None
) -> torch.Tensor:
    """Return the ``(rows, 1, s, s)`` mask: True where a token may see another.

    Parameters
    ----------
    segments : (rows, s) Tensor
        0 for the prompt, one number per response, -1 for padding.
    positions : (rows, s) Tensor, optional
        Position of each token in its own text, for ``window``.
    window : int, optional
        How far back a token sees, in positions: the place in the row says nothing.

    Returns
    -------
    (rows, 1, s, s) bool Tensor
        Causal within the prompt and within a response; responses see the prompt.
    """
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    causal = torch.ones(segments.shape[1], segments.shape[1], device=segments.device).tril().bool()
    # padding sees itself: a row of the mask without any True would give NaN
    seen = ((key == 0) | (key == query)) & causal
    if window is not None and positions is not None:
        seen &= positions.unsqueeze(2) - positions.unsqueeze(1) < window
    return seen.unsqueeze(1)


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
    None, Tensor or dict of str to Tensor
        Where every row is one text, the model makes the mask itself: None for one row, else the
        usual ``(rows, s)`` mask of padding. One mask for each kind of layer where a model mixes
        them.
    """
    if int(segments.max()) <= 1:
        return None if len(segments) == 1 else (segments >= 0).long()
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    windows = {"full_attention": None, "sliding_attention": window}
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds and kinds <= set(windows) and kinds != {"full_attention"}:
        return {
            kind: _as_taken(visible(segments, positions, windows[kind]), base) for kind in windows
        }
    # a model with a window and no kinds of layers has it in all of them (Mistral, Phi-3)
    return _as_taken(visible(segments, positions, None if kinds else window), base)


def _as_taken(mask: torch.Tensor, base: Any) -> torch.Tensor:
    """Return a bool mask, or for the plain implementation of attention one that is added."""
    if base.config._attn_implementation != "eager":
        return mask
    lowest = torch.finfo(base.dtype).min
    return torch.zeros_like(mask, dtype=base.dtype).masked_fill(~mask, lowest)
