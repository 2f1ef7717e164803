"""Refusals before the first update: what would train, silently, against the wrong reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ctrl_dpo.engine.int8 import linear_8bit_modules
from ctrl_dpo.engine.models import context_length, load_tokenizer
from ctrl_dpo.engine.policies import ADAPTER_OFF, FROZEN_ADAPTER, ReferencePolicy

# nats per response by which policy and reference may differ before the first update on an
# accelerator, where a row's rounding depends on the rows beside it. Rows batched otherwise differ
# by 1.5e-5 in float32 and 0.17 in bfloat16 on 100 tokens (benchmarks/step_zero.py), another row
# layout by 1.1. A processor computes row by row: there they must not differ at all.
STEP_ZERO_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# starts of init_lora_weights with which PEFT takes the adapter's product out of the base weights
_REWRITING = ("pissa", "corda", "olora", "loftq", "lora_ga")


def check_attention(implementation: str | None, device: torch.device) -> None:
    """Raise where PyTorch has no backward pass for FlexAttention.

    Parameters
    ----------
    implementation : str or None
        Attention, by its name in transformers.
    device : torch.device
        Where the model is trained.

    Raises
    ------
    ValueError
        If it is ``flex_attention`` on a CPU or on MPS.
    """
    if implementation == "flex_attention" and device.type in ("cpu", "mps"):
        raise ValueError(
            "attn_implementation must not be 'flex_attention' where PyTorch has no backward pass "
            f"for it; got device {device.type!r}. Use 'sdpa'."
        )


def check_new_adapter(peft_config: Any) -> None:
    """Raise where attaching an adapter changes the model below it, the reference policy.

    Parameters
    ----------
    peft_config : peft.PeftConfig or None
        Adapter to be attached.

    Raises
    ------
    ValueError
        If ``init_lora_weights`` rewrites the base weights, or ``layer_replication`` adds layers.
    """
    start = getattr(peft_config, "init_lora_weights", True)
    if str(start).lower().startswith(_REWRITING):
        raise ValueError(
            "init_lora_weights must leave the base model as it is, the reference policy; got "
            f"{start!r}, which rewrites its weights. Use True, 'gaussian' or 'eva'."
        )
    replicated = getattr(peft_config, "layer_replication", None)
    if replicated:
        raise ValueError(
            "layer_replication must be left out, since the model below an adapter is the reference "
            f"policy; got {replicated!r}, which adds layers to it. Save the larger model and train "
            "that."
        )


def check_8bit(model: Any, name: Any, load_in_8bit: bool, peft_config: Any) -> None:
    """Raise where 8 bits were asked for and are not there, or nothing beside them can be trained.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy as it came.
    name : str, Path or None
        Where it was loaded from by the trainer.
    load_in_8bit : bool
        Of the configuration.
    peft_config : peft.PeftConfig or None
        Adapter to be attached.

    Raises
    ------
    ValueError
        If a given model is not in 8 bits, or an 8-bit model has no adapter.
    """
    in_8bit = bool(linear_8bit_modules(model))
    if load_in_8bit and not in_8bit and name is None:
        raise ValueError(
            f"model must be in 8 bits with load_in_8bit; got {type(model).__name__} of "
            f"{model.dtype}. Give its name or folder, or load it with quantization_config="
            "BitsAndBytesConfig(load_in_8bit=True); GGUF weights have to be saved by "
            "save_pretrained first."
        )
    if in_8bit and peft_config is None and not hasattr(model, "disable_adapter"):
        raise ValueError(
            "peft_config must be given for a model in 8 bits; got None. Integer weights cannot be "
            "trained: add an adapter, such as LoraConfig(target_modules='all-linear')."
        )


def check_model(model: Any, reference: ReferencePolicy) -> None:
    """Raise unless something can be trained and a reference policy is left.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy, its adapter attached.
    reference : ReferencePolicy
        From :func:`ctrl_dpo.engine.policies.choose_reference`.

    Raises
    ------
    ValueError
        If no weight is trainable, the base model of an adapter is, the head has an adapter, the
        adapter is a prompt or one of several, a model trained as a whole has no reference policy,
        or its attention cannot be trained on its device.
    """
    check_attention(model.config._attn_implementation, model.device)
    if reference.model is model and reference.kind not in (ADAPTER_OFF, FROZEN_ADAPTER):
        raise ValueError("ref_model must be a model of its own; got the one that is trained.")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "model must have trainable weights; got none. Give peft_config, or load the adapter "
            "with is_trainable=True."
        )
    if hasattr(model, "disable_adapter"):
        _check_adapter(model, reference, trainable)
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model must be a PeftModel where it has an adapter; got one that transformers loaded. "
            "Give the adapter's folder as a name, or use PeftModel.from_pretrained."
        )
    if reference.kind == ADAPTER_OFF:
        raise ValueError(
            "ref_model must be given to train all weights of a model; got None. Load the model "
            "a second time, or give peft_config to train an adapter."
        )


def _check_adapter(model: Any, reference: ReferencePolicy, trainable: list[str]) -> None:
    """Raise where an adapter cannot be trained on responses, or its reference is not clear."""
    if len(model.active_adapters) != 1:
        raise ValueError(
            f"model must have one active adapter; got {list(model.active_adapters)}. Choose it "
            "with set_adapter."
        )
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_config must not be prompt learning; got {config.peft_type}. Use LoRA: with a "
            "learned prompt the response tokens are not where the batch says."
        )
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"peft_config must not have target_parameters; got {config.target_parameters!r}. Name "
            "modules in target_modules: these parameters' adapter may stay on in the reference."
        )
    base = model.get_base_model()
    ends = {"output": base.get_output_embeddings()}
    if base.config.get_text_config().tie_word_embeddings:
        ends["tied input"] = base.get_input_embeddings()
    for which, module in ends.items():
        if any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                f"peft_config must leave the {which} embeddings as they are; got trainable "
                "weights there. Take them out of target_modules and modules_to_save."
            )
    if reference.kind in (ADAPTER_OFF, FROZEN_ADAPTER):
        own = (model.base_model.prefix, "modules_to_save", "trainable_tokens")
        outside = [name for name in trainable if not any(part in name for part in own)]
        if outside:
            raise ValueError(
                f"the base model must be frozen where it is the reference policy; got "
                f"{len(outside)} trainable weights, first {outside[0]!r}. Freeze them (bias='none')"
                ", or give ref_model."
            )


def check_tokenizer(tokenizer: Any, model: Any, what: str) -> None:
    """Raise where token ids mean something else to a model than to the tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        What the data is tokenised with.
    model : transformers.PreTrainedModel or peft.PeftModel
        Policy or reference policy; where its folder has a tokenizer, the vocabularies are compared.
    what : {"model", "ref_model"}
        Its name in the error.

    Raises
    ------
    ValueError
        If the tokenizer has more tokens than the model, or the model's own has others.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"processing_class must fit {what}; got {len(tokenizer)} tokens for {rows} embeddings. "
            "Give the model's own tokenizer, or resize_token_embeddings."
        )
    folder = Path(str(model.name_or_path))
    if not model.name_or_path or not any((folder / f).is_file() for f in _TOKENIZER_FILES):
        return
    own, used = load_tokenizer(folder).get_vocab(), tokenizer.get_vocab()
    other = [token for token, i in own.items() if used.get(token) != i]
    if other:
        raise ValueError(
            f"processing_class must be the tokenizer of {what}; got another id for {len(other)} of "
            f"its {len(own)} tokens, first {other[0]!r} in {str(folder)!r}. Give the model's own."
        )


