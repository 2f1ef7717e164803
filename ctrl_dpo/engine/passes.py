"""Passes: the parts of a micro-batch that are computed together, with next to no padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ctrl_dpo.engine.batches import collate, row_lengths

# share of a pass's tokens that may be padding
_PADDING = 0.05
# tokens of a pass by default: on a processor more than a group at a time is not faster
_TOKENS_ON_CPU, _TOKENS = 1, 16384
# batches in a pool that is sorted by length: more sort better, fewer mix better
_POOL = 50


def default_tokens(device: torch.device) -> int:
    """Return the limit of a pass in tokens where none is set."""
    return _TOKENS_ON_CPU if device.type == "cpu" else _TOKENS


def collate_passes(
    groups: Sequence[Mapping[str, Any]], share_prompt: bool, max_tokens: int | None
) -> dict[str, Any]:
    """Lay a micro-batch out as passes, each of which is one forward and backward pass.

    Parameters
    ----------
    groups : sequence of mapping
        Training rows, see :func:`ctrl_dpo.engine.batches.collate`.
    share_prompt : bool
        Row layout, see there.
    max_tokens : int or None
        Limit of a pass, see :func:`split`; None computes the micro-batch in one.

    Returns
    -------
    dict
        ``weights`` of the loss's groups, ``(n_groups,)``, in the order of the passes;
        ``input_ids``, all tokens without padding, which transformers counts; ``passes``, a list of
        batches.
    """
    parts = [list(range(len(groups)))]
    if max_tokens is not None:
        parts = split([row_lengths(group, share_prompt) for group in groups], max_tokens)
    passes = [collate([groups[i] for i in part], share_prompt) for part in parts]
    return {
        "weights": torch.cat([each["weights"] for each in passes]),
        "input_ids": torch.cat([each["input_ids"][each["segments"] >= 0] for each in passes]),
        "passes": passes,
    }


def split(lengths: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Share groups out to passes of similar lengths.

    Parameters
    ----------
    lengths : sequence of sequence of int
        Tokens of the rows of each group.
    max_tokens : int
        Tokens of a pass, padding included; a group that is longer gets a pass of its own.

    Returns
    -------
    list of list of int
        Indices of the groups of each pass, longest first, so that what does not fit in memory
        fails at once. At most 5 % of a pass of several groups is padding between groups.

    Examples
    --------
    >>> split([[10], [200], [190], [30]], max_tokens=400)
    [[1, 2], [3], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -max(lengths[i]))
    passes: list[list[int]] = []
    rows = apart = longest = 0  # of the last pass
    for i in order:
        more, length = len(lengths[i]), max(lengths[i])
        together = (rows + more) * longest
        fits = together <= max_tokens and apart + more * length >= (1 - _PADDING) * together
        if passes and fits:
            passes[-1].append(i)
            rows, apart = rows + more, apart + more * length
        else:
            passes.append([i])
            rows, apart, longest = more, more * length, length
    return passes


class LengthPools(Sampler[int]):
    """Order in which batches hold rows of similar length; another one in each epoch.

    Rows are shuffled and cut into pools of 50 batches; each pool is sorted by length and cut into
    batches, and the batches of all pools are shuffled. The processes of a run share a batch, so
    that their work is equal. Seed and epoch decide the order, so that a resumed run sees the same.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each row.
    batch_size : int
        Rows of a batch, of all processes.
    seed : int
        Seed of the shuffles.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the places of all rows, once each; an incomplete batch comes last."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self))
        full = len(order) // self.batch_size * self.batch_size
        size = _POOL * self.batch_size
        pools = [order[start : min(start + size, full)] for start in range(0, full, size)]
        by_length = [pool[np.argsort(-self.lengths[pool], kind="stable")] for pool in pools]
        batches = np.concatenate([*by_length, order[:0]]).reshape(-1, self.batch_size)
        yield from rng.permutation(batches).ravel().tolist()
        yield from order[full:].tolist()
