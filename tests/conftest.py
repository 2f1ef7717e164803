"""Fixtures shared by all tests. Sockets are blocked, the hub is off, warnings are errors."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import tempfile
import threading

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from tiny import tiny_llama, tiny_tokenizer

from ctrl_dpo.data.disk import exclusive

settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("ci")
# the models are tiny: threads would only wait for one another
torch.set_num_threads(1)
# tests of numbers, of bits and of whole runs; counting lines takes two fifths of a training's time
UNCOUNTED = {
    "oracle",
    "property",
    "test_accumulation.py",
    "test_headline.py",
    "test_interrupted.py",
    "test_processes.py",
    "test_resume.py",
}
_CACHE = tempfile.TemporaryDirectory(prefix="ctrl_dpo_cache_")


def pytest_collection_finish() -> None:
    """Take what is imported for lasting: accelerate collects garbage after every run."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Count no lines in UNCOUNTED, nor in their fixtures (`no_cover` would count those)."""
    plugin = item.config.pluginmanager.get_plugin("_cov")
    counting = plugin and plugin.cov_controller
    if not counting or UNCOUNTED.isdisjoint(item.path.relative_to(item.config.rootpath).parts):
        return (yield)
    counting.pause()
    try:
        return (yield)
    finally:
        counting.resume()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let only tests marked ``network`` open a socket; Unix sockets serve torch's data loaders.

    What one test computes is not there for the next: each has a cache of its own.
    """
    name = hashlib.sha256(item.nodeid.encode()).hexdigest()[:16]
    os.environ["CTRL_DPO_CACHE"] = str(Path(_CACHE.name) / name)
    if item.get_closest_marker("network") is None:
        from pytest_socket import disable_socket

        disable_socket(allow_unix_socket=True)


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[Path]:
    """Put the benchmarks on the path."""
    folder = Path(__file__).parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(params=[0], ids=lambda seed: f"seed{seed}")
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny model and its tokenizer, as users have models."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def held_by_another() -> Callable[[Path], AbstractContextManager[None]]:
    """Return a context in which somebody else holds a folder."""

    @contextmanager
    def hold(folder: Path) -> Iterator[None]:
        held, done = threading.Event(), threading.Event()

        def work() -> None:
            with exclusive(folder):
                held.set()
                done.wait(60)

        thread = threading.Thread(target=work)
        thread.start()
        assert held.wait(60)
        try:
            yield
        finally:
            done.set()
            thread.join()

    return hold
