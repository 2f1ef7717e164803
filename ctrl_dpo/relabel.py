"""Scored groups -> groups with calibrated and transformed rewards, and pairs with margins."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ctrl_dpo._validation import (
    check_choice,
    check_columns,
    check_integer,
    check_weight,
)
from ctrl_dpo.calibrate import METHODS, RewardCalibrator
from ctrl_dpo.data import columns
from ctrl_dpo.labels.datasets import add_calibrated, add_columns
from ctrl_dpo.labels.extremes import keep_extremes
from ctrl_dpo.labels.groups import RAW
from ctrl_dpo.labels.pairs import TIES, pair_batch, parse_strategy, select_pairs
from ctrl_dpo.labels.settings import check_raw, label_settings
from ctrl_dpo.theory.procedures import Procedure
from ctrl_dpo.theory.rank_targets import RankOptimal

if TYPE_CHECKING:
    from datasets import Dataset

_UNSCORED = "These are unscored: run `ctrl-dpo score` first, or give `ctrl-dpo relabel` a --reward."
_LISTS = (columns.CALIBRATED_REWARDS, columns.TRANSFORMED_REWARDS)


def relabel(  # noqa: PLR0913 (each is a decision of the user's)
    groups: Dataset,
    *,
    procedure: str | Procedure,
    transformation: Any = "optimal",
    beta: float | None = None,
    target_kl: float | None = None,
    calibration: str | RewardCalibrator = "empirical",
    estimator: str | None = None,
    against: str | Procedure | None = None,
    extremes: int | None = None,
    anchor: float = 0.0,
    **map_options: Any,
) -> Dataset:
    r"""Add calibrated and transformed rewards to scored groups.

    .. math:: C = \hat C(x, y), \qquad \hat\Phi = E[\Phi(U) \mid \text{rank of } y]

    The target of training is then :math:`\log \pi / \pi_\mathrm{ref} = \hat\Phi/\beta - \log Z`.

    Parameters
    ----------
    groups : Dataset or IterableDataset
        Rows with ``responses`` and ``rewards``, lists of one length; ``reference_rewards`` where
        the responses are not themselves the draws of the reference policy. Other columns are kept.
    procedure : str or Procedure
        How the trained policy will be used: ``"best_of_4"``, ``"worst_of_8"``, ``"single_draw"``.
    transformation : str or Transformation
        ``"optimal"``, ``"identity"``, ``"log"``, ``"normal_quantile"``, ``"exponential:5"``; or
        ``"raw"``, the baseline: rewards as they are, with no normaliser. Its squared loss is REBEL
        with eta = 1 / beta (Gao et al., arXiv:2404.16767), its soft label RPO with
        eta = 1 (Sun et al., arXiv:2502.00203).
    beta : float, optional
        Strength of the KL penalty, > 0. Give this or ``target_kl``.
    target_kl : float, optional
        KL budget in nats per response, from which beta follows.
    calibration : {"empirical", "pooled", "weighted"} or RewardCalibrator
        ``"empirical"``: ranks among the prompt's own draws. ``"pooled"``: for few draws, or none,
        shrunk toward what all prompts share, and toward what the column ``prompt_features`` (lists
        of floats) predicts, if there is one. ``"weighted"``: for responses that another policy
        drew, by ``reference_logps`` minus ``sampler_logps``; adds ``effective_sample_size``, and
        drops ``sampled_from`` and, without ``reference_computed``, ``reference_logps``, of which
        training would ask what the weights have settled. A
        :class:`ctrl_dpo.calibrate.RewardCalibrator` sets the least size that is accepted. The
        transformation is applied to these as they are (``estimator="plug_in"``).
    estimator : {"rank_optimal", "posterior", "plug_in", "levels"}, optional
        How ranks among few draws become transformed rewards. ``"rank_optimal"``, the default of
        ``"optimal"``: such that the policy fitted to them is optimal and has the KL budget, see
        :func:`ctrl_dpo.theory.rank_targets.rank_targets`. The others estimate the transformed
        reward of each response, see :func:`ctrl_dpo.transform.transformed_rewards`;
        ``"posterior"`` is the default of every other transformation. ``"levels"`` is for rewards
        of few values, such as verifiers and ratings: equal rewards are one level, with the share
        of the prompt's reference draws as its mass, and a normaliser for each prompt.
    against : str or Procedure, optional
        Procedure on the reference policy's side; by default the same.
    extremes : int, optional
        Keep only so many of the best and of the worst responses of each group, ranked among all of
        its draws: they tell a trainer most for their tokens. A regression on the ends alone fits a
        curve that is bent there: next to nothing for worst-of-N, but with much data one or two
        points of win rate for best-of-N (``benchmarks/partial_fit.py``), which all draws have.
        It pays another KL than the budget. The rewards of all draws stay in ``draw_rewards``.
    anchor : float
        Anchor of the squared loss that will fit the labels, >= 0, as in
        :class:`ctrl_dpo.CTRLDPOConfig`; ``"rank_optimal"`` labels of whole groups of draws differ
        with it, and name it in a column.
    **map_options
        For ``datasets.map``, such as ``num_proc=4`` or ``batch_size=1000``.

    Returns
    -------
    Dataset or IterableDataset
        The rows in their order with ``calibrated_rewards`` and ``transformed_rewards`` (lists),
        ``log_normaliser``, ``beta``, ``procedure`` and ``transformation``, perhaps ``anchor``.

    Raises
    ------
    ValueError
        If there is no row, a column is missing, a reward is not finite, list lengths differ, or not
        exactly one of ``beta`` and ``target_kl`` is given.

    Notes
    -----
    What became of the labels is told by
    :func:`ctrl_dpo.measures.label_summary.summarise_labels` and :func:`count_pairs`.
    A response that is itself a reference draw is compared with the other draws (leave one out),
    the only one of its prompt is given 1/2. A relabelled dataset can be relabelled again; after
    weighted calibration relabel the scored groups.

    Examples
    --------
    >>> from datasets import Dataset
    >>> groups = Dataset.from_dict(
    ...     {"prompt": ["Hi"], "responses": [["a", "b", "c"]], "rewards": [[0.1, 0.9, 0.4]]}
    ... )
    >>> relabel(groups, procedure="best_of_4", beta=0.1)["calibrated_rewards"][0]
    [0.0, 1.0, 0.5]
    """
    from datasets import Dataset

    found = _names(groups)
    check_columns(found, [columns.RESPONSES], "Use to_groups first.")
    check_columns(found, [columns.REWARDS], _UNSCORED)
    if not isinstance(calibration, RewardCalibrator):
        calibration = RewardCalibrator(check_choice("calibration", calibration, METHODS))
    if transformation == RAW:
        check_raw(calibration.method, estimator, target_kl)
        estimator = RAW
    elif calibration.method != "empirical":
        estimator = check_choice("estimator", estimator or "plug_in", ["plug_in"])
    settings = label_settings(procedure, transformation, beta, target_kl, against, estimator)
    if isinstance(settings["estimator"], RankOptimal):
        weight = check_weight("anchor", anchor)
        known = extremes is None and columns.compared_with(found) == columns.REWARDS
        settings["estimator"] = replace(settings["estimator"], anchor=weight if known else None)
    if calibration.method == "empirical":
        made = add_columns(groups, found, settings, map_options)
    else:
        made = add_calibrated(groups, found, calibration, settings)
    if extremes is None:
        return made
    count = check_integer("extremes", extremes, 1)
    options = {"desc": "extremes", **map_options} if isinstance(made, Dataset) else {}
    options.pop("batch_size", None)  # rows are cut one by one
    return made.map(partial(keep_extremes, count=count), **options)


def _names(rows: Any) -> list[str]:
    """Return the columns, of a stream that does not know them those of its first row."""
    return list(rows.column_names or next(iter(rows), {}))


def pairs(
    relabelled: Dataset,
    strategy: str = "best_worst",
    *,
    ties: str = "drop",
    seed: int = 0,
    **map_options: Any,
) -> Dataset:
    r"""Make preference pairs with margins out of relabelled groups.

    .. math:: m = \hat\Phi(\text{chosen}) - \hat\Phi(\text{rejected}) \ge 0

    Parameters
    ----------
    relabelled : Dataset or IterableDataset
        What :func:`relabel` returned.
    strategy : str
        ``"best_worst"`` one pair a group, ``"adjacent"`` neighbours in rank, ``"all"``,
        ``"random:N"`` N of them, ``"margin:T"`` those with a margin of at least T.
    ties : {"drop", "keep"}
        Whether pairs of equal transformed rewards are kept, with margin 0.
    seed : int
        Seed of ``"random:N"``.
    **map_options
        For ``datasets.map``, such as ``num_proc=4``.

    Returns
    -------
    Dataset or IterableDataset
        ``prompt, chosen, rejected, margin``, in TRL's standard or conversational format, with
        ``beta``, ``procedure`` and ``transformation``. Two equal texts never make a pair.

    Raises
    ------
    ValueError
        If the strategy is unknown or no group has a pair to give.

    Examples
    --------
    >>> from datasets import Dataset
    >>> groups = Dataset.from_dict(
    ...     {"prompt": ["Hi"], "responses": [["a", "b", "c"]], "rewards": [[0.1, 0.9, 0.4]]}
    ... )
    >>> labelled = relabel(groups, procedure="single_draw", transformation="identity", beta=1.0)
    >>> pairs(labelled)[0]["chosen"], pairs(labelled)[0]["rejected"], pairs(labelled)[0]["margin"]
    ('b', 'a', 0.5)
    """
    from datasets import Dataset

    settings = _pair_settings(relabelled, strategy, ties, seed)
    stored = isinstance(relabelled, Dataset)
    if stored:  # of a stream, what is returned is all that it keeps
        map_options = {"remove_columns": relabelled.column_names, "desc": "pairs", **map_options}
    made = relabelled.with_format("arrow").map(
        pair_batch,
        batched=True,
        with_indices=True,
        fn_kwargs=settings,
        **map_options,
    )
    if stored and len(made) == 0:
        counts = count_pairs(relabelled, strategy, ties=ties, seed=seed)
        raise ValueError(
            f"relabelled must hold a pair of unequal responses; got {counts}. Score with a finer "
            "reward, draw more responses, or use ties='keep'."
        )
    return made.with_format(None)


def count_pairs(
    relabelled: Dataset, strategy: str = "best_worst", *, ties: str = "drop", seed: int = 0
) -> dict[str, int]:
    """Count what :func:`pairs` makes and leaves out.

    Parameters
    ----------
    relabelled, strategy, ties, seed
        As for :func:`pairs`.

    Returns
    -------
    dict
        ``groups``, ``pairs``, ``groups_without_pair``, and among the candidates of the strategy
        ``tied_pairs`` (kept or dropped by ``ties``) and ``duplicate_pairs`` (of equal texts,
        dropped); of the pairs made, ``flipped_pairs`` (the chosen response has the lower reward).

    Examples
    --------
    >>> from datasets import Dataset
    >>> groups = Dataset.from_dict(
    ...     {"prompt": ["Hi"], "responses": [["a", "b", "c"]], "rewards": [[0.0, 0.0, 0.4]]}
    ... )
    >>> labelled = relabel(groups, procedure="best_of_4", beta=1.0)
    >>> counts = count_pairs(labelled, "all")
    >>> counts["pairs"], counts["tied_pairs"]
    (2, 1)
    """
    settings = _pair_settings(relabelled, strategy, ties, seed)
    totals = {"groups": len(relabelled), "pairs": 0, "groups_without_pair": len(relabelled)}
    totals |= {"tied_pairs": 0, "duplicate_pairs": 0, "flipped_pairs": 0}
    rewards = [columns.REWARDS] if columns.REWARDS in relabelled.column_names else []
    numbers = relabelled.select_columns([columns.RESPONSES, *_LISTS, *rewards])
    start = 0
    for table in numbers.with_format("arrow").iter(batch_size=1000):
        found = select_pairs(table, list(range(start, start + len(table))), **settings)
        start += len(table)
        totals["pairs"] += found.row.size
        totals["groups_without_pair"] -= np.unique(found.row).size
        totals["tied_pairs"] += found.ties
        totals["duplicate_pairs"] += found.duplicates
        totals["flipped_pairs"] += found.flips
    return totals


def _pair_settings(relabelled: Dataset, strategy: str, ties: str, seed: int) -> dict[str, Any]:
    """Check the arguments of :func:`pairs`."""
    required = [columns.PROMPT, columns.RESPONSES, *_LISTS, columns.BETA]
    check_columns(_names(relabelled), required, "Call relabel first.")
    return {
        "strategy": parse_strategy(strategy),
        "ties": check_choice("ties", ties, TIES),
        "seed": check_integer("seed", seed, 0),
    }
