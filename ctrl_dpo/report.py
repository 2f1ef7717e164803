"""Report stage: evaluation records to one page with tables and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from ctrl_dpo.data.folders import write_atomically
from ctrl_dpo.evaluate import compare
from ctrl_dpo.measures import plots
from ctrl_dpo.measures.figure_style import DPI
from ctrl_dpo.measures.label_plots import label_figure
from ctrl_dpo.measures.planning import frontier_rows
from ctrl_dpo.measures.tables import cell, figures, percent, table
from ctrl_dpo.measures.win_rates import untrained_win_rate
from ctrl_dpo.report_inputs import check_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
_SHORTEST = 0.1  # nats: curves to show where no KL is above 0

_LABELS = (
    "What became of the rows; calibrated rewards of one half of every prompt's reference draws, "
    "calibrated by the other half; and the margins that the policy is fitted to. Few draws a "
    "prompt leave gaps between ranks."
)
_CAPTIONS = {
    "frontier.png": "Win rate against KL. No policy lies above the black curve but for noise; the "
    "further below it a point lies, the more of its KL went into changes that the rewards ignore.",
    "rewards.png": "Rewards of single draws on the held-out prompts, before and after training. "
    "Shares are of draws; means are over prompts, each counted once.",
    "calibration.png": "Calibrated rewards of reference draws that took no part in the "
    "calibration. Where they are not uniform, the curves of the theory do not hold.",
    "training.png": "Training, one colour a policy; dashed lines are held-out values.",
}


def report(  # noqa: PLR0913 (each is a section of the page)
    path: str | Path,
    records: Sequence[Record],
    *,
    training_logs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    calibrated_rewards: ArrayLike | None = None,
    k: int | None = None,
    reference_rewards: ArrayLike | None = None,
    policy_rewards: Mapping[str, ArrayLike] | None = None,
    settings: Mapping[str, Any] | None = None,
    labels: Mapping[str, Record] | None = None,
) -> Path:
    """Write ``report.md`` and its figures.

    Parameters
    ----------
    path : str or Path
        Folder; a report that is there is replaced.
    records : sequence of mapping
        Records of :func:`~ctrl_dpo.evaluate.evaluate`, on the same prompts. The first is compared
        with each of the others.
    training_logs : mapping of str to sequence of mapping, optional
        Rows of each policy's ``metrics.jsonl``: ``step``, ``loss``, ``logratios/margins``, ...
    calibrated_rewards : array_like, optional
        Calibrated rewards of fresh reference draws, any shape.
    k : int, optional
        Reference rewards a prompt that calibrated them.
    reference_rewards, policy_rewards : array_like and mapping of str to array_like, optional
        Rewards of single draws of the reference policy and of each policy; given together.
    settings : mapping, optional
        What made the numbers, ready for JSON.
    labels : mapping of str to mapping, optional
        Summaries of relabelled data by the name they get, as
        :meth:`ctrl_dpo.measures.label_summary.LabelSummary.to_dict` returns them. With these,
        ``records`` may be empty.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ValueError
        If there is neither a record nor labels, two records have one name, or they cannot be
        compared.
    """
    if not records and not labels:
        raise ValueError(
            f"records must hold at least one record; got {list(records)!r}. Name an evaluation, or "
            "labels."
        )
    check_names(records)
    sections = evaluation_sections(records) if records else {}
    drawn: dict[str, Figure] = {}
    if any(record["kl"] is not None for record in records):
        drawn["frontier.png"] = _frontier_figure(records)
    if reference_rewards is not None and policy_rewards is not None:
        drawn["rewards.png"] = plots.reward_figure(
            reference_rewards, policy_rewards, _mean_rewards(records)
        )
    if calibrated_rewards is not None:
        drawn["calibration.png"] = plots.calibration_figure(calibrated_rewards, k)
    if training_logs:
        drawn["training.png"] = plots.training_figure(training_logs)
    for number, (name, summary) in enumerate((labels or {}).items()):
        drawn[f"labels{number}.png"] = label_figure(name, summary)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=DPI)
    page = folder / "report.md"
    text = _page(sections, list(drawn), settings or {}, labels or {})
    write_atomically(page, text.encode("utf-8"))
    return page


def win_rate_table(records: Sequence[Record]) -> str:
    """Write KL, win rates and lengths as a Markdown table, one row a policy.

    Parameters
    ----------
    records : sequence of mapping
        Records of :func:`~ctrl_dpo.evaluate.evaluate`.

    Returns
    -------
    str
        The table.
    """
    procedures = _procedures(records)
    against = records[0]["against"]
    rows = [
        [
            record["name"],
            cell(record["kl"], "{:.2f}"),
            *(cell(record["win_rates"].get(p), "{:.1%}") for p in procedures),
            cell(record["length"], "{:.1f}"),
        ]
        for record in records
    ]
    starts = [untrained_win_rate(p, against) for p in procedures]
    length = cell(records[0]["reference_length"], "{:.1f}")
    rows.append(["reference policy", "0", *(f"{start:.1%}" for start in starts), length])
    return table(["policy", "KL (nats)", *map(plots.words, procedures), "length (tokens)"], rows)


def attainment_table(records: Sequence[Record]) -> str:
    """Write attainment, the share of the attainable gain, as a Markdown table, one row a policy.

    Parameters
    ----------
    records : sequence of mapping
        Records of :func:`~ctrl_dpo.evaluate.evaluate`.

    Returns
    -------
    str
        The table.
    """
    procedures = _procedures(records)
    rows = [
        [record["name"], *(cell(record["attainment"].get(p), "{:.2f}") for p in procedures)]
        for record in records
    ]
    return table(["policy", *map(plots.words, procedures)], rows)


def comparison_table(records: Sequence[Record]) -> str:
    """Write the differences of the first policy to each other one, paired by prompt.

    Parameters
    ----------
    records : sequence of mapping
        At least two records of :func:`~ctrl_dpo.evaluate.evaluate`, on the same prompts.

    Returns
    -------
    str
        A Markdown table; win rates differ by percentage points.
    """
    first, *others = records
    procedures = _procedures(records)
    rows = []
    for other in others:
        found = compare(first, other)
        cells = [cell(found.get(p), "{:+.1%}") for p in procedures]
        rows.append([f"{first['name']} minus {other['name']}", *cells])
    return table(["difference of win rates", *map(plots.words, procedures)], rows)


def _procedures(records: Sequence[Record]) -> list[str]:
    """List the procedures measured, in the order in which they first appear."""
    return list(dict.fromkeys(p for record in records for p in record["win_rates"]))


def _frontier_figure(records: Sequence[Record]) -> Figure:
    """Draw every policy under the theory's curves, which end a little beyond the largest KL."""
    highest = max(record["kl"]["high"] for record in records if record["kl"] is not None)
    end = max(1.15 * highest, _SHORTEST)
    kls = (end * np.linspace(0.02, 1, 40) ** 2).tolist()  # closer where the curves are steep
    rows = frontier_rows(_procedures(records), kls, records[0]["against"])
    return plots.frontier_figure(rows, records, "Win rate at the KL paid for it, under the optimum")


