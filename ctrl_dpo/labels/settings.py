"""Arguments of relabelling -> what decides the labels of a batch."""

from __future__ import annotations

from typing import Any

from ctrl_dpo._validation import check_choice, check_one_of, check_positive
from ctrl_dpo.labels.groups import LEVELS, RAW
from ctrl_dpo.theory.policies import match_kl
from ctrl_dpo.theory.procedures import Procedure, parse_procedure
from ctrl_dpo.theory.rank_targets import RankOptimal
from ctrl_dpo.transform import parse_transformation

ESTIMATORS = ("rank_optimal", "posterior", "plug_in", LEVELS)


def label_settings(
    procedure: str | Procedure,
    transformation: Any,
    beta: float | None,
    target_kl: float | None,
    against: str | Procedure | None,
    estimator: str | None,
) -> dict[str, Any]:
    """Settle what decides the transformed rewards, beta solved for.

    Parameters
    ----------
    procedure, transformation, beta, target_kl, against, estimator
        As for :func:`ctrl_dpo.relabel.relabel`; ``estimator`` is ``"raw"`` for raw rewards.

    Returns
    -------
    dict
        ``transformation``, ``procedure``, ``beta`` and ``estimator``, as plain values if possible.

    Raises
    ------
    ValueError
        If not exactly one of beta and KL is given, or they do not go together.
    """
    served = parse_procedure(procedure)
    if transformation == RAW:
        settings = {"transformation": RAW, "procedure": str(served), "estimator": RAW}
        return settings | {"beta": check_positive("beta", beta)}
    opponent = None if against is None else parse_procedure(against)
    is_optimal = transformation == "optimal"
    given_as = check_one_of(beta=beta, target_kl=target_kl)
    if estimator == LEVELS and given_as != "beta":
        raise ValueError(
            f"beta must be given for estimator='levels'; got target_kl={target_kl!r}. What KL a "
            "beta leads to depends on every prompt's levels."
        )
    if given_as == "beta":
        beta = check_positive("beta", beta)
    else:
        target_kl = check_positive("target_kl", target_kl)
        given = transformation if is_optimal else parse_transformation(transformation)
        beta = match_kl(given, served, target_kl, against=opponent)
    made: str | RankOptimal = estimator or ("rank_optimal" if is_optimal else "posterior")
    check_choice("estimator", made, ESTIMATORS)
    if made == "rank_optimal":
        if not is_optimal:
            raise ValueError(
                f"transformation must be 'optimal' for estimator='rank_optimal'; got "
                f"{transformation!r}. Use estimator='posterior'."
            )
        made = RankOptimal(served, opponent or served, beta, target_kl)
    return {
        "transformation": parse_transformation(transformation, served, beta, opponent),
        "procedure": str(served),
        "beta": beta,
        "estimator": made,
    }


def check_raw(calibration: str, estimator: str | None, target_kl: float | None) -> None:
    """Check that raw rewards are asked for nothing that they do not have.

    Parameters
    ----------
    calibration : str
        Method.
    estimator : str, optional
        As given.
    target_kl : float, optional
        As given.

    Raises
    ------
    ValueError
        If a KL budget, a calibration or an estimator is given.
    """
    if target_kl is not None:
        raise ValueError(
            f"beta must be given for transformation='raw'; got target_kl={target_kl!r}. What KL a "
            "raw reward leads to depends on its distribution."
        )
    for name, value in (("calibration", calibration), ("estimator", estimator)):
        if value not in {"empirical", None}:
            raise ValueError(
                f"{name} must be left out for transformation='raw'; got {value!r}. Raw rewards are "
                "not calibrated."
            )
