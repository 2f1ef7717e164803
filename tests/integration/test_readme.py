"""The README is code: its example runs, its commands exist, its length is what it promises."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ctrl_dpo
from ctrl_dpo.cli import app

ROOT = Path(ctrl_dpo.__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^    ctrl-dpo (\w+)(.*)$", README, re.MULTILINE)


def test_the_example_trains_and_evaluates(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(sys, "path", [*sys.path])
    # the same lines on the tiny model and few prompts; nothing else is changed
    code = EXAMPLE.replace("runs/quickstart/model", str(tiny_model_folder))
    code = code.replace('split="train"', 'split="train[:4]"').replace("max_steps=48", "max_steps=2")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    result = names["result"]
    assert result["n_prompts"] == 4
    assert 0 < result["win_rates"]["best_of_4"]["value"] < 1
    assert (tmp_path / "runs" / "example" / "adapter_config.json").exists()


def test_the_example_is_short():
    lines = [line for line in EXAMPLE.splitlines() if line.strip()]
    assert len([line for line in lines if "import" not in line]) < 20
    assert len(lines) < 27


def test_every_command_and_option_exists():
    assert len(COMMANDS) == 11
    for name, words in COMMANDS:
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+(?![a-z_-])", words):
            if name != "train":
                assert option in shown, (name, option)


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w/]+\.md)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_every_module_of_the_tree_exists():
    tree = README.split("## Files")[1].split("## Measured")[0]
    modules = re.findall(r"^      ([a-z]+\.py)", tree, re.MULTILINE)
    assert modules[:3] == ["sample.py", "score.py", "calibrate.py"]
    assert len(modules) >= 9
    assert all((ROOT / "ctrl_dpo" / name).exists() for name in modules)
