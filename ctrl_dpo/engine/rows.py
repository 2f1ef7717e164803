"""Dataset rows -> tokenised groups with targets: what the trainer's batches are made of."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ctrl_dpo._validation import check_columns, check_finite, check_positive
from ctrl_dpo.config import HARD_LABEL_LOSSES, CTRLDPOConfig
from ctrl_dpo.data import columns
from ctrl_dpo.data.layouts import to_groups
from ctrl_dpo.data.token_groups import TokenizedGroup, count_tokens
from ctrl_dpo.data.tokens import tokenize_group
from ctrl_dpo.engine.merged_pairs import merge_pairs
from ctrl_dpo.labels.groups import RAW
from ctrl_dpo.relabel import relabel
from ctrl_dpo.theory.procedures import Procedure, parse_procedure

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_RECOMPUTE = "Remove the column, and they are computed."
_RELABEL = "Run `ctrl-dpo relabel` first, or set procedure and target_kl in the configuration."


def labelled(dataset: Dataset, config: CTRLDPOConfig) -> Dataset:
    """Return the dataset with targets, relabelling scored groups by the configuration.

    Parameters
    ----------
    dataset : Dataset
        Relabelled groups, scored groups, unpaired scored responses (``prompt, response, reward``),
        pairs with ``margin``, or plain pairs.
    config : CTRLDPOConfig
        Its ``procedure``, ``transformation``, ``calibration``, ``beta`` and ``target_kl`` relabel
        scored groups.

    Returns
    -------
    Dataset
        Groups with ``transformed_rewards``, or pairs.

    Raises
    ------
    ValueError
        If the dataset is empty, of no known form, or lacks what the loss needs.
    """
    names = dataset.column_names
    if len(dataset) == 0:
        raise ValueError("train_dataset must have at least one row; got 0.")
    if columns.CHOSEN in names and columns.REJECTED in names:
        _check_pairs(names, config)
        return dataset
    if columns.TRANSFORMED_REWARDS in names:
        return dataset
    if columns.RESPONSE in names and columns.REWARD in names:
        dataset = _groups_of_one(dataset, config)
        names = dataset.column_names
    if columns.RESPONSES not in names or columns.REWARDS not in names:
        raise ValueError(
            "train_dataset must hold groups (prompt, responses, rewards), pairs (prompt, chosen, "
            "rejected) or single responses (prompt, response, reward); got "
            f"{sorted(names)}. See the README's data format."
        )
    procedure, transformation = config.procedure, config.transformation
    if procedure is None and (transformation == RAW or config.loss in HARD_LABEL_LOSSES):
        # raw rewards, or their order, as those who proposed these losses used them: for one draw
        procedure, transformation = "single_draw", RAW
    if procedure is None:
        raise ValueError(f"procedure must be given for unlabelled groups; got None. {_RELABEL}")
    return relabel(
        dataset,
        procedure=procedure,
        transformation=transformation,
        beta=config.beta,
        target_kl=config.target_kl,
        calibration=config.calibration,
        anchor=config.anchor,
    )


def _check_pairs(names: list[str], config: CTRLDPOConfig) -> None:
    """Raise where pairs lack what the loss needs."""
    check_columns(names, [columns.PROMPT], "to_groups splits pairs with an implicit prompt.")
    if columns.MARGIN not in names and config.loss not in HARD_LABEL_LOSSES:
        raise ValueError(
            f"pairs must have a column 'margin' for loss={config.loss!r}; got {sorted(names)}. "
            "Relabel scored groups and export pairs, or use loss='dpo'."
        )
    if config.anchor > 0:
        raise ValueError(
            f"anchor must be 0 for pairs, whose margin is a difference; got {config.anchor!r}. "
            "Train on the relabelled groups themselves."
        )


def _groups_of_one(dataset: Dataset, config: CTRLDPOConfig) -> Dataset:
    """Return unpaired responses as groups, or raise where there is nothing to rank them among."""
    if config.anchor == 0 or config.transformation == RAW:
        raise ValueError(
            f"anchor must be > 0 for unpaired responses; got {config.anchor!r}. A contrastive loss "
            "compares responses of one prompt: set anchor=1, or give groups."
        )
    if columns.REFERENCE_REWARDS not in dataset.column_names and config.calibration != "pooled":
        raise ValueError(
            "unpaired responses must have a column 'reference_rewards', rewards of draws of the "
            f"reference policy; got {sorted(dataset.column_names)}. Draw and score some, or set "
            "calibration='pooled'."
        )
    return to_groups(dataset, "unpaired", same_prompt="keep")


def resolve_beta(dataset: Dataset, config: CTRLDPOConfig) -> float:
    """Return the one beta of dataset and configuration, or raise where they differ.

    Parameters
    ----------
    dataset : Dataset
        From :func:`labelled`.
    config : CTRLDPOConfig
        May name ``beta``, ``procedure`` and ``target_kl``.

    Returns
    -------
    float
        Strength of the KL penalty.

    Raises
    ------
    ValueError
        If the dataset was relabelled for several betas, or for another beta or procedure.
    """
    hard = config.loss in HARD_LABEL_LOSSES
    if hard and config.beta is not None:
        return config.beta  # the baseline's own; only the order of its pairs is used
    wanted_of = {columns.PROCEDURE: config.procedure, columns.BETA: config.beta}
    for column, wanted in {**wanted_of, columns.ANCHOR: config.anchor}.items():
        found = dataset.unique(column) if column in dataset.column_names else []
        if len(found) > 1:
            raise ValueError(
                f"{column} must be one for the whole dataset; got {sorted(found)[:4]}. Relabel it."
            )
        same = not found or wanted is None or found[0] == wanted or config.accept_other_labels
        if isinstance(wanted, float) and found:
            same = same or abs(found[0] - wanted) <= 1e-6 * wanted
        if not same:
            raise ValueError(
                f"{column} must be that of the relabelled dataset, {found[0]!r}; got {wanted!r}. "
                "Relabel the data for it, leave it out of the configuration, or set "
                "accept_other_labels."
            )
    if columns.BETA in dataset.column_names and not config.accept_other_labels:
        return check_positive("beta", float(dataset[0][columns.BETA]))
    if config.beta is None:
        raise ValueError("beta must be given, since the dataset has no column 'beta'; got None.")
    return config.beta


def resolve_procedure(dataset: Dataset, config: CTRLDPOConfig) -> Procedure | None:
    """Return how the policy will be used, for the predicted win rate; None where nobody says.

    Parameters
    ----------
    dataset : Dataset
        From :func:`labelled`.
    config : CTRLDPOConfig
        Its ``procedure`` comes first.

    Returns
    -------
    Procedure or None
        The configuration's, else the dataset's.
    """
    if config.procedure is not None:
        return parse_procedure(config.procedure)
    if columns.PROCEDURE not in dataset.column_names:
        return None
    return parse_procedure(dataset[0][columns.PROCEDURE])


def training_rows(
    dataset: Dataset, tokenizer: Any, config: CTRLDPOConfig, beta: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Tokenise a labelled dataset.

    Parameters
    ----------
    dataset : Dataset
        From :func:`labelled`.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    config : CTRLDPOConfig
        Its length limits, loss and anchor.
    beta : float
        From :func:`resolve_beta`.

    Returns
    -------
    rows : list of dict
        ``prompt_ids``, ``response_ids``, ``targets`` (nats), ``truncated``, ``weight`` and, where
        the dataset has them, ``reference_logps``. Pairs of one prompt are one row, with
        ``members``.
    counts : dict of str to int
        Rows in, kept and dropped, and what tokenisation did.

    Raises
    ------
    ValueError
        If no row is left, a target is not finite, a weight is not a finite number >= 0, or
        log-probabilities of the dataset are of tokens that are cut.
    """
    rows, tokenised, dropped, cut_alike = [], [], 0, 0
    for index, row in enumerate(dataset):
        if config.anchor > 0 and row.get(columns.LOG_NORMALISER) is None:
            raise ValueError(
                f"anchor must be 0 where the normaliser is not known; got {config.anchor!r} with "
                f"transformation {row[columns.TRANSFORMATION]!r} at row {index}."
            )
        group = _group(row, beta)
        check_finite(f"targets of train_dataset's row {index}", group["targets"])
        if len(group["responses"]) < 2 and config.anchor == 0:
            dropped += 1  # a contrastive loss has nothing to compare
            continue
        tokens = _tokenise(group, tokenizer, config)
        if config.anchor == 0 and sum(tokens.repeated) == len(tokens.response_ids) - 1:
            cut_alike += 1  # one text is left, which cannot be better than itself
            continue
        tokenised.append(tokens)
        rows.append(
            {
                "prompt_ids": tokens.prompt_ids,
                "response_ids": tokens.response_ids,
                "targets": group["targets"],
                "truncated": _truncated(group, tokens),
                "weight": _weight(row, index),
                "reference_logps": _reference_logps(row, tokens, index),
            }
        )
    if not rows:
        raise ValueError(
            f"train_dataset must have a group of two responses or more; got {dropped} groups of "
            f"one, and {cut_alike} whose responses are the same within max_response_length. Draw "
            "more responses, raise the limit, or set anchor > 0."
        )
    counts = {"rows": len(dataset), "dropped_single_response": dropped}
    counts |= {"dropped_cut_alike": cut_alike} | count_tokens(tokenised)
    if columns.CHOSEN in dataset.column_names and config.share_prompt:
        before, rows = len(rows), merge_pairs(rows)
        counts["pairs_merged_by_prompt"] = before - len(rows)
    lost = dropped + cut_alike
    logger.log(logging.WARNING if lost else logging.INFO, "training rows: %s", counts)
    return rows, counts


