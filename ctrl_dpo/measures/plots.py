"""Figures of the report, each to be understood alone; built without pyplot, so without state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrl_dpo.measures.figure_style import (
    COLOURS,
    DASHES,
    MARKERS,
    legend_below,
    legend_name,
    panels,
    styled,
)
from ctrl_dpo.measures.tables import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
_HUGE = 1e300

_TRAINING_PANELS = (
    ("Loss", "loss per batch", ("loss", "eval_loss")),
    ("Log-ratio, best minus worst response", "nats", ("logratios/margins",)),
    ("Pairs ranked as their rewards", "share of pairs", ("rewards/accuracies",)),
)


def words(name: str) -> str:
    """Write the name of a procedure or a transformation for a person.

    Parameters
    ----------
    name : str
        As in records and tables: ``best_of_4``, ``exponential:10.0``.

    Returns
    -------
    str
        Words.

    Examples
    --------
    >>> words("best_of_4"), words("single_draw"), words("exponential:-10.0")
    ('best of 4', 'one draw', 'exponential, rate -10')
    """
    kind, _, rate = name.partition(":")
    text = {"single_draw": "one draw"}.get(kind, kind.replace("_", " "))
    return f"{text}, rate {float(rate):g}" if rate else text


@styled
def frontier_figure(
    rows: Sequence[Row], records: Sequence[Row] = (), title: str | None = None
) -> Figure:
    """Draw inference-time win rate against KL: the theory as curves, policies as points.

    Parameters
    ----------
    rows : sequence of mapping
        Table of :func:`~ctrl_dpo.theory.policies.frontier`: ``procedure``, ``transformation``,
        ``kl`` (nats per response) and ``win_rate`` (fraction). One panel a procedure.
    records : sequence of mapping
        Records of :func:`~ctrl_dpo.evaluate.evaluate`, drawn with both intervals where they have
        the procedure and a KL.
    title : str, optional
        What the figure states.

    Returns
    -------
    matplotlib.figure.Figure
        To be saved by ``figure.savefig(path, dpi=150)``.
    """
    procedures = list(dict.fromkeys(str(row["procedure"]) for row in rows))
    title = title or "The win rate that each nat of KL can buy, by theory"
    figure, axes = panels(len(procedures), title, share_y=True)
    # an estimated KL can be below 0
    lowest = min([0.0, *(record["kl"]["low"] for record in records if record["kl"] is not None)])
    for axis, procedure in zip(axes, procedures, strict=True):
        _curves(axis, [row for row in rows if str(row["procedure"]) == procedure])
        for number, record in enumerate(records):
            _point(axis, record, procedure, number)
        axis.axhline(50, color="0.75", linewidth=1)
        axis.set_title(f"used through {words(procedure)}")
        axis.set_xlabel("KL from the reference policy\n(nats per response)")
        axis.set_xlim(left=1.15 * lowest)
    axes[0].set_ylabel("inference-time win rate\nagainst the reference policy (%)")
    legend_below(figure, axes)
    return figure


def _curves(axis: Axes, rows: Sequence[Row]) -> None:
    """Draw one curve a transformation, the optimum in black."""
    for number, name in enumerate(dict.fromkeys(str(row["transformation"]) for row in rows)):
        curve = sorted(
            (row["kl"], row["win_rate"]) for row in rows if str(row["transformation"]) == name
        )
        kls, win_rates = np.array(curve, dtype=float).T
        best = name == "optimal"
        # the exponential's sign differs between procedures: one entry in the legend for both
        transformation = name.partition(":")[0].replace("_", " ")
        kind = "exact optimum (upper limit)" if best else f"{transformation} transformation"
        colour = "black" if best else ("0.35", "0.6")[number % 2]
        dash = DASHES[number % len(DASHES)]
        axis.plot(kls, 100 * win_rates, linestyle=dash, color=colour, label=kind)


def _point(axis: Axes, record: Row, procedure: str, number: int) -> None:
    """Draw one policy with both intervals, where it was measured."""
    rate, kl = record["win_rates"].get(procedure), record["kl"]
    if rate is None or kl is None:
        return
    axis.errorbar(
        kl["value"],
        100 * rate["value"],
        xerr=[[kl["value"] - kl["low"]], [kl["high"] - kl["value"]]],
        yerr=[[100 * (rate["value"] - rate["low"])], [100 * (rate["high"] - rate["value"])]],
        fmt=MARKERS[number % len(MARKERS)],
        color=COLOURS[number % len(COLOURS)],
        markersize=8,
        capsize=3,
        label=f"{legend_name(record['name'])} ({percent(record['confidence'])} intervals)",
    )


@styled
def sensitivity_figure(rows: Sequence[Row], title: str) -> Figure:
    """Draw the win rate lost against how a policy is served, one line a training procedure.

    Parameters
    ----------
    rows : sequence of mapping
        ``trained_for``, ``served_with`` and ``lost`` (win rate, 0 to 1), as
        :class:`~ctrl_dpo.theory.sensitivity.SensitivityPoint` has them.
    title : str
        What the figure states.

    Returns
    -------
    matplotlib.figure.Figure
        The figure.
    """
    figure, (axis,) = panels(1, title)
    names = list(dict.fromkeys(row["trained_for"] for row in rows))
    for number, name in enumerate(names):
        mine = [row for row in rows if row["trained_for"] == name]
        axis.plot(
            [words(row["served_with"]) for row in mine],
            [100 * row["lost"] for row in mine],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle=DASHES[number % len(DASHES)],
            label=f"trained for {words(name)}",
        )
    axis.set_xlabel("served by")
    axis.set_ylabel("win rate lost (percentage points)")
    axis.set_ylim(bottom=0)
    legend_below(figure, [axis])
    return figure


@styled
def calibration_figure(calibrated_rewards: ArrayLike, k: int | None = None) -> Figure:
    """Compare the calibrated rewards of fresh reference draws with the uniform distribution.

    Parameters
    ----------
    calibrated_rewards : array_like
        Values in [0, 1], any shape.
    k : int, optional
        Reference rewards a prompt. Calibrated rewards are then multiples of 1/(2k), and each is
        spread over the 1/(k + 1) of the unit interval that its rank stands for; without spreading,
        bins that do not divide k show stripes.

    Returns
    -------
    matplotlib.figure.Figure
        Histogram and cumulative distribution.
    """
    cumulative = _spread_distribution(np.ravel(np.asarray(calibrated_rewards, dtype=float)), k)
    grid = np.linspace(0, 1, 1001)
    below = cumulative(grid)
    distance = float(np.abs(below - grid).max())
    title = "Calibrated rewards of fresh reference draws: at most"
    figure, (left, right) = panels(
        2, f"{title} {100 * distance:.1f} percentage points from uniform"
    )
    edges = np.linspace(0, 1, 21)
    left.stairs(
        100 * np.diff(cumulative(edges)),
        edges,
        fill=True,
        color=COLOURS[5],
        label="fresh reference draws",
    )
    left.axhline(5, color="black", linestyle="--", label="uniform: 5 % in each of 20 bins")
    left.set_ylabel("share of draws (%)")
    left.set_title("histogram")
    right.plot(grid, 100 * below, color=COLOURS[1], label="fresh reference draws, cumulative")
    right.plot([0, 1], [0, 100], "--", color="black", label="uniform, cumulative")
    right.set_ylabel("share of draws at or below (%)")
    right.set_title("cumulative distribution")
    for axis in (left, right):
        axis.set_xlabel("calibrated reward\n(win rate of a response against the reference policy)")
        axis.set_xlim(0, 1)
    left.set_ylim(bottom=0)
    legend_below(figure, (left, right))
    return figure


def _spread_distribution(
    values: NDArray[np.float64], k: int | None
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Return the distribution function, each of the k + 1 ranks spread over its share of [0, 1]."""
    if k is None:
        ordered = np.sort(values)
        return lambda u: np.searchsorted(ordered, u, side="right") / values.size
    lows, counts = np.unique(values * k / (k + 1), return_counts=True)
    shares = counts / values.size
    return lambda u: np.clip((u[:, None] - lows) * (k + 1), 0, 1) @ shares


