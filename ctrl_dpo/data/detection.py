"""Which layout a dataset is in, by its columns; and the user's names for ours."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ctrl_dpo._validation import check_choice, check_columns
from ctrl_dpo.data import columns as names
from ctrl_dpo.data.layout_rows import DIALOGUE, LAYOUTS
from ctrl_dpo.data.messages import is_messages

if TYPE_CHECKING:
    from datasets import Dataset

PAIRED = ("pairs", "hh")  # their columns are also in datasets that hold more responses
PASSED = (
    names.REFERENCE_REWARDS,
    names.REFERENCE_LOGPS,
    names.RESPONSE_IDS,
    names.FINISHED,
    names.SAMPLER_LOGPS,
    names.PROMPT_FEATURES,
    names.REFERENCE_COMPUTED,
    names.WEIGHT,
)
_SCORES = ("score_chosen", "score_rejected")


def detected_layout(dataset: Dataset) -> str:
    """Return the only layout that the columns fit."""
    found = dataset.column_names
    fitting = [name for name, each in LAYOUTS.items() if set(each.required) <= set(found)]
    wider = [name for name in fitting if name not in PAIRED]
    if not wider and fitting:
        return _pairs_or_hh(dataset)
    if len(wider) == 1:
        return wider[0]
    if wider:
        raise ValueError(
            f"layout must be named where several fit; got columns {sorted(found)} of {wider}. Give "
            f"layout={wider[0]!r}, or drop the columns of the others."
        )

    def likeness(name: str) -> float:
        needed = LAYOUTS[name].required
        close = [max(difflib.SequenceMatcher(None, n, f).ratio() for f in found) for n in needed]
        return sum(close) / len(close)

    nearest = max(LAYOUTS, key=likeness)
    missing = sorted(set(LAYOUTS[nearest].required) - set(found))
    raise ValueError(
        f"dataset must be in a known layout; got columns {sorted(found)}. The nearest is "
        f"{nearest!r}, which also needs {missing}. Map your columns: "
        "columns={'prompt': ..., 'responses': ..., 'rewards': ...}."
    )


def _pairs_or_hh(dataset: Dataset) -> str:
    """Tell dialogue strings from other pairs; a null decides nothing."""
    sides = (text for text in dataset[names.CHOSEN] if text is not None)
    dialogues = [isinstance(text, str) and text.startswith(DIALOGUE) for text in sides]
    if any(dialogues) and not all(dialogues):
        raise ValueError(
            "layout must be named where several fit; got dialogues '\\n\\nHuman:' in "
            f"{sum(dialogues)} of {len(dialogues)} rows. Give layout='hh' or layout='pairs'."
        )
    return "hh" if any(dialogues) else "pairs"


def renamed(dataset: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Give the user's columns our names, and drop what would clash with them."""
    ours = [names.PROMPT, names.RESPONSES, names.REWARDS, *PASSED]
    ours += [names.CHOSEN, names.REJECTED, *_SCORES]
    if len(set(columns.values())) < len(columns):
        raise ValueError(
            f"columns must map each column once; got {dict(columns)!r}. Copy the column first."
        )
    for ours_name, theirs in columns.items():
        check_choice("columns key", ours_name, ours)
        check_columns(dataset.column_names, [theirs], f"columns maps {ours_name!r} to it.")
    clashes = [n for n in columns if n in dataset.column_names and n not in columns.values()]
    dataset = dataset.remove_columns(clashes)
    return dataset.rename_columns({v: k for k, v in columns.items() if k != v})


def check_one_kind(dataset: Dataset) -> None:
    """Raise where one of the columns of texts or conversations holds both."""
    for name in {names.PROMPT, names.CHOSEN, names.REJECTED}.intersection(dataset.column_names):
        if type(dataset.features[name]).__name__ != "Json":
            continue
        first: dict[str, int] = {}
        for row, value in enumerate(dataset[name]):
            if value is not None:
                first.setdefault("messages" if is_messages(value) else "text", row)
        if len(first) > 1:
            raise ValueError(
                f"column {name!r} must be of one type in all rows; got text at row "
                f"{first['text']} and messages at row {first['messages']}. Convert one."
            )
