"""Where draws come from, as a column that travels with them, and its check before training."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ctrl_dpo.data import columns

if TYPE_CHECKING:
    from datasets import Dataset

_KEPT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def provenance(identity: str, tokenizer: Any, settings: dict[str, Any]) -> str:
    """Describe the distribution that responses were drawn from.

    Parameters
    ----------
    identity : str
        From :func:`ctrl_dpo.engine.identity.model_identity`.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its chat template decides what the model sees.
    settings : dict
        Of the sampler; those that change the distribution are kept.

    Returns
    -------
    str
        JSON with ``model``, ``template`` and the settings.
    """
    kept = {name: settings[name] for name in _KEPT}
    return json.dumps({"model": identity, "template": _template(tokenizer), **kept}, sort_keys=True)


def check_provenance(dataset: Dataset, identity: str, tokenizer: Any) -> None:
    """Raise where the draws are not those of the reference policy, as far as the data tells.

    Parameters
    ----------
    dataset : Dataset
        Training data; without the column ``sampled_from`` nothing is known.
    identity : str
        Of the reference policy.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the reference policy.

    Raises
    ------
    ValueError
        If model, template or sampler differ.
    """
    if columns.SAMPLED_FROM not in dataset.column_names:
        return
    expected: dict[str, Any] = {"model": identity, "template": _template(tokenizer), **_KEPT}
    for text in dataset.unique(columns.SAMPLED_FROM):
        found = json.loads(text)
        for name, value in expected.items():
            if name == "model" and _kind(found[name]) != _kind(value):
                continue  # one was hashed as files, the other as tensors: not comparable
            if found[name] != value:
                raise ValueError(
                    f"responses must be draws of the reference policy; got {name} {found[name]!r} "
                    f"instead of {value!r}. Calibrated rewards hold for the distribution they were "
                    "drawn from: sample again, use calibration='weighted', or remove the column "
                    f"{columns.SAMPLED_FROM!r} if you know better."
                )


def _template(tokenizer: Any) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def _kind(identity: str) -> str:
    return identity.partition(":")[0]
