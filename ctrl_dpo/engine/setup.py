"""From what a user gives to a policy that can be trained and its reference policy, checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ctrl_dpo.config import CTRLDPOConfig
from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.checks import check_8bit, check_model, check_tokenizer
from ctrl_dpo.engine.int8 import fix_8bit_forward, linear_8bit_modules
from ctrl_dpo.engine.models import load_policy, switch_dropout_off
from ctrl_dpo.engine.policies import ReferencePolicy, choose_reference


def check_arguments(model: Any, args: Any, ref_model: Any, peft_config: Any) -> None:
    """Raise where what a user gives is not of its type.

    Parameters
    ----------
    model, args, ref_model, peft_config : Any
        As given to the trainer.

    Raises
    ------
    TypeError
        Naming the argument, the type it has, and what to give.
    """
    from peft import PeftConfig  # slow to load

    if not isinstance(args, CTRLDPOConfig):
        raise TypeError(
            f"args must be a CTRLDPOConfig; got {_kind(args)}. Give CTRLDPOConfig(output_dir, ...),"
            " which takes every setting of transformers.TrainingArguments."
        )
    models = {"model": model} if ref_model is None else {"model": model, "ref_model": ref_model}
    for name, value in models.items():
        if not isinstance(value, (str, Path, torch.nn.Module)):
            raise TypeError(
                f"{name} must be a model, its folder or its hub name; got {_kind(value)}."
            )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(
            f"peft_config must be a peft.PeftConfig; got {_kind(peft_config)}. Give an object, "
            "such as LoraConfig(r=16, target_modules='all-linear', task_type='CAUSAL_LM')."
        )


def _kind(value: Any) -> str:
    return "None" if value is None else f"one of type {type(value).__name__}"


def set_up_policies(
    model: Any,
    ref_model: Any,
    peft_config: Any,
    tokenizer: Any,
    args: CTRLDPOConfig,
    *,
    from_dataset: bool,
) -> tuple[Any, ReferencePolicy]:
    """Load, check and prepare the policy, and settle on its reference policy.

    Parameters
    ----------
    model, ref_model : str, Path, transformers.PreTrainedModel or peft.PeftModel
        Policy and, optionally, a reference policy of its own; names are loaded as configured.
    peft_config : peft.PeftConfig or None
        Adapter to attach to a policy that has none.
    tokenizer : transformers.PreTrainedTokenizerBase
        What the data is tokenised with.
    args : CTRLDPOConfig
        Type, 8 bits, attention, device and seed.
    from_dataset : bool
        Whether the dataset has the reference policy's log-probabilities of every row.

    Returns
    -------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy on its device, its adapter attached, one function in training and evaluation.
    reference : ReferencePolicy
        What log-ratios are taken against.

    Raises
    ------
    ValueError
        If a model given as an object computes attention otherwise than configured.
    """
    name = model if isinstance(model, (str, Path)) else None
    loading: dict[str, Any] = {
        "dtype": args.model_dtype,
        "load_in_8bit": args.load_in_8bit,
        "attn_implementation": args.attn_implementation,
    }
    if name is None and args.attn_implementation not in (None, model.config._attn_implementation):
        raise ValueError(
            "attn_implementation must be that of the model where the model is given as an object; "
            f"got {args.attn_implementation!r} for {model.config._attn_implementation!r}. Load the "
            "model with it, or give its name."
        )
    if name is not None:
        model = load_policy(name, **loading, trainable=True)
    ref_name = ref_model if isinstance(ref_model, (str, Path)) else None
    if ref_name is not None:
        ref_model = load_policy(ref_name, **loading)
    check_8bit(model, name, args.load_in_8bit, peft_config)
    for what, each in (("model", model), ("ref_model", ref_model)):
        if each is not None:
            check_tokenizer(tokenizer, each, what)
            _make_one_function(each, args)
    reference = choose_reference(
        model,
        ref_model,
        name,
        ref_name,
        new_adapter=peft_config is not None,
        from_dataset=from_dataset,
    )
    if peft_config is not None:
        model = _with_adapter(model, peft_config, args.seed)
        if ref_model is None:
            reference = replace(reference, model=model)
    check_model(model, reference)
    model.reference_record = reference.record  # for draws from it; its folder gets the same
    model.known_base = reference.identity
    speed_up_adapters(model)
    if ref_model is not None:
        speed_up_adapters(ref_model)  # the same products: both are one function at the start
    return model, reference


def mixed_precision(args: CTRLDPOConfig) -> torch.autocast:
    """Return the context of all forward passes: policy's and reference's must be one."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype=dtype, enabled=args.bf16 or args.fp16)


def _make_one_function(model: Any, args: CTRLDPOConfig) -> None:
    """Make a model the same in training and evaluation, on the device of training."""
    fix_8bit_forward(model)
    switch_dropout_off(model)
    if not linear_8bit_modules(model) and not hasattr(model, "hf_device_map"):
        model.to(args.device)


def _with_adapter(model: Any, peft_config: Any, seed: int) -> Any:
    if hasattr(model, "disable_adapter"):
        raise ValueError(
            "peft_config must be left out for a model that has an adapter; got "
            f"{type(peft_config).__name__}. That adapter is trained on, against a frozen copy."
        )
    from peft import get_peft_model

    torch.manual_seed(seed)  # the adapter's start belongs to the seed of the run
    return get_peft_model(model, peft_config)
