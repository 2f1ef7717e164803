"""What a KL can buy, before any model is run: tables and pictures of the theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_dpo._validation import check_positive
from ctrl_dpo.measures import plots
from ctrl_dpo.measures.attainment import optimal_points
from ctrl_dpo.measures.figure_style import DPI
from ctrl_dpo.measures.tables import table
from ctrl_dpo.theory.policies import FrontierPoint, frontier
from ctrl_dpo.theory.procedures import Procedure, parse_procedure
from ctrl_dpo.theory.sensitivity import sensitivity
from ctrl_dpo.transform import Exponential, Identity, Log, NormalQuantile


def frontier_rows(
    procedures: Sequence[str],
    kls: Sequence[float],
    against: str | None = None,
    rate: float = 10.0,
) -> list[dict[str, Any]]:
    """Tabulate the theory for several procedures: the optimum, an exponential, the identity.

    Parameters
    ----------
    procedures : sequence of str
        Inference-time procedures.
    kls : sequence of float
        KL budgets, nats per response, > 0.
    against : str, optional
        Procedure on the reference side, where it is not the policy's.
    rate : float
        Rate of the exponential, > 0; negated for procedures that do not keep the best.

    Returns
    -------
    list of dict
        ``procedure``, ``transformation``, ``kl``, ``beta`` and ``win_rate``, as
        :func:`~ctrl_dpo.measures.plots.frontier_figure` takes them. Where the optimum's win rate
        is all but 1 (:func:`~ctrl_dpo.measures.attainment.optimal_points`) it has no beta.
    """
    rows: list[dict[str, Any]] = []
    for procedure in map(parse_procedure, procedures):
        compared = [_exponential(procedure, rate), Identity()]
        points = optimal_points(procedure, kls, against)
        rows += _rows(procedure, points + frontier(procedure, compared, kls, against))
    return rows


def frontier_page(
    procedure: str, kl: float, picture: str | Path, *, against: str | None = None, rate: float = 10
) -> str:
    """Tabulate what every transformation reaches at one KL, and draw the frontier around it.

    Parameters
    ----------
    procedure : str
        Inference-time procedure.
    kl : float
        KL budget of the table, nats per response, > 0; the picture goes to twice that.
    picture : str or Path
        Image file to write.
    against : str, optional
        Procedure on the reference side, where it is not the policy's.
    rate : float
        Rate of the exponential, > 0; negated for procedures that do not keep the best.

    Returns
    -------
    str
        The table, as Markdown. A dash: the transformation cannot reach that KL.
    """
    served, kl = parse_procedure(procedure), check_positive("kl", kl)
    compared = ["optimal", _exponential(served, rate), Identity(), Log(), NormalQuantile()]
    rows = [
        [point.transformation, f"{point.beta:.5g}", f"{point.win_rate:.4f}", f"{point.kl:.4f}"]
        if not math.isnan(point.beta)
        else [point.transformation, "-", "-", "-"]
        for point in frontier(served, compared, [kl], against)
    ]
    kls = (2 * kl * np.linspace(0.02, 1, 40) ** 2).tolist()
    title = "What each nat of KL can buy"
    if against is not None:
        title += f"\nagainst {plots.words(str(parse_procedure(against)))} of the reference policy"
    curves = _rows(served, frontier(served, compared, kls, against))
    plots.frontier_figure(curves, (), title).savefig(picture, dpi=DPI)
    header = ["transformation", "beta", "inference-time win rate", "KL (nats)"]
    return f"{table(header, rows)}\n\n{picture}"


def sensitivity_page(
    procedures: Sequence[str], kl: float, picture: str | Path, *, against: str | None = None
) -> str:
    """Tabulate and draw what it costs to serve by another procedure than one trained for.

    Parameters
    ----------
    procedures : sequence of str
        Inference-time procedures, to train for and to serve by.
    kl : float
        KL of every policy, nats per response, > 0.
    picture : str or Path
        Image file to write.
    against : str, optional
        Procedure on the reference side, where it is not the one served.

    Returns
    -------
    str
        The table, as Markdown: win rate, and the loss to the policy trained for that procedure.
    """
    points = sensitivity(procedures, kl, against)
    names = list(dict.fromkeys(point.trained_for for point in points))
    cells = {p: f"{p.win_rate:.4f} (-{p.lost:.4f})" for p in points}
    rows = [
        [plots.words(name), *(text for p, text in cells.items() if p.trained_for == name)]
        for name in names
    ]
    title = f"What serving a policy of {kl:g} nat by another procedure costs"
    figure = plots.sensitivity_figure([asdict(p) | {"lost": p.lost} for p in points], title)
    figure.savefig(picture, dpi=DPI)
    header = ["trained for, served by", *map(plots.words, names)]
    return f"{table(header, rows)}\n\n{picture}"


def _exponential(procedure: Procedure, rate: float) -> Exponential:
    """Return the exponential that leans to the end the procedure keeps."""
    rate = check_positive("rate", rate)
    return Exponential(rate if procedure.is_convex else -rate)


def _rows(procedure: Procedure, points: Sequence[FrontierPoint]) -> list[dict[str, Any]]:
    """Return a frontier as rows of a figure."""
    return [{"procedure": str(procedure), **asdict(point)} for point in points]
