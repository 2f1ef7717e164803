"""Command lines killed with SIGKILL, stopped by signals, and run by two processes: real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# ten short runs; on a machine that is busy with other things they take minutes
pytestmark = pytest.mark.timeout(900)
TESTS = Path(__file__).parent.parent
POINTS = 6


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What ``run_interrupted.py`` saw; one process makes all the forks."""
    folder = tmp_path_factory.mktemp("interrupted")
    script = TESTS / "run_interrupted.py"
    words = [sys.executable, str(script), str(folder), "--points", str(POINTS), "--ranks"]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_killed_run_ends_with_the_same_bits_when_it_is_run_again(result):
    """Weights, states of the 8-bit optimiser and log, with dropout and accumulation."""
    kills = result["kills"]
    assert len(kills) == POINTS
    assert all(kill["resumed"] and kill["equal"] for kill in kills), kills
    by_event = [kill for kill in kills if "event" in kill["point"]]
    assert all(kill["killed"] for kill in by_event)
    assert sum(kill["inside_a_save"] for kill in kills) >= 2


def test_a_stopped_run_exits_with_its_code_and_goes_on(result):
    assert [stop["code"] for stop in result["signals"]] == [143, 130]
    for stop in result["signals"]:
        assert stop["equal"]
        assert stop["checkpoints"] >= 1


def test_a_bad_loss_on_one_process_stops_both_before_the_update(result):
    ranks = result["ranks"]
    assert ranks["whole"] == [0, 0]
    assert ranks["bad"] == [1, 1]
    assert ranks["steps"] == ["2", "2"]
    assert ranks["checkpoints"] == ["checkpoint-1", "checkpoint-2"]
    for error in ranks["errors"]:
        assert "loss must be finite; got nan at step 2 on process 1" in error


def test_two_processes_resume_to_the_same_bits(result):
    assert result["ranks"]["again"] == [0, 0]
    assert result["ranks"]["equal"]
