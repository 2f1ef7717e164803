"""Figure of a relabelled dataset: its rows, its calibration, its margins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ctrl_dpo.measures.figure_style import COLOURS, legend_below, panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COUNTS = (
    "rows",
    "merged_rows",
    "groups",
    "unscored_groups",
    "groups_without_pair",
    "pairs",
    "tied_pairs",
    "duplicate_pairs",
    "flipped_labels",
    "flipped_pairs",
)


@styled
def label_figure(name: str, summary: Mapping[str, Any]) -> Figure:
    """Draw what :class:`ctrl_dpo.measures.label_summary.LabelSummary` counted.

    Parameters
    ----------
    name : str
        What the title calls the dataset.
    summary : mapping
        Its ``to_dict()``.

    Returns
    -------
    matplotlib.figure.Figure
        Bars of the counts, calibrated rewards of held-out draws against uniform, and margins.
    """
    figure, axes = panels(3, f"Labels of {name}")
    _counts(axes[0], summary)
    held_out, margins = (summary["histograms"][key] for key in ("held_out", "margins"))
    total = sum(held_out["counts"])
    if total:
        shares = 100 * np.array(held_out["counts"]) / total
        label = "held-out reference draws"
        axes[1].stairs(shares, held_out["edges"], fill=True, color=COLOURS[5], label=label)
        even = 100 / len(shares)
        axes[1].axhline(even, color="black", linestyle="--", label=f"uniform: {even:g} % a bin")
    axes[1].set_title("calibration" if total else "calibration: no prompt has two draws")
    axes[1].set_xlabel("calibrated reward")
    axes[1].set_ylabel("share of draws (%)")
    found = np.array(margins["counts"])
    shares = 100 * found / max(found.sum(), 1)
    label = "pairs of responses within groups"
    axes[2].stairs(shares, margins["edges"], fill=True, color=COLOURS[2], label=label)
    median = summary["margin_nats"]
    axes[2].axvline(median, color="black", linestyle=":", label=f"median: {median:.3g} nats")
    axes[2].set_title(f"margins, {summary['tied_share']:.1%} of them 0")
    axes[2].set_xlabel("difference in log-ratio\nthat training aims at (nats)")
    axes[2].set_ylabel("share of pairs (%)")
    legend_below(figure, axes[1:])
    return figure


def _counts(axis: Axes, summary: Mapping[str, Any]) -> None:
    """Draw one bar a count, the first on top."""
    found = {name: summary[name] for name in _COUNTS if summary.get(name) is not None}
    # "3, first at rows [0, 4, 9]"
    lost = {k: int(v.partition(",")[0]) for k, v in summary.items() if k.startswith("dropped")}
    bars = {_wrapped(name): count for name, count in (found | lost).items()}
    drawn = axis.barh(list(bars), list(bars.values()), color=COLOURS[1])
    axis.bar_label(drawn, padding=3)
    axis.margins(x=0.2)
    axis.invert_yaxis()
    axis.set_title("rows, groups and pairs")
    axis.set_xlabel("count")


def _wrapped(name: str, width: int = 28) -> str:
    text = name.replace("_", " ")
    return text if len(text) <= width else f"{text[: width - 1]}…"