def warn_of_overlap(rows: list[dict[str, Any]], eval_rows: list[dict[str, Any]]) -> None:
    """Warn where prompts that are evaluated on are also trained on."""
    trained = {tuple(row["prompt_ids"]) for row in rows}
    shared = [i for i, row in enumerate(eval_rows) if tuple(row["prompt_ids"]) in trained]
    if shared:
        logger.warning(
            "eval_dataset should hold prompts of its own; %d of %d are also in train_dataset, "
            "first at row %d. What it measures is not generalisation.",
            len(shared),
            len(eval_rows),
            shared[0],
        )


def _truncated(group: Mapping[str, Any], tokens: TokenizedGroup) -> list[bool]:
    """Tell which responses lack their end: cut here, or by the limit they were drawn with."""
    finished = group.get(columns.FINISHED) or [True] * len(tokens.truncated)
    return [cut or not done for cut, done in zip(tokens.truncated, finished, strict=True)]


def _weight(row: Mapping[str, Any], index: int) -> float:
    """Return the weight of a row in the loss."""
    weight = row.get(columns.WEIGHT, 1.0)
    if not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight >= 0):
        raise ValueError(
            f"weight must be a finite number >= 0; got {weight!r} at row {index}. Mend or drop it."
        )
    return float(weight)


