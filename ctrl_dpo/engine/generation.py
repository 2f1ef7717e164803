"""Independent draws from a language model: the K draws of a prompt share its computation."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ctrl_dpo._validation import check_integer, check_positive
from ctrl_dpo.engine.kv_cache import block_cache

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

# finished rows are dropped from the batch when they are this share of it
_DROP_SHARE = 0.2
_CDF_BLOCK = 256


@dataclass(frozen=True)
class Sampler:
    """How responses are drawn. Calibration holds only for the sampler it was made with.

    Parameters
    ----------
    draws : int
        Independent responses per prompt.
    max_new_tokens : int
        Length limit of a response in tokens, its end token included.
    temperature : float
        Divides the logits; 1 draws from the model itself.
    top_k : int
        Keep the k most likely tokens only; 0 keeps all.
    top_p : float
        Keep the most likely tokens up to this mass only; 1 keeps all.
    seed : int
        A response depends on seed, prompt and draw number, not on the other prompts' random
        numbers. (In bf16 the rounding of a row can still depend on what else is in its batch.)
    """

    draws: int = 16
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every setting before a model is loaded."""
        check_integer("draws", self.draws, 1)
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_integer("top_k", self.top_k, 0)
        check_integer("seed", self.seed, 0)
        check_positive("temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p!r}.")

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as a dictionary, for records."""
        return asdict(self)

    def processors(self) -> LogitsProcessorList:
        """Return the changes to the logits, in transformers' order; empty by default."""
        chain = LogitsProcessorList()
        if self.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            chain.append(TopPLogitsWarper(self.top_p))
        return chain

    def uniforms(self, prompt_ids: Sequence[int], occurrence: int = 0) -> NDArray[np.float64]:
        """Return the ``(draws, max_new_tokens)`` uniform numbers that decide a prompt's draws."""
        text = f"{self.seed}:{occurrence}:{','.join(map(str, prompt_ids))}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        return generator.random((self.draws, self.max_new_tokens))


@dataclass
class Draws:
    """Responses to one prompt: token ids (end token included), nats, and whether each ended."""

    response_ids: list[list[int]]
    sampler_logps: list[float]
    finished: list[bool]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the token ids that end a response, by the model's and the tokenizer's settings."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None})


class InverseCDF:
    """Token draws by inversion: one uniform number per row and step, in two levels.

    ``torch.multinomial`` needs one exponential number per vocabulary entry, which on a CPU takes
    longer than the model. The sum over blocks is in float64, so that a token's chance is exact to
    the float32 rounding of its block's mass.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        blocks = -(-vocabulary // _CDF_BLOCK)
        self._padded = torch.zeros(rows, blocks * _CDF_BLOCK, device=device)
        self._vocabulary = vocabulary

    def draw(
        self, scores: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token per row.

        Parameters
        ----------
        scores : (rows, v) Tensor
            Unnormalised log-probabilities.
        uniforms : (rows,) float64 Tensor
            Numbers in [0, 1).

        Returns
        -------
        tokens : (rows,) int64 Tensor
            The drawn tokens.
        logps : (rows,) float64 Tensor
            Their log-probabilities in nats.
        """
        masses = self._padded[: len(scores)]
        # in place: a fresh buffer of this size costs more in page faults than the arithmetic
        logits = masses[:, : self._vocabulary]
        logits.copy_(scores)
        logits.sub_(scores.amax(dim=-1, keepdim=True)).exp_()
        blocks = masses.view(len(scores), -1, _CDF_BLOCK)
        edges = blocks.sum(dim=-1).to(torch.float64).cumsum(dim=-1)
        total = edges[:, -1:]
        target = uniforms.unsqueeze(1) * total
        block = _first_above(edges, target)
        before = torch.where(block > 0, edges.gather(1, (block - 1).clamp(min=0)), 0.0)
        inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, _CDF_BLOCK)).squeeze(1)
        cumulative = before + inside.to(torch.float64).cumsum(dim=-1)
        offset = _first_above(cumulative, target)
        # rounding may leave the target above the last cumulative value: never a zero-mass token
        last = inside.shape[1] - 1 - (inside > 0).flip(1).to(torch.int8).argmax(dim=1, keepdim=True)
        offset = torch.minimum(offset, last)
        token = (block * _CDF_BLOCK + offset).squeeze(1)
        return token, (inside.gather(1, offset) / total).log().squeeze(1)


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return per row the first index whose cumulative value exceeds the target, ``(rows, 1)``."""
    index = torch.searchsorted(cumulative, target, right=True)
    return index.clamp(max=cumulative.shape[1] - 1)


@torch.inference_mode()
def draw_responses(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    end_ids: Sequence[int],
    occurrences: Sequence[int] | None = None,
) -> list[Draws]:
    """Draw responses for a batch of prompts, computing each prompt once.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        From :func:`ctrl_dpo.engine.models.prepare_for_generation`.
    prompts : list of list of int
        Prompt tokens; of similar length, since shorter ones are padded on the left.
    sampler : Sampler
        What to draw.
    end_ids : list of int
        Tokens that end a response.
    occurrences : list of int, optional
        For a prompt seen before, how often: repeated prompts get draws of their own.

    Returns
    -------
    list of Draws
        One per prompt, in order.
    """
    device = model.device
    seen = occurrences if occurrences is not None else [0] * len(prompts)
    numbers = np.concatenate([sampler.uniforms(p, o) for p, o in zip(prompts, seen, strict=True)])
    uniforms = torch.from_numpy(numbers).to(device)
    with _reused_logits(model):
        ends = torch.tensor(end_ids, device=device)
        tokens, logps = _decode(model, prompts, sampler, uniforms, ends)
    return list(_collect(tokens.tolist(), logps, set(end_ids), sampler))


class _ReusedLogits(torch.nn.Module):
    """The head of a model, its logits in one buffer: a fresh one costs page faults every step."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self._buffer = head.weight.new_empty(0, head.out_features)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.flatten(0, -2)
        if len(rows) > len(self._buffer):
            self._buffer = rows.new_empty(len(rows), len(self.weight))
        logits = torch.mm(rows, self.weight.t(), out=self._buffer[: len(rows)])
        return logits.view(*hidden.shape[:-1], -1)


