"""When to stop a run: signals, and numbers that are not finite; agreed between processes."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterable
from typing import Any

import torch


class StopSignals:
    """While entered, SIGTERM and SIGINT are noted; a second SIGINT interrupts at once.

    Attributes
    ----------
    received : int
        Number of the last signal; 0 without one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the signals over; only the main thread of a process can.

        Returns
        -------
        StopSignals
            This object.
        """
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


def exit_by(number: int) -> None:
    """Leave as a process does that a signal stops: exit code 143 for SIGTERM, 130 for SIGINT.

    Parameters
    ----------
    number : int
        Of the signal.

    Raises
    ------
    KeyboardInterrupt
        For SIGINT, which ends an interpreter with 130, but not a notebook.
    SystemExit
        For any other, with code 128 + number.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def check_step(values: torch.Tensor, step: int) -> None:
    """Raise at a loss or gradient norm that is not finite, on whichever process it is.

    Parameters
    ----------
    values : (n_processes, 2) Tensor
        Loss and gradient norm of every process, the same on all of them.
    step : int
        Updates made so far, for the error.

    Raises
    ------
    FloatingPointError
        Before the update, so that weights and optimiser are those of the last good step.
    """
    # losses first: the gradient norm, of all processes together, tells less about the cause
    for name, column in zip(("loss", "grad_norm"), values.T.tolist(), strict=True):
        for process, value in enumerate(column):
            if not math.isfinite(value):
                where = f" on process {process}" if len(values) > 1 else ""
                raise FloatingPointError(
                    f"{name} must be finite; got {value!r} at step {step}{where}. The update was "
                    "not made, and the last checkpoint is kept. Lower learning_rate, set "
                    "max_grad_norm, or look for extreme rewards."
                )


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Return the name of the first trained weight with a value that is not finite."""
    trained = [(name, weight) for name, weight in named if weight.requires_grad]
    # a shard of a distributed tensor is looked at by the process that holds it
    local = [weight.to_local() if hasattr(weight, "to_local") else weight for _, weight in trained]
    finite = torch.stack([torch.isfinite(weight.detach()).all() for weight in local])
    if bool(finite.all()):
        return None
    return trained[int(finite.logical_not().nonzero()[0])][0]
