"""What one of several processes does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """Do something on one process; all get its result, or raise its error.

    Parameters
    ----------
    work : callable
        Called on the main process only. Its result and its ``ValueError`` or ``OSError`` must
        pickle.

    Returns
    -------
    T
        What ``work`` returned.

    Examples
    --------
    >>> on_main(lambda: 3)
    3
    """
    result: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            result[0] = work()
        except (ValueError, OSError) as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    done: T = result[0]
    return done
