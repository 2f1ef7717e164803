"""Log-probabilities under the reference policy: computed once, kept, found again by content."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from ctrl_dpo.data.hashes import user_cache
from ctrl_dpo.engine.batches import collate, row_lengths
from ctrl_dpo.engine.checks import check_tokenizer
from ctrl_dpo.engine.identity import model_identity
from ctrl_dpo.engine.int8 import is_in_8bit
from ctrl_dpo.engine.kv_cache import training_attention
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.models import adapter_off, load_policy
from ctrl_dpo.engine.numerics import numerics
from ctrl_dpo.engine.passes import split
from ctrl_dpo.engine.policies import check_recorded
from ctrl_dpo.engine.reference_store import ReferenceStore

logger = logging.getLogger(__name__)


def load_reference(policy: Any, reference: Any, tokenizer: Any) -> tuple[Any, str | None]:
    """Return the reference policy that was given for log-ratios of a policy, and its identity.

    Parameters
    ----------
    policy : transformers.PreTrainedModel or peft.PeftModel
        The policy.
    reference : str, Path, transformers.PreTrainedModel, peft.PeftModel or None
        A name is loaded in the type, bits and attention of the policy, so that equal weights give
        equal numbers; None stands for the policy with its adapter off.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the policy.

    Returns
    -------
    model : transformers.PreTrainedModel or peft.PeftModel or None
        None where none was given.
    identity : str or None
        See :func:`ctrl_dpo.engine.identity.model_identity`.

    Raises
    ------
    ValueError
        If it is not the one that the policy was trained against, as far as that is recorded, or
        has another tokenizer.
    """
    if reference is None:
        check_recorded(policy, None)
        return None, None
    name = reference if isinstance(reference, (str, Path)) else None
    if name is not None:
        reference = load_policy(
            name,
            dtype=str(policy.dtype).removeprefix("torch."),
            load_in_8bit=is_in_8bit(policy),
            device=policy.device,
            attn_implementation=training_attention(policy),
        )
    identity = model_identity(reference, name)
    check_recorded(policy, identity)
    check_tokenizer(tokenizer, reference, "reference")
    return reference, identity


@torch.no_grad()
def reference_logps(
    model: Any, batch: Mapping[str, torch.Tensor], reference: Any = None
) -> torch.Tensor:
    """Return the log-probabilities of a batch under the reference policy, ``(n_responses,)``.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy; without ``reference`` one with an adapter, which is switched off.
    batch : mapping of str to Tensor
        From :func:`ctrl_dpo.engine.batches.collate`.
    reference : transformers.PreTrainedModel or peft.PeftModel, optional
        A reference policy of its own, used as it is.

    Returns
    -------
    (n_responses,) float32 Tensor
        Nats per response.
    """
    with adapter_off(model) if reference is None else nullcontext(reference) as computing:
        return response_logps(computing, batch)


def compute_rows(
    model: Any, rows: Sequence[Mapping[str, Any]], max_tokens: int, share: bool
) -> Iterator[tuple[int, list[float]]]:
    """Compute rows under the reference policy, longest first, and yield each with its place.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        While it computes the reference policy, see
        :meth:`ctrl_dpo.engine.policies.ReferencePolicy.computing`.
    rows : sequence of mapping
        ``prompt_ids`` and ``response_ids``.
    max_tokens : int
        Tokens of a forward pass, see :func:`ctrl_dpo.engine.passes.split`.
    share : bool
        One row of the batch per group, else per response.

    Yields
    ------
    place : int
        Index into ``rows``.
    logps : list of float
        Nats per response.
    """
    for chosen in split([row_lengths(row, share) for row in rows], max_tokens):
        batch = collate([_tokens(rows[i]) for i in chosen], share)
        with torch.no_grad():
            values = response_logps(model, {k: v.to(model.device) for k, v in batch.items()})
        parts = torch.split(values, [len(rows[i]["response_ids"]) for i in chosen])
        yield from zip(chosen, (part.tolist() for part in parts), strict=True)


def add_reference_logps(
    model: Any,
    rows: Sequence[dict[str, Any]],
    key: str,
    folder: Path | None,
    max_tokens: int,
    share: bool,
) -> int:
    """Fill in ``reference_logps`` of every row, from the cache or by computing them.

    Several processes each compute a share of the rows and exchange the numbers.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        While it computes the reference policy, see
        :meth:`ctrl_dpo.engine.policies.ReferencePolicy.computing`.
    rows : sequence of dict
        Training rows; changed in place.
    key : str
        Identity of the reference policy's weights, and what else the caller decides.
    folder : Path or None
        Where the numbers are kept; by default ``reference`` in the folder that all runs of a user
        share (:func:`ctrl_dpo.data.hashes.user_cache`).
    max_tokens : int
        Tokens of a forward pass, as of a pass of training.
    share : bool
        Row layout, as in training: in bfloat16 another layout gives another value.

    Returns
    -------
    int
        Number of groups computed, by all processes; the others were found.

    Notes
    -----
    A number is found again by everything that decides it: ``key``, the row layout, the tokens of
    the row, and :func:`ctrl_dpo.engine.numerics.numerics` (types, attention, autocast, processor,
    threads, library versions, the code of the forward path). Template and tokenizer act through the
    tokens. LoRA settings, learning rate, seed, output folder and the dataset do not act at all.

    A row is what is computed as one: a group with ``share``, since the shape of a product decides
    the order of its sums, else prompt and response alone. On a processor rows are computed one by
    one, so that their neighbours cannot act. On an accelerator a batch is computed together, and
    its padded shape moves the last bits of a value as it does for the policy in every step of
    training; that shape is not a part of the key.
    """
    parts = [row for group in rows for row in _units(group, share)]
    names = [_row_key(part) for part in parts]
    path = folder or user_cache() / "reference"
    store = ReferenceStore(path, {"key": key, "share_prompt": share, **numerics(model)})
    processes = PartialState()
    # one process reads, so that all agree on what is missing while some already write
    known = broadcast_object_list([store.read() if processes.is_main_process else None])[0]
    # a row may be in the data twice
    missing = {name: part for name, part in zip(names, parts, strict=True) if name not in known}
    logger.info(
        "reference cache %s: %d rows, %d found, %d to compute",
        store.path,
        len(set(names)),
        len(set(names)) - len(missing),
        len(missing),
    )
    mine = list(missing)[processes.process_index :: processes.num_processes]
    computed_here: dict[str, list[float]] = {}
    if mine:
        quiet = None if processes.is_main_process else True
        with store, tqdm(total=len(mine), desc="reference", unit="row", disable=quiet) as bar:
            share_of_rows = [missing[name] for name in mine]
            for place, logps in compute_rows(model, share_of_rows, max_tokens, share):
                store.add({mine[place]: logps})
                computed_here[mine[place]] = logps
                bar.update()
    for of_process in gather_object([computed_here]):
        known |= of_process
    values = iter(names)
    computed = 0
    for group in rows:
        mine = [next(values) for _ in _units(group, share)]
        computed += any(name in missing for name in mine)
        group["reference_logps"] = [logp for name in mine for logp in known[name]]
    return computed


def _units(group: Mapping[str, Any], share: bool) -> list[dict[str, Any]]:
    """Cut a group into what is computed as one row."""
    whole = _tokens(group)
    if share:
        return [whole]
    return [whole | {"response_ids": [response]} for response in whole["response_ids"]]


def _tokens(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in ("prompt_ids", "response_ids")}


def _row_key(row: Mapping[str, Any]) -> str:
    text = json.dumps([row["prompt_ids"], row["response_ids"]])
    return hashlib.sha256(text.encode()).hexdigest()
