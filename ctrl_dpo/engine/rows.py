"""Labelled rows -> tokenised groups with targets: what the trainer's batches are made of."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ctrl_dpo._validation import check_finite
from ctrl_dpo.config import HARD_LABEL_LOSSES, CTRLDPOConfig
from ctrl_dpo.data import columns
from ctrl_dpo.data.token_groups import TokenizedGroup, count_tokens
from ctrl_dpo.data.tokens import tokenize_group
from ctrl_dpo.engine.merged_pairs import merge_pairs

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_RECOMPUTE = "Remove the column, and they are computed."


def training_rows(
    dataset: Dataset, tokenizer: Any, config: CTRLDPOConfig, beta: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Tokenise a labelled dataset.

    Parameters
    ----------
    dataset : Dataset
        From :func:`ctrl_dpo.engine.labelling.labelled`.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    config : CTRLDPOConfig
        Its length limits, loss and anchor.
    beta : float
        From :func:`ctrl_dpo.engine.labelling.resolve_beta`.

    Returns
    -------
    rows : list of dict
        ``prompt_ids``, ``response_ids``, ``targets`` (nats; for the losses ``dpo`` and ``ipo`` the
        ``order``), ``order`` (ranks of the rewards, of the targets where there are none),
        ``truncated``, ``dataset_rows`` (where each response comes from), ``weight`` and, where the
        dataset has them, ``reference_logps``. With ``share_prompt``, pairs of one prompt are one
        row, with ``members``.
    counts : dict of str to int
        Rows in, kept and dropped, and what tokenisation did.

    Raises
    ------
    ValueError
        If no row is left, a target or reward is not finite, a weight is not a finite number >= 0,
        or log-probabilities of the dataset are of tokens that are cut.
    """
    rows, tokenised, dropped, cut_alike = [], [], 0, 0
    hard = config.loss in HARD_LABEL_LOSSES
    for index, row in enumerate(dataset):
        if config.anchor > 0 and row.get(columns.LOG_NORMALISER) is None:
            raise ValueError(
                f"anchor must be 0 where the normaliser is not known; got {config.anchor!r} with "
                f"transformation {row[columns.TRANSFORMATION]!r} at row {index}."
            )
        group = _group(row, beta)
        check_finite(f"targets of train_dataset's row {index}", group["targets"])
        order = _order(group, index)
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
                "targets": order if hard else group["targets"],
                "order": order,
                "truncated": _truncated(group, tokens),
                "dataset_rows": [index] * len(tokens.response_ids),
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


def warn_of_merged_pairs(rows: list[dict[str, Any]], counts: Mapping[str, int]) -> None:
    """Warn where an update holds more pairs, and an epoch fewer updates, than pairs alone give."""
    merged = counts.get("pairs_merged_by_prompt", 0)
    if merged:
        logger.warning(
            "%d pairs are %d rows of batches: those of one prompt are one row, which shares its "
            "prompt. Lower per_device_train_batch_size for as many updates an epoch, or set "
            "share_prompt=False to keep pairs apart.",
            len(rows) + merged,
            len(rows),
        )


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
    group = {
        "prompt": row["prompt"],
        "responses": [_text(row[columns.CHOSEN]), _text(row[columns.REJECTED])],
        # only the difference counts; a plain pair's is 1, of which only the sign is used
        "targets": [row.get(columns.MARGIN, 1.0) / beta, 0.0],
    }
    if row.get(columns.CHOSEN_IDS) is not None:
        group[columns.RESPONSE_IDS] = [row[columns.CHOSEN_IDS], row[columns.REJECTED_IDS]]
    if row.get(columns.CHOSEN_FINISHED) is not None:
        group[columns.FINISHED] = [row[columns.CHOSEN_FINISHED], row[columns.REJECTED_FINISHED]]
    return group


def _order(group: Mapping[str, Any], index: int) -> list[int]:
    """Return ranks of the responses, equal only for equal rewards; targets may tie unequal ones."""
    values = group.get(columns.REWARDS) or group["targets"]
    finite = check_finite(f"rewards of train_dataset's row {index}", values)
    ranks: list[int] = np.unique(finite, return_inverse=True)[1].tolist()
    return ranks


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
