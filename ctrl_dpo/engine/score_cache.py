"""Scores by content, appended to a file as they come, so that a rerun scores nothing twice."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

logger = logging.getLogger(__name__)


class ScoreCache:
    r"""JSON lines ``{"key": ..., "score": ...}``, read once and then only appended to.

    A process that dies leaves at most one incomplete last line, which is ignored; the next writer
    starts on a new line. One file may hold the scores of several rewards, since the identity of the
    reward is a part of the key, and several processes may append to it.

    Parameters
    ----------
    path : Path or None
        File, made when the first score is written; None keeps scores in memory only.
    identity : str
        Identity of the reward.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path = path
        self.identity = identity
        self._scores: dict[str, float] = _read(path) if path is not None and path.exists() else {}
        self._file: Any = None

    def __enter__(self) -> ScoreCache:
        """Open the file for appending.

        Returns
        -------
        ScoreCache
            This object.
        """
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            incomplete = self.path.exists() and not _ends_a_line(self.path)
            self._file = self.path.open("a", encoding="ascii", newline="\n")
            if incomplete:
                self._file.write("\n")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; what was written stays."""
        if self._file is not None:
            self._file.close()

    def key(self, prompt: Any, response: str) -> str:
        """Return the sha256 of reward identity, prompt and response.

        Parameters
        ----------
        prompt : str or list of dict
            Text or messages.
        response : str
            Text of the response.

        Returns
        -------
        str
            Hexadecimal digits.
        """
        # ASCII escapes: lone surrogates have no UTF-8 form
        content = json.dumps([self.identity, prompt, response], ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def __contains__(self, key: str) -> bool:
        """Tell whether a score is known."""
        return key in self._scores

    def __getitem__(self, key: str) -> float:
        """Return a known score."""
        return self._scores[key]

    def add(self, scores: Mapping[str, float]) -> None:
        """Keep scores and append them to the file, whole lines in one write.

        Parameters
        ----------
        scores : mapping of str to float
            Finite scores by key.
        """
        self._scores.update(scores)
        if self._file is not None:
            lines = [json.dumps({"key": key, "score": score}) for key, score in scores.items()]
            self._file.write("".join(line + "\n" for line in lines))
            self._file.flush()


def _ends_a_line(path: Path) -> bool:
    """Tell whether the last byte of a file ends a line, or there is none."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _read(path: Path) -> dict[str, float]:
    """Read every complete line; one cut short by an interruption is left out and scored again."""
    scores: dict[str, float] = {}
    n_incomplete = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
            except ValueError:
                n_incomplete += bool(line.strip())
                continue
            if not isinstance(entry, dict) or not entry.keys() >= {"key", "score"}:
                raise ValueError(
                    f"cache must be a file that this stage wrote; got {str(path)!r}, which holds "
                    f"something else at line {number}. Name another file."
                )
            scores[entry["key"]] = float(entry["score"])
    if n_incomplete:
        logger.warning("%s: %d incomplete lines left out", path, n_incomplete)
    return scores
