"""What it costs to serve a model by another procedure than the one it was trained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ctrl_dpo.theory.optimum import optimal_policy
from ctrl_dpo.theory.policies import match_kl
from ctrl_dpo.theory.procedures import Procedure, parse_procedure


@dataclass(frozen=True)
class SensitivityPoint:
    """One pair of training and serving procedure.

    Parameters
    ----------
    trained_for : str
        Procedure whose exact optimum the policy is.
    served_with : str
        Procedure applied to it, and to the reference policy unless ``against`` was given.
    kl : float
        KL from the reference policy, nats.
    win_rate : float
        Inference-time win rate as served.
    best_win_rate : float
        Inference-time win rate of the policy trained for this serving procedure at the same KL.
    """

    trained_for: str
    served_with: str
    kl: float
    win_rate: float
    best_win_rate: float

    @property
    def lost(self) -> float:
        """Win rate lost by having trained for the other procedure; >= 0."""
        return self.best_win_rate - self.win_rate


def sensitivity(
    procedures: Sequence[str | Procedure], kl: float, against: str | Procedure | None = None
) -> list[SensitivityPoint]:
    """Return the win rate of each procedure's optimum served by each of the procedures.

    Parameters
    ----------
    procedures : sequence of str or Procedure
        Procedures to train for and to serve with.
    kl : float
        KL budget of every policy, nats, > 0.
    against : str or Procedure, optional
        Procedure applied to the reference policy; by default the one the policy is served with.

    Returns
    -------
    list of SensitivityPoint
        One row for each pair, the training procedure changing slowest.

    Examples
    --------
    A model trained for best-of-8 and used one draw at a time.

    >>> rows = sensitivity(["single_draw", "best_of_8"], kl=1.0)
    >>> print(f"{rows[2].win_rate:.4f} of {rows[2].best_win_rate:.4f}, {rows[2].lost:.4f} lost")
    0.7106 of 0.8646, 0.1540 lost
    """
    served = [parse_procedure(procedure) for procedure in procedures]
    trained = [
        optimal_policy(each, match_kl("optimal", each, kl, against), against) for each in served
    ]
    rates = [
        [policy.served_by(each, _against(each, against)).win_rate for each in served]
        for policy in trained
    ]
    return [
        SensitivityPoint(str(served[i]), str(served[j]), kl, rates[i][j], rates[j][j])
        for i in range(len(served))
        for j in range(len(served))
    ]


def _against(procedure: Procedure, against: str | Procedure | None) -> Procedure:
    """Return the procedure of the reference policy."""
    return procedure if against is None else parse_procedure(against)
