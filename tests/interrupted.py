"""Command lines that are killed or stopped at a chosen point, in forks of one warm process.

A fork costs no imports, so that many can be made. A point is a number of events on files of the
output folder, as Python's audit hooks see them: repeatable, and dense where files are written; or a
time, which also falls inside native code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"}
SETTINGS = {
    "load_in_8bit": True,
    "model_dtype": "float32",
    "lora_r": 64,
    "lora_dropout": 0.2,
    "loss": "squared",
    "anchor": 0.5,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "max_steps": 6,
    "save_steps": 1,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
}


def start(work: Callable[[], object], log: Path) -> int:
    """Start something in a fork, its output in a file; return the number of the process."""
    child = os.fork()
    if child == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def fork(work: Callable[[], object], log: Path) -> int:
    """Do something in a fork; return its exit code, minus the signal where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(start(work, log), 0)[1])


def train(model: Path, data: Path, output: Path) -> None:
    """Type ``ctrl-dpo train``."""
    from ctrl_dpo.cli import main

    options = SETTINGS | {"output_dir": output, "reference_cache": output / "reference"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    sys.argv = ["ctrl-dpo", "train", str(model), str(data), *words]
    main()


def at_event(number: int, output: Path, act: Callable[[int], None]) -> None:
    """Call ``act`` before the given event on files in ``output``, and at none with number 0."""
    seen, inside = 0, str(output)

    def look(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(inside):
            seen += 1
            if seen == number or number == 0:
                act(seen)

    sys.addaudithook(look)


def count_events(model: Path, data: Path, output: Path, log: Path) -> tuple[int, float]:
    """Train without interruption; return the number of events, and the seconds."""
    count = log.with_suffix(".count")
    start = time.monotonic()

    def work() -> None:
        descriptor = os.open(count, os.O_WRONLY | os.O_CREAT)
        at_event(0, output, lambda n: os.pwrite(descriptor, f"{n:9d}".encode(), 0))
        train(model, data, output)

    if fork(work, log) != 0:
        raise RuntimeError(f"the uninterrupted run failed: {log.read_text()[-2000:]}")
    return int(count.read_text()), time.monotonic() - start


def interrupt(
    number: int, event: int | None, seconds: float | None, paths: Sequence[Path], log: Path
) -> int:
    """Train, and send a signal at an event or a time; return the exit code."""
    model, data, output = paths

    def send(*_: object) -> None:
        os.kill(os.getpid(), number)

    def work() -> None:
        if event is not None:
            at_event(event, output, send)
        if seconds is not None:
            timer = threading.Timer(seconds, send)
            timer.daemon = True
            timer.start()
        train(model, data, output)

    return fork(work, log)


def outcome(output: Path) -> dict:
    """Read what a finished run left: weights, optimiser state and log, without times."""
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    times = ("runtime", "per_second")
    return {
        "weights": load_file(output / "adapter_model.safetensors"),
        "optimiser": torch.load(newest / "optimizer.pt", weights_only=True)["state"],
        "log": [{k: v for k, v in row.items() if not k.endswith(times)} for row in rows],
        "checkpoints": sorted(path.name for path in output.glob("checkpoint-*")),
        "unfinished": (output / ".saving").exists(),
    }


def same(one: object, other: object) -> bool:
    """Tell whether two outcomes agree in every bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(one == other)


def kill_and_resume(point: dict, expected: dict, paths: Sequence[Path]) -> dict:
    """Kill a run at a point, run the command again, and compare."""
    model, data, output = paths
    log = output.with_suffix(".log")
    code = interrupt(signal.SIGKILL, point.get("event"), point.get("seconds"), paths, log)
    saving = (output / ".saving").exists()
    steps = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]
    again = fork(lambda: train(model, data, output), log) if code else 0
    found = {"killed": code == -signal.SIGKILL, "inside_a_save": saving}
    found |= {"checkpoint": max(steps, default=0), "resumed": again == 0}
    found["equal"] = again == 0 and same(expected, outcome(output))
    return {"point": json.dumps(point), **found}