def _mean_rewards(records: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Return the mean rewards of the reference policy and of each policy, by its name."""
    return {r["name"]: (r["reference_rewards"]["value"], r["rewards"]["value"]) for r in records}


def _page(
    evaluation: Mapping[str, str],
    pictures: Sequence[str],
    settings: Mapping[str, Any],
    labels: Mapping[str, Record],
) -> str:
    """Compose the page."""
    sections = dict(evaluation)
    for name, summary in labels.items():
        sections[f"Labels of {name}"] = table(["", "value"], figures(summary))
    if pictures:
        captions = {name: _CAPTIONS.get(name, _LABELS) for name in pictures}
        shown = [f"![{text}]({name})\n\n{text}" for name, text in captions.items()]
        sections["Figures"] = "\n\n".join(shown)
    if settings:
        sections["Settings"] = f"```json\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```"
    return "\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items())


def evaluation_sections(records: Sequence[Record]) -> dict[str, str]:
    """Compose what evaluations tell.

    Parameters
    ----------
    records : sequence of mapping
        Records of :func:`~ctrl_dpo.evaluate.evaluate`; several are compared.

    Returns
    -------
    dict of str to str
        Markdown by title.
    """
    first = records[0]
    confidence = percent(first["confidence"])
    served = (
        f"what {plots.words(first['against'])} serves" if first["against"] else "what it serves"
    )
    sections = {
        "Evaluation": (
            f"{first['n_prompts']} held-out prompts, {first['n_reference_draws']} draws of the "
            f"reference policy and {first['n_draws']} of {first['name']}; {first['tied']:.1%} of "
            f"their pairs have equal rewards. Brackets hold {confidence} intervals by "
            "bootstrap over prompts."
        ),
        "Inference-time win rate against the reference policy": (
            f"{win_rate_table(records)}\n\nEach procedure's choice from the policy's draws against "
            f"{served} from the reference policy's, over all subsets of the draws; ties count one "
            "half."
        ),
        "Attainment": (
            f"{attainment_table(records)}\n\nThe share of the gain that the exact optimum has at "
            "the KL that was paid: 1 is the optimum, 0 the reference policy. A dash: the KL is not "
            "known, or may be 0."
        ),
    }
    if len(records) > 1:
        sections["Differences, paired by prompt"] = comparison_table(records)
    return sections
