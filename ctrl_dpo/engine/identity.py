"""What a model is, as a hash of its weights: names and folders move, contents do not."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from ctrl_dpo.data.hashes import model_hash

# how PEFT names what it adds to a base model besides the tuner's own, and what it wraps
_ADDED = ("modules_to_save", "trainable_tokens")
_WRAPPERS = re.compile(r"\b(base_layer|original_module|token_adapter)\.")


def model_identity(model: Any, name: str | Path | None = None, *, adapter: bool = True) -> str:
    """Return a hash that changes with any weight of the model.

    Parameters
    ----------
    model : torch.nn.Module
        The loaded model.
    name : str or Path, optional
        Where it was loaded from, by us: the ``name_or_path`` of a model that somebody else loaded
        stays the same when an adapter is merged into it. A local folder is hashed by its weights
        and configuration (:func:`ctrl_dpo.data.hashes.model_hash`), a hub name by its commit;
        without a name, or when the commit is not known, the tensors are hashed.
    adapter : bool
        Whether an adapter on the model counts; else it is the base model that is identified.

    Returns
    -------
    str
        ``files:SHA256``, ``hub:NAME@COMMIT`` or ``tensors:SHA256``; of an adapter and its base
        both, joined by ``+``.
    """
    name = name or None  # a model made in memory is named "": as a path, the working directory
    if adapter and hasattr(model, "get_base_model"):
        base = model.get_base_model()
        mine = model_identity(base, name) if name is not None else f"tensors:{tensors_hash(model)}"
        return f"{mine}+{base_identity(model, by_name=name is not None)}"
    if name is not None and Path(name).is_dir():
        return f"files:{model_hash(name)}"
    commit = getattr(model.config, "_commit_hash", None)
    if name is not None and commit:
        return f"hub:{name}@{commit}"
    return f"tensors:{tensors_hash(model, adapter=False)}"


def base_identity(model: Any, *, by_name: bool) -> str:
    """Return the identity of the model below an adapter.

    Parameters
    ----------
    model : peft.PeftModel
        The loaded model.
    by_name : bool
        Whether the base model was loaded by us from its ``name_or_path`` and is what lies there.

    Returns
    -------
    str
        See :func:`model_identity`.
    """
    name = model.get_base_model().name_or_path if by_name else None
    return model_identity(model, name, adapter=False)


def identity_kind(identity: str) -> str:
    """Return how a model was identified: two identities are comparable where this is the same."""
    return identity.partition(":")[0]


def tensors_hash(model: Any, *, adapter: bool = True, dtype: torch.dtype | None = None) -> str:
    """Return the sha256 over names, types and bytes of a model's parameters and buffers.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    adapter : bool
        Whether an adapter on it counts; without it the hash is that of the bare base model.
    dtype : torch.dtype, optional
        Type that floating-point tensors are converted to before; by default they stay as they are.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    state = model.state_dict()
    if not adapter and hasattr(model, "get_base_model"):
        added = (*_ADDED, getattr(model.base_model, "prefix", _ADDED[0]))
        state = model.get_base_model().state_dict()
        kept = {k: v for k, v in state.items() if not any(part in k for part in added)}
        state = {_WRAPPERS.sub("", k): v for k, v in kept.items()}
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        tensor = tensor.detach().to("cpu")
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        flat = tensor.contiguous().reshape(-1)
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
