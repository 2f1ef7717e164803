"""Language models for the stages: float or int8 base, adapters, and a fast form for drawing."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ctrl_dpo._validation import check_choice, check_source
from ctrl_dpo.engine.adapters import speed_up_adapters
from ctrl_dpo.engine.int8 import ScaledLinear, fix_8bit_forward, linear_8bit_modules

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_CONFIG = "adapter_config.json"
REFERENCE_RECORD = "reference_policy.json"  # beside the weights of a trained policy


def load_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of a model or adapter folder, or of a hub name."""
    from transformers import AutoTokenizer

    if not name:
        raise ValueError(
            "the tokenizer (processing_class in training) must be given for a model that was made "
            f"in memory; got one named {name!r}, which leads to no tokenizer. Give the model's."
        )
    check_source("tokenizer", name)
    return AutoTokenizer.from_pretrained(str(name))


def default_device() -> torch.device:
    """Return the accelerator torch sees, else the CPU."""
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return accelerator
    return torch.device("cpu")


def fast_dtype(device: str | torch.device | None = None) -> str:
    """Return the type in which a device multiplies matrices fastest with bfloat16's range.

    Parameters
    ----------
    device : str or torch.device, optional
        The accelerator where there is one, else the CPU.

    Returns
    -------
    {"bfloat16", "float32"}
        bfloat16, or float32 where bfloat16 products are emulated: on CUDA devices before compute
        capability 8.0, and on processors for which oneDNN has no bfloat16 kernels (x86 without
        AVX-512), where they took 6 times as long (``benchmarks/type_speed.py``). float16
        is never chosen: gradients leave its range.

    Examples
    --------
    >>> fast_dtype("cpu") in ("bfloat16", "float32")
    True
    """
    place = torch.device(device) if device is not None else default_device()
    if place.type == "cpu":
        native = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    elif place.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = True
    return "bfloat16" if native else "float32"