@styled
def training_figure(logs: Mapping[str, Sequence[Row]]) -> Figure:
    """Draw what training logged, one curve a policy.

    Parameters
    ----------
    logs : mapping of str to sequence of mapping
        Rows of ``metrics.jsonl`` by policy: ``step`` and what was measured there.

    Returns
    -------
    matplotlib.figure.Figure
        One panel for each measure that any policy logged.

    Raises
    ------
    ValueError
        If no row holds a measure that is drawn.
    """
    found = {key for rows in logs.values() for row in rows for key in row}
    shown = [panel for panel in _TRAINING_PANELS if found & {*panel[2]}]
    if not shown:
        known = [key for panel in _TRAINING_PANELS for key in panel[2]]
        raise ValueError(f"logs must hold one of {known}; got {sorted(found)}.")
    figure, axes = panels(len(shown), "What the fit did in training, step by step")
    for axis, (title, unit, keys) in zip(axes, shown, strict=True):
        for number, (name, rows) in enumerate(logs.items()):
            for dash, key in zip(DASHES, keys, strict=False):
                curve = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if curve:
                    split = " (held out)" if key.startswith("eval") else ""
                    colour = COLOURS[number % len(COLOURS)]
                    steps, values = np.array(curve, dtype=float).T
                    label = legend_name(name) + split
                    axis.plot(steps, values, dash, color=colour, alpha=0.85, label=label)
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.set_xlabel("optimiser step")
    legend_below(figure, axes)
    return figure


