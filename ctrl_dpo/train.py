"""Trainer: offline fit of log-ratios to their targets, on ``transformers.Trainer``."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ctrl_dpo.config import CTRLDPOConfig
from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.checks import check_model, check_step_zero
from ctrl_dpo.engine.identity import model_identity
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.losses import group_loss, pad_groups
from ctrl_dpo.engine.metrics import RunningMeans, batch_metrics
from ctrl_dpo.engine.models import load_model, load_tokenizer
from ctrl_dpo.engine.provenance import check_provenance
from ctrl_dpo.engine.reference import add_reference_logps
from ctrl_dpo.engine.resumable import ResumableTrainer
from ctrl_dpo.engine.rows import labelled, resolve_beta, training_rows, warn_of_overlap
from ctrl_dpo.engine.run_identity import origin
from ctrl_dpo.engine.sharing import can_share_prompt

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


class CTRLDPOTrainer(ResumableTrainer):
    r"""Fit a policy offline to the optimal log-ratios of an inference-time procedure.

    .. math:: \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)} = \frac{\Phi(C(x, y))}{\beta} - \log Z

    Parameters
    ----------
    model : str, Path, transformers.PreTrainedModel or peft.PeftModel
        Policy to train. A name is loaded as the configuration says (type, 8 bits).
    args : CTRLDPOConfig
        Settings.
    train_dataset : datasets.Dataset
        Groups (``prompt, responses, rewards``), relabelled groups, pairs with ``margin``, or, for
        the losses ``dpo`` and ``ipo``, plain pairs.
    eval_dataset : datasets.Dataset, optional
        The same, for evaluation losses and metrics.
    processing_class : transformers.PreTrainedTokenizerBase, optional
        Tokenizer; the model's own by default.
    ref_model : transformers.PreTrainedModel, optional
        Reference policy, where it is not the model with its adapter off.
    peft_config : peft.PeftConfig, optional
        Adapter to train on a model that has none.
    callbacks : list of transformers.TrainerCallback, optional
        Passed on.

    Notes
    -----
    Log-probabilities of the reference policy are computed once, before the first update, with the
    forward path and row layout of training, and kept for all runs. Before the first update,
    policy and reference are compared on a batch: they must be one function.
    """

    # the loss is a mean over the groups of a micro-batch: Trainer divides by the accumulation
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any,
        args: CTRLDPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: Any = None,
        ref_model: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        data = labelled(train_dataset, args)
        self.beta = resolve_beta(data, args)
        name = model if isinstance(model, (str, Path)) else None
        tokenizer = processing_class or load_tokenizer(name or model.name_or_path)
        rows, self.data_counts = training_rows(data, tokenizer, args, self.beta)
        eval_rows = None
        if eval_dataset is not None:
            eval_rows, _ = training_rows(labelled(eval_dataset, args), tokenizer, args, self.beta)
            warn_of_overlap(rows, eval_rows)
        if name is not None:
            model = load_model(name, dtype=args.model_dtype, load_in_8bit=args.load_in_8bit)
        identity = model_identity(ref_model or model, None if ref_model is not None else name)
        check_provenance(data, identity, tokenizer)
        own = identity if ref_model is None else model_identity(model, name)
        facts = {"model": own, "reference_model": identity, "beta": self.beta, **origin(data)}
        if peft_config is not None:
            from peft import get_peft_model

            torch.manual_seed(args.seed)  # the adapter's start belongs to the seed of the run
            model = get_peft_model(model, peft_config)
        check_model(model, ref_model)
        speed_up_adapters(model)
        reference = (ref_model or model).eval()
        args.share_prompt = args.share_prompt and can_share_prompt(reference, rows)
        self._add_reference_logps(reference, identity, args, [rows, eval_rows or []])
        self._is_fresh = peft_config is not None or ref_model is not None
        super().__init__(
            facts=facts,
            means={"train": RunningMeans(), "eval": RunningMeans()},
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            data_collator=partial(collate, share_prompt=args.share_prompt),
            callbacks=callbacks,
        )

    def _add_reference_logps(
        self, reference: Any, identity: str, args: CTRLDPOConfig, parts: list[list[dict[str, Any]]]
    ) -> None:
        rows = [row for part in parts for row in part if row["reference_logps"] is None]
        if not rows:
            logger.info("reference policy: log-probabilities of the dataset")
            return
        key = f"{identity}:{reference.dtype}:8bit={args.load_in_8bit}:share={args.share_prompt}"
        folder = Path(args.reference_cache) if args.reference_cache else None
        computed = add_reference_logps(
            reference, rows, key, folder, args.per_device_train_batch_size, args.share_prompt
        )
        logger.info(
            "reference log-probabilities: %d computed, %d found", computed, len(rows) - computed
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the groups of a batch."""
        logps = response_logps(model, inputs)
        where = inputs["group_of"], inputs["slot_of"]
        logratios, mask = pad_groups(logps - inputs["reference_logps"], *where)
        targets, _ = pad_groups(inputs["targets"], *where)
        options = {"beta": self.beta, "anchor": self.args.anchor}
        loss = group_loss(self.args.loss, logratios, targets, mask, **options).mean()
        with torch.no_grad():
            padded, _ = pad_groups(logps, *where)
            part = "train" if model.training else "eval"
            self._means[part].add(batch_metrics(logratios, targets, mask, padded, self.beta))
        return (loss, {"logratios": logratios}) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Make one forward and backward pass; before the first, compare with the reference."""
        if self.state.global_step == 0 and self._is_fresh:
            self._is_fresh = False
            model.train()
            with torch.no_grad():
                logps = response_logps(model, self._prepare_inputs(inputs))
            check_step_zero(logps.cpu() - inputs["reference_logps"].cpu(), self.model.dtype)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss of an evaluation batch; its metrics are collected by the way."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the collected metrics to a log row."""
        for part, prefix in (("train", ""), ("eval", "eval_")):
            if f"{prefix}loss" in logs:
                means = self._means[part].means()
                logs |= {f"{prefix}{name}": value for name, value in means.items()}
        super().log(logs, *args, **kwargs)