@contextmanager
def _reused_logits(model: Any) -> Iterator[None]:
    """Let the head of a model write its logits into one buffer, where it is a plain product."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        yield
        return
    base.set_output_embeddings(_ReusedLogits(head))
    try:
        yield
    finally:
        base.set_output_embeddings(head)


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    uniforms: torch.Tensor,
    end_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the decoding loop; return ``(rows, max_new_tokens)`` tokens (-1: none) and row sums."""
    device, config = model.device, model.config.get_text_config()
    n_rows, width = len(uniforms), max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
    capacity = width + sampler.max_new_tokens
    cache = block_cache(config.num_hidden_layers, sampler.draws, capacity)
    visible = torch.zeros(len(prompts), capacity, dtype=torch.bool, device=device)
    visible[:, :width] = torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)
    tokens = torch.full((n_rows, sampler.max_new_tokens), -1, dtype=torch.long, device=device)
    logps = torch.zeros(n_rows, dtype=torch.float64, device=device)
    inverse, processors = InverseCDF(n_rows, config.vocab_size, device), sampler.processors()

    scores = _forward(model, cache, ids, lengths.unsqueeze(1), visible)
    rows = torch.arange(n_rows, device=device)  # the original row of each live one
    copies = rows // sampler.draws
    scores, visible, lengths = scores[copies], visible[copies], lengths[copies]
    live = torch.ones(n_rows, dtype=torch.bool, device=device)
    for step in range(sampler.max_new_tokens):
        scores = processors(ids[rows // sampler.draws], scores) if processors else scores
        token, logp = inverse.draw(scores, uniforms[rows, step])
        tokens[rows[live], step] = token[live]
        logps[rows[live]] += logp[live]
        live &= ~torch.isin(token, end_ids)
        n_live = int(live.sum())
        if n_live == 0 or step + 1 == sampler.max_new_tokens:
            break
        if n_live <= (1 - _DROP_SHARE) * len(rows):
            kept = live.nonzero().squeeze(1)
            for layer in cache.layers:
                layer.keep_rows(kept)
            rows, token, live = rows[kept], token[kept], live[kept]
            visible, lengths = visible[kept], lengths[kept]
        visible[:, width + step] = True
        lengths = lengths + 1
        scores = _forward(model, cache, token.unsqueeze(1), lengths.unsqueeze(1), visible)
    return tokens, logps


def _forward(
    model: Any, cache: Any, ids: torch.Tensor, ends: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Advance the cache by ``ids``, the last at position ``ends - 1``; return its logits."""
    offsets = torch.arange(1 - ids.shape[1], 1, device=ids.device)
    covered, _ = cache.get_mask_sizes(ids.shape[1], 0)
    output = model(
        input_ids=ids,
        attention_mask=visible[:, :covered].long(),
        position_ids=(ends - 1 + offsets).clamp(min=0),
        past_key_values=cache,
        decode_cache=cache,
        use_cache=True,
        # an index, not a count: the strided slice of a count makes the head copy its weight per row
        logits_to_keep=torch.tensor([ids.shape[1] - 1], device=ids.device),
    )
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _collect(
    tokens: list[list[int]], logps: torch.Tensor, end_ids: set[int], sampler: Sampler
) -> Iterator[Draws]:
    """Cut the padded token rows into one :class:`Draws` per prompt."""
    sums = logps.tolist()
    for start in range(0, len(tokens), sampler.draws):
        chosen = [[t for t in row if t >= 0] for row in tokens[start : start + sampler.draws]]
        yield Draws(
            response_ids=chosen,
            sampler_logps=sums[start : start + sampler.draws],
            finished=[row[-1] in end_ids for row in chosen],
        )
