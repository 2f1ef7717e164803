"""Settings of training: transformers' arguments plus what this method needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ctrl_dpo._validation import check_choice, check_integer, check_positive, check_weight
from ctrl_dpo.calibrate import METHODS
from ctrl_dpo.engine.checks import check_attention
from ctrl_dpo.engine.models import DTYPES, fast_dtype
from ctrl_dpo.engine.passes import default_tokens
from ctrl_dpo.labels.groups import RAW
from ctrl_dpo.theory.procedures import parse_procedure
from ctrl_dpo.transform import parse_transformation

LOSSES = ("squared", "soft_label", "softmax", "dpo", "ipo")
HARD_LABEL_LOSSES = ("dpo", "ipo")
# orders of the rows; batch_rebalance of transformers wants the columns of another kind of row
ORDERS = ("random", "sequential", "group_by_length")

_METRICS = "Evaluation has the metrics of training; there is no compute_metrics."
_ONE_TYPE = "Log-ratios need policy and reference in one type: set model_dtype, or bf16=True."
_ANOTHER = "The policy would be another function than the reference before the first update."
_NO_LABELS = "No loss here has labels of tokens; soft_label fits soft preferences."
_SECOND_TRY = (
    "A second try would go on from the first's weights. Lower max_tokens_per_pass instead."
)
# settings of transformers that would do nothing here, or break a run later: value, and why
_FIXED: dict[str, tuple[Any, str]] = {
    "auto_find_batch_size": (False, _SECOND_TRY),
    "average_tokens_across_devices": (
        True,
        "An update is a mean over the groups of all processes.",
    ),
    "batch_eval_metrics": (False, _METRICS),
    "bf16_full_eval": (False, _ONE_TYPE),
    "enable_jit_checkpoint": (False, "SIGTERM and SIGINT save a complete checkpoint without it."),
    "fp16_full_eval": (False, _ONE_TYPE),
    "include_for_metrics": ([], _METRICS),
    "label_smoothing_factor": (0.0, _NO_LABELS),
    "length_column_name": ("length", "Lengths are counted in tokens."),
    "neftune_noise_alpha": (None, _ANOTHER),
    "remove_unused_columns": (False, "Batches are made of every column."),
}


def _doc(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CTRLDPOConfig(TrainingArguments):
    """``transformers.TrainingArguments`` with the settings of inference-aware training.

    Examples
    --------
    >>> config = CTRLDPOConfig("out", procedure="best_of_4", target_kl=1.0)
    >>> config.loss, config.anchor, config.logging_nan_inf_filter
    ('squared', 0.0, False)
    """

    loss: str = _doc(
        "squared, softmax or soft_label fit the log-ratios to their targets; dpo and ipo use only "
        "the order of the rewards.",
        "squared",
    )
    beta: float | None = _doc(
        "Strength of the KL penalty. From the relabelled dataset, or solved from target_kl, where "
        "not given; required for dpo and ipo.",
        None,
    )
    anchor: float = _doc(
        "Weight of the group mean in the squared loss: 0 is contrastive, 1 pins every response's "
        "log-ratio (QRPO's regression).",
        0.0,
    )
    procedure: str | None = _doc(
        "How the trained policy will be used, such as best_of_4: relabels unlabelled groups, and "
        "is checked against relabelled ones.",
        None,
    )
    transformation: str | None = _doc(
        "Transformation of calibrated rewards: relabels unlabelled groups, by default optimal, and "
        "is checked against relabelled ones; raw takes rewards as they are (REBEL with "
        "loss=squared, RPO with loss=soft_label).",
        None,
    )
    calibration: str | None = _doc(
        "How rewards are calibrated, when relabelling: empirical (the default), pooled or "
        "weighted.",
        None,
    )
    accept_other_labels: bool = _doc(
        "Train on a dataset that was relabelled for another beta, procedure or transformation than "
        "named here: its transformed rewards are used with this beta.",
        False,
    )
    target_kl: float | None = _doc("KL budget in nats per response, when relabelling.", None)
    max_prompt_length: int | None = _doc(
        "Limit in tokens; longer prompts keep their end, and are counted.", None
    )
    max_response_length: int | None = _doc(
        "Limit in tokens; longer responses are cut and lose their end token, and are counted.", None
    )
    share_prompt: bool = _doc(
        "Compute a prompt once for all its responses. All pairs of a prompt become one row of a "
        "batch, so that batches hold more pairs and an epoch has fewer updates.",
        True,
    )
    max_tokens_per_pass: int | None = _doc(
        "Tokens of one forward and backward pass, a bound of memory: micro-batches, and the rows "
        "of the reference pass, are computed in passes of groups of similar length. By default one "
        "group at a time on a processor, where more are not faster, else 16384. Where weights are "
        "sharded over processes, a micro-batch is one pass; the reference pass comes before that.",
        None,
    )
    load_in_8bit: bool = _doc("Hold the base model's linear layers in int8 (bitsandbytes).", False)
    model_dtype: str | None = _doc(
        "Type of weights and activations of a model given by name: bfloat16, float32 or float16. "
        "By default bfloat16, or float32 where the device only emulates bfloat16.",
        None,
    )
    attn_implementation: str | None = _doc(
        "Attention of a model given by name, as in transformers: sdpa by default, with one mask of "
        "the whole row; flex_attention, on CUDA or XPU, never computes the blocks of tokens that "
        "do not see each other.",
        None,
    )
    reference_cache: str | None = _doc(
        "Folder of reference log-probabilities; default: one for all runs, in "
        "CTRL_DPO_CACHE or the cache folder of Hugging Face.",
        None,
    )
    allow_changed: bool = _doc(
        "Resume a checkpoint of a run with other settings, data, model or versions.", False
    )

    # what differs from transformers' own defaults, and why
    learning_rate: float = _doc("Step size of the optimiser; this default suits LoRA.", 2e-4)
    logging_nan_inf_filter: bool = _doc("Off: a loss of NaN must not be logged as 0.", False)
    remove_unused_columns: bool = _doc("Off: the collator needs every column.", False)
    logging_steps: float = _doc("Log every so many updates.", 10)
    restore_callback_states_from_checkpoint: bool = _doc(
        "On: a resumed run stops early where the whole one does. A callback's own settings are "
        "then the checkpoint's too.",
        True,
    )
    optim: str = _doc("Optimiser; adamw_8bit by default with load_in_8bit.", "")

    def __post_init__(self) -> None:
        """Check the settings, and their conflicts, before anything is loaded."""
        check_choice("loss", self.loss, LOSSES)
        if self.model_dtype is not None:
            check_choice("model_dtype", self.model_dtype, DTYPES)
        if self.calibration is not None:
            check_choice("calibration", self.calibration, METHODS)
        self._check_numbers()
        if self.procedure is not None:
            self.procedure = str(parse_procedure(self.procedure))
        if self.transformation not in (None, RAW):
            # only its name: the procedure and beta of the optimal one are those of the labels
            self.transformation = str(parse_transformation(self.transformation, "single_draw", 1.0))
        self._check_conflicts()
        self._check_fixed()
        if not self.optim:
            self.optim = "adamw_8bit" if self.load_in_8bit else "adamw_torch"
        if not torch.accelerator.is_available():
            self.use_cpu = True
            self.dataloader_pin_memory = False
        super().__post_init__()
        self._check_parsed()
        check_attention(self.attn_implementation, self.device)
        self.model_dtype = self.model_dtype or fast_dtype(self.device)
        if self.max_tokens_per_pass is None:
            self.max_tokens_per_pass = default_tokens(self.device)

    def _check_numbers(self) -> None:
        for name in ("beta", "target_kl"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("max_prompt_length", "max_response_length", "max_tokens_per_pass"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_weight("anchor", self.anchor)
        if not check_positive("learning_rate", self.learning_rate) <= 1:
            raise ValueError(
                f"learning_rate must be <= 1; got {self.learning_rate!r}. An Adam step moves every "
                "weight by about that much; 2e-4 suits LoRA."
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} must be a number; got nan.")

    def _check_conflicts(self) -> None:
        if self.anchor > 0 and self.loss != "squared":
            raise ValueError(f"anchor must be 0 unless loss is squared; got loss={self.loss!r}.")
        if self.anchor > 0 and (self.transformation == RAW or self.accept_other_labels):
            raise ValueError(
                "anchor must be 0 where the normaliser is not known; got "
                f"transformation={self.transformation!r}, "
                f"accept_other_labels={self.accept_other_labels!r}."
            )
        if self.accept_other_labels and self.beta is None:
            raise ValueError("beta must be given with accept_other_labels; got None.")
        if self.beta is not None and self.target_kl is not None:
            raise ValueError(
                f"beta and target_kl exclude each other; got {self.beta!r} and {self.target_kl!r}."
            )
        if self.loss in HARD_LABEL_LOSSES:
            self._check_hard_label()

    def _check_fixed(self) -> None:
        """Raise for settings of transformers that would do nothing here, or break a run later."""
        for name, (wanted, reason) in _FIXED.items():
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"{name} must be {wanted!r}; got {getattr(self, name)!r}. {reason}"
                )
        check_choice("train_sampling_strategy", self.train_sampling_strategy, ORDERS)

    def _check_parsed(self) -> None:
        """Raise for parts, as transformers has read them, that no batch or model here survives."""
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches of accelerator_config must be False; got True. It cuts the parts "
                "of a batch to one length; every process reads its own rows without it."
            )
        if "underflow_overflow" in self.debug:
            raise ValueError(
                f"debug must be empty; got {self.debug!r}, which needs the logits that are not "
                "computed here. What is not finite stops training without it."
            )

    def _check_hard_label(self) -> None:
        if self.beta is None:
            raise ValueError(f"beta must be given for loss={self.loss!r}; got None. Try 0.1.")
        for name in ("transformation", "calibration"):
            if getattr(self, name) not in (None, RAW):
                raise ValueError(
                    f"{name} must be left out for loss={self.loss!r}, which uses only the order of "
                    f"the rewards; got {getattr(self, name)!r}."
                )
