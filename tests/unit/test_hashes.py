"""Hashes of large files: read once, and again when anything may have changed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ctrl_dpo.data import hashes
from ctrl_dpo.data.folders import file_hash, folder_hash
from ctrl_dpo.data.hashes import known_file_hash, model_hash, user_cache

SIZE = hashes._LARGE


@pytest.fixture
def reads(monkeypatch):
    """Paths that were read; files count as settled at once."""
    found: list[Path] = []

    def reading(path):
        found.append(path)
        return file_hash(path)

    monkeypatch.setattr(hashes, "file_hash", reading)
    monkeypatch.setattr(hashes, "_SETTLED_NS", -1)
    return found


def test_a_large_file_is_read_once(tmp_path, reads):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"a" * SIZE)
    link.symlink_to(file)
    assert known_file_hash(file) == known_file_hash(file) == known_file_hash(link)
    assert known_file_hash(file) == file_hash(file)
    assert reads == [file]


@pytest.mark.parametrize("way", ["in place, times set back", "replaced", "longer"])
def test_a_changed_file_is_read_again(tmp_path, reads, way):
    file = tmp_path / "file"
    file.write_bytes(b"a" * SIZE)
    before, times = known_file_hash(file), file.stat()
    if way == "in place, times set back":
        with file.open("r+b") as opened:
            opened.write(b"b")
    elif way == "replaced":
        (tmp_path / "new").write_bytes(b"b" * SIZE)
        (tmp_path / "new").replace(file)
    else:
        file.write_bytes(b"a" * (SIZE + 1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_file_hash(file) == file_hash(file) != before
    assert len(reads) == 2


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED_NS", 10**12)
    file = tmp_path / "file"
    file.write_bytes(b"a" * SIZE)
    assert known_file_hash(file) == known_file_hash(file)
    assert len(reads) == 2


def test_damaged_notes_and_unwritable_caches_cost_only_time(tmp_path, reads, monkeypatch, caplog):
    file = tmp_path / "file"
    file.write_bytes(b"a" * SIZE)
    expected = known_file_hash(file)
    (note,) = (user_cache() / "hashes").iterdir()
    assert json.loads(note.read_text())["sha256"] == expected
    for damage in ("{", "[]", "{}"):
        note.write_text(damage)
        assert known_file_hash(file) == expected
    (tmp_path / "no_folder").write_text("")
    monkeypatch.setenv("CTRL_DPO_CACHE", str(tmp_path / "no_folder"))
    assert known_file_hash(file) == expected
    assert "hash not kept" in caplog.text
    assert len(reads) == 5


def test_a_model_is_its_weights_and_configuration(tiny_model_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(tiny_model_folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    before = model_hash(folder)
    assert before == model_hash(tiny_model_folder)
    (folder / "README.md").write_text("a card")
    (folder / "tokenizer.json").write_text("another tokenizer")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_bytes(b"of a run")
    assert model_hash(folder) == before
    for name in ("config.json", "model.safetensors", "modeling_own.py"):
        with (folder / name).open("ab") as opened:
            opened.write(b" ")
        assert model_hash(folder) != before
        before = model_hash(folder)


def test_a_folder_without_weights_is_all_its_files_and_a_name_a_name(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert model_hash(tmp_path) == folder_hash(tmp_path)
    assert model_hash("owner/name") == "hub:owner/name"


def test_the_cache_folder_follows_hugging_face(monkeypatch):
    monkeypatch.delenv("CTRL_DPO_CACHE")
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", "/some/hf")
    assert user_cache() == Path("/some/hf/ctrl_dpo")
    monkeypatch.setenv("CTRL_DPO_CACHE", "~/mine")
    assert user_cache() == Path.home() / "mine"
