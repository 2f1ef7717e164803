"""Public dataset layouts -> scored groups, with a report of what happened to every row."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ctrl_dpo._validation import check_choice, check_columns
from ctrl_dpo.data import columns as names
from ctrl_dpo.data.layout_report import LayoutReport, suspect_completions
from ctrl_dpo.data.layout_rows import (
    FLOATS,
    HELPSTEER_WEIGHTS,
    LAYOUTS,
    DroppedRow,
    Group,
    checked_group,
    read_helpsteer,
)
from ctrl_dpo.data.merging import merge_equal_prompts

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

INVALID = ("error", "drop")
SAME_PROMPT = ("merge", "keep")
_PAIRED = ("pairs", "hh")  # their columns are also in datasets that hold more responses
_RANKED = ("nectar",)
_PASSED = (
    names.REFERENCE_REWARDS,
    names.REFERENCE_LOGPS,
    names.RESPONSE_IDS,
    names.FINISHED,
    names.SAMPLER_LOGPS,
)
_SCORES = ("score_chosen", "score_rejected")
_REASON = "dropped_reason"
# datasets keys its cache by the name of a function of ours, not by its code: raise this number when
# rows are read differently, or an older version's rows come back
_READING = 2


def to_groups(dataset: Dataset, layout: str = "auto", **options: Any) -> Dataset:
    """Convert any supported layout to scored groups; see :func:`read_groups`.

    Parameters
    ----------
    dataset : Dataset or IterableDataset
        Rows in a layout of :data:`ctrl_dpo.data.layout_rows.LAYOUTS`.
    layout : str
        Its name; ``"auto"`` detects it from the columns.
    **options
        See :func:`read_groups`.

    Returns
    -------
    Dataset or IterableDataset
        ``prompt``, ``responses``, and ``rewards`` where the layout has them; the report is logged.

    Examples
    --------
    >>> from datasets import Dataset
    >>> rows = {"instruction": ["Hi"], "generations": [["a", "b"]], "ratings": [["4", "2"]]}
    >>> to_groups(Dataset.from_dict(rows))[0]
    {'prompt': 'Hi', 'responses': ['a', 'b'], 'rewards': [4.0, 2.0]}
    """
    groups, report = read_groups(dataset, layout, **options)
    logger.info("%s", report.summary())
    return groups


def read_groups(
    dataset: Dataset,
    layout: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    invalid: str = "error",
    same_prompt: str = "merge",
    ranks_as_rewards: bool = False,
    attribute_weights: Mapping[str, float] | None = None,
    **map_options: Any,
) -> tuple[Dataset, LayoutReport]:
    """Convert any supported layout to scored groups and report on every row.

    Parameters
    ----------
    dataset : Dataset or IterableDataset
        Rows in a layout of :data:`ctrl_dpo.data.layout_rows.LAYOUTS`. A stream is read as it
        passes: its report is complete when it has been read to the end.
    layout : str
        Its name; ``"auto"`` detects it from the columns.
    columns : mapping of str to str, optional
        Our name to the dataset's, such as ``{"responses": "candidates", "rewards": "scores"}``,
        for datasets in no known layout.
    invalid : {"error", "drop"}
        Whether a row that breaks the rules stops the run, or is dropped and counted.
    same_prompt : {"merge", "keep"}
        Whether rows of one prompt become one group, or stay apart. Of pairs, a response that
        several rows name is kept once. A stream is not merged.
    ranks_as_rewards : bool
        Take ranks, 1 the best, for rewards (Nectar). Calibrated rewards need the order only.
    attribute_weights : mapping of str to float, optional
        Weights that make one reward of HelpSteer2's attributes.
    **map_options
        For ``datasets.map``, such as ``num_proc=4``.

    Returns
    -------
    groups : Dataset or IterableDataset
        ``prompt``, ``responses``, and where the layout has them ``rewards``,
        ``reference_rewards``, ``reference_logps`` and the library's other columns.
    report : LayoutReport
        What happened to the rows.

    Raises
    ------
    TypeError
        If it is several splits.
    ValueError
        If there is no row, the layout is unknown or ambiguous, a row breaks the rules, every row
        was dropped, or two rows give one response different rewards.
    """
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"dataset must be a datasets.Dataset; got {type(dataset).__name__}. Choose a split."
        )
    check_choice("invalid", invalid, INVALID)
    check_choice("same_prompt", same_prompt, SAME_PROMPT)
    if columns is not None:
        dataset = _renamed(dataset, columns)
    head = dataset if isinstance(dataset, Dataset) else Dataset.from_list(list(dataset.take(1)))
    if len(head) == 0:
        raise ValueError("dataset must have at least one row; got 0. Check the file and filters.")
    found = _detected(head) if layout == "auto" else check_choice("layout", layout, LAYOUTS)
    check_columns(head.column_names, LAYOUTS[found].required, f"Layout {found!r} needs it.")
    if found in _RANKED and not ranks_as_rewards:
        raise ValueError(
            f"ranks_as_rewards must be True to use the ranks of layout {found!r}; got False. Ranks "
            "tell the order of responses only: say that this is enough, or score them."
        )
    reader = LAYOUTS[found].read
    if found == "helpsteer2":
        weights = attribute_weights or HELPSTEER_WEIGHTS
        check_columns(head.column_names, weights, "attribute_weights names it.")
        reader = read_helpsteer(weights)
    passed = [n for n in head.column_names if found == "canonical" or n in _PASSED]
    read = _RowReader(reader, invalid, [n for n in passed if n not in LAYOUTS[found].required])
    if not isinstance(dataset, Dataset):
        return _stream(dataset, read, LayoutReport(found, 0))
    groups, report = _read_rows(dataset, read, LayoutReport(found, len(dataset)), map_options)
    if same_prompt == "merge":
        groups, report.counts["merged_rows"] = merge_equal_prompts(groups, found in _PAIRED)
    report.groups = len(groups)
    report.count_texts(groups[names.RESPONSES])
    report.count_rewards(groups, found in _PAIRED)
    return groups, report


def _stream(
    dataset: IterableDataset, read: _RowReader, report: LayoutReport
) -> tuple[IterableDataset, LayoutReport]:
    """Read a stream as it passes, counting on the way."""
    from datasets import IterableDataset

    def rows() -> Iterator[Group]:
        report.rows, report.groups, report.dropped, report.counts = 0, 0, {}, {}
        for index, row in enumerate(dataset):
            report.rows += 1
            judged = read.judge(row, index)
            reason = judged.pop(_REASON)
            if reason is not None:
                report.dropped.setdefault(reason, []).append(index)
                continue
            group = read(row, index) | {n: v for n, v in judged.items() if v is not None}
            report.groups += 1
            report.count_texts([group[names.RESPONSES]])
            yield group

    return IterableDataset.from_generator(rows), report


def _read_rows(
    dataset: Dataset, read: _RowReader, report: LayoutReport, map_options: dict[str, Any]
) -> tuple[Dataset, LayoutReport]:
    """Judge every row, and read those that pass."""
    from datasets import Features, List, Value, concatenate_datasets

    options = {"with_indices": True, "remove_columns": dataset.column_names, **map_options}
    # a type inferred from the first rows fails where those have no reward and later ones do
    types = Features({_REASON: Value("string"), **{n: List(Value("float64")) for n in FLOATS}})
    judged = dataset.map(read.judge, features=types, desc=f"check {report.layout}", **options)
    kept = []
    for row, text in enumerate(judged[_REASON]):
        if text is None:
            kept.append(row)
        else:
            report.dropped.setdefault(text, []).append(row)
    if not kept:
        raise ValueError(
            f"dataset must have a usable row; got none of {report.rows}: {report.summary()}."
        )
    if len(kept) < len(dataset):
        dataset, judged = dataset.select(kept), judged.select(kept)
    if report.layout == "ultrafeedback":
        report.noted["suspect_scores"] = [
            kept[i] for i, row in enumerate(dataset) if suspect_completions(row)
        ]
    groups = dataset.map(read, desc=f"read {report.layout}", **options)
    given = [n for n in FLOATS if any(values is not None for values in judged[n])]
    if given:
        groups = concatenate_datasets([groups, judged.select_columns(given)], axis=1)
    return groups, report


def _detected(dataset: Dataset) -> str:
    """Return the only layout that the columns fit."""
    found = dataset.column_names
    fitting = [name for name, each in LAYOUTS.items() if set(each.required) <= set(found)]
    wider = [name for name in fitting if name not in _PAIRED]
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
    dialogues = [isinstance(text, str) and text.startswith("\n\nHuman:") for text in sides]
    if any(dialogues) and not all(dialogues):
        raise ValueError(
            "layout must be named where several fit; got dialogues '\\n\\nHuman:' in "
            f"{sum(dialogues)} of {len(dialogues)} rows. Give layout='hh' or layout='pairs'."
        )
    return "hh" if any(dialogues) else "pairs"


def _renamed(dataset: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Give the user's columns our names, and drop what would clash with them."""
    ours = [names.PROMPT, names.RESPONSES, names.REWARDS, *_PASSED]
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


class _RowReader:
    """Read rows one by one; a picklable function for worker processes."""

    def __init__(self, read: Callable[..., Group], invalid: str, passed: Iterable[str]) -> None:
        self.read, self.invalid, self.passed = read, invalid, sorted(passed)
        self.reading = _READING

    def __call__(self, row: Mapping[str, Any], index: int) -> Group:
        """Return the group of a row."""
        group = self._group(row)
        return {name: values for name, values in group.items() if name not in FLOATS}

    def _group(self, row: Mapping[str, Any]) -> Group:
        return checked_group({name: row[name] for name in self.passed} | self.read(row))

    def judge(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return a row's numbers, or why it is dropped, or raise."""
        try:
            group = self._group(row)
        except DroppedRow as reason:
            return {_REASON: str(reason), **dict.fromkeys(FLOATS)}
        except (ValueError, TypeError, KeyError) as error:
            if self.invalid == "drop":
                return {_REASON: str(error).partition(";")[0], **dict.fromkeys(FLOATS)}
            raise ValueError(
                f"row {index}: {error} (invalid='drop' drops such rows and counts them)"
            ) from error
        return {_REASON: None, **{name: group.get(name) for name in FLOATS}}
