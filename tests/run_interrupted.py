"""Kill, stop and resume command lines; print as JSON what came out, for ``test_interrupted``.

Runs in a process of its own: it forks, and its ranks talk over loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from interrupted import count_events, fork, interrupt, kill_and_resume, outcome, same, start, train
from tiny import tiny_llama, tiny_tokenizer

import ctrl_dpo.train  # noqa: F401 - imported once, for all forks
from ctrl_dpo import relabel

GROUPS = {
    "prompt": [f"question {i}" for i in range(8)],
    "responses": [[f"{'abc'[j]}{i}" * (1 + (i + j) % 3) for j in range(3)] for i in range(8)],
    "rewards": [[float((i + 2 * j) % 5) for j in range(3)] for i in range(8)],
}


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """Write a one-layer model and relabelled groups."""
    model, data = folder / "model", folder / "data.parquet"
    tiny_llama(num_hidden_layers=1, hidden_size=64).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = Dataset.from_dict(GROUPS)
    relabel(rows, procedure="best_of_2", beta=0.3, anchor=0.5).to_parquet(str(data))
    return model, data


def kills(folder: Path, model: Path, data: Path, points: int, seed: int) -> Iterator[dict]:
    """Kill runs at seeded points, half by event and half by time."""
    events, seconds = count_events(model, data, folder / "whole", folder / "whole.log")
    expected = outcome(folder / "whole")
    draws = np.random.default_rng(seed)
    for number in range(points):
        if number % 2 == 0:
            point = {"event": int(draws.integers(1, events + 1))}
        else:
            point = {"seconds": float(draws.uniform(0, seconds))}
        yield kill_and_resume(point, expected, (model, data, folder / f"killed-{number}"))


def signals(folder: Path, model: Path, data: Path) -> list[dict]:
    """Stop runs by signals; the exit code is documented, and the command again finishes them."""
    expected = outcome(folder / "whole")
    found = []
    for number in (signal.SIGTERM, signal.SIGINT):
        output = folder / f"stopped-{int(number)}"
        log = output.with_suffix(".log")
        code = interrupt(number, 40, None, (model, data, output), log)
        stopped = len(list(output.glob("checkpoint-*")))
        again = fork(lambda o=output: train(model, data, o), log)
        equal = again == 0 and same(expected, outcome(output))
        found.append({"code": code, "checkpoints": stopped, "equal": equal})
    return found


def rank(index: int, port: int, output: Path, spoils: bool) -> None:
    """Train as one of two processes; the second may see a loss that is not finite at step 2."""
    import torch.distributed
    from integration.test_resume import At, make

    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rows = relabel(Dataset.from_dict(GROUPS), procedure="best_of_2", beta=0.3)

    def spoil() -> None:
        loss = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: loss(*a, **k) * float("nan")

    callbacks = [At(2, spoil)] if spoils and index == 1 else []
    trainer = make(output, rows, callbacks=callbacks, max_steps=5, ddp_backend="gloo")
    resume = bool(list(output.glob("checkpoint-*")))
    torch.distributed.barrier()
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        (output / f"rank-{index}.step").write_text(str(trainer.state.global_step))
    if index == 0:
        trainer.save_model()


def two_ranks(output: Path, port: int, spoils: bool = False) -> list[int]:
    """Train with two processes; return their exit codes."""
    logs = [output.with_suffix(f".{i}.log") for i in range(2)]
    children = [start(lambda i=i: rank(i, port, output, spoils), log) for i, log in enumerate(logs)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def ranks(folder: Path) -> dict:
    """Train with two processes: undisturbed; with a bad loss on one of them; resumed from that."""
    whole, stopped = folder / "ranks", folder / "ranks-stopped"
    result: dict = {"whole": two_ranks(whole, free_port())}
    result["bad"] = two_ranks(stopped, free_port(), spoils=True)
    result["steps"] = [(stopped / f"rank-{i}.step").read_text() for i in range(2)]
    result["errors"] = [folder.joinpath(f"ranks-stopped.{i}.log").read_text() for i in range(2)]
    result["checkpoints"] = sorted(path.name for path in stopped.glob("checkpoint-*"))
    result["again"] = two_ranks(stopped, free_port())
    result["equal"] = same(outcome(whole), outcome(stopped))
    return result


def free_port() -> int:
    """Ask the system for a free port on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", action="store_true", help="also with two processes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["CTRL_DPO_CACHE"] = str(options.folder / "cache")
    model, data = write_inputs(options.folder)
    result = {"kills": list(kills(options.folder, model, data, options.points, options.seed))}
    result["signals"] = signals(options.folder, model, data)
    if options.ranks:
        result["ranks"] = ranks(options.folder)
    sys.stdout.write(json.dumps(result) + "\n")
