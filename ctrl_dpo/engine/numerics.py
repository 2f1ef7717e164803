"""What decides the last bits of a log-probability besides weights and tokens."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

from ctrl_dpo.data.folders import installed_versions
from ctrl_dpo.engine import batches, int8, logprobs, masks, models

_FORWARD_PATH = (batches, int8, logprobs, masks, models)
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")
# names and places, which move, and what is not used in a forward pass over known tokens
_NOT_NUMBERS = {"_name_or_path", "_commit_hash", "transformers_version", "use_cache", "torch_dtype"}
_NOT_NUMBERS |= {"dtype", "architectures", "pad_token_id", "bos_token_id", "eos_token_id"}


def numerics(model: Any) -> dict[str, Any]:
    """Describe the computation of log-probabilities by a model, here and now.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        On the device that computes; an adapter on it is left out.

    Returns
    -------
    dict
        JSON-ready: configuration and types of the base weights, attention, autocast, precision
        settings, device, threads, versions of the libraries, and a hash of this library's own
        forward path. Equal for a model without and with an adapter, of whatever rank.

    Notes
    -----
    The processor and its threads are in since kernels may sum in another order by either; that one
    and two threads gave equal bits where this was measured does not bind a larger machine.
    """
    base = logprobs.causal_model(model)
    kind = base.device.type
    return {
        "config": _digest(
            {k: v for k, v in base.config.to_dict().items() if k not in _NOT_NUMBERS}
        ),
        "weights": _digest(_forms(base, getattr(model, "base_model", None))),
        "attention": base.config._attn_implementation,
        "autocast": str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "",
        "precision": [
            *_float32_precision(),
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            torch.are_deterministic_algorithms_enabled(),
        ],
        "device": [kind, *_device(base.device)],
        "versions": {k: v for k, v in installed_versions().items() if k in _LIBRARIES},
        "forward_path": _code_hash(),
    }


def _forms(base: Any, tuner: Any) -> list[str]:
    """Name, type and shape of every weight of the base model; int8 and casts are told by type."""
    prefix = getattr(tuner, "prefix", None)
    return sorted(
        f"{name.replace('.base_layer.', '.')}:{tensor.dtype}:{tuple(tensor.shape)}"
        for name, tensor in base.named_parameters(remove_duplicate=False)
        if not (prefix and prefix in name)
    )


def _float32_precision() -> list[str]:
    """Read PyTorch's older setting and the newer ones, which forbid reading the older if used."""
    onednn = getattr(torch.backends.mkldnn, "matmul", None)
    kinds = (torch.backends, torch.backends.cuda.matmul, onednn)
    newer = [getattr(kind, "fp32_precision", "") for kind in kinds]
    try:
        return [torch.get_float32_matmul_precision(), *newer]
    except RuntimeError:
        return ["", *newer]


def _device(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), str(torch.version.cuda)]
    if device.type != "cpu":
        return [platform.platform()]
    return [
        _processor(),
        torch.backends.cpu.get_cpu_capability(),
        f"{torch.get_num_threads()} threads",
        f"mkldnn={torch.backends.mkldnn.enabled}",
    ]


def _processor() -> str:
    """Hash the name and the instructions of the processor, by which kernels are chosen."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    lines = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Feat"))]
    return _digest(lines)


def _code_hash() -> str:
    files = [Path(str(module.__file__)).read_bytes() for module in _FORWARD_PATH]
    return hashlib.sha256(b"\0".join(files)).hexdigest()[:16]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
