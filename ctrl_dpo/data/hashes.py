"""Hashes of large files, kept from one start to the next, and the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from ctrl_dpo._validation import check_source
from ctrl_dpo.data.folders import content_hash, file_hash, folder_hash, write_atomically

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "CTRL_DPO_CACHE"
_WEIGHTS = ("*.safetensors", "*model*.bin")
# what decides a model's numbers: not the tokenizer, whose tokens are keys of their own, nor cards
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    *_WEIGHTS,
    "*.index.json",
    "*.py",
)
_LARGE = 1 << 22
_SETTLED_NS = 2_000_000_000


def user_cache() -> Path:
    """Return the folder that all runs of a user share.

    Returns
    -------
    Path
        ``CTRL_DPO_CACHE`` where that is set, else ``ctrl_dpo`` in the cache folder of Hugging Face
        (``HF_HOME``, ``XDG_CACHE_HOME/huggingface`` or ``~/.cache/huggingface``).
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named).expanduser()
    from datasets.config import HF_CACHE_HOME

    return Path(HF_CACHE_HOME) / "ctrl_dpo"


def known_file_hash(path: Path) -> str:
    """Return the sha256 of a file, read once: again only when the file may have changed.

    Parameters
    ----------
    path : Path
        Files of 4 MiB and more are remembered by path, size, inode and the times of the last change
        of content and of inode, which no writer can set back. As in git, a file that was changed
        within the last two seconds is not: a second change might leave the same times.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    before = _state(path)
    if before["size"] < _LARGE:
        return file_hash(path)
    name = hashlib.sha256(str(before["path"]).encode()).hexdigest()
    note = user_cache() / "hashes" / f"{name}.json"
    found = _read_note(note)
    if {key: found.get(key) for key in before} == before and "sha256" in found:
        return str(found["sha256"])
    settled = time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > _SETTLED_NS
    value = file_hash(path)
    if settled and _state(path) == before:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(note, json.dumps(before | {"sha256": value}).encode())
        except OSError as error:
            logger.warning("%s: hash not kept, and read again next time: %s", path, error)
    return value


def model_hash(source: str | Path) -> str:
    """Return a hash of what decides a model's numbers: its weights and configuration.

    Parameters
    ----------
    source : str or Path
        Folder of a model or an adapter, or a hub name.

    Returns
    -------
    str
        Of a folder the sha256 over its weights, configurations and code; another tokenizer or a
        model card leave it as it is. Of a folder without weights all files. Otherwise see
        :func:`ctrl_dpo.data.folders.content_hash`.
    """
    check_source("model", source)
    path = Path(source)
    if not path.is_dir():
        return content_hash(source)
    weights = any(file for pattern in _WEIGHTS for file in path.glob(pattern))
    return folder_hash(path, _MODEL_FILES if weights else ("**/*",), known_file_hash)


def _state(path: Path) -> dict[str, Any]:
    """Return what changes with a file."""
    resolved = path.resolve()
    found = resolved.stat()
    return {
        "path": str(resolved),
        "size": found.st_size,
        "device": found.st_dev,
        "inode": found.st_ino,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _read_note(note: Path) -> dict[str, Any]:
    """Read what is remembered; nothing where that is damaged, since it is only a saving of time."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
