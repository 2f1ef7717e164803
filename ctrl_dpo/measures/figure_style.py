"""Style of all figures; built without pyplot, so without state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito (2008): told apart with every common colour blindness; markers and dashes differ too
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
_STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "text.parse_math": False,  # a name may hold dollar signs
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the style of all figures, leaving the user's matplotlib settings alone."""

    @functools.wraps(draw)
    def in_style(*args: Any, **options: Any) -> Figure:
        with matplotlib_or_remedy().rc_context(_STYLE):
            return draw(*args, **options)

    return in_style


def matplotlib_or_remedy() -> Any:
    """Return matplotlib, or say how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "figures must have matplotlib; got none. Run: pip install 'ctrl-dpo[plots]'"
        ) from error
    return matplotlib


def panels(n: int, title: str, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``n`` panels side by side under a title that states what is seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.6 * n, 7.0), 4.8), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    return figure, list(figure.subplots(1, n, squeeze=False, sharey=share_y)[0])


def legend_name(name: str) -> str:
    """Return a user's name as a legend shows it: matplotlib hides labels that begin with "_"."""
    return f" {name}" if name.startswith("_") else name


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """Put one legend for all panels under them, each label once, in as many columns as fit."""
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for label, handle in zip(labels, handles, strict=True):
            entries.setdefault(label, handle)
    inches = 0.09 * (max(map(len, entries)) + 8)  # a letter at 11 points, and the handle
    columns = min(len(entries), max(1, int(figure.get_figwidth() / inches)))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
