"""Evaluate stage: win rates, KL and attainment of a policy from scored draws, no model involved."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ctrl_dpo._validation import check_integer
from ctrl_dpo.data.columns import POLICY_LOGPS, PROMPT, REFERENCE_LOGPS, RESPONSE_IDS, REWARDS
from ctrl_dpo.measures.attainment import attainment, attainment_interval
from ctrl_dpo.measures.draws import (
    LENGTH,
    check_origins,
    gather_draws,
    having_columns,
    named,
    noting_origins,
)
from ctrl_dpo.measures.estimates import (
    Estimate,
    largest_coverage,
    mean_over_prompts,
    paired_difference,
)
from ctrl_dpo.measures.uniformity import CalibrationError, calibration_error
from ctrl_dpo.measures.win_rates import Rows, check_draws, checked_rows, inference_win_rate
from ctrl_dpo.theory.procedures import Procedure, parse_procedure

__all__ = [
    "CalibrationError",
    "attainment",
    "calibration_error",
    "compare",
    "evaluate",
    "inference_win_rate",
    "kl_divergence",
    "paired_difference",
]

Draws = dict[str, list[Any]]  # of one prompt, by column

logger = logging.getLogger(__name__)

PROCEDURES = ("single_draw", "best_of_4", "worst_of_4")


def kl_divergence(
    policy_logps: Rows,
    reference_logps: Rows,
    confidence: float = 0.95,
    seed: int = 0,
) -> Estimate:
    r"""Estimate KL(policy, reference policy) from draws of the policy.

    .. math:: \mathrm{KL} = E_{y \sim \pi} \left[ \log \pi(y|x) - \log \pi_\mathrm{ref}(y|x) \right]

    Parameters
    ----------
    policy_logps, reference_logps : (n_prompts, m) array_like, or one sequence a prompt
        Log-probabilities of the policy's draws under the two models, nats per response.
    confidence : float
        Nominal coverage of the interval, in (0, 1).
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    Estimate
        Nats per response. ``.standard_error`` is clustered by prompt.

    Raises
    ------
    ValueError
        If the two do not have the same shape.

    Notes
    -----
    The plain mean of log-ratios, unbiased; noise can make it negative near 0. No control variate is
    used: E[pi_ref/pi] = 1 would give one, but that ratio has a heavy tail beyond 1 nat.

    Examples
    --------
    >>> result = kl_divergence([[-1.0, -2.0], [-3.0, -1.0]], [[-2.0, -2.0], [-3.0, -2.0]])
    >>> result.value, result.per_prompt.tolist()
    (0.5, [0.5, 0.5])
    """
    policy = checked_rows("policy_logps", policy_logps)
    reference = checked_rows("reference_logps", reference_logps)
    shapes = [row.size for row in policy], [row.size for row in reference]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "policy_logps and reference_logps must cover the same draws; got "
            f"{sum(shapes[0])} draws on {len(policy)} prompts and {sum(shapes[1])} on "
            f"{len(reference)}."
        )
    per_prompt = [float((a - b).mean()) for a, b in zip(policy, reference, strict=True)]
    return mean_over_prompts(per_prompt, confidence, seed, "KL")


def evaluate(
    policy: Iterable[Mapping[str, Any]],
    reference: Iterable[Mapping[str, Any]],
    *,
    name: str = "policy",
    procedures: Sequence[str | Procedure] = PROCEDURES,
    against: str | Procedure | None = None,
    columns: Mapping[str, str] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a policy against the reference policy on the same held-out prompts.

    Parameters
    ----------
    policy, reference : iterable of mapping, for instance Dataset
        Rows with ``prompt`` and ``rewards`` of fresh draws, a list or one number.
        ``response_ids`` or ``length`` of either give the lengths; ``policy_logps`` and
        ``reference_logps`` of the policy's rows give the KL. Rows of one prompt are taken together.
        Where rows say how they were drawn (``sampled_from``), both must be drawn alike.
    name : str
        What tables and figures call the policy.
    procedures : sequence of str or Procedure
        Inference-time procedures to measure.
    against : str or Procedure, optional
        Procedure on the reference side, where it is not the policy's.
    columns : mapping of str to str, optional
        Our name of a column to theirs, where both sides have others: ``{"rewards": "score"}``.
    confidence : float
        Nominal coverage of every interval, in (0, 1).
    seed : int
        Seed of the bootstrap.

    Returns
    -------
    dict
        Ready for JSON. ``win_rates`` and ``attainment`` by procedure; ``kl`` (nats per response);
        ``length`` and ``reference_length`` (tokens); ``rewards`` and ``reference_rewards`` (means);
        ``tied`` (share of policy and reference rewards that are equal); counts and settings.
        ``per_prompt`` lists are in the order of the policy's rows; ``prompt_ranks`` are the places
        of these prompts in sorted order, ``prompts_hash`` and ``reference_hash`` (of the reference
        rewards) do not depend on the order of rows or draws. None stands for what the columns do
        not give, and for attainment at a KL that may be 0.

    Raises
    ------
    ValueError
        If the two do not hold the same prompts, a mapped column is not there (those of the KL on
        the reference's side apart), or a prompt has fewer draws than a procedure looks at; if
        sampler or template differ, or log-probabilities are of draws that a changed sampler made.

    Notes
    -----
    A warning is logged where the prompts are too few for intervals of that confidence: 95 % need 6
    (:func:`~ctrl_dpo.measures.estimates.largest_coverage`).

    Examples
    --------
    >>> policy = [{"prompt": p, "rewards": [0.2, 0.9]} for p in ("a", "b")]
    >>> reference = [{"prompt": p, "rewards": [0.1, 0.5]} for p in ("a", "b")]
    >>> record = evaluate(policy, reference, procedures=["single_draw", "best_of_2"])
    >>> [rates["value"] for rates in record["win_rates"].values()]
    [0.75, 1.0]
    """
    check_integer("seed", seed, 0)
    prompts, ours, base = _match_prompts(policy, reference, columns or {})
    options: dict[str, Any] = {"confidence": confidence, "seed": seed}
    rewards = [row[REWARDS] for row in ours], [row[REWARDS] for row in base]
    _warn_of_few(len(prompts), confidence)

    def place(number: int) -> str:
        return named(prompts[number])

    for procedure in procedures:
        other = procedure if against is None else against
        check_draws("policy_rewards", rewards[0], parse_procedure(procedure), place)
        check_draws("reference_rewards", rewards[1], parse_procedure(other), place)
    win_rates = {
        str(procedure): inference_win_rate(*rewards, procedure, against=against, **options)
        for procedure in procedures
    }
    kl = _kl_of_draws(ours, options)
    attained = {
        procedure: None
        if kl is None
        else attainment_interval(rate, kl, procedure, against, **options)
        for procedure, rate in win_rates.items()
    }
    return {
        "name": name,
        "n_prompts": len(prompts),
        "n_draws": sum(map(len, rewards[0])),
        "n_reference_draws": sum(map(len, rewards[1])),
        **_identity(prompts, rewards[1]),
        "against": None if against is None else str(against),
        **options,
        "win_rates": {procedure: rate.as_dict() for procedure, rate in win_rates.items()},
        "attainment": attained,
        "kl": None if kl is None else kl.as_dict(),
        "length": _mean_of_means(ours, LENGTH, options),
        "reference_length": _mean_of_means(base, LENGTH, options),
        "rewards": _mean_of_means(ours, REWARDS, options),
        "reference_rewards": _mean_of_means(base, REWARDS, options),
        "tied": float(np.mean([_tied(*pair) for pair in zip(*rewards, strict=True)])),
    }


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Compare two policies over the same prompts: first minus second, paired by prompt.

    Parameters
    ----------
    first, second : mapping
        Records of :func:`evaluate` on the same prompts, in any order, against the same reference
        draws.

    Returns
    -------
    dict
        Difference of each win rate that both records have, by procedure, as :class:`Estimate`
        fields ready for JSON. The seed is that of ``first``.

    Raises
    ------
    ValueError
        If the records are of different prompts, reference rewards, ``against`` or confidences.

    Examples
    --------
    >>> reference = [{"prompt": p, "rewards": [0.1, 0.5]} for p in ("a", "b")]
    >>> good = [{"prompt": p, "rewards": [0.7, 0.9]} for p in ("a", "b")]
    >>> records = [evaluate(x, reference, procedures=["best_of_2"]) for x in (good, reference)]
    >>> compare(*records)["best_of_2"]["value"]
    0.5
    """
    for setting in ("prompts_hash", "reference_hash", "against", "confidence"):
        found = first.get(setting), second.get(setting)
        if found[0] != found[1]:
            remedy = "Evaluate both on the same prompts and reference draws."
            if not (setting in first and setting in second):
                remedy = "One is of an older version: evaluate it again."
            raise ValueError(
                f"first and second must be records of the same {setting}; got {found[0]!r} "
                f"for {first['name']!r} and {found[1]!r} for {second['name']!r}. {remedy}"
            )
    # records without ranks are older: their equal hashes say that the order is the same
    ranks = [record.get("prompt_ranks", range(record["n_prompts"])) for record in (first, second)]
    order = np.argsort(ranks[1])[ranks[0]]
    differences = {}
    for procedure in first["win_rates"]:
        if procedure in second["win_rates"]:
            ours, other = (Estimate.from_dict(r["win_rates"][procedure]) for r in (first, second))
            other = replace(other, per_prompt=other.per_prompt[order])
            paired = paired_difference(ours, other, first["confidence"], first["seed"])
            differences[procedure] = paired.as_dict()
    return differences


def _identity(prompts: list[str], reference_rewards: list[list[float]]) -> dict[str, Any]:
    """Return what tells whether two records are of the same prompts and reference draws."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    # + 0.0: two zeros that compare equal hash alike
    rewards = [sorted(float(reward) + 0.0 for reward in reference_rewards[i]) for i in order]
    texts = {
        "prompts_hash": "\n".join(prompts[i] for i in order),
        "reference_hash": json.dumps(rewards),
    }
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    return {**hashes, "prompt_ranks": np.argsort(order).tolist()}