@styled
def reward_figure(
    reference_rewards: ArrayLike,
    policy_rewards: Mapping[str, ArrayLike],
    means: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Compare the rewards of single draws before and after training.

    Parameters
    ----------
    reference_rewards : array_like
        Rewards of draws from the reference policy, any shape.
    policy_rewards : mapping of str to array_like
        Rewards of draws from each trained policy.
    means : mapping of str to (before, after), optional
        Mean rewards of the reference policy and of a policy, such as those over prompts where
        prompts have unequal numbers of draws; by default those of the draws.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a policy, over the same bins.
    """
    before = np.ravel(np.asarray(reference_rewards, dtype=float))
    after = {name: np.ravel(np.asarray(r, dtype=float)) for name, r in policy_rewards.items()}
    largest = max(float(abs(rewards).max()) for rewards in (before, *after.values()))
    # matplotlib adds up edges, which overflows near the largest float
    unit = _HUGE if largest > _HUGE else 1.0
    before, after = before / unit, {name: rewards / unit for name, rewards in after.items()}
    edges = _edges(np.concatenate([before, *after.values()]))
    figure, axes = panels(
        len(after), "Rewards of single draws before and after training", share_y=True
    )
    for number, (axis, (name, rewards)) in enumerate(zip(axes, after.items(), strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        shares = [100 * np.histogram(r, edges)[0] / r.size for r in (before, rewards)]
        axis.stairs(shares[0], edges, fill=True, color="0.8", label="reference policy, before")
        label = f"{legend_name(name)}, after"
        axis.stairs(shares[1], edges, color=colour, linewidth=2, label=label)
        first, last = (means or {}).get(name, (unit * before.mean(), unit * rewards.mean()))
        axis.axvline(first / unit, color="0.4", linestyle=":", label="mean before")
        axis.axvline(last / unit, color=colour, linestyle="--", label="mean after")
        axis.set_title(f"{name}\nmean {first:.3g} before, {last:.3g} after")
        scale = "" if unit == 1 else f"{unit:g} times "
        axis.set_xlabel(f"reward (in {scale}the reward's own unit)")
    axes[0].set_ylabel("share of draws (%)")
    legend_below(figure, axes)
    return figure


def _edges(values: NDArray[np.float64], bins: int = 30) -> NDArray[np.float64]:
    """Return the edges of equal bins, over a wider range where floats cannot tell them apart."""
    low, high = float(values.min()), float(values.max())
    largest = max(abs(low), abs(high))
    if high - low < 2 * bins * np.spacing(largest):
        margin = max(0.5, 1e-3 * largest)
        low, high = low - margin, high + margin
    return np.histogram_bin_edges(values, bins, (low, high))
