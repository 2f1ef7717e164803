"""What the training benchmarks train on: real preference pairs, or texts of the same lengths."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
HH = HERE.parent.parent / "shared" / "data" / "hh_harmless_test_half.jsonl.gz"
LENGTHS = HERE / "data" / "hh_lengths.csv"  # tokens of prompt, chosen, rejected of the real pairs
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be")
_LAST = "\n\nAssistant:"


def hh_pairs() -> tuple[str, list[dict[str, Any]]]:
    """Read the real pairs where they are; else make as many with the same numbers of tokens."""
    if HH.exists():
        with gzip.open(HH, "rt") as file:
            pairs = [_pair(json.loads(line)) for line in file]
        return "hh_harmless", [pair for pair in pairs if pair is not None]
    with LENGTHS.open(newline="") as file:
        lengths = [[int(n) for n in row] for row in csv.reader(file)]
    return "synthetic", [_synthetic(row, np.random.default_rng(i)) for i, row in enumerate(lengths)]


def groups(prompt: int, response: int, size: int, count: int) -> list[dict[str, Any]]:
    """Make groups of ``size`` responses, all texts of the given numbers of words."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": [{"role": "user", "content": _text(rng, prompt)}],
            "responses": [_text(rng, response) for _ in range(size)],
            "rewards": rng.permutation(size).astype(float).tolist(),
        }
        for _ in range(count)
    ]


def expand(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List all pairs of each group, as a pairwise trainer needs them."""
    pairs = []
    for group in groups:
        ranked = sorted(zip(group["rewards"], group["responses"], strict=True), reverse=True)
        for (_, chosen), (_, rejected) in itertools.combinations(ranked, 2):
            pairs.append({"prompt": group["prompt"], **_answers(chosen, rejected)})
    return pairs


def _answers(chosen: str, rejected: str) -> dict[str, Any]:
    texts = {"chosen": chosen, "rejected": rejected}
    return {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}


def _pair(row: dict[str, str]) -> dict[str, Any] | None:
    """Split a pair of dialogues; None where one speaker has two turns in a row."""
    prompt, _, chosen = row["chosen"].rpartition(_LAST)
    other, _, rejected = row["rejected"].rpartition(_LAST)
    messages = []
    for part in re.split(r"\n\n(?=Human:|Assistant:)", prompt.strip()):
        speaker, _, text = part.partition(":")
        role = "user" if speaker == "Human" else "assistant"
        messages.append({"role": role, "content": text.strip()})
    twice = any(a["role"] == b["role"] for a, b in itertools.pairwise(messages))
    if prompt != other or twice or chosen.strip() == rejected.strip():
        return None
    return {"prompt": messages, **_answers(chosen.strip(), rejected.strip())}


def _synthetic(lengths: list[int], rng: np.random.Generator) -> dict[str, Any]:
    prompt, chosen, rejected = lengths
    messages = [{"role": "user", "content": _text(rng, prompt)}]
    return {"prompt": messages, **_answers(_text(rng, chosen), _text(rng, rejected))}


def _text(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, size=max(words, 1)))
