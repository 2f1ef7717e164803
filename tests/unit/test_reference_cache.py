"""The cache of reference log-probabilities: found by what decides them, whatever goes wrong."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama

from ctrl_dpo.engine import numerics as numerics_module
from ctrl_dpo.engine import reference as reference_module
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.models import load_model
from ctrl_dpo.engine.numerics import numerics
from ctrl_dpo.engine.policies import ADAPTER_OFF, ReferencePolicy
from ctrl_dpo.engine.reference import add_reference_logps, compute_rows
from ctrl_dpo.engine.reference_store import ReferenceStore

ROWS = [
    {"prompt_ids": [5, 6], "response_ids": [[7, 2], [8, 9, 2]]},
    {"prompt_ids": [5], "response_ids": [[7, 2]]},
    {"prompt_ids": [11, 12, 13], "response_ids": [[14, 15, 16, 2], [17], [18, 2]]},
]


def fill(folder, rows=ROWS, key="k", model=None, share=True):
    rows = [dict(row) for row in rows]
    return rows, add_reference_logps(model or tiny_llama(), rows, key, folder, 1, share)


def lora(rank=4):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("share", [True, False])
def test_values_are_computed_once_and_found_again_bit_by_bit(tmp_path, share):
    first, computed = fill(tmp_path, share=share)
    assert computed == 3
    again, computed = fill(tmp_path, share=share)
    assert computed == 0
    assert again == first
    for row in again:
        with torch.no_grad():
            live = response_logps(tiny_llama(), collate([row | {"reference_logps": None}], share))
        assert torch.equal(torch.tensor(row["reference_logps"]), live)


@pytest.mark.parametrize(
    ("share", "shapes"),
    [
        (True, [(1, 7), (2, 5), (1, 5), (2, 2)]),
        # a group stays whole, whatever the limit
        (False, [(3, 6), (2, 4), (2, 4), (2, 4), (2, 2)]),
    ],
)
def test_passes_hold_so_many_tokens_in_rows_of_one_length(monkeypatch, share, shapes):
    rows = [dict(ROWS[i]) for i in (0, 1, 2, 0, 1, 0)]
    seen = []

    def spied(model, batch):
        seen.append(tuple(batch["input_ids"].shape))
        return response_logps(model, batch)

    monkeypatch.setattr(reference_module, "response_logps", spied)
    found = dict(compute_rows(tiny_llama(), rows, 10, share))
    assert seen == shapes
    assert found == dict(compute_rows(tiny_llama(), rows, 1, share))
    assert sorted(found) == list(range(6))


def test_only_what_decides_the_numbers_is_in_the_key(tmp_path):
    fill(tmp_path)
    # the order and the company of the rows, and an adapter of whatever rank, do not
    assert fill(tmp_path, rows=[ROWS[2], {**ROWS[0], "targets": [1.0, 2.0]}])[1] == 0
    for rank in (2, 8):
        model = get_peft_model(tiny_llama(), lora(rank))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        assert fill(tmp_path, model=model)[1] == 0
    # tokens, weights and the layout do
    assert fill(tmp_path, rows=[ROWS[0], {**ROWS[1], "prompt_ids": [6]}])[1] == 1
    assert fill(tmp_path, key="other weights")[1] == 3
    assert fill(tmp_path, share=False)[1] == 3


def test_the_adapter_is_off_for_the_reference(tmp_path):
    model = get_peft_model(tiny_llama(), lora())
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    with ReferencePolicy(ADAPTER_OFF, "a", "a", model).computing() as reference:
        mine = fill(tmp_path, key="a", model=reference)[0]
    theirs = fill(tmp_path, key="b")[0]
    for a, b in zip(mine, theirs, strict=True):
        assert a["reference_logps"] == b["reference_logps"]


def test_responses_alone_are_found_in_other_groups(tmp_path):
    """Without a shared prompt a response is a row of its own; two equal ones are computed once."""
    whole, _ = fill(tmp_path, rows=ROWS[2:], share=False)
    third, first, _ = ROWS[2]["response_ids"][::-1]
    regrouped = [{"prompt_ids": ROWS[2]["prompt_ids"], "response_ids": [third, first, third]}]
    rows, computed = fill(tmp_path, rows=regrouped, share=False)
    assert computed == 0
    values = whole[0]["reference_logps"]
    assert rows[0]["reference_logps"] == [values[2], values[1], values[2]]


def test_numerics_tell_computations_apart(tiny_model_folder, monkeypatch):
    plain = numerics(tiny_llama())
    assert numerics(get_peft_model(tiny_llama(), lora())) == plain
    others = {
        "weights": [tiny_llama(dtype=torch.bfloat16)],
        "config": [tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})],
        "attention": [tiny_llama(attn_implementation="eager")],
    }
    others["weights"] += [load_model(tiny_model_folder, dtype="float32", load_in_8bit=True)]
    for name, models in others.items():
        for model in models:
            assert numerics(model)[name] != plain[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert numerics(tiny_llama())["autocast"] == "torch.bfloat16"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert numerics(tiny_llama())["device"] != plain["device"]
    monkeypatch.setattr(numerics_module, "installed_versions", lambda: {"torch": "9"})
    assert numerics(tiny_llama())["versions"] == {"torch": "9"}


@pytest.mark.parametrize("kind", ["cuda", "mkldnn"])
def test_newer_precision_settings_are_told_apart_and_do_not_stop_a_run(kind):
    plain, settings = numerics(tiny_llama()), getattr(torch.backends, kind).matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        with pytest.raises(RuntimeError):  # what PyTorch says of the older setting then
            torch.get_float32_matmul_precision()
        assert numerics(tiny_llama())["precision"] != plain["precision"]
    finally:
        settings.fp32_precision = before
    assert numerics(tiny_llama()) == plain


def test_8bit_values_are_those_of_the_policy_before_its_first_update(tiny_model_folder, tmp_path):
    model = load_model(tiny_model_folder, dtype="float32", load_in_8bit=True)
    policy = get_peft_model(model, lora())
    fill(tmp_path, model=policy)
    rows, computed = fill(tmp_path, model=policy)
    assert computed == 0
    batch = collate(rows)
    assert torch.equal(response_logps(policy.train(), batch).detach(), batch["reference_logps"])


def test_the_default_folder_is_shared_by_all_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CTRL_DPO_CACHE", str(tmp_path / "shared"))
    assert fill(None)[1] == 3
    (where,) = (tmp_path / "shared" / "reference").iterdir()
    assert json.loads((where / "computation.json").read_text())["key"] == "k"
    monkeypatch.setenv("CTRL_DPO_CACHE", str(tmp_path / "moved"))
    assert fill(None)[1] == 3


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, monkeypatch, caplog):
    whole, _ = fill(tmp_path / "whole")
    original, calls = reference_module.response_logps, itertools.count()

    def failing(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(reference_module, "response_logps", failing)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "parts")
    caplog.set_level(logging.INFO)
    rows, computed = fill(tmp_path / "parts")
    assert (rows, computed) == (whole, 1)
    assert "3 rows, 2 found, 1 to compute" in caplog.text


WRITER = """
import itertools, sys
from pathlib import Path
from ctrl_dpo.engine.reference_store import ReferenceStore

