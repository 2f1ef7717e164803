"""Two processes over gloo train what one does; none hangs, goes on alone or writes twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched import equal_batches
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_llama

import ctrl_dpo
from ctrl_dpo.data.folders import read_record
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.checkpoints import check_complete
from ctrl_dpo.engine.checks import check_one_device
from ctrl_dpo.engine.logprobs import response_logps

ROOT = Path(ctrl_dpo.__file__).parent.parent
COMPARED = ("loss", "grad_norm", "logps/chosen", "rewards/margins", "kl/self_normalised", "fit/r2")
GROUPS = [{"prompt_ids": [5, 6, 7], "response_ids": [[8, 9, 2], [10, 2]]}]
# the processes meet on loopback
pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(600)]


def launch(folder: Path, *scenarios: str) -> Path:
    """Run scenarios in two processes; a hang is an error after eight minutes."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "recipes/accelerate/cpu_2proc.yaml")]
    command += ["--main_process_port", "0", str(ROOT / "tests/launched.py"), str(folder)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *scenarios],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            _, errors = launcher.communicate(timeout=480)
        finally:
            launcher.terminate()  # it ends its processes; nothing where it has ended
    assert launcher.returncode == 0, errors[-4000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    equal_batches(folder / "equal_batches", 1)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    names = "equal_batches", "unequal_last_batch", "resumed", "command_line", "one_process_fails"
    return launch(tmp_path_factory.mktemp("two"), *names)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return launch(tmp_path_factory.mktemp("sharded"), "sharded") / "sharded"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def worst_difference(one: Path, other: Path) -> float:
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (one, other))
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


def test_two_processes_reach_the_weights_of_one(one, two):
    assert worst_difference(one / "equal_batches", two / "equal_batches") < 1e-6


def test_metrics_are_written_once_and_are_those_of_all_processes(one, two):
    mine, theirs = rows(one / "equal_batches"), rows(two / "equal_batches")
    assert [row["step"] for row in mine] == [row["step"] for row in theirs] == [*range(1, 21), 20]
    for before, after in zip(mine[:-1], theirs[:-1], strict=True):
        for name in COMPARED:
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-5), name


def test_each_process_computes_its_share_of_the_reference(one, two):
    def stored(folder: Path) -> list[dict[str, list[float]]]:
        files = sorted((folder / "equal_batches" / "reference").rglob("*.jsonl"))
        lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        return [{entry["key"]: entry["logps"] for entry in entries} for entries in lines]

    (whole,), shares = stored(one), stored(two)
    assert [len(share) for share in shares] == [8, 8]
    assert shares[0] | shares[1] == whole


def test_an_unequal_last_batch_hangs_no_process(two):
    # 13 groups in batches of 4 are 4 updates an epoch
    assert [row["step"] for row in rows(two / "unequal_last_batch")] == [*range(1, 9), 8]


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_two_processes_resume_to_the_same_bits(order, two):
    whole, again = two / "resumed" / order / "whole", two / "resumed" / order / "again"
    assert worst_difference(whole, again) == 0.0
    logs = [rows(folder)[:-1] for folder in (whole, again)]
    assert [row["step"] for row in logs[0]] == [*range(1, 7)]
    told = [[[row[name] for name in ("step", *COMPARED)] for row in log] for log in logs]
    assert told[0] == told[1]


def test_what_one_process_finds_stops_all(two):
    for process in range(2):
        error = (two / "one_process_fails" / f"error-{process}.txt").read_text()
        assert "log-ratios before the first update must be within" in error
    assert not (two / "one_process_fails" / "metrics.jsonl").exists()


def test_the_command_line_trains_and_saves_once(two):
    output = two / "command_line" / "output"
    assert read_record(output)["complete"]
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4, 4]
    for step in (2, 4):
        check_complete(output / f"checkpoint-{step}")
    assert worst_difference(output / "checkpoint-4", output) == 0.0


def test_checkpoints_of_sharded_weights_are_complete(sharded):
    for step in (10, 20):
        check_complete(sharded / f"checkpoint-{step}")
    assert worst_difference(sharded / "checkpoint-20", sharded) == 0.0


def test_sharded_weights_reach_those_of_one_process(one, sharded):
    assert worst_difference(one / "equal_batches", sharded) < 1e-6
    for process in range(2):
        assert json.loads((sharded / f"kinds-{process}.json").read_text()) == ["DTensor"]


def test_an_adapter_saved_from_shards_is_the_trained_one(one, sharded):
    batch = collate(GROUPS)
    before = response_logps(tiny_llama(), batch)
    found = [
        response_logps(PeftModel.from_pretrained(tiny_llama(), str(folder)), batch).detach()
        for folder in (one / "equal_batches", sharded)
    ]
    assert found[1].tolist() == pytest.approx(found[0].tolist(), abs=1e-5)
    assert (found[1] - before).abs().max() > 1e-2  # a thousand times what may differ


def test_several_devices_in_one_process_are_refused():
    import torch

    with pytest.raises(ValueError, match="one device; got 2 devices and a model of type str"):
        check_one_device("folder", 2)
    wrapped = torch.nn.DataParallel(tiny_llama())
    with pytest.raises(ValueError, match="a model of type DataParallel: .*accelerate launch"):
        check_one_device(wrapped, 1)
