"""Checkpoint folders: every damage is named by file, and never resumed from."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest

from ctrl_dpo.engine.checkpoints import (
    MANIFEST,
    SCRATCH,
    check_complete,
    check_resumable,
    clear_scratch,
    find_fault,
    list_checkpoints,
    newest_complete,
    publish,
    read_run,
    rotate,
    write_manifest,
)
from ctrl_dpo.engine.run_identity import check_same_run

FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": b"weights" * 100,
    "optimizer.pt": b"moments" * 100,
    "rng_state.pth": b"random" * 10,
    "running_sums_0.pt": b"sums" * 10,
    "scheduler.pt": b"schedule" * 10,
    "tokenizer.json": b'{"vocab": []}',
    "trainer_state.json": b'{"global_step": 2}',
}


def write(run_dir, step, files=FILES, run=None):
    """Write a checkpoint as a save does."""
    part = run_dir / SCRATCH / f"checkpoint-{step}"
    for name, content in files.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_bytes(content)
    write_manifest(part, {"seed": 1} if run is None else run)
    publish(part, run_dir / part.name)
    clear_scratch(run_dir)
    return run_dir / part.name


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def replace_by_a_link(path):
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize("damage", [remove, cut, empty, flip, replace_by_a_link])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(name, damage, tmp_path, caplog):
    good, bad = write(tmp_path, 9), write(tmp_path, 10)
    assert find_fault(bad) is None
    if name == MANIFEST and damage is replace_by_a_link:
        damage = flip
    damage(bad / name)
    with pytest.raises(ValueError, match=f"checkpoint must be complete; got .*where {name}"):
        check_complete(bad)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path) == good
    assert f"checkpoint-10 is damaged: {name}" in caplog.text
    assert "checkpoint-9 is used instead" in caplog.text
    shutil.rmtree(good)
    with pytest.raises(ValueError, match=f"must be complete; got checkpoint-10 .*{name}.*start ov"):
        newest_complete(tmp_path)


def test_any_flipped_bit_is_seen(tmp_path):
    folder = write(tmp_path, 1, {"a.json": b'{"x": 1}', "b.pt": b"12"})
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            changed = bytearray(content)
            changed[place] ^= 4
            path.write_bytes(bytes(changed))
            fault = find_fault(folder)
            harmless = path.name == MANIFEST and not content[place : place + 1].strip()
            assert harmless or fault is not None, (path.name, place)
        path.write_bytes(content)
    assert find_fault(folder) is None


def test_a_file_that_the_trainer_did_not_write_is_not_read(tmp_path):
    """Stock ``transformers`` would load these weights instead of the adapter's."""
    folder = write(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert find_fault(folder) == f"model.safetensors is not in {MANIFEST}"


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    folder = write(tmp_path, 1)
    outside = tmp_path / "outside.pt"
    outside.write_bytes(b"12")
    for name in ("../outside.pt", str(outside)):
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"] |= {name: {"bytes": 2, "sha256": "0"}}
        (folder / MANIFEST).write_text(json.dumps(manifest))
        assert find_fault(folder) == f"{MANIFEST} is not as it was written"


@pytest.mark.parametrize("shard", ["../model-1.safetensors", "/tmp/model-1.safetensors", "absent"])
def test_an_index_cannot_name_files_elsewhere(shard, tmp_path):
    name = "model.safetensors.index.json"
    index = json.dumps({"weight_map": {"layer": shard}}).encode()
    folder = write(tmp_path, 1, FILES | {name: index})
    assert find_fault(folder) == f"{name} lists files outside the checkpoint"


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": 1, "sha256": ""}', "\xff", "nul\0"])
def test_a_manifest_of_another_form_is_named(text, tmp_path):
    folder = write(tmp_path, 1)
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    assert find_fault(folder).startswith(f"{MANIFEST} ")


def test_folders_within_a_checkpoint_are_covered(tmp_path):
    """Sharded optimisers write folders."""
    folder = write(tmp_path, 1, FILES | {"optimizer_0/shard.distcp": b"state"})
    assert find_fault(folder) is None
    flip(folder / "optimizer_0" / "shard.distcp")
    assert find_fault(folder) == "optimizer_0/shard.distcp is not as it was written (sha256)"


STATES = {
    "one process": ["optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "two processes": ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"],
    "FSDP, whole": ["optimizer.bin", "scheduler.pt", "rng_state_0.pth"],
    "FSDP, sharded": ["optimizer_0/__0_0.distcp", "scheduler.pt", "rng_state_0.pth"],
    "DeepSpeed": ["global_step1/zero_pp_rank_0_optim_states.pt", "latest", "rng_state_0.pth"],
}


@pytest.mark.parametrize("layout", STATES)
def test_a_checkpoint_without_its_states_is_not_resumed(layout, tmp_path):
    weights = {"adapter_model.safetensors": b"1", "trainer_state.json": b"{}"}
    states = STATES[layout]
    check_resumable(write(tmp_path, 1, weights | dict.fromkeys(states, b"1")))
    with pytest.raises(
        ValueError,
        match="checkpoint must hold optimiser, schedule and random state to be resumed; got .*"
        "checkpoint-2' without optimizer.pt, scheduler.pt, rng_state.pth, .*save_only_model=True",
    ):
        check_resumable(write(tmp_path, 2, weights))
    without = {name: b"1" for name in states if "rng" not in name}
    with pytest.raises(ValueError, match="got .*checkpoint-3' without rng_state.pth, as"):
        check_resumable(write(tmp_path, 3, weights | without))


def test_steps_decide_the_order_and_clocks_do_not(tmp_path):
    folders = [write(tmp_path, step) for step in (100, 20, 3)]
    for age, folder in enumerate(folders):
        os.utime(folder, (age, age))
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-500").write_text("a file")
    assert [p.name for p in list_checkpoints(tmp_path)] == [p.name for p in reversed(folders)]
    assert newest_complete(tmp_path) == folders[0]


def test_no_checkpoint_is_no_fault(tmp_path):
    assert newest_complete(tmp_path) is None
    (tmp_path / SCRATCH / "checkpoint-5").mkdir(parents=True)  # of a process killed in a save
    assert newest_complete(tmp_path) is None


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    write(tmp_path, 1, run={"seed": 1})
    folder = write(tmp_path, 1, {"new.pt": b"1"}, run={"seed": 2})
    assert find_fault(folder) is None
    assert read_run(folder) == {"seed": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, [4], [1, 2, 3, 4, 9]),
        (0, [4], [1, 2, 3, 4, 9]),
        (1, [4], [4, 9]),
        (2, [4], [3, 4, 9]),
        (2, [1, 4], [1, 4, 9]),
        (1, [1, 4], [1, 4, 9]),
        (7, [4], [1, 2, 3, 4, 9]),
    ],
)
def test_rotation(limit, keep, left, tmp_path):
    for step in range(1, 5):
        write(tmp_path, step)
    (tmp_path / "checkpoint-9").mkdir()  # empty: neither counted nor deleted
    rotate(tmp_path, limit, {tmp_path / f"checkpoint-{step}" for step in keep})
    clear_scratch(tmp_path)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{s}" for s in left]


def test_a_symlinked_output_folder_is_an_output_folder(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    folder = write(tmp_path / "out", 3)
    assert newest_complete(tmp_path / "out") == folder
    assert find_fault(tmp_path / "disk" / "checkpoint-3") is None


def test_every_difference_between_runs_is_named():
    found = {"seed": 1, "loss": "squared", "gone": True, "same": [1]}
    wanted = {"seed": 2, "loss": "squared", "new": 0.5, "same": [1]}
    with pytest.raises(
        ValueError,
        match="that of 'here' to resume it; got seed 2 instead of 1, new 0.5 instead of None, "
        "gone None instead of True. Restore",
    ):
        check_same_run(found, wanted, "here", allowed=False)
    assert len(check_same_run(found, wanted, "here", allowed=True)) == 3
    assert check_same_run(found, found, "here", allowed=False) == []