for run in range(int(sys.argv[2])):
    with ReferenceStore(Path(sys.argv[1]), {"run": run}) as store:
        for i in range(40) if sys.argv[3] == "some" else itertools.count():
            store.add({f"row{i}": [float(i)] * 50})
"""


def writer(folder, runs, amount):
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(runs), amount])


def test_two_writers_at_once_corrupt_nothing(tmp_path, caplog):
    both = [writer(tmp_path, 20, "some") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    for run in range(20):
        known = ReferenceStore(tmp_path, {"run": run}).read()
        assert known == {f"row{i}": [float(i)] * 50 for i in range(40)}
    assert caplog.text == ""


def test_a_killed_writer_leaves_nothing_half_written(tmp_path):
    process = writer(tmp_path, 1, "endless")
    store = ReferenceStore(tmp_path, {"run": 0})
    while len(store.read()) < 100 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    known = store.read()
    assert len(known) >= 100
    assert all(v == [float(key.removeprefix("row"))] * 50 for key, v in known.items())
    with store:
        store.add({"another": [1.0]})
    assert store.read() == known | {"another": [1.0]}


def test_damage_is_said_aloud_and_computed_again(tmp_path, caplog):
    rows, _ = fill(tmp_path)
    (file,) = tmp_path.glob("*/*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    digit = next(i for i, c in enumerate(lines[1]) if c in "45678" and i > lines[1].index("logps"))
    lines[1] = lines[1][:digit] + "3" + lines[1][digit + 1 :]  # JSON still, of another number
    file.write_text("".join([lines[0], lines[1], "no JSON\n", lines[2][:-9]]))
    again, computed = fill(tmp_path)
    assert (again, computed) == (rows, 2)
    assert "2 damaged lines, first line 2" in caplog.text
    assert fill(tmp_path)[1] == 0


def test_a_full_disk_is_an_error_and_leaves_no_half_entry(tmp_path, monkeypatch):
    write = os.write
    store = ReferenceStore(tmp_path, {})

    def full(file, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[: len(data) // 2])

    with store:
        store.add({"a": [1.0]})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match=r"No space left.*set reference_cache or CTRL_DPO_C"):
                store.add({"b": [2.0], "c": [3.0]})
        (file,) = tmp_path.glob("*/*.jsonl")
        assert len(file.read_text().splitlines()) == 1
        store.add({"d": [4.0]})
    assert store.read() == {"a": [1.0], "d": [4.0]}


def test_a_folder_that_cannot_be_written_fails_before_the_first_row(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(reference_module, "compute_rows", lambda *_: pytest.fail("computed"))
    with pytest.raises(NotADirectoryError, match="file"):
        fill(tmp_path / "file")


def test_a_store_that_is_not_open_takes_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="store must be entered"):
        ReferenceStore(tmp_path, {}).add({"a": [1.0]})
    with ReferenceStore(tmp_path, {}):
        pass
    assert not list(tmp_path.glob("*/*.jsonl"))