def load_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    load_in_8bit: bool = False,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """Load a causal language model for training or scoring, its weights frozen when in 8 bits.

    Parameters
    ----------
    name : str or Path
        Folder with safetensors, or a hub name.
    dtype : {"bfloat16", "float32", "float16"}, optional
        Type of the weights and activations; of the activations only for 8-bit linear layers. By
        default what the device computes fastest, see :func:`fast_dtype`.
    load_in_8bit : bool
        Hold every linear layer but the head as int8 with one float scale per output row
        (``bitsandbytes``). Weights are then 1 byte each and cannot be trained: add an adapter.
    device : str or torch.device, optional
        Where the model goes; the accelerator where there is one, else the CPU.
    attn_implementation : str, optional
        How attention is computed, as in transformers, whose default is ``sdpa``.

    Returns
    -------
    transformers.PreTrainedModel
        The model in evaluation mode.

    Raises
    ------
    ValueError
        If ``name`` is a path that is not there, ``dtype`` is unknown, or ``name`` holds a GGUF
        file, which cannot be combined with int8.
    """
    from transformers import AutoModelForCausalLM

    check_source("model", name)
    place = torch.device(device) if device is not None else default_device()
    torch_dtype = DTYPES[check_choice("dtype", dtype or fast_dtype(place), DTYPES)]
    folder = Path(name)
    is_gguf = folder.suffix == ".gguf" or (
        folder.is_dir() and not (folder / "config.json").exists() and list(folder.glob("*.gguf"))
    )
    if is_gguf:
        raise ValueError(
            f"model must be a folder with config.json and safetensors; got {str(name)!r}, which "
            "holds a GGUF file. Convert it once: from_pretrained(gguf_file=), then save_pretrained."
        )
    options: dict[str, Any] = {"dtype": torch_dtype, "attn_implementation": attn_implementation}
    if load_in_8bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        options["device_map"] = {"": place}
    model = AutoModelForCausalLM.from_pretrained(str(name), **options)
    if load_in_8bit:
        fix_8bit_forward(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    else:
        model.to(place)
    return model.eval()


def context_length(config: Any) -> int | None:
    """Return the number of positions a model is made for, None where its configuration has none.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        The model's configuration.

    Returns
    -------
    int or None
        Tokens of prompt and response together.
    """
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def switch_dropout_off(model: Any) -> None:
    """Set the base model's dropout to 0; an adapter's own is left.

    A log-ratio compares two functions: noise on one of them would be taken for a difference.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Changed in place.
    """
    prefix = model.base_model.prefix if hasattr(model, "get_base_model") else None
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = module.p if prefix is not None and prefix in name else 0.0
            continue
        for key, value in vars(module).items():
            if key.endswith("dropout") and isinstance(value, float):
                setattr(module, key, 0.0)


def load_policy(
    name: str | Path,
    *,
    dtype: str | None = None,
    load_in_8bit: bool = False,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    base: str | Path | None = None,
    trainable: bool = False,
) -> Any:
    """Load a model folder or, where it holds an adapter, the base model with the adapter on it.

    Parameters
    ----------
    name : str or Path
        Model folder, adapter folder or hub name.
    dtype, load_in_8bit, device, attn_implementation
        As in :func:`load_model`.
    base : str or Path, optional
        Base model of an adapter, when it has moved since the adapter was saved.
    trainable : bool
        Whether the adapter's weights can be trained.

    Returns
    -------
    transformers.PreTrainedModel or peft.PeftModel
        The model in evaluation mode, with what is recorded of its reference policy
        (:func:`recorded_reference`).

    Raises
    ------
    ValueError
        If the name is empty or a path that is not there, or an adapter names no base model, as
        one on a model made in memory, and none is given.
    """
    check_source("model", name)
    loading: dict[str, Any] = {
        "dtype": dtype,
        "load_in_8bit": load_in_8bit,
        "device": device,
        "attn_implementation": attn_implementation,
    }
    if not is_adapter(name):
        policy = load_model(name, **loading)
    else:
        from peft import PeftConfig, PeftModel

        source = base or PeftConfig.from_pretrained(str(name)).base_model_name_or_path
        if not source:
            raise ValueError(
                f"base_model_name_or_path in {Path(name) / ADAPTER_CONFIG} must name the adapter's "
                f"base model; got {source!r}. Write the model's folder or hub name there."
            )
        check_source(f"base model of the adapter {str(name)!r}", source)
        model = load_model(source, **loading)
        policy = PeftModel.from_pretrained(model, str(name), is_trainable=trainable).eval()
        speed_up_adapters(policy)  # the products of training: the policy drawn is the one trained
    record = Path(name) / REFERENCE_RECORD
    if record.is_file():
        policy.reference_record = json.loads(record.read_text(encoding="utf-8"))
    return policy


def recorded_reference(model: Any) -> dict[str, str]:
    """Return what is known of the reference policy that a model was trained against.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        From :func:`load_policy`, or of a trainer.

    Returns
    -------
    dict of str to str
        ``kind`` and ``identity``, see :class:`ctrl_dpo.engine.policies.ReferencePolicy`; empty
        where nothing is recorded.
    """
    # not by getattr: an adapter without a record would answer with that of its base model
    found: dict[str, str] = vars(model).get("reference_record", {})
    return found


def is_adapter(name: str | Path) -> bool:
    """Tell whether a local folder holds a PEFT adapter."""
    return (Path(name) / ADAPTER_CONFIG).exists()


@contextmanager
def adapter_off(model: Any) -> Iterator[Any]:
    """Switch a PeftModel to its base weights inside the block: the reference policy."""
    with model.disable_adapter():
        yield model


def prepare_for_generation(model: Any) -> Any:
    """Turn a loaded policy into its fastest equal for drawing: no int8 layer, one float type.

    Decoding does one small product per layer and token, so turning every int8 weight to a float
    each time would cost more than the product. That is done once; for inputs of one shape the drawn
    policy is the trained one to the last bit. The model cannot be trained afterwards.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        Model from :func:`load_model` or :func:`load_policy`; changed in place.

    Returns
    -------
    transformers.PreTrainedModel or peft.PeftModel
        The same object.
    """
    compute = model.dtype
    replaced = {id(each): ScaledLinear(each, compute) for each in linear_8bit_modules(model)}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(compute)
    return model.eval()
