"""Losses on log-ratios: pure functions of ``(n_groups, k)`` tensors, one value per group.

``logratios`` are d = log pi/pi_ref and ``targets`` are t = Phi/beta - log Z, both in nats; ``mask``
is True where a group has a response. A pair is a group of two, the chosen response first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def squared(logratios: Tensor, targets: Tensor, mask: Tensor, anchor: float = 0.0) -> Tensor:
    r"""Regress log-ratios on their targets, up to a weighted common shift.

    With :math:`e_i = d_i - t_i`,

    .. math:: \frac1K \sum_i (e_i - \bar e)^2 + w \, \bar e^2,

    whose first term is the mean of :math:`(e_a - e_b)^2 / 2` over all K^2 ordered pairs.

    Parameters
    ----------
    logratios, targets : (n_groups, k) Tensor
        Log-ratios of the policy and their targets, nats.
    mask : (n_groups, k) bool Tensor
        True for a response, False for padding.
    anchor : float
        Weight w >= 0 of the group mean: 0 is contrastive, 1 the pointwise regression (QRPO).

    Returns
    -------
    (n_groups,) Tensor
        Loss per group, nats squared.

    Notes
    -----
    Minimiser: both terms are squares, zero exactly where d - t is constant in a group (w = 0), or
    zero (w > 0).
    """
    weights = mask.to(logratios.dtype)
    sizes = weights.sum(dim=1)
    errors = torch.where(mask, logratios - targets, 0.0)
    mean = errors.sum(dim=1) / sizes
    spread = torch.where(mask, errors - mean.unsqueeze(1), 0.0).square().sum(dim=1) / sizes
    return spread + anchor * mean.square()


def softmax(logratios: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    r"""Cross-entropy of the group's softmax of log-ratios against that of the targets.

    .. math:: -\sum_i q_i \log \frac{e^{d_i}}{\sum_j e^{d_j}}, \qquad q = \mathrm{softmax}(t)

    Parameters
    ----------
    logratios, targets : (n_groups, k) Tensor
        Log-ratios of the policy and their targets, nats.
    mask : (n_groups, k) bool Tensor
        True for a response, False for padding.

    Returns
    -------
    (n_groups,) Tensor
        Loss per group, nats.

    Notes
    -----
    Minimiser: Gibbs' inequality, softmax(d) = q, so d - t is constant in a group.
    """
    goal = torch.softmax(targets.masked_fill(~mask, float("-inf")), dim=1)
    logs = torch.log_softmax(logratios.masked_fill(~mask, float("-inf")), dim=1)
    return -(goal * torch.where(mask, logs, 0.0)).sum(dim=1)


def soft_label(logratios: Tensor, targets: Tensor, mask: Tensor, beta: float) -> Tensor:
    r"""Cross-entropy of the implied preference against that of the targets, mean over pairs.

    .. math::

        -\sigma(\beta \tau) \log \sigma(\beta \delta)
        - \sigma(-\beta \tau) \log \sigma(-\beta \delta)

    with :math:`\delta = d_a - d_b` and :math:`\tau = t_a - t_b` for every pair of a group.

    Parameters
    ----------
    logratios, targets : (n_groups, k) Tensor
        Log-ratios of the policy and their targets, nats.
    mask : (n_groups, k) bool Tensor
        True for a response, False for padding.
    beta : float
        Strength of the KL penalty, > 0.

    Returns
    -------
    (n_groups,) Tensor
        Loss per group, nats.

    Notes
    -----
    Minimiser: Gibbs' inequality per pair, delta = tau. Cost O(k^2) on numbers, not on tokens.
    """
    delta, pairs = _differences(logratios, mask)
    tau, _ = _differences(targets, mask)
    each = F.binary_cross_entropy_with_logits(
        beta * delta, torch.sigmoid(beta * tau), reduction="none"
    )
    return _mean(each, pairs)


def dpo(logratios: Tensor, targets: Tensor, mask: Tensor, beta: float) -> Tensor:
    r"""Hard-label loss of DPO, mean over the pairs that the targets order.

    .. math:: -\log \sigma(\beta (d_w - d_l))

    Parameters
    ----------
    logratios, targets : (n_groups, k) Tensor
        Log-ratios of the policy, nats; only the order of the targets is used.
    mask : (n_groups, k) bool Tensor
        True for a response, False for padding.
    beta : float
        Strength of the KL penalty, > 0.

    Returns
    -------
    (n_groups,) Tensor
        Loss per group, nats.

    Notes
    -----
    No finite minimiser on one pair: the loss falls as the difference grows. Rafailov et al.,
    arXiv:2305.18290, equation 7.
    """
    delta, pairs = _differences(logratios, mask)
    tau, _ = _differences(targets, mask)
    return _mean(-F.logsigmoid(beta * delta), pairs & (tau > 0))


def ipo(logratios: Tensor, targets: Tensor, mask: Tensor, beta: float) -> Tensor:
    r"""Loss of IPO, mean over the pairs that the targets order.

    .. math:: \left( d_w - d_l - \frac{1}{2 \beta} \right)^2

    Parameters
    ----------
    logratios, targets : (n_groups, k) Tensor
        Log-ratios of the policy, nats; only the order of the targets is used.
    mask : (n_groups, k) bool Tensor
        True for a response, False for padding.
    beta : float
        Strength of the KL penalty, > 0.

    Returns
    -------
    (n_groups,) Tensor
        Loss per group, nats squared.

    Notes
    -----
    Minimiser: a difference of 1/(2 beta) per pair. Azar et al., arXiv:2310.12036, equation 17. TRL
    divides each log-ratio by the response's length first; this is the paper's form.
    """
    delta, pairs = _differences(logratios, mask)
    tau, _ = _differences(targets, mask)
    return _mean((delta - 0.5 / beta).square(), pairs & (tau > 0))


def _differences(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``values_a - values_b`` for all (a, b) of a group, and where a pair a != b exists."""
    clean = torch.where(mask, values, 0.0)
    pairs = mask.unsqueeze(2) & mask.unsqueeze(1)
    eye = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    return clean.unsqueeze(2) - clean.unsqueeze(1), pairs & ~eye