def _reference_logps(
    row: Mapping[str, Any], tokens: TokenizedGroup, index: int
) -> list[float] | None:
    """Return the dataset's log-probabilities, unless they are of other tokens."""
    values: list[float] | None = row.get(columns.REFERENCE_LOGPS)
    if values is None:
        return None
    if len(values) != len(tokens.response_ids) or not all(map(math.isfinite, values)):
        raise ValueError(
            "reference_logps must be one finite number per response; got "
            f"{values!r} for {len(tokens.response_ids)} responses at row {index}. {_RECOMPUTE}"
        )
    if tokens.prompt_truncated or any(tokens.truncated):
        raise ValueError(
            f"reference_logps must be of the tokens trained on; got a row that the length limits "
            f"cut at row {index}. {_RECOMPUTE}"
        )
    return values


def _tokenise(group: Mapping[str, Any], tokenizer: Any, config: CTRLDPOConfig) -> TokenizedGroup:
    return tokenize_group(
        tokenizer,
        group["prompt"],
        group["responses"],
        response_ids=group.get(columns.RESPONSE_IDS),
        finished=group.get(columns.FINISHED),
        max_prompt_length=config.max_prompt_length,
        max_response_length=config.max_response_length,
    )


def _group(row: Mapping[str, Any], beta: float) -> dict[str, Any]:
    """Bring a group or a pair into one form: responses with their target log-ratios."""
    if columns.CHOSEN not in row:
        shift = row[columns.LOG_NORMALISER] or 0.0  # raw rewards have none, and no anchor
        targets = [phi / beta - shift for phi in row[columns.TRANSFORMED_REWARDS]]
        return {**row, "targets": targets}
    margin = row.get(columns.MARGIN)
    group = {
        "prompt": row["prompt"],
        "responses": [_text(row[columns.CHOSEN]), _text(row[columns.REJECTED])],
        # only the difference counts; a plain pair's is 1, of which only the sign is used
        "targets": [(1.0 if margin is None else margin) / beta, 0.0],
    }
    if row.get(columns.CHOSEN_IDS) is not None:
        group[columns.RESPONSE_IDS] = [row[columns.CHOSEN_IDS], row[columns.REJECTED_IDS]]
    if row.get(columns.CHOSEN_FINISHED) is not None:
        group[columns.FINISHED] = [row[columns.CHOSEN_FINISHED], row[columns.REJECTED_FINISHED]]
    return group


def _text(response: Any) -> str:
    """Return a response's text; a conversational one is a single assistant message."""
    if isinstance(response, str):
        return response
    if len(response) != 1 or response[0].get("role") != "assistant":
        raise ValueError(
            f"a conversational response must be one assistant message; got {response!r}. Move "
            "earlier messages to the prompt."
        )
    return str(response[0]["content"])
