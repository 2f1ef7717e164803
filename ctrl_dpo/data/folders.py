"""Folders that stages exchange: Parquet shards that ``datasets.load_dataset`` reads, and a record.

A stage folder holds ``data/train-00000-of-0000N.parquet`` and ``stage.json`` (settings, content
hashes of the inputs, versions, and whether it is complete). Shards appear under a temporary name
and are renamed, so that a shard is either complete or absent.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_dpo._validation import check_source
from ctrl_dpo.data.disk import exclusive, flush
from ctrl_dpo.data.files import read_file, read_folder

if TYPE_CHECKING:
    from datasets import Dataset

RECORD = "stage.json"
_PACKAGES = (
    "ctrl-dpo",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "bitsandbytes",
    "numpy",
    "scipy",
)


@cache
def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a stage's numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass
class StageFolder:
    """One stage's output: which settings and inputs made it, and which shards are there.

    Parameters
    ----------
    path : Path
        Folder of the stage.
    stage : str
        Name of the stage, for the record.
    settings : dict
        Everything that changes the rows, JSON-ready, seeds included.
    inputs : dict of str to str
        Content hash of each input, see :func:`content_hash`.
    n_shards : int
        Number of shards the rows are split into; 0 for a stage that writes files of its own.
    """

    path: Path
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    n_shards: int = 1

    def open(self, allow_changed: bool = False) -> StageFolder:
        """Create the folder, or continue it when the same settings and inputs made it.

        Parameters
        ----------
        allow_changed : bool
            Also continue what other settings or inputs began; the record is then of these.

        Returns
        -------
        StageFolder
            This object, ready for :meth:`missing_shards`.

        Raises
        ------
        ValueError
            If the folder holds another run, or files that no stage wrote.
        """
        self.path = Path(self.path)
        record_path = self.path / RECORD
        if record_path.exists() and self._holds_work() and not allow_changed:
            self._check_same_run(json.loads(record_path.read_text(encoding="utf-8")))
            return self
        if not record_path.exists() and self._files():
            raise ValueError(
                f"output must be a new folder or one of this run; got {str(self.path)!r}, which "
                f"holds files but no {RECORD}. Name another folder."
            )
        (self.path / "data" if self.n_shards else self.path).mkdir(parents=True, exist_ok=True)
        self._write_record({"complete": False})
        return self

    @contextmanager
    def held(self) -> Iterator[StageFolder]:
        """Open the folder and hold it for this process, unless there is nothing left to do.

        Yields
        ------
        StageFolder
            This object. A finished stage is only read, by any number of processes at once.

        Raises
        ------
        ValueError
            If another process is writing the folder, or :meth:`open` refuses it.
        """
        with ExitStack() as stack:
            if not self.is_complete:
                stack.enter_context(exclusive(self.path))
            yield self.open()

    def _holds_work(self) -> bool:
        """Tell whether there is more than the record of a stage that failed at once."""
        return self.is_complete or any(path.name != RECORD for path in self._files())

    def _files(self) -> list[Path]:
        """List the files that are neither a lock nor a part of a file."""
        found = (path for path in self.path.rglob("*") if path.is_file())
        return [path for path in found if not path.name.startswith(".")]

    def _check_same_run(self, record: Mapping[str, Any]) -> None:
        """Raise unless the record on disk has this stage, settings, inputs and shard count."""
        mine = json.loads(json.dumps(self._identity()))
        for key, value in mine.items():
            if record.get(key) == value:
                continue
            theirs: Any = record.get(key)
            if isinstance(value, dict) and isinstance(theirs, dict):
                names = [k for k in {**value, **theirs} if value.get(k) != theirs.get(k)]
                if not names:  # a setting that did not exist then, and is not set now
                    continue
                key, value, theirs = f"{key}.{names[0]}", value.get(names[0]), theirs.get(names[0])
            raise ValueError(
                f"output must hold this run; got {str(self.path)!r} of another run, where {key} is "
                f"{theirs!r}, not {value!r}. Name another folder, or delete that one."
            )

    def _identity(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "settings": self.settings,
            "inputs": self.inputs,
            "n_shards": self.n_shards,
        }

    def _write_record(self, extra: Mapping[str, Any]) -> None:
        record = {**self._identity(), "versions": installed_versions(), **extra}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.path / RECORD, text.encode("utf-8"))

    def shard_path(self, index: int) -> Path:
        """Return the place of shard ``index``, under the name that ``load_dataset`` expects."""
        return self.path / "data" / f"train-{index:05d}-of-{self.n_shards:05d}.parquet"

    @property
    def is_complete(self) -> bool:
        """Whether an earlier call finished this stage."""
        return bool(read_record(self.path).get("complete", False))

    def missing_shards(self) -> list[int]:
        """List the shards still to be made."""
        return [i for i in range(self.n_shards) if not self.shard_path(i).exists()]

    def write_shard(self, index: int, rows: Dataset) -> None:
        """Write one shard so that it is complete or absent, whatever interrupts the call."""
        target = self.shard_path(index)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        rows.to_parquet(str(scratch))
        flush(scratch)
        scratch.replace(target)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the stage complete and keep what it reports about itself."""
        extra: dict[str, Any] = {"complete": True, "summary": dict(summary)}
        if self.n_shards:
            hashes = [file_hash(self.shard_path(i)) for i in range(self.n_shards)]
            extra["content_hash"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
        self._write_record(extra)


def read_record(path: str | Path) -> dict[str, Any]:
    """Return the record of a stage folder; empty for any other source."""
    record = Path(path) / RECORD
    if not record.exists():
        return {}
    loaded: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return loaded


def read_rows(source: str | Path) -> Dataset:
    """Read a stage folder, a data file, or a hub data set's train split.

    Parameters
    ----------
    source : str or Path
        Stage folder; ``.parquet``, ``.jsonl``, ``.json`` or ``.csv`` file (``.gz`` too); hub name.

    Returns
    -------
    datasets.Dataset
        The rows, memory-mapped.

    Raises
    ------
    ValueError
        If the stage folder is not complete, or a path exists in no known form or not at all.
    """
    import datasets

    check_source("data", source)
    path = Path(source)
    record = read_record(path)
    if record:
        if not record.get("complete"):
            raise ValueError(
                f"{str(path)!r} must be a complete stage; got an interrupted {record['stage']!r}. "
                "Run that command again: it goes on where it stopped."
            )
        return read_shards(path)
    if path.is_file():
        return read_file(path)
    if path.is_dir():
        return read_folder(path)
    if "/" not in str(source):
        raise ValueError(
            f"data must be a file, a folder or a hub name; got {str(source)!r}: no such file or "
            "folder. Name one that is there; a hub data set's name has its owner's before it."
        )
    return datasets.load_dataset(str(source), split="train")


def read_shards(path: Path) -> Dataset:
    """Read the shards of a stage folder, complete or not."""
    import datasets

    files = sorted(str(f) for f in (path / "data").glob("train-*.parquet"))
    return datasets.load_dataset("parquet", data_files=files, split="train")


def content_hash(source: str | Path) -> str:
    """Return a hash of what a stage reads: a stage's recorded hash, a file's sha256, or the name.

    Parameters
    ----------
    source : str or Path
        What :func:`read_rows` accepts.

    Returns
    -------
    str
        ``sha256`` in hexadecimal, or ``hub:NAME`` for a data set that is not local.
    """
    check_source("data", source)
    path = Path(source)
    recorded = read_record(path).get("content_hash")
    if recorded:
        return str(recorded)
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        return folder_hash(path)
    return f"hub:{source}"


def folder_hash(
    path: Path, patterns: Sequence[str] = ("**/*",), hash_file: Callable[[Path], str] | None = None
) -> str:
    """Return the sha256 over names and contents of a folder's visible files.

    Parameters
    ----------
    path : Path
        Folder.
    patterns : sequence of str
        Which files count, as for ``Path.glob``; all by default.
    hash_file : callable, optional
        Returns the hash of one file; :func:`file_hash` by default.

    Returns
    -------
    str
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    found = {file for pattern in patterns for file in path.glob(pattern)}
    for file in sorted(p for p in found if p.is_file() and not p.name.startswith(".")):
        mine = (hash_file or file_hash)(file)
        digest.update(str(file.relative_to(path)).encode() + b"\0" + mine.encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file so that readers see the old or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    flush(scratch)
    scratch.replace(path)


def run_once(folder: StageFolder, make: Callable[[], tuple[Dataset, Mapping[str, Any]]]) -> bool:
    """Make a stage of one shard, unless an earlier call finished it.

    Parameters
    ----------
    folder : StageFolder
        Where the rows go, not yet opened.
    make : callable
        Returns the rows and what the stage reports about itself.

    Returns
    -------
    bool
        Whether there was anything to do.
    """
    with folder.held():
        if folder.is_complete:
            return False
        rows, summary = make()
        folder.write_shard(0, rows)
        folder.finish(summary)
    return True
