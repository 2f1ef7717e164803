"""The methods: scored groups -> what a trainer is given, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import special

from ctrl_dpo import CTRLDPOTrainer, pairs, relabel
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.losses import ipo, pad_groups, share_of_update
from experiment.settings import Experiment

PAPER_RATE = 10.0  # of the exponential, arXiv:2412.19792v5, section 5
BONBON_SHARE = 0.005  # weight of the likelihood term, arXiv:2406.00832, section 4


@dataclass(frozen=True)
class Job:
    """What to train on and how.

    Parameters
    ----------
    data : Dataset
        Labelled groups or pairs.
    config : dict
        Settings of ``CTRLDPOConfig`` that the method decides.
    trainer : type
        Trainer class.
    """

    data: Dataset
    config: dict[str, Any]
    trainer: type[CTRLDPOTrainer] = CTRLDPOTrainer


class BestResponseTrainer(CTRLDPOTrainer):
    r"""Fine-tuning on the best response, alone or as BoNBoN mixes it with IPO.

    .. math:: -a \log \pi(y_\mathrm{best} | x) + (1 - a) (d_w - d_l - 1/(2\beta))^2
    """

    likelihood_share = 1.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over the groups of a pass, or a pass's share in an update's."""
        logps = response_logps(model, inputs)
        where, members = (inputs["group_of"], inputs["slot_of"]), inputs["members"]
        padded, mask = pad_groups(logps[members], *where)
        targets, _ = pad_groups(inputs["targets"], *where)
        best = targets.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
        losses = -self.likelihood_share * padded.gather(1, best).squeeze(1)
        if self.likelihood_share < 1:
            logratios, _ = pad_groups((logps - inputs["reference_logps"])[members], *where)
            contrast = ipo(logratios, targets, mask, self.beta)
            losses = losses + (1 - self.likelihood_share) * contrast
        processes = self.accelerator.num_processes
        loss = share_of_update(inputs["weights"] * losses, num_items_in_batch, processes)
        return (loss, {}) if return_outputs else loss


class BonbonTrainer(BestResponseTrainer):
    """BoNBoN's mixture."""

    likelihood_share = BONBON_SHARE


def reward_spread(groups: Dataset) -> float:
    """Return the standard deviation of rewards within prompts: the unit of raw differences."""
    return float(np.sqrt(np.mean([np.var(rewards, ddof=1) for rewards in groups["rewards"]])))


def calibrated(
    transformation: str, anchor: float | None = None, estimator: str | None = None
) -> Callable[[Dataset, float, Experiment], Job]:
    """Return the method that fits a transformation at a KL budget, which is its strength."""

    def job(groups: Dataset, strength: float, experiment: Experiment) -> Job:
        name = transformation
        if name == "exponential":
            sign = -1 if experiment.procedure.startswith("worst") else 1
            name = f"exponential:{sign * PAPER_RATE:g}"
        weight = experiment.anchor if anchor is None else anchor
        labelled = relabel(
            groups,
            procedure=experiment.procedure,
            transformation=name,
            target_kl=strength,
            estimator=experiment.estimator or estimator,
            extremes=experiment.extremes,
            anchor=weight,
        )
        if experiment.as_pairs is not None:
            labelled = pairs(labelled, experiment.as_pairs)
        return Job(labelled, {"loss": experiment.loss, "anchor": weight})

    return job


def _ordered(groups: Dataset, experiment: Experiment, extremes: int | None) -> Dataset:
    """Label groups by their order alone, at a beta that nothing uses."""
    return relabel(
        groups,
        procedure=experiment.procedure,
        transformation="identity",
        beta=1.0,
        extremes=extremes,
    )


def hard_label(loss: str) -> Callable[[Dataset, float, Experiment], Job]:
    """Return DPO or IPO; the strength is beta.

    On best against worst of all draws, or on the pairs that the experiment names, which are made
    of the responses that the other methods see.
    """

    def job(groups: Dataset, strength: float, experiment: Experiment) -> Job:
        kind = experiment.as_pairs
        ordered = _ordered(groups, experiment, None if kind is None else experiment.extremes)
        return Job(pairs(ordered, kind or "best_worst"), {"loss": loss, "beta": strength})

    return job


def raw(loss: str) -> Callable[[Dataset, float, Experiment], Job]:
    """Return a regression on raw reward differences; the strength is beta.

    Rewards are in units of their spread within prompts, one number for the whole data set.
    """

    def job(groups: Dataset, strength: float, experiment: Experiment) -> Job:
        spread = reward_spread(groups)
        ordered = _ordered(groups, experiment, experiment.extremes)

        def relabelled(row: dict[str, Any]) -> dict[str, Any]:
            values = [reward / spread for reward in row["rewards"]]
            return {"transformed_rewards": values, "log_normaliser": 0.0, "beta": strength}

        return Job(ordered.map(relabelled), {"loss": loss})

    return job


def bonbon(groups: Dataset, strength: float, experiment: Experiment) -> Job:
    """BoNBoN toward best-of-n, n being the strength.

    The margin is what best-of-n gives best against worst of K draws,
    (n - 1) E[log U_(K) - log U_(1)] = (n - 1) (H_K - 1/K); for n = K it is the paper's.
    """
    k = len(groups[0]["rewards"])
    harmonic = float(special.digamma(k) + np.euler_gamma)  # H_(K-1)
    data = pairs(_ordered(groups, experiment, None))
    beta = 0.5 / ((strength - 1) * harmonic)
    return Job(data, {"loss": "ipo", "beta": beta}, BonbonTrainer)


def best_of_k(groups: Dataset, strength: float, experiment: Experiment) -> Job:
    """Fine-tuning on the best of the K draws; the strength multiplies the learning rate."""
    data = pairs(_ordered(groups, experiment, None))
    rate = strength * float(experiment.training["learning_rate"])
    config = {"loss": "ipo", "beta": 1.0, "learning_rate": rate}
    return Job(data, config, BestResponseTrainer)


METHODS: dict[str, Callable[[Dataset, float, Experiment], Job]] = {
    "optimal": calibrated("optimal"),
    "exponential": calibrated("exponential"),
    "identity": calibrated("identity"),
    "qrpo_log": calibrated("log", anchor=1.0),
    "qrpo_identity": calibrated("identity", anchor=1.0),
    "dpo": hard_label("dpo"),
    "ipo": hard_label("ipo"),
    "rebel": raw("squared"),
    "rpo": raw("soft_label"),
    "bonbon": bonbon,
    "best_of_k": best_of_k,
}
