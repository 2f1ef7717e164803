"""Sequence-classification checkpoints as rewards: batched by length, blind to padding."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ctrl_dpo._validation import check_choice, check_source
from ctrl_dpo.data.folders import folder_hash
from ctrl_dpo.data.hashes import known_file_hash
from ctrl_dpo.engine.models import DTYPES, context_length, default_device, load_tokenizer
from ctrl_dpo.engine.reward_functions import Candidate


class SequenceRewardModel:
    """A Hugging Face checkpoint with one output per sequence.

    Nothing but its configuration is read until the first batch.

    Parameters
    ----------
    name : str or Path
        Folder or hub name of an ``AutoModelForSequenceClassification`` checkpoint.
    dtype : {"float32", "bfloat16", "float16"}
        Type of weights and activations. The 8 significant bits of bfloat16 make close rewards tie.
    device : str or torch.device, optional
        Where it runs; the accelerator where there is one, else the CPU.

    Raises
    ------
    ValueError
        If the checkpoint is a path that is not there, or has another number of outputs than one,
        or no padding token.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        dtype: str = "float32",
        device: str | torch.device | None = None,
    ) -> None:
        from transformers import AutoConfig

        self.name = str(name)
        self.dtype = check_choice("dtype", dtype, DTYPES)
        self.device = torch.device(device) if device is not None else default_device()
        check_source("reward", name)
        config = AutoConfig.from_pretrained(self.name)
        if config.num_labels != 1:
            raise ValueError(
                "reward must be a sequence-classification checkpoint with num_labels 1; got "
                f"{config.num_labels} for {self.name!r} ({config.architectures}). A language model "
                "has no reward head: train one, or name another checkpoint."
            )
        text_config = config.get_text_config()
        if text_config.pad_token_id is None:
            raise ValueError(
                "reward must have a padding token in its config, which is how it finds the last "
                f"token; got pad_token_id None for {self.name!r}. Set config.pad_token_id to the "
                "tokenizer's, save, and score again."
            )
        self.pad_token_id: int = text_config.pad_token_id
        self.tokenizer = load_tokenizer(self.name)
        context = context_length(config) or sys.maxsize
        self.max_length: int = min(context, self.tokenizer.model_max_length)
        # segments reach the model where its tokenizer makes them, as they did in its training
        self._inputs = {"input_ids", "token_type_ids"} & {*self.tokenizer.model_input_names}
        self._model: Any = None

    @property
    def identity(self) -> str:
        """Content of the checkpoint and the type it is computed in."""
        folder = Path(self.name)
        if folder.is_dir():
            content = folder_hash(folder, hash_file=known_file_hash)
        else:
            content = f"{self.name}@{self._revision()}"
        return f"{content}:{self.dtype}"

    def _revision(self) -> str:
        """Return the commit that the hub's cache holds of this checkpoint."""
        from huggingface_hub import try_to_load_from_cache

        # the constructor has just read this file, so the cache holds it: .../snapshots/COMMIT/...
        return Path(str(try_to_load_from_cache(self.name, "config.json"))).parent.name

    def batches(
        self, candidates: Sequence[Candidate], batch_size: int
    ) -> Iterator[dict[int, float]]:
        """Score sequences of similar length together, longest first.

        The longest batch comes first so that memory that does not suffice shows at once.

        Parameters
        ----------
        candidates : sequence of Candidate
            What to score.
        batch_size : int
            Sequences a forward pass.

        Yields
        ------
        dict of int to float
            Scores by position.
        """
        sequences = [self._tokens(candidate) for candidate in candidates]
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]["input_ids"]))
        for start in range(0, len(order), batch_size):
            where = order[start : start + batch_size]
            scores = self._forward([sequences[i] for i in where])
            yield dict(zip(where, scores, strict=True))

    def _tokens(self, candidate: Candidate) -> dict[str, list[int]]:
        """Tokenise a dialogue by the model's own template, or plain text with its continuation."""
        prompt, response = candidate.prompt, candidate.response
        if isinstance(prompt, str):
            # an encoder reads two segments, a decoder one text
            pair = (prompt, response) if self.tokenizer.sep_token else (prompt + response,)
            encoded = self.tokenizer(*pair, verbose=False)
        else:
            if self.tokenizer.chat_template is None:
                raise ValueError(
                    "reward must have a chat template for conversational prompts; got none for "
                    f"{self.name!r} at {candidate.place}. Set tokenizer.chat_template to the one "
                    "it was trained with, or give the prompts as plain text."
                )
            messages = [*prompt, {"role": "assistant", "content": response}]
            encoded = self.tokenizer.apply_chat_template(
                messages, tokenizer_kwargs={"verbose": False}
            )
        n_tokens = len(encoded["input_ids"])
        if not 0 < n_tokens <= self.max_length:
            raise ValueError(
                f"prompt and response must have 1 to {self.max_length} tokens together; got "
                f"{n_tokens} at {candidate.place}. Drop that response: it is not cut silently."
            )
        return {name: encoded[name] for name in self._inputs}

    @torch.inference_mode()
    def _forward(self, sequences: list[dict[str, list[int]]]) -> list[float]:
        """Score one batch, padded on the right."""
        model = self._loaded()
        lengths = torch.tensor([len(sequence["input_ids"]) for sequence in sequences])
        shape = (len(sequences), int(lengths.max()))
        batch = {name: torch.zeros(shape, dtype=torch.long) for name in self._inputs}
        batch["input_ids"].fill_(self.pad_token_id)
        for row, sequence in enumerate(sequences):
            for name, values in sequence.items():
                batch[name][row, : len(values)] = torch.tensor(values)
        batch["attention_mask"] = (torch.arange(shape[1]) < lengths[:, None]).long()
        logits = model(**{name: values.to(self.device) for name, values in batch.items()}).logits
        scores: list[float] = logits[:, 0].float().tolist()
        return scores

    def _loaded(self) -> Any:
        """Load the weights on first use; a head that the checkpoint lacks would be random."""
        if self._model is not None:
            return self._model
        from transformers import AutoModelForSequenceClassification

        model, info = AutoModelForSequenceClassification.from_pretrained(
            self.name, dtype=DTYPES[self.dtype], output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(
                f"reward must hold every weight of {type(model).__name__}; got {self.name!r} "
                f"without {sorted(info['missing_keys'])[:3]}. Name a trained reward model."
            )
        self._model = model.to(self.device).eval()
        return self._model