def _match_prompts(
    policy: Iterable[Mapping[str, Any]],
    reference: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
) -> tuple[list[str], list[Draws], list[Draws]]:
    """Return the prompts, and for each the draws of the policy and of the reference policy."""
    origins: tuple[set[str], set[str]] = set(), set()
    needed = {ours: name for ours, name in columns.items() if ours not in (PROMPT, REWARDS)}
    policy = having_columns(policy, needed, "policy")
    mine = gather_draws(noting_origins(policy, origins[0]), columns, "policy")
    needed = {ours: name for ours, name in needed.items() if ours in (LENGTH, RESPONSE_IDS)}
    reference = having_columns(reference, needed, "reference")
    theirs = gather_draws(noting_origins(reference, origins[1]), columns, "reference")
    if mine.keys() != theirs.keys():
        raise ValueError(
            "policy and reference must hold the same prompts; got "
            f"{len(mine.keys() - theirs.keys())} in policy only and "
            f"{len(theirs.keys() - mine.keys())} in reference only."
        )
    prompts = list(mine)
    check_origins(*origins, has_kl=_has_kl(mine[prompts[0]]))
    return prompts, [mine[prompt] for prompt in prompts], [theirs[prompt] for prompt in prompts]


def _warn_of_few(n_prompts: int, confidence: float) -> None:
    """Log that intervals over so few prompts do not cover what they are meant to."""
    coverage = largest_coverage(n_prompts)
    if coverage < confidence:
        logger.warning(
            "%d prompts are too few for %g%% intervals: theirs cover the mean of a symmetric "
            "distribution %.3g%% of the time at most. Evaluate more prompts.",
            n_prompts,
            100 * confidence,
            100 * coverage,
        )


def _has_kl(draws: Draws) -> bool:
    """Tell whether the columns that give the KL are there."""
    return draws.keys() >= {POLICY_LOGPS, REFERENCE_LOGPS}


def _kl_of_draws(draws: list[Draws], options: Mapping[str, Any]) -> Estimate | None:
    """Estimate the KL from draws of the policy; None without their log-probabilities."""
    if not _has_kl(draws[0]):
        return None
    policy = [row[POLICY_LOGPS] for row in draws]
    return kl_divergence(policy, [row[REFERENCE_LOGPS] for row in draws], **options)


def _mean_of_means(
    rows: list[Draws], column: str, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Average a column over draws and then over prompts; None where it is absent."""
    if column not in rows[0]:
        return None
    values = checked_rows(column, [row[column] for row in rows])
    # divided first: the sum of rewards near the largest float would overflow
    means = [float(np.sum(row / row.size)) for row in values]
    return mean_over_prompts(means, name=column, **options).as_dict()


def _tied(policy: ArrayLike, reference: ArrayLike) -> float:
    """Return the share of pairs with equal rewards on one prompt."""
    return float(np.mean(np.asarray(policy)[:, None] == np.asarray(reference)[None, :]))
