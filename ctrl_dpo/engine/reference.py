"""Log-probabilities under the reference policy: computed once, kept, found again by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.models import adapter_off


@torch.no_grad()
def reference_logps(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probabilities of a batch under the reference policy, ``(n_responses,)``.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A policy with an adapter, which is switched off; or the reference policy itself.
    batch : mapping of str to Tensor
        From :func:`ctrl_dpo.engine.batches.collate`.

    Returns
    -------
    (n_responses,) float32 Tensor
        Nats per response.
    """
    context = adapter_off(model) if hasattr(model, "disable_adapter") else nullcontext()
    with context:
        return response_logps(model, batch)


def add_reference_logps(
    model: Any, rows: Sequence[dict[str, Any]], key: str, folder: Path, batch_size: int, share: bool
) -> int:
    """Fill in ``reference_logps`` of every row, from the folder's cache or by computing them.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        See :func:`reference_logps`.
    rows : sequence of dict
        Training rows; changed in place.
    key : str
        Everything besides the tokens that decides the numbers: weights, types, row layout.
    folder : Path
        Where the numbers are kept.
    batch_size : int
        Groups per forward pass.
    share : bool
        Row layout, as in training: in bfloat16 another layout gives another value.

    Returns
    -------
    int
        Number of rows computed; the others were found.
    """
    names = [_row_key(key, row) for row in rows]
    store = folder / "reference_logps.jsonl"
    known = _read(store)
    _cut_partial_line(store)
    missing = [i for i, name in enumerate(names) if name not in known]
    # longest first: what does not fit in memory fails at once
    missing.sort(key=lambda i: -sum(map(len, rows[i]["response_ids"])))
    folder.mkdir(parents=True, exist_ok=True)
    with (
        store.open("a", encoding="utf-8") as file,
        tqdm(total=len(missing), desc="reference", unit="group", disable=None) as bar,
    ):
        for start in range(0, len(missing), batch_size):
            chosen = missing[start : start + batch_size]
            batch = collate([rows[i] | {"reference_logps": None} for i in chosen], share)
            values = reference_logps(model, {k: v.to(model.device) for k, v in batch.items()})
            parts = torch.split(values, [len(rows[i]["response_ids"]) for i in chosen])
            for i, part in zip(chosen, parts, strict=True):
                known[names[i]] = part.tolist()
                file.write(json.dumps({"key": names[i], "logps": known[names[i]]}) + "\n")
            bar.update(len(chosen))
    for row, name in zip(rows, names, strict=True):
        row["reference_logps"] = known[name]
    return len(missing)


def _row_key(key: str, row: Mapping[str, Any]) -> str:
    text = json.dumps([key, row["prompt_ids"], row["response_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()


def _cut_partial_line(store: Path) -> None:
    """Remove a last line without its end, so that the next entry starts a line of its own."""
    if store.exists():
        data = store.read_bytes()
        with store.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _read(store: Path) -> dict[str, list[float]]:
    """Read the cache; a last line cut by an interruption is not there yet."""
    if not store.exists():
        return {}
    lines = store.read_text(encoding="utf-8").split("\n")[:-1]
    return {entry["key"]: entry["logps"] for entry in map(json.loads, lines)}