def check_context(model: Any, rows: Sequence[Mapping[str, Any]], what: str) -> None:
    """Raise where a prompt and its longest response are more than the model is made for.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy.
    rows : sequence of mapping
        From :func:`ctrl_dpo.engine.rows.training_rows`.
    what : {"train_dataset", "eval_dataset"}
        Their name in the error.

    Raises
    ------
    ValueError
        If a row has more tokens than the model has positions.
    """
    context = context_length(model.config)
    longest = [max(map(len, row["response_ids"])) for row in rows]
    sizes = [len(row["prompt_ids"]) + size for row, size in zip(rows, longest, strict=True)]
    over = [i for i, size in enumerate(sizes) if context is not None and size > context]
    if over:
        first = rows[over[0]]
        place = [len(response) for response in first["response_ids"]].index(longest[over[0]])
        raise ValueError(
            f"prompt and longest response must have at most {context} tokens together, the model's "
            f"context; got {len(over)} of {len(sizes)} rows of {what} with more, first "
            f"{sizes[over[0]]} at row {first['dataset_rows'][place]}. Set max_prompt_length and "
            f"max_response_length to {context} together at most, or drop those rows."
        )


def check_step_zero(logratios: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise unless policy and reference agree before the first update.

    Parameters
    ----------
    logratios : (n_responses,) Tensor
        Log-ratios of one batch, nats, on the device that computed them.
    dtype : torch.dtype
        Type of the activations.

    Raises
    ------
    ValueError
        If a log-ratio is not 0 on a processor, or exceeds the bound for the type elsewhere.
    """
    worst = logratios.abs().max().item()
    bound = 0.0 if logratios.device.type == "cpu" else STEP_ZERO_BOUND[dtype]
    if not worst <= bound:
        raise ValueError(
            f"log-ratios before the first update must be within {bound:g} nats; got {worst:.4g}. "
            "Likely causes: reference log-probabilities of another model, type, template or "
            "tokenizer; a ref_model that is not the model that training starts from."
        )


def check_one_device(model: Any, n_devices: int) -> None:
    """Raise where one process would spread a batch over several devices.

    Parameters
    ----------
    model : str, Path or torch.nn.Module
        As given to the trainer.
    n_devices : int
        Accelerators that this process would use, ``TrainingArguments.n_gpu``.

    Raises
    ------
    ValueError
        If the model is wrapped in ``nn.DataParallel``, or there is more than one device.
    """
    if n_devices > 1 or isinstance(model, torch.nn.DataParallel):
        raise ValueError(
            f"a process must use one device; got {max(n_devices, 1)} devices and a model of type "
            f"{type(model).__name__}: nn.DataParallel would cut groups apart. Start one process "
            "per device (accelerate launch), or set CUDA_VISIBLE_DEVICES to one."
        )
