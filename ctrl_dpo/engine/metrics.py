"""What a training step reports: TRL's names, and how far the fit, the KL and the win rate are."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ctrl_dpo.theory.procedures import Procedure

Sums = dict[str, tuple[Tensor, Tensor]]
SPEED = "tokens_per_second"


def batch_metrics(
    logratios: Tensor,
    targets: Tensor,
    order: Tensor,
    mask: Tensor,
    logps: Tensor,
    beta: float,
    procedure: Procedure | None = None,
) -> Sums:
    r"""Summarise a batch as sums and weights, on the device, without synchronising.

    Parameters
    ----------
    logratios, targets : (n_groups, k) Tensor
        Log-ratios d and their targets, nats.
    order : (n_groups, k) Tensor
        Rewards of the responses or their ranks; targets may tie responses of unequal rewards.
    mask : (n_groups, k) bool Tensor
        True where a group has a response.
    logps : (n_groups, k) Tensor
        The policy's log-probabilities, nats.
    beta : float
        Strength of the KL penalty, for the implicit rewards.
    procedure : Procedure, optional
        How the policy will be used; without it no win rate is predicted.

    Returns
    -------
    dict of str to (Tensor, Tensor)
        Numerator and denominator of each metric, so that batches and processes add up.

    Notes
    -----
    ``chosen`` is the response of a group with the highest reward, ``rejected`` the lowest, each the
    mean of those that tie; groups of one response, or of equal rewards only, have no margin and do
    not count there. The following hold where the responses of a group are draws of the reference
    policy, not a choice among them such as best and worst.

    * ``kl/self_normalised``: importance weights w = exp(d), normalised within each group, in nats
      and at most log k: :math:`\sum w d / \sum w - \log \frac1k \sum w`.
    * ``normalisation``: the mean of exp(d), 1 in expectation for a proper policy.
    * ``fit/r2``: share of the targets' variance within groups that the log-ratios explain.
    * ``win_rate/predicted``: see :func:`predicted_win_rate`.
    """
    highest = order.masked_fill(~mask, float("-inf")).amax(1, keepdim=True)
    lowest = order.masked_fill(~mask, float("inf")).amin(1, keepdim=True)
    best, worst = mask & (order == highest), mask & (order == lowest)
    sizes = mask.sum(1, keepdim=True)
    is_pair = (highest > lowest).to(logratios.dtype)
    groups, pairs = torch.ones_like(is_pair).sum(), is_pair.sum()

    def mean(values: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, values, 0.0).sum(1, keepdim=True) / where.sum(1, keepdim=True)

    chosen, rejected = mean(logratios, best), mean(logratios, worst)
    masked = logratios.masked_fill(~mask, float("-inf"))
    log_mean = torch.logsumexp(masked, 1, keepdim=True) - sizes.log()
    kl = (torch.softmax(masked, 1) * torch.where(mask, logratios, 0.0)).sum(1) - log_mean[:, 0]

    def centred(values: Tensor) -> Tensor:
        return torch.where(mask, values - mean(values, mask), 0.0)

    spread = centred(targets).square().sum()
    residual = (centred(logratios) - centred(targets)).square().sum()
    margins = is_pair * (chosen - rejected)
    made = {
        "rewards/chosen": (beta * chosen.sum(), groups),
        "rewards/rejected": (beta * rejected.sum(), groups),
        "rewards/margins": (beta * margins.sum(), pairs),
        "rewards/accuracies": ((margins > 0).to(groups.dtype).sum(), pairs),
        "logps/chosen": (mean(logps, best).sum(), groups),
        "logps/rejected": (mean(logps, worst).sum(), groups),
        "logratios/margins": (margins.sum(), pairs),
        "logratios/chosen_below_0": ((chosen < 0).to(groups.dtype).sum(), groups),
        "kl/self_normalised": (kl.sum(), groups),
        "normalisation": (log_mean.exp().sum(), groups),
        "fit/r2": (spread - residual, spread),
    }
    if procedure is not None:
        wins = predicted_win_rate(logratios, order, mask, procedure)
        made["win_rate/predicted"] = (wins.sum(), groups)
    return made


def predicted_win_rate(
    logratios: Tensor, order: Tensor, mask: Tensor, procedure: Procedure
) -> Tensor:
    r"""Predict each group's inference-time win rate against the reference policy.

    .. math:: \sum_l [h(P_l) - h(P_{l-1})] \, \tfrac12 [h(Q_l) + h(Q_{l-1})]

    over the levels of the rewards, with P the cumulative sum of softmax(d) and Q of 1/k: the exact
    win rate of a policy that weighs the group's responses by exp(d), ties one half.

    Parameters
    ----------
    logratios : (n_groups, k) Tensor
        Log-ratios, nats.
    order : (n_groups, k) Tensor
        Rewards of the responses or their ranks; only equal ones tie.
    mask : (n_groups, k) bool Tensor
        True where a group has a response.
    procedure : Procedure
        Applied on both sides; h is its distortion.

    Returns
    -------
    (n_groups,) Tensor
        Between 0 and 1; 1/2 where all log-ratios are equal.
    """
    policy = torch.softmax(logratios.masked_fill(~mask, float("-inf")), 1)
    reference = mask.to(policy.dtype) / mask.sum(1, keepdim=True)
    values = torch.where(mask, order, 0.0)
    below = (values.unsqueeze(1) < values.unsqueeze(2)).to(policy.dtype)
    tied = ((values.unsqueeze(1) == values.unsqueeze(2)) & mask.unsqueeze(1)).to(policy.dtype)
    # each response stands for its level, at an equal share among the level's responses
    lower = [(below @ p.unsqueeze(2)).squeeze(2) for p in (policy, reference)]
    upper = [
        (a + (tied @ p.unsqueeze(2)).squeeze(2)).clamp(max=1.0)
        for a, p in zip(lower, (policy, reference), strict=True)
    ]
    h = [[distortion(procedure, q) for q in part] for part in (lower, upper)]
    levels = (h[1][0] - h[0][0]) * (h[1][1] + h[0][1]) / 2
    return torch.where(mask, levels / tied.sum(2).clamp(min=1), 0.0).sum(1)


def distortion(procedure: Procedure, q: Tensor) -> Tensor:
    r"""Apply a procedure's distortion on the device.

    .. math:: h(q) = \sum_{i < k} \binom{n}{i} q^{n - i} (1 - q)^i

    for the k-th best of n: at most i = k - 1 of the n draws lie above.

    Parameters
    ----------
    procedure : Procedure
        A mixture of order statistics, as all of them are.
    q : Tensor
        In [0, 1].

    Returns
    -------
    Tensor
        As ``q``.
    """
    total = torch.zeros_like(q)
    for weight, k, n in procedure.order_statistics:
        if 2 * k > n:  # fewer terms in the complement
            total = total + weight * (1 - _binomial_sum(q, n, range(k, n + 1)))
        else:
            total = total + weight * _binomial_sum(q, n, range(k))
    return total


def _binomial_sum(q: Tensor, n: int, above: range) -> Tensor:
    """Sum the probabilities that so many of n draws lie above q; in logs, for large n."""
    total = torch.zeros_like(q)
    for i in above:
        log_ways = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        below = torch.xlogy(torch.full_like(q, n - i), q)
        total += torch.exp(log_ways + below + torch.special.xlog1py(torch.full_like(q, i), -q))
    return total


def token_metrics(batch: Mapping[str, Tensor]) -> Sums:
    """Summarise a batch's tokens.

    Parameters
    ----------
    batch : mapping of str to Tensor
        From :func:`ctrl_dpo.engine.batches.collate`.

    Returns
    -------
    dict of str to (Tensor, Tensor)
        ``response_length`` (tokens, end token included), ``truncated``, the share of responses
        without their end, ``useful_tokens``, the share of the computed tokens that are not
        padding, and the tokens computed for use, prompts included.
    """
    cut = batch["truncated"]
    responses = torch.full_like(cut[0], len(cut))
    useful = (batch["segments"] >= 0).to(cut.dtype).sum()
    # a processor computes rows one by one, see logprobs.response_token_logps
    padded = torch.full_like(cut[0], batch["segments"].numel())
    computed = useful if cut.device.type == "cpu" else padded
    return {
        "response_length": (torch.full_like(cut[0], len(batch["token_ids"])), responses),
        "truncated": (cut.sum(), responses),
        "useful_tokens": (useful, computed),
        # the time is filled in when the mean is taken
        SPEED: (useful, torch.zeros_like(responses)),
    }


class RunningMeans:
    """Sums of numerators and denominators since the last log, over batches and processes."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._since: float | None = None

    def start(self) -> None:
        """Start the clock of tokens per second, unless it runs."""
        if self._since is None:
            self._since = time.perf_counter()

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a batch's metrics."""
        self._names = list(metrics)
        sums = torch.stack([part.detach().float() for pair in metrics.values() for part in pair])
        self._sums = sums if self._sums is None else self._sums + sums

    def means(self, accelerator: Any = None) -> dict[str, float]:
        """Return the means and start again; the only place that waits for the device.

        Parameters
        ----------
        accelerator : accelerate.Accelerator, optional
            Adds up the sums of all processes, in one call; all of them have to make it.

        Returns
        -------
        dict of str to float
            By name; what had no denominator is left out.
        """
        if self._sums is None:
            return {}
        sums = self._sums
        if accelerator is not None and accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, "sum")
        pairs = dict(zip(self._names, sums.view(-1, 2).tolist(), strict=True))
        if self._since is not None and SPEED in pairs:
            pairs[SPEED][1] = time.perf_counter() - self._since
        self._sums = self._since = None
        return {name: top / bottom for name, (top, bottom) in pairs.items() if bottom}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, for a checkpoint between two logs."""
        return {"names": list(self._names), "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's sums."""
        self._names, self._sums = list(state["names"]), state["sums"]
