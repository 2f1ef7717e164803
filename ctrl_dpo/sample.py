"""Reference policy -> responses, drawn once, offline: training itself never generates."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, concatenate_datasets
from tqdm import tqdm

from ctrl_dpo._validation import check_columns, check_integer
from ctrl_dpo.data import columns
from ctrl_dpo.data.folders import StageFolder, read_rows, read_shards
from ctrl_dpo.data.inputs import check_dataset
from ctrl_dpo.data.tokens import prompt_tokens
from ctrl_dpo.engine.batches import collate
from ctrl_dpo.engine.generation import (
    Draws,
    Sampler,
    draw_responses,
    end_tokens,
)
from ctrl_dpo.engine.identity import model_identity
from ctrl_dpo.engine.int8 import is_in_8bit
from ctrl_dpo.engine.kv_cache import use_decode_attention, use_training_attention
from ctrl_dpo.engine.logprobs import response_logps
from ctrl_dpo.engine.models import (
    context_length,
    load_policy,
    load_tokenizer,
    prepare_for_generation,
)
from ctrl_dpo.engine.provenance import provenance
from ctrl_dpo.engine.reference import load_reference, reference_logps

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def sample(  # noqa: PLR0913 (each is a decision of the user's)
    prompts: Dataset,
    model: Any,
    sampler: Sampler | None = None,
    *,
    tokenizer: Any = None,
    output: str | Path | None = None,
    batch_rows: int = 256,
    shard_prompts: int = 64,
    log_ratios: bool = False,
    reference: Any = None,
    **loading: Any,
) -> Dataset:
    """Draw responses to every prompt, each prompt computed once for all its draws.

    Parameters
    ----------
    prompts : datasets.Dataset
        Rows with ``prompt``: text, or a list of ``{"role", "content"}`` messages. Other columns are
        kept.
    model : str, Path or transformers.PreTrainedModel or peft.PeftModel
        Policy to draw from. A loaded model is changed for fast decoding and cannot be trained
        afterwards (:func:`ctrl_dpo.engine.models.prepare_for_generation`).
    sampler : Sampler, optional
        Number, length, temperature and seed of the draws.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        The model's own by default.
    output : str or Path, optional
        Stage folder to write shard by shard. A call that finds finished shards of the same run
        there draws only the missing ones, and gives what an uninterrupted call gives.
    batch_rows : int
        Responses decoded together; bounds memory.
    shard_prompts : int
        Prompts per shard: what an interruption can lose.
    log_ratios : bool
        Add the log-probability of each draw under the policy and under its reference policy, from
        one forward path, for the KL. The sampler must then leave the policy as it is: temperature
        1, no ``top_k``, no ``top_p``.
    reference : str, Path, transformers.PreTrainedModel or peft.PeftModel, optional
        Reference policy of the log-ratios, a model or an adapter; by default the model with its
        adapter off. It must be given for a policy that was trained against another, which its
        folder tells. A name is loaded as the policy is; a loaded model is changed as it is.
    **loading
        For a policy given by name: ``dtype``, ``load_in_8bit`` and what else
        :func:`ctrl_dpo.engine.models.load_policy` takes.

    Returns
    -------
    datasets.Dataset
        The rows with ``responses`` (text), ``response_ids`` (tokens, end token included),
        ``finished`` (whether the response ended before the length limit), ``sampler_logps``
        (nats per response under the sampler), ``sampled_from`` (model, template and sampler, by
        which training knows the draws of its reference policy) and, if asked for, ``policy_logps``
        and ``reference_logps`` (nats).

    Raises
    ------
    TypeError
        If the prompts are no ``datasets.Dataset``.
    ValueError
        If there are no prompts, a column such as ``tools`` would not be rendered, a prompt is
        malformed or too long for the model, or ``log_ratios`` is asked of a sampler that changes
        the policy, without the reference policy, or with another; if options of loading are given
        for a loaded model.
    """
    chosen = sampler or Sampler()
    if log_ratios:
        _check_unchanged(chosen)
    check_integer("batch_rows", batch_rows, 1)
    check_integer("shard_prompts", shard_prompts, 1)
    prompts = check_dataset("prompts", prompts)
    check_columns(prompts.column_names, [columns.PROMPT], "Rename the column with the prompts.")
    name = model if isinstance(model, (str, Path)) else None
    loaded = _loaded(model, loading)
    tokens = tokenizer or load_tokenizer(name or loaded.name_or_path)
    base, base_identity = load_reference(loaded, reference, tokens) if log_ratios else (None, None)
    ids = [prompt_tokens(tokens, prompt) for prompt in prompts[columns.PROMPT]]
    _check_lengths(ids, loaded, chosen)
    identity = model_identity(loaded, name)
    origin = provenance(identity, tokens, chosen.settings)
    drawing = _Drawing(loaded, tokens, chosen, batch_rows, log_ratios, base, origin)
    shards = [range(i, min(i + shard_prompts, len(ids))) for i in range(0, len(ids), shard_prompts)]
    if output is None:
        made = [part for _, part in drawing.run(prompts, ids, dict(enumerate(shards)))]
        return concatenate_datasets(made)
    inputs = {"model": identity, "prompts": _prompts_hash(ids)}
    inputs |= {} if base_identity is None else {"reference": base_identity}
    settings = drawing.settings
    with StageFolder(Path(output), "sample", settings, inputs, len(shards)).held() as folder:
        missing = {i: shards[i] for i in folder.missing_shards()}
        for index, part in drawing.run(prompts, ids, missing):
            folder.write_shard(index, part)
        if not folder.is_complete:
            folder.finish(_summary(read_shards(folder.path)))
    return read_rows(folder.path)


@dataclass
class _Drawing:
    """What it takes to draw a shard."""

    model: Any
    tokenizer: Any
    sampler: Sampler
    batch_rows: int
    log_ratios: bool
    reference: Any
    origin: str

    @property
    def settings(self) -> dict[str, Any]:
        """Return what decides the draws besides weights and prompts."""
        settings = {**self.sampler.settings, "batch_rows": self.batch_rows}
        settings |= {"log_ratios": self.log_ratios}
        # files of weights are the same in any type and number of bits
        settings |= {"dtype": str(self.model.dtype).removeprefix("torch.")}
        return settings | ({"load_in_8bit": True} if is_in_8bit(self.model) else {})

    def run(
        self, prompts: Dataset, ids: list[list[int]], shards: Mapping[int, range]
    ) -> Iterator[tuple[int, Dataset]]:
        """Draw the given shards, one after the other, with a progress bar over prompts."""
        if not shards:
            return
        if self.reference is not None:
            use_training_attention(prepare_for_generation(self.reference))
        prepare_for_generation(self.model)
        use_decode_attention(self.model)
        occurrences = _occurrences(ids)
        done = len(ids) - sum(map(len, shards.values()))
        with tqdm(total=len(ids), initial=done, unit="prompt", desc="sample", disable=None) as bar:
            for index, rows in shards.items():
                draws = self._draw([ids[i] for i in rows], [occurrences[i] for i in rows], bar)
                part = prompts.select(rows)
                for column, values in self._columns([ids[i] for i in rows], draws).items():
                    part = part.add_column(column, values)
                yield index, part

    def _draw(self, ids: list[list[int]], occurrences: list[int], bar: Any) -> list[Draws]:
        """Draw for the prompts of a shard, batched by length, in their own order."""
        end_ids = end_tokens(self.model, self.tokenizer)
        order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
        size = max(1, self.batch_rows // self.sampler.draws)
        found: dict[int, Draws] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            drawn = draw_responses(
                self.model,
                [ids[i] for i in batch],
                self.sampler,
                end_ids,
                [occurrences[i] for i in batch],
            )
            found.update(zip(batch, drawn, strict=True))
            bar.update(len(batch))
        return [found[i] for i in range(len(ids))]

    def _columns(self, ids: list[list[int]], draws: list[Draws]) -> dict[str, list[Any]]:
        """Lay the draws of a shard out as dataset columns."""
        made: dict[str, list[Any]] = {
            columns.RESPONSES: [self._texts(d) for d in draws],
            columns.RESPONSE_IDS: [d.response_ids for d in draws],
            columns.FINISHED: [d.finished for d in draws],
            columns.SAMPLER_LOGPS: [d.sampler_logps for d in draws],
            columns.SAMPLED_FROM: [self.origin] * len(draws),
        }
        if self.log_ratios:
            made |= self._logps(ids, draws)
        return made

    def _texts(self, draws: Draws) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(
            draws.response_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def _logps(self, ids: list[list[int]], draws: list[Draws]) -> dict[str, list[list[float]]]:
        """Compute each draw under policy and reference, in one row layout for both."""
        made: dict[str, list[list[float]]] = {columns.POLICY_LOGPS: [], columns.REFERENCE_LOGPS: []}
        # the stock attention of training: that of decoding is made for one position at a time
        use_training_attention(self.model)
        for prompt, drawn in zip(ids, draws, strict=True):
            group = {"prompt_ids": prompt, "response_ids": drawn.response_ids}
            batch = {k: v.to(self.model.device) for k, v in collate([group]).items()}
            with torch.no_grad():
                made[columns.POLICY_LOGPS].append(response_logps(self.model, batch).tolist())
            made[columns.REFERENCE_LOGPS].append(
                reference_logps(self.model, batch, self.reference).tolist()
            )
        use_decode_attention(self.model)
        return made


def _loaded(model: Any, loading: Mapping[str, Any]) -> Any:
    """Return the policy, loaded where it was given by name."""
    if isinstance(model, (str, Path)):
        return load_policy(model, **loading)
    if loading:
        raise ValueError(
            f"options of loading must be for a model given by name; got {sorted(loading)} for "
            f"{type(model).__name__}."
        )
    return model


def _check_unchanged(sampler: Sampler) -> None:
    """Raise where draws are not those of the policy itself."""
    for name, value in columns.UNCHANGED_SAMPLER.items():
        if sampler.settings[name] != value:
            raise ValueError(
                f"{name} must be {value:g} with log_ratios; got {sampler.settings[name]!r}: over "
                "such draws the mean log-ratio is not the KL. Draw without log_ratios for win "
                f"rates at that {name}, and a second time with {name} {value:g} for the KL."
            )


def _prompts_hash(ids: Sequence[Sequence[int]]) -> str:
    """Hash the prompts as the model sees them: text, template and tokenizer are all in the ids."""
    text = ";".join(",".join(map(str, prompt)) for prompt in ids)
    return hashlib.sha256(text.encode()).hexdigest()


def _occurrences(ids: Sequence[Sequence[int]]) -> list[int]:
    """Count for each prompt how many equal ones came before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    counts = []
    for prompt in map(tuple, ids):
        counts.append(seen[prompt])
        seen[prompt] += 1
    return counts


def _check_lengths(ids: Sequence[Sequence[int]], model: Any, sampler: Sampler) -> None:
    """Raise unless every prompt leaves room for a response in the model's context."""
    context = context_length(model.config)
    if context is None:
        return
    room = context - sampler.max_new_tokens
    for row, prompt in enumerate(ids):
        if len(prompt) > room:
            raise ValueError(
                f"prompt must have at most {room} tokens (context {context} less max_new_tokens "
                f"{sampler.max_new_tokens}); got {len(prompt)} at row {row}. Shorten or drop it."
            )


def _summary(drawn: Dataset) -> dict[str, Any]:
    """Count what was drawn, for the record."""
    lengths = [len(r) for row in drawn[columns.RESPONSE_IDS] for r in row]
    finished = [f for row in drawn[columns.FINISHED] for f in row]
    return {
        "prompts": len(drawn),
        "responses": len(lengths),
        "tokens": sum(lengths),
        "mean_response_tokens": sum(lengths) / len(lengths),
        "finished_share": sum(finished) / len(finished),
    }
