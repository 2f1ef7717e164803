"""Refusals before the first update: what would train, silently, against the wrong reference."""

from __future__ import annotations

from typing import Any

import torch

# nats per response by which policy and reference may differ before the first update: in bfloat16
# the rounding of a row depends on the shape of its batch, in float32 no more than in its last bits
STEP_ZERO_BOUND = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}


def check_model(model: Any, ref_model: Any) -> None:
    """Raise unless something can be trained and a reference policy is left.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy, its adapter attached.
    ref_model : transformers.PreTrainedModel or None
        A reference policy of its own.

    Raises
    ------
    ValueError
        If no weight is trainable, the base model of an adapter is, the head has an adapter, the
        adapter is a prompt, or a model trained as a whole has no reference policy.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            "model must have trainable weights; got none. Give peft_config: an 8-bit model is "
            "trained through an adapter."
        )
    if not hasattr(model, "disable_adapter"):
        if ref_model is None:
            raise ValueError(
                "ref_model must be given to train all weights of a model; got None. Load the model "
                "a second time, or give peft_config to train an adapter."
            )
        return
    config = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_config must not be prompt learning; got {config.peft_type}. Use LoRA: with a "
            "learned prompt the response tokens are not where the batch says."
        )
    head = model.get_base_model().get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()):
        raise ValueError(
            "peft_config must leave the output embeddings as they are; got an adapter on them. "
            "Take lm_head out of target_modules."
        )


def check_step_zero(logratios: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise unless policy and reference agree before the first update.

    Parameters
    ----------
    logratios : (n_responses,) Tensor
        Log-ratios of one batch, nats.
    dtype : torch.dtype
        Type of the activations.

    Raises
    ------
    ValueError
        If a log-ratio exceeds the bound for the type.
    """
    worst = logratios.abs().max().item()
    bound = STEP_ZERO_BOUND[dtype]
    if not worst <= bound:
        raise ValueError(
            f"log-ratios before the first update must be within {bound} nats; got {worst:.4g}. "
            "Likely causes: reference log-probabilities of another model, template or tokenizer; "
            "an adapter that does not start at zero; dropout in the base model."
        )
