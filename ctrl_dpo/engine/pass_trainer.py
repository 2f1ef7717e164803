"""A trainer whose micro-batches are made in passes, each of a bounded number of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ctrl_dpo.engine.batches import row_lengths
from ctrl_dpo.engine.passes import LengthPools, collate_passes
from ctrl_dpo.engine.resumable import ResumableTrainer


class PassTrainer(ResumableTrainer):
    """Trainer on rows that are groups: their order, their passes, and how many an update has.

    Parameters
    ----------
    **arguments : Any
        Of :class:`ctrl_dpo.engine.resumable.ResumableTrainer`.
    """

    def __init__(self, **arguments: Any) -> None:
        self._pools: LengthPools | None = None
        super().__init__(**arguments)
        self._set_up_passes()

    def _set_up_passes(self) -> None:
        """Lay a micro-batch out in passes of at most so many tokens, or in one that must be one."""
        if self._needs_one_pass():
            self.args.max_tokens_per_pass = None
        self.data_collator = partial(
            collate_passes,
            share_prompt=self.args.share_prompt,
            max_tokens=self.args.max_tokens_per_pass,
        )

    def _needs_one_pass(self) -> bool:
        """Tell whether a backward pass does more than to add to the gradients."""
        layerwise = any(name in str(self.args.optim) for name in ("layerwise", "lomo"))
        return layerwise or self._is_sharded()

    def _is_sharded(self) -> bool:
        """Tell whether a pass gathers weights, so that processes must make equally many."""
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        return bool(sharded or self.is_distributed_loading_by_transformers)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> torch.Tensor:
        """Count the groups of an update: micro-batches and processes may hold unequal numbers."""
        groups = sum(len(batch["weights"]) for batch in batch_samples)
        counts: torch.Tensor = self.accelerator.gather(torch.tensor(groups, device=device))
        return counts.sum()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return the order of the rows, in batches of similar lengths where those are asked for."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [sum(row_lengths(row, self.args.share_prompt)) for row in rows]
        size = self.args.train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._pools = LengthPools(lengths, size, seed)
        return self._pools

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """Leave rows that are evaluated as they are; group_by_length would look for input_ids."""

    def _run_epoch(self, **arguments: Any) -> None:
        """Train for an epoch in its order, of which accelerate tells a resumed loader nothing."""
        if self._pools is not None:
            self._pools.set_epoch(arguments["epoch"])
        super()._run_epoch(**arguments)

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Make the passes of a micro-batch."""
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        *first, last = inputs["passes"]
        loss = torch.zeros((), device=self.args.device)
        for part in first:
            with self.accelerator.no_sync(model):  # processes meet once, after the last
                loss += super().training_step(model, part, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)
