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
from ctrl_dpo.data.layout_rows import DroppedRow, split_pair
from ctrl_dpo.data.messages import is_messages, response_text
from ctrl_dpo.data.token_groups import TokenizedGroup, count_tokens
from ctrl_dpo.data.tokens import tokenize_group
from ctrl_dpo.engine.merged_pairs import merge_pairs

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_DROPPED = _SINGLE, _EQUAL, _CUT_ALIKE, _NO_PROMPT = (
    "dropped_single_response",
    "dropped_equal_responses",
    "dropped_cut_alike",
    "dropped_no_shared_prompt",
)
_RECOMPUTE = "Remove the column, and they are computed."


def training_rows(
    dataset: Dataset,
    tokenizer: Any,
    config: CTRLDPOConfig,
    beta: float,
    name: str = "train_dataset",
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
    name : str
        The argument that the dataset came as, for errors and the log.

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
        If no row is left, or, by the name of the row: a prompt or response is malformed or refused
        by the chat template, a response holds more than its text, a text prompt has messages for
        responses, a target or reward is not finite, a weight is not a finite number >= 0, or
        log-probabilities of the dataset are of tokens that are cut.
    """
    rows, tokenised, dropped = [], [], dict.fromkeys(_DROPPED, 0)
    for index, row in enumerate(dataset):
        try:
            made, tokens = _training_row(row, tokenizer, config, beta)
        except DroppedRow as reason:
            dropped[str(reason)] += 1
            continue
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}'s row {index}: {error}") from error
        tokenised.append(tokens)
        rows.append(made | {"dataset_rows": [index] * len(tokens.response_ids)})
    if not rows:
        raise ValueError(
            f"{name} must have a group of two responses or more; got {dropped[_SINGLE]} groups of "
            f"one, {dropped[_EQUAL]} of equal responses, {dropped[_CUT_ALIKE]} whose responses are "
            f"the same within max_response_length, and {dropped[_NO_PROMPT]} pairs whose sides "
            "begin with no common prompt. Draw more responses, raise the limit, give the prompts, "
            "or set anchor > 0."
        )
    counts = {"rows": len(dataset), **dropped, **count_tokens(tokenised)}
    if columns.CHOSEN in dataset.column_names and config.share_prompt:
        before, rows = len(rows), merge_pairs(rows)
        counts["pairs_merged_by_prompt"] = before - len(rows)
    lost = any(dropped.values())
    logger.log(logging.WARNING if lost else logging.INFO, "rows of %s: %s", name, counts)
    return rows, counts


def check_batches(
    rows: list[dict[str, Any]], counts: Mapping[str, int], config: CTRLDPOConfig
) -> None:
    """Refuse rows that never fill a batch, where only full ones are kept; warn of merged pairs."""
    shared = config.accelerator_config.split_batches
    size = config.train_batch_size * (1 if shared else config.world_size)
    if config.dataloader_drop_last and len(rows) < size:
        raise ValueError(
            f"train_dataset must fill a batch where dataloader_drop_last=True; got {len(rows)} "
            f"rows of batches, and a batch is {size} (per_device_train_batch_size="
            f"{config.per_device_train_batch_size}, world_size={config.world_size}). Lower "
            "per_device_train_batch_size, or set dataloader_drop_last=False."
        )
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


def _training_row(
    row: Mapping[str, Any], tokenizer: Any, config: CTRLDPOConfig, beta: float
) -> tuple[dict[str, Any], TokenizedGroup]:
    """Tokenise a labelled row; raise where it breaks a rule, or leaves nothing to compare."""
    if config.anchor > 0 and row.get(columns.LOG_NORMALISER) is None:
        raise ValueError(
            f"anchor must be 0 where the normaliser is not known; got {config.anchor!r} with "
            f"transformation {row[columns.TRANSFORMATION]!r}."
        )
    group = _group(row, beta)
    check_finite("targets", group["targets"])
    order = _order(group)
    contrastive = config.anchor == 0
    if contrastive and len(group["responses"]) < 2:
        raise DroppedRow(_SINGLE)
    tokens = _tokenise(group, tokenizer, config)
    if contrastive and len(set(map(tuple, tokens.response_ids))) == 1:
        # one text, which cannot be better than itself
        raise DroppedRow(_CUT_ALIKE if any(tokens.repeated) else _EQUAL)
    made = {
        "prompt_ids": tokens.prompt_ids,
        "response_ids": tokens.response_ids,
        "targets": order if config.loss in HARD_LABEL_LOSSES else group["targets"],
        "order": order,
        "truncated": _truncated(group, tokens),
        "weight": _weight(row),
        "reference_logps": _reference_logps(row, tokens),
    }
    return made, tokens


def _truncated(group: Mapping[str, Any], tokens: TokenizedGroup) -> list[bool]:
    """Tell which responses lack their end: cut here, or by the limit they were drawn with."""
    finished = group.get(columns.FINISHED) or [True] * len(tokens.truncated)
    return [cut or not done for cut, done in zip(tokens.truncated, finished, strict=True)]


def _weight(row: Mapping[str, Any]) -> float:
    """Return the weight of a row in the loss."""
    weight = row.get(columns.WEIGHT, 1.0)
    if not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be a finite number >= 0; got {weight!r}. Mend or drop it.")
    return float(weight)


def _reference_logps(row: Mapping[str, Any], tokens: TokenizedGroup) -> list[float] | None:
    """Return the dataset's log-probabilities, unless they are of other tokens."""
    values: list[float] | None = row.get(columns.REFERENCE_LOGPS)
    if values is None:
        return None
    if len(values) != len(tokens.response_ids) or not all(map(math.isfinite, values)):
        raise ValueError(
            "reference_logps must be one finite number per response; got "
            f"{values!r} for {len(tokens.response_ids)} responses. {_RECOMPUTE}"
        )
    if tokens.prompt_truncated or any(tokens.truncated):
        raise ValueError(
            "reference_logps must be of the tokens trained on; got a row that the length limits "
            f"cut. {_RECOMPUTE}"
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
    group = _texts(row)
    # only the difference counts; a plain pair's is 1, of which only the sign is used
    group["targets"] = [row.get(columns.MARGIN, 1.0) / beta, 0.0]
    if row.get(columns.CHOSEN_IDS) is not None:
        group[columns.RESPONSE_IDS] = [row[columns.CHOSEN_IDS], row[columns.REJECTED_IDS]]
    if row.get(columns.CHOSEN_FINISHED) is not None:
        group[columns.FINISHED] = [row[columns.CHOSEN_FINISHED], row[columns.REJECTED_FINISHED]]
    return group


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt of a pair and the texts of its responses, the chosen one first."""
    try:
        split = split_pair(row)
    except DroppedRow:
        raise DroppedRow(_NO_PROMPT) from None
    if split is not None:  # chosen is the better one, whatever scores say, as for other pairs
        return {name: split[name] for name in (columns.PROMPT, columns.RESPONSES)}
    prompt = row[columns.PROMPT]
    sides = {name: row[name] for name in (columns.CHOSEN, columns.REJECTED)}
    for name, side in sides.items():
        if is_messages(side) and isinstance(prompt, str):
            raise ValueError(
                f"prompt must be messages where {name} is; got {prompt!r}, which no chat template "
                "would render. Write it as [{'role': 'user', 'content': ...}], or give chosen and "
                "rejected as text."
            )
    texts = [response_text(name, side) for name, side in sides.items()]
    return {"prompt": prompt, "responses": texts}


def _order(group: Mapping[str, Any]) -> list[int]:
    """Return ranks of the responses, equal only for equal rewards; targets may tie unequal ones."""
    values = group.get(columns.REWARDS) or group["targets"]
    finite = check_finite("rewards", values)
    ranks: list[int] = np.unique(finite, return_inverse=True)[1].tolist()
    return ranks
