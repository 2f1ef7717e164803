"""What other processes and power cuts may do to files: locks, and flushes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"


@contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process, which may hold it several times over.

    Parameters
    ----------
    folder : str or Path
        Made where it is missing. The operating system gives the lock back when a process dies.

    Yields
    ------
    None
        While the folder is held.

    Raises
    ------
    ValueError
        If another process holds the folder.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.resolve() / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output folder must not be in use; got {str(path)!r}, which another process is "
            "writing. Wait for it, or name another folder."
        ) from None
    try:
        yield
    finally:
        lock.release()


def flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk before the next step relies on it."""
    if os.name != "posix" and path.is_dir():
        return  # only POSIX systems open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
