"""What a model is, as a hash of its weights: names and folders move, contents do not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ctrl_dpo.data.hashes import model_hash


def model_identity(model: Any, name: str | Path | None = None) -> str:
    """Return a hash that changes with any weight of the model.

    Parameters
    ----------
    model : torch.nn.Module
        The loaded model.
    name : str or Path, optional
        Where it was loaded from. A local folder is hashed by its weights and
        configuration (:func:`ctrl_dpo.data.hashes.model_hash`), a hub name by its commit; without a
        name, or when the commit is not known, the tensors are hashed.

    Returns
    -------
    str
        ``files:SHA256``, ``hub:NAME@COMMIT`` or ``tensors:SHA256``.
    """
    if name is not None and Path(name).is_dir():
        return f"files:{model_hash(name)}"
    commit = getattr(model.config, "_commit_hash", None)
    if name is not None and commit:
        return f"hub:{name}@{commit}"
    return f"tensors:{tensors_hash(model)}"


def tensors_hash(model: torch.nn.Module) -> str:
    """Return the sha256 over names, types and bytes of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        digest.update(f"{key}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
