"""Log-probabilities by content on disk: many writers, no locks, nothing half-written believed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ctrl_dpo.data.folders import write_atomically

logger = logging.getLogger(__name__)


class ReferenceStore:
    r"""Values of one computation, by the hash of a row's tokens.

    ``FOLDER/COMPUTATION/`` holds ``computation.json``, which says in plain words what decides the
    numbers, and one file of JSON lines ``{"key", "logps", "check"}`` per writer. No two processes
    write to one file, so nothing has to be locked, on network folders either; two that compute the
    same row at the same time both keep it, and the values are equal. A line counts only with its
    end and its checksum: what a process that dies has left of one is never read.

    Parameters
    ----------
    folder : Path
        Shared by all computations.
    computation : mapping
        JSON-ready; what decides the numbers besides the tokens of a row.
    """

    def __init__(self, folder: Path, computation: Mapping[str, Any]) -> None:
        self._text = json.dumps(computation, indent=2, sort_keys=True) + "\n"
        self.path = folder / hashlib.sha256(self._text.encode()).hexdigest()[:32]
        self._file: int | None = None
        self._name: Path | None = None
        self._size = 0

    def read(self) -> dict[str, list[float]]:
        """Read what is known, by the key of the row.

        Returns
        -------
        dict of str to list of float
            Nats per response, in float32. Damaged lines are left out and named in a warning.
        """
        known: dict[str, list[float]] = {}
        for file in sorted(self.path.glob("*.jsonl")):
            known.update(_entries(file))
        return known

    def __enter__(self) -> ReferenceStore:
        """Make this writer's file, so that a folder that cannot be written fails at once.

        Returns
        -------
        ReferenceStore
            This object.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "computation.json").exists():
            write_atomically(self.path / "computation.json", self._text.encode())
        self._name = self.path / f"{uuid.uuid4().hex}.jsonl"
        self._file = os.open(self._name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; what was written stays, a file without entries does not."""
        if self._file is not None and self._name is not None:
            os.close(self._file)
            self._file = None
            if self._size == 0:
                self._name.unlink()

    def add(self, entries: Mapping[str, list[float]]) -> None:
        """Append entries: all of them, or none.

        Parameters
        ----------
        entries : mapping of str to list of float
            Nats per response, by the key of the row.

        Raises
        ------
        RuntimeError
            Outside a ``with`` block.
        OSError
            If they cannot be written, as on a full disk. What was added before stays.
        """
        if self._file is None:
            raise RuntimeError("store must be entered before rows are added; got a closed one.")
        data = "".join(_line(key, logps) for key, logps in entries.items()).encode("ascii")
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(
                error.errno,
                f"reference log-probabilities must be written to {self.path}; got "
                f"{error.strerror!r}. Make room there, or set reference_cache or CTRL_DPO_CACHE; "
                "what was computed before is kept",
            ) from error
        self._size += len(data)


def _line(key: str, logps: list[float]) -> str:
    return json.dumps({"key": key, "logps": logps, "check": _check(key, logps)}) + "\n"


def _check(key: str, logps: list[float]) -> int:
    return zlib.crc32(json.dumps([key, logps]).encode("ascii"))


def _entries(file: Path) -> Iterator[tuple[str, list[float]]]:
    """Yield the entries of a file; its last line may be one that is just being written."""
    damaged = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            key, logps = entry["key"], entry["logps"]
            sound = entry["check"] == _check(key, logps)
        except (ValueError, KeyError, TypeError):
            sound = False
        if sound:
            yield key, logps
        else:
            damaged.append(number)
    if damaged:
        logger.warning(
            "%s: %d damaged lines, first line %d; their rows are computed again",
            file,
            len(damaged),
            damaged[0],
        )
