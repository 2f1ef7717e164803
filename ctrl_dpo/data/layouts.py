"""Public dataset layouts -> scored groups, with a report of what happened to every row."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ctrl_dpo._validation import check_choice, check_columns
from ctrl_dpo.data.detection import PAIRED, PASSED, check_one_kind, detected_layout, renamed
from ctrl_dpo.data.layout_report import LayoutReport, suspect_completions
from ctrl_dpo.data.layout_rows import (
    FLOATS,
    HELPSTEER_WEIGHTS,
    LAYOUTS,
    Group,
    read_helpsteer,
)
from ctrl_dpo.data.merging import merge_equal_prompts
from ctrl_dpo.data.row_reader import REASON, RowReader

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

INVALID = ("error", "drop")
SAME_PROMPT = ("merge", "keep")
EMPTY_PROMPTS = ("error", "keep")
EMPTY_RESPONSES = ("keep", "drop")
_CANONICAL = "canonical"
_RANKED = ("nectar",)


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
    # a loss of rows is for everybody to see
    logger.log(logging.WARNING if report.dropped else logging.INFO, "%s", report.summary())
    return groups


def read_groups(  # noqa: PLR0913 (each is a decision of the user's)
    dataset: Dataset,
    layout: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    invalid: str = "error",
    same_prompt: str = "merge",
    ranks_as_rewards: bool = False,
    attribute_weights: Mapping[str, float] | None = None,
    empty_prompts: str = "error",
    empty_responses: str = "keep",
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
        Weights that make one reward of HelpSteer2's attributes; by default those of the reward
        model that came with them. The report states them.
    empty_prompts : {"error", "keep"}
        Whether a prompt may be empty text, which a tokenizer with an opening token can continue.
    empty_responses : {"keep", "drop"}
        Whether a response without text stays, as its end token alone, or is taken out of its group
        and so out of the distribution that rewards are calibrated by.
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
        If there is no row, the layout is unknown or ambiguous, a row breaks the rules (also by a
        column such as ``tools``, which nothing renders), every row was dropped, or two rows give
        one response different rewards.
    """
    from datasets import Dataset, IterableDataset

    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"dataset must be a datasets.Dataset; got {type(dataset).__name__}. Choose a split."
        )
    check_choice("invalid", invalid, INVALID)
    check_choice("same_prompt", same_prompt, SAME_PROMPT)
    check_choice("empty_prompts", empty_prompts, EMPTY_PROMPTS)
    check_choice("empty_responses", empty_responses, EMPTY_RESPONSES)
    if columns is not None:
        dataset = renamed(dataset, columns)
    head = dataset if isinstance(dataset, Dataset) else Dataset.from_list(list(dataset.take(1)))
    if len(head) == 0:
        raise ValueError("dataset must have at least one row; got 0. Check the file and filters.")
    found = _settle_layout(head, layout, ranks_as_rewards)
    report = LayoutReport(found, weights=_settle_weights(head, found, attribute_weights))
    reader = read_helpsteer(report.weights) if report.weights else LAYOUTS[found].read
    passed = [n for n in head.column_names if found == _CANONICAL or n in PASSED]
    passed = [n for n in passed if n not in LAYOUTS[found].required]
    read = RowReader(reader, invalid, passed, empty_prompts, empty_responses)
    if not isinstance(dataset, Dataset):
        return _stream(dataset, read, report)
    groups = _read_rows(dataset, read, report, map_options)
    if same_prompt == "merge":
        groups, report.counts["merged_rows"] = merge_equal_prompts(groups, found in PAIRED)
    report.groups = len(groups)
    report.count_groups(groups)
    return groups, report


def _settle_layout(head: Dataset, layout: str, ranks_as_rewards: bool) -> str:
    """Detect the layout where none is named; raise unless the dataset can be read in it."""
    found = detected_layout(head) if layout == "auto" else check_choice("layout", layout, LAYOUTS)
    check_columns(head.column_names, LAYOUTS[found].required, f"Layout {found!r} needs it.")
    if found in _RANKED and not ranks_as_rewards:
        raise ValueError(
            f"ranks_as_rewards must be True to use the ranks of layout {found!r}; got False. Ranks "
            "tell the order of responses only: say that this is enough, or score them."
        )
    return found


def _settle_weights(
    head: Dataset, layout: str, weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Return what one reward is made of; nothing where the layout has the reward itself."""
    if layout == "helpsteer2":
        settled = dict(weights or HELPSTEER_WEIGHTS)
        check_columns(head.column_names, settled, "attribute_weights names it.")
        return settled
    if weights is not None:
        raise ValueError(
            f"attribute_weights must be of layout 'helpsteer2'; got {layout!r}. Leave them out."
        )
    return {}


def _stream(
    dataset: IterableDataset, read: RowReader, report: LayoutReport
) -> tuple[IterableDataset, LayoutReport]:
    """Read a stream as it passes, counting on the way."""
    from datasets import IterableDataset

    def rows() -> Iterator[Group]:
        report.rows, report.groups, report.dropped, report.counts = 0, 0, {}, {}
        for index, row in enumerate(dataset):
            report.rows += 1
            judged = read.judge(row, index)
            reason = judged.pop(REASON)
            if reason is not None:
                report.dropped.setdefault(reason, []).append(index)
                continue
            group = read(row, index) | {n: v for n, v in judged.items() if v is not None}
            report.groups += 1
            report.count_row(group, report.layout in PAIRED)
            yield group

    return IterableDataset.from_generator(rows), report


def _read_rows(
    dataset: Dataset, read: RowReader, report: LayoutReport, map_options: dict[str, Any]
) -> Dataset:
    """Judge every row, and read those that pass."""
    from datasets import Features, List, Value, concatenate_datasets

    options = {"with_indices": True, "remove_columns": dataset.column_names, **map_options}
    # columns of several types are held as JSON text, which only datasets can read back
    typed = "Json" not in str(dataset.features)
    canonical = report.layout == _CANONICAL and typed
    if not typed:
        check_one_kind(dataset)
    # a type inferred from the first rows fails where those have no reward and later ones do
    types = Features({REASON: Value("string"), **{n: List(Value("float64")) for n in FLOATS}})
    judge = {"features": types, "desc": f"check {report.layout}", **options}
    if canonical:
        arrow = dataset.with_format("arrow")
        judged = arrow.map(read.judge_canonical, batched=True, **judge).with_format(None)
    else:
        judged = dataset.map(read.judge, **judge)
    report.rows = len(dataset)
    kept = report.count_dropped(judged.with_format("arrow")[:][REASON])
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
    if report.layout in PAIRED:
        report.count_labels(judged)
    if canonical and read.empty_responses == "keep":
        # nothing but its numbers changes, and those are in judged
        groups = dataset.remove_columns([n for n in FLOATS if n in dataset.column_names])
    else:
        groups = dataset.map(read, desc=f"read {report.layout}", **options)
    given = [n for n in FLOATS if not _all_null(judged, n)]
    if given:
        groups = concatenate_datasets([groups, judged.select_columns(given)], axis=1)
    return groups


def _all_null(dataset: Dataset, name: str) -> bool:
    column = dataset.select_columns([name]).with_format("arrow")[:][name]
    return bool(column.null_count == len(column))
