"""What a training step reports: TRL's names, and how far the fit and the KL have come."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def batch_metrics(
    logratios: Tensor, targets: Tensor, mask: Tensor, logps: Tensor, beta: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Summarise a batch as sums and weights, on the device, without synchronising.

    Parameters
    ----------
    logratios, targets, logps : (n_groups, k) Tensor
        Log-ratios, their targets and the policy's log-probabilities, nats.
    mask : (n_groups, k) bool Tensor
        True where a group has a response.
    beta : float
        Strength of the KL penalty, for the implicit rewards.

    Returns
    -------
    dict of str to (Tensor, Tensor)
        Numerator and denominator of each metric, so that batches and processes add up.

    Notes
    -----
    ``chosen`` is the response of a group with the highest target, ``rejected`` the lowest.
    ``kl`` is the self-normalised estimate from reference draws, E[w d] / E[w] - log E[w] with
    w = exp(d); ``normalisation`` is E[w], which is 1 for a proper policy in the mean over draws of
    the reference policy. ``fit/r2`` is the share of the targets' variance within groups explained.
    """
    best = targets.masked_fill(~mask, float("-inf")).argmax(1, keepdim=True)
    worst = targets.masked_fill(~mask, float("inf")).argmin(1, keepdim=True)
    groups = torch.ones_like(best, dtype=logratios.dtype).sum()
    chosen, rejected = logratios.gather(1, best), logratios.gather(1, worst)
    sizes = mask.sum(1, keepdim=True)
    masked = logratios.masked_fill(~mask, float("-inf"))
    log_mean = torch.logsumexp(masked, 1, keepdim=True) - sizes.log()
    kl = (torch.softmax(masked, 1) * torch.where(mask, logratios, 0.0)).sum(1) - log_mean[:, 0]

    def centred(values: Tensor) -> Tensor:
        clean = torch.where(mask, values, 0.0)
        return torch.where(mask, clean - clean.sum(1, keepdim=True) / sizes, 0.0)

    spread = centred(targets).square().sum()
    residual = (centred(logratios) - centred(targets)).square().sum()
    return {
        "rewards/chosen": (beta * chosen.sum(), groups),
        "rewards/rejected": (beta * rejected.sum(), groups),
        "rewards/margins": (beta * (chosen - rejected).sum(), groups),
        "rewards/accuracies": ((chosen > rejected).to(groups.dtype).sum(), groups),
        "logps/chosen": (logps.gather(1, best).sum(), groups),
        "logps/rejected": (logps.gather(1, worst).sum(), groups),
        "logratios/margins": ((chosen - rejected).sum(), groups),
        "logratios/chosen_below_0": ((chosen < 0).to(groups.dtype).sum(), groups),
        "kl": (kl.sum(), groups),
        "normalisation": (log_mean.exp().sum(), groups),
        "fit/r2": (spread - residual, spread),
    }


class RunningMeans:
    """Sums of numerators and denominators since the last log."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a batch's metrics."""
        for name, (top, bottom) in metrics.items():
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + top.detach(), before[1] + bottom.detach())

    def means(self) -> dict[str, float]:
        """Return the means and start again; the only place that waits for the device."""
        values = {
            n: float(top) / float(bottom) for n, (top, bottom) in self._sums.items() if bottom
        }
        self._sums = {}
        return values

    def state_dict(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the sums, for a checkpoint between two logs."""
        return dict(self._sums)

    def load_state_dict(self, state: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Go on from a checkpoint's sums."""
        self._sums = dict(state)
