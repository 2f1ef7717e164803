"""Trainer: offline fit of log-ratios to their targets, on ``transformers.Trainer``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ctrl_dpo.config import CTRLDPOConfig
from ctrl_dpo.engine.checks import (
    check_context,
    check_new_adapter,
    check_one_device,
    check_step_zero,
)
from ctrl_dpo.engine.evaluation_labels import check_labels, labels_of_training
from ctrl_dpo.engine.footprint import FootprintCallback
from ctrl_dpo.engine.labelling import labelled, resolve_beta, resolve_procedure
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.losses import group_loss, pad_groups, share_of_update
from ctrl_dpo.engine.memory import MemoryCallback
from ctrl_dpo.engine.metrics import RunningMeans, batch_metrics, token_metrics
from ctrl_dpo.engine.models import load_tokenizer
from ctrl_dpo.engine.pass_trainer import PassTrainer
from ctrl_dpo.engine.passes import default_tokens
from ctrl_dpo.engine.provenance import check_computation, check_provenance, computation
from ctrl_dpo.engine.reference import add_reference_logps
from ctrl_dpo.engine.rows import check_batches, training_rows, warn_of_overlap
from ctrl_dpo.engine.run_identity import origin
from ctrl_dpo.engine.setup import check_arguments, mixed_precision, set_up_policies
from ctrl_dpo.engine.sharing import can_share_prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers.trainer_utils import EvalLoopOutput

logger = logging.getLogger(__name__)


class CTRLDPOTrainer(PassTrainer):
    r"""Fit a policy offline to the optimal log-ratios of an inference-time procedure.

    .. math:: \log \frac{\pi(y|x)}{\pi_\mathrm{ref}(y|x)} = \frac{\Phi(C(x, y))}{\beta} - \log Z

    Parameters
    ----------
    model : str, Path, transformers.PreTrainedModel or peft.PeftModel
        Policy to train. A name is loaded as the configuration says (type, 8 bits). Its dropout is
        switched off, an adapter's is not.
    args : CTRLDPOConfig
        Settings.
    train_dataset : datasets.Dataset
        Groups (``prompt, responses, rewards``), relabelled groups, pairs with ``margin``, with
        ``anchor`` > 0 single responses (``prompt, response, reward``), or, for the losses ``dpo``
        and ``ipo``, plain pairs; the prompt of pairs may be implicit. A column ``weight``
        multiplies the loss of its row. Pairs of one prompt are one row of a batch, unless
        ``share_prompt`` is False.
    eval_dataset : datasets.Dataset or dict of str to datasets.Dataset, optional
        The same, for evaluation losses and metrics.
    processing_class : transformers.PreTrainedTokenizerBase, optional
        Tokenizer; the model's own by default.
    ref_model : str, Path, transformers.PreTrainedModel or peft.PeftModel, optional
        Reference policy, used as it is. By default the model with its adapter off; for a model
        that comes with a trained adapter, a frozen copy of that; or what computed the dataset's
        ``reference_logps``, which need a record of it. The log says which.
    peft_config : peft.PeftConfig, optional
        Adapter to train on a model that has none.
    callbacks : list of transformers.TrainerCallback, optional
        Passed on.

    Notes
    -----
    Log-probabilities of the reference policy are computed once, before the first update, with the
    forward path and row layout of training, and kept for all runs. Before the first update,
    policy and reference are compared on a batch: they must be one function.

    Attributes
    ----------
    beta : float
        Strength of the KL penalty, of the dataset or the configuration.
    reference : ReferencePolicy
        Which policy log-ratios are taken against.
    reference_computed : str
        Record of how ``reference_logps`` are computed, for datasets that carry them.
    """

    # the loss of a micro-batch is its share of a mean over all groups of an update
    loss_is_scaled_for_ga = True
    _is_fresh = True  # no step was made yet

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
        check_arguments(model, args, ref_model, peft_config)
        check_one_device(model, args.n_gpu)
        check_new_adapter(peft_config)
        data = labelled(train_dataset, args)
        self.beta = resolve_beta(data, args)
        self.procedure = resolve_procedure(data, args)
        name = model if isinstance(model, (str, Path)) else None
        tokenizer = processing_class or load_tokenizer(model.name_or_path if name is None else name)
        rows, self.data_counts = training_rows(data, tokenizer, args, self.beta)
        check_batches(rows, self.data_counts, args)
        self._labels = labels_of_training(data, args, self.beta)
        parts = {
            k: self._labelled(part, tokenizer, args, _argument(k))
            for k, part in _by_name(eval_dataset).items()
        }
        evaluated = {k: part_rows for k, (_, part_rows) in parts.items()}
        from_dataset = all(row["reference_logps"] is not None for row in rows)
        model, self.reference = set_up_policies(
            model, ref_model, peft_config, tokenizer, args, from_dataset=from_dataset
        )
        identity = self.reference.identity
        logger.info("reference policy: %s (%s)", self.reference.kind, identity)
        self.reference_computed = self._settle_computation(model, rows, tokenizer, args)
        self._check(model, data, rows, tokenizer, "train_dataset")
        for k, (part, part_rows) in parts.items():
            self._check(model, part, part_rows, tokenizer, _argument(k))
            warn_of_overlap(rows, part_rows)
        self._add_reference_logps([row for p in (rows, *evaluated.values()) for row in p], args)
        known = {"model": self.reference.start, "reference_model": identity, "beta": self.beta}
        super().__init__(
            facts=known | origin(data),
            means={"train": RunningMeans(), "eval": RunningMeans()},
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=evaluated if isinstance(eval_dataset, dict) else evaluated.get(""),
            processing_class=tokenizer,
            callbacks=[FootprintCallback(), MemoryCallback(), *(callbacks or [])],
        )

    def _settle_computation(
        self, model: Any, rows: list[dict[str, Any]], tokenizer: Any, args: CTRLDPOConfig
    ) -> str:
        """Settle whether rows share their prompts; return how ``reference_logps`` are computed."""
        judged = (self.reference.model or model).eval()
        args.share_prompt = args.share_prompt and can_share_prompt(judged, rows)
        with mixed_precision(args):
            return computation(judged, self.reference.identity, tokenizer, args.share_prompt)

    def _labelled(
        self, dataset: Any, tokenizer: Any, args: CTRLDPOConfig, name: str
    ) -> tuple[Dataset, list[dict[str, Any]]]:
        """Label data to evaluate on as the training data is, and make rows of it."""
        part = labelled(dataset, args, name)
        check_labels(part, self._labels, name)
        return part, training_rows(part, tokenizer, args, self.beta, name)[0]

    def _check(
        self, model: Any, data: Dataset, rows: list[dict[str, Any]], tokenizer: Any, name: str
    ) -> None:
        """Raise where data is not of the reference policy, or rows do not fit in the model."""
        check_provenance(data, self.reference.identity, tokenizer, name)
        check_computation(data, self.reference_computed)
        check_context(model, rows, name)

    def _add_reference_logps(self, rows: list[dict[str, Any]], args: CTRLDPOConfig) -> None:
        missing = [row for row in rows if row["reference_logps"] is None]
        if not missing:
            return
        folder = Path(args.reference_cache) if args.reference_cache else None
        limit = args.max_tokens_per_pass or default_tokens(args.device)
        with self.reference.computing() as model, mixed_precision(args):
            computed = add_reference_logps(
                model, missing, self.reference.identity, folder, limit, args.share_prompt
            )
        logger.info(
            "reference log-probabilities: %d computed, %d found, %d of the dataset",
            computed,
            len(missing) - computed,
            len(rows) - len(missing),
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the policy, and beside it which policy its log-ratios are taken against."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.reference.save_record(Path(output_dir or self.args.output_dir))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, also on a dataset that was not there when the trainer was built."""
        # a dict comes back part by part, a name is of one that was there
        if not (eval_dataset is None or isinstance(eval_dataset, (dict, str))):
            eval_dataset = self._rows(eval_dataset, "eval_dataset")
        found: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        return found

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Measure loss and metrics on another dataset; predictions are not kept."""
        return super().predict(self._rows(test_dataset, "test_dataset"), *args, **kwargs)

    def _rows(self, dataset: Any, name: str) -> Any:
        """Return rows that the trainer has, or make them of a dataset that was not there before."""
        given = self.eval_dataset
        known = (self.train_dataset, *(given.values() if isinstance(given, dict) else [given]))
        if any(dataset is rows for rows in known):
            return dataset
        if self._is_sharded():
            raise ValueError(
                f"{name} must be given when the trainer is built (eval_dataset=...) where weights "
                f"are sharded over processes; got a new one of {len(dataset)} rows, whose "
                "reference pass would have to come before that."
            )
        part, rows = self._labelled(dataset, self.processing_class, self.args, name)
        self._check(self.model, part, rows, self.processing_class, name)
        self._add_reference_logps(rows, self.args)
        return rows

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Add the metrics collected on the way, and take the loss over groups, not over rows."""
        self._means["eval"].means()  # drops what an interrupted evaluation left
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._means["eval"].means(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{k}": value for k, value in means.items()})
        return output

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the groups of a pass, or a pass's share in an update's."""
        means = self._means["train" if model.training else "eval"]
        means.start()
        logps = self._logps(model, inputs)
        where = inputs["group_of"], inputs["slot_of"]
        members = inputs["members"]
        logratios, mask = pad_groups((logps - inputs["reference_logps"])[members], *where)
        targets, _ = pad_groups(inputs["targets"], *where)
        losses = group_loss(
            self.args.loss,
            logratios,
            targets,
            mask,
            beta=self.beta,
            anchor=self.args.anchor,
            weights=inputs["weights"],
        )
        loss = share_of_update(losses, num_items_in_batch, self.accelerator.num_processes)
        with torch.no_grad():
            padded, _ = pad_groups(logps[members], *where)
            order, _ = pad_groups(inputs["order"], *where)
            each = logratios, targets, order, mask, padded
            made = batch_metrics(*each, self.beta, self.procedure) | token_metrics(inputs)
            if not model.training:
                # rows of one prompt's pairs hold several groups: batches are not means alike
                made["loss"] = losses.sum(), torch.ones_like(losses).sum()
            means.add(made)
        return (loss, {"logratios": logratios}) if return_outputs else loss

    def _logps(self, model: Any, inputs: Any) -> torch.Tensor:
        with mixed_precision(self.args):
            return response_logps(model, inputs)

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Make a step of training; before the first, compare with the reference."""
        if self.state.global_step == 0 and self._is_fresh:
            self._is_fresh = False
            self._check_step_zero(model, self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    @torch.no_grad()
    def _check_step_zero(self, model: Any, inputs: Any) -> None:
        """Compare policy and reference in training mode, an adapter's dropout aside."""
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        gaps = [self._logps(model, part) - part["reference_logps"] for part in inputs["passes"]]
        model.train()
        # the worst of all processes, so that all of them stop
        worst = torch.cat(gaps).abs().max()
        check_step_zero(self.accelerator.gather(worst), self.model.dtype)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the loss of an evaluation batch; its metrics are collected by the way."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            sums = [
                self.compute_loss(model, part) * len(part["weights"]) for part in inputs["passes"]
            ]
        return torch.stack(sums).sum() / len(inputs["weights"]), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the metrics collected since the last one to a log row of training."""
        if "loss" in logs:
            logs |= self._means["train"].means(self.accelerator)
        super().log(logs, *args, **kwargs)


def _argument(name: str) -> str:
    """Return what errors call an evaluation dataset."""
    return f"eval_dataset[{name!r}]" if name else "eval_dataset"


def _by_name(eval_dataset: Any) -> dict[str, Any]:
    """Return the evaluation datasets there are, a single one under the empty name."""
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    return {name: part for name, part in parts.items() if part is not None}