def _mean(each: Tensor, pairs: Tensor) -> Tensor:
    """Average over the pairs of each group; a group without one contributes 0."""
    total = torch.where(pairs, each, 0.0).sum(dim=(1, 2))
    return total / pairs.sum(dim=(1, 2)).clamp(min=1)


def group_loss(
    name: str,
    logratios: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    beta: float,
    anchor: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Apply the loss of that name.

    Parameters
    ----------
    name : {"squared", "soft_label", "softmax", "dpo", "ipo"}
        Loss.
    logratios, targets : (n_groups, k) Tensor
        Log-ratios of the policy and their targets, nats.
    mask : (n_groups, k) bool Tensor
        True for a response, False for padding.
    beta : float
        Strength of the KL penalty, > 0.
    anchor : float
        Weight of the group mean, for the squared loss.
    weights : (n_groups,) Tensor, optional
        Factor >= 0 of each group's loss, or of each pair's where a group is a pair.

    Returns
    -------
    (n_groups,) Tensor
        Loss per group.

    Notes
    -----
    The mean over a batch divides by the number of groups, not by the sum of weights: a weight then
    means the same in every batch, accumulation and number of processes.
    """
    by_pairs = {"soft_label": soft_label, "dpo": dpo, "ipo": ipo}
    if name == "squared":
        values = squared(logratios, targets, mask, anchor)
    elif name == "softmax":
        values = softmax(logratios, targets, mask)
    else:
        values = by_pairs[name](logratios, targets, mask, beta)
    return values if weights is None else weights * values


def pad_groups(values: Tensor, group_of: Tensor, slot_of: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange one number per response as ``(n_groups, k)``, with the mask of where one is.

    Parameters
    ----------
    values : (n_responses,) Tensor
        Numbers in the order of the batch.
    group_of, slot_of : (n_responses,) int64 Tensor
        Group of each response and its place in it.

    Returns
    -------
    padded : (n_groups, k) Tensor
        Zero where there is no response.
    mask : (n_groups, k) bool Tensor
        True where there is one.
    """
    shape = (int(group_of[-1]) + 1, int(slot_of.max()) + 1)
    mask = torch.zeros(shape, dtype=torch.bool, device=values.device)
    mask[group_of, slot_of] = True
    return values.new_zeros(shape).index_put((group_of, slot_of), values), mask


def share_of_update(losses: Tensor, n_groups: Tensor | None, n_processes: int) -> Tensor:
    """Return a micro-batch's share of the mean over all groups of an update.

    Shares are added over micro-batches and averaged over processes, so that the update is that of
    one batch of all groups, also where micro-batches hold unequal numbers of groups.

    Parameters
    ----------
    losses : (b,) Tensor
        Losses of the micro-batch's groups.
    n_groups : scalar Tensor or None
        Groups of the update, in all micro-batches of all processes; None for a batch on its own.
    n_processes : int
        Processes whose gradients are averaged.

    Returns
    -------
    scalar Tensor
        The share; the mean of ``losses`` for a batch on its own.

    Examples
    --------
    >>> parts = torch.tensor([1.0, 2.0]), torch.tensor([6.0])
    >>> sum(share_of_update(part, torch.tensor(3), 1).item() for part in parts)
    3.0
    """
    if n_groups is None:
        return losses.mean()
    return losses.sum() * n_processes / n_groups
