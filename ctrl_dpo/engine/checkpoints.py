"""Checkpoint folders: complete or absent, each with a manifest of its files and of its run.

A checkpoint is written into a hidden scratch folder beside its place, flushed, and renamed. Its
``manifest.json`` holds size and sha256 of every file, the identity of the run, and its own sha256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ctrl_dpo.data.disk import flush
from ctrl_dpo.data.folders import file_hash, write_atomically

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCRATCH = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")
# beside the weights, by what they are called with one process or several, FSDP (optimizer.bin,
# optimizer_0) and DeepSpeed, whose folder holds both of the first two
_STATES = {
    "optimizer.pt": ("optimizer.*", "optimizer_*", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the folders named ``checkpoint-STEP``, by step; clocks play no part."""
    found = [path for path in run_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted((p for p in found if p.is_dir()), key=step_of)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(folder.name.rpartition("-")[2])


def write_manifest(folder: Path, run: Mapping[str, Any]) -> None:
    """Flush every file of a folder and record them.

    Parameters
    ----------
    folder : Path
        A checkpoint in the making.
    run : mapping
        From :func:`ctrl_dpo.engine.run_identity.run_identity`, JSON-ready.
    """
    files = {}
    for path in _files(folder):
        flush(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    body: dict[str, Any] = {"files": files, "run": dict(run)}
    text = json.dumps(body | {"sha256": _digest(body)}, indent=1) + "\n"
    write_atomically(folder / MANIFEST, text.encode("utf-8"))
    for inner in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        flush(inner)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the identity of the run that wrote a complete checkpoint."""
    run: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["run"]
    return run


def publish(part: Path, final: Path) -> None:
    """Give a written checkpoint its name; one of that name is replaced.

    Parameters
    ----------
    part : Path
        The checkpoint inside the scratch folder, its manifest written.
    final : Path
        Where it belongs, on the same file system.
    """
    if final.exists():
        final.rename(part.with_name(f"replaced-{final.name}"))
    part.rename(final)
    flush(final.parent)


def rotate(run_dir: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest checkpoints beyond a limit, those with a manifest only.

    Parameters
    ----------
    run_dir : Path
        Folder of the run.
    limit : int or None
        Number of checkpoints to keep; none is deleted without one.
    keep : set of Path
        Never deleted: the one just written, and the best.

    Notes
    -----
    What has no manifest is not counted: an empty folder of a later step must not cost the last good
    checkpoint. A checkpoint leaves its place by a rename, so that half a one never bears its name.
    """
    if not limit or limit < 0:
        return
    complete = [path for path in list_checkpoints(run_dir) if (path / MANIFEST).is_file()]
    surplus = len(complete) - max(limit, len(keep))
    for path in [path for path in complete if path not in keep][: max(surplus, 0)]:
        scratch = run_dir / SCRATCH
        scratch.mkdir(exist_ok=True)
        path.rename(scratch / f"rotated-{path.name}")
        logger.info("deleted %s: save_total_limit is %d", path, limit)


def clear_scratch(run_dir: Path) -> None:
    """Remove what an interrupted save or rotation left."""
    shutil.rmtree(run_dir / SCRATCH, ignore_errors=True)


def newest_complete(run_dir: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, passing over damaged ones aloud.

    Parameters
    ----------
    run_dir : Path
        Folder of the run.

    Returns
    -------
    Path or None
        None where there is no checkpoint folder at all.

    Raises
    ------
    ValueError
        If there are checkpoint folders, and each is damaged.
    """
    faults: list[str] = []
    for folder in reversed(list_checkpoints(run_dir)):
        fault = find_fault(folder)
        if fault is None:
            for line in faults:
                logger.warning("%s; %s is used instead", line, folder.name)
            return folder
        faults.append(f"{folder.name} is damaged: {fault}")
    if faults:
        raise ValueError(
            f"a checkpoint in {str(run_dir)!r} must be complete; got {'; '.join(faults)}. Delete "
            "them to start over."
        )
    return None


def check_complete(folder: Path) -> None:
    """Raise unless a checkpoint is what its manifest says.

    Parameters
    ----------
    folder : Path
        A checkpoint.

    Raises
    ------
    ValueError
        With the file that is missing or differs.
    """
    fault = find_fault(folder)
    if fault is not None:
        raise ValueError(
            f"checkpoint must be complete; got {str(folder)!r}, where {fault}. Resume from an "
            "older one; resume_from_checkpoint=True finds it."
        )


def check_resumable(folder: Path) -> None:
    """Raise where a complete checkpoint has weights only, from which no run goes on as it was.

    Parameters
    ----------
    folder : Path
        A complete checkpoint.

    Raises
    ------
    ValueError
        Naming the states that were not saved: optimiser, schedule, random numbers.
    """
    absent = [
        name for name, forms in _STATES.items() if not any(any(folder.glob(f)) for f in forms)
    ]
    if absent:
        raise ValueError(
            "checkpoint must hold optimiser, schedule and random state to be resumed; got "
            f"{str(folder)!r} without {', '.join(absent)}, as save_only_model=True saves it. "
            "Resume from another one, or start over: with save_only_model=False, in a new "
            "output_dir."
        )


def find_fault(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest, sizes before contents.

    Parameters
    ----------
    folder : Path
        A checkpoint.

    Returns
    -------
    str or None
        The first fault, by file name; None for a complete checkpoint.
    """
    if not folder.is_dir():
        return "there is no such folder"
    path = folder / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing, so it was not written by this trainer, or not to the end"
    try:
        manifest = json.loads(path.read_bytes())
        recorded, entries = manifest.pop("sha256"), manifest["files"].items()
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if recorded != _digest(manifest):
        return f"{MANIFEST} is not as it was written"
    return _fault_of_files(folder, files)


def _fault_of_files(folder: Path, files: Mapping[str, tuple[int, str]]) -> str | None:
    present = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    for name in sorted(present | set(files)):
        path = folder / name
        if ".." in PurePosixPath(name).parts or path.is_symlink() or not path.is_file():
            return f"{name} is missing, or not a file of that folder"
        if name not in files:
            return f"{name} is not in {MANIFEST}"
        if path.stat().st_size != files[name][0]:
            return f"{name} has {path.stat().st_size} of {files[name][0]} bytes"
    for name in sorted(files):
        if file_hash(folder / name) != files[name][1]:
            return f"{name} is not as it was written (sha256)"
        if name.endswith(".index.json"):
            shards = json.loads((folder / name).read_bytes())["weight_map"].values()
            if not set(shards) <= set(files):
                return f"{name} lists files outside the checkpoint"
    return None


def _files(folder: Path) -> list[Path]:
    """List what is not a folder, links included."""
    return sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
