"""Where draws come from, as a column that travels with them, and its check before training."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ctrl_dpo.data import columns
from ctrl_dpo.engine.identity import identity_kind
from ctrl_dpo.engine.numerics import numerics

if TYPE_CHECKING:
    from datasets import Dataset


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
    kept = {name: settings[name] for name in columns.UNCHANGED_SAMPLER}
    return json.dumps({"model": identity, "template": _template(tokenizer), **kept}, sort_keys=True)


def check_provenance(
    dataset: Dataset, identity: str, tokenizer: Any, what: str = "train_dataset"
) -> None:
    """Raise where the draws are not those of the reference policy, as far as the data tells.

    Parameters
    ----------
    dataset : Dataset
        Data to train or evaluate on; without the column ``sampled_from`` nothing is known.
    identity : str
        Of the reference policy.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the reference policy.
    what : str
        The argument that it came as, for the error.

    Raises
    ------
    ValueError
        If model, template or sampler differ.
    """
    if columns.SAMPLED_FROM not in dataset.column_names:
        return
    expected: dict[str, Any] = {"model": identity, "template": _template(tokenizer)}
    expected |= columns.UNCHANGED_SAMPLER
    for text in filter(None, dataset.unique(columns.SAMPLED_FROM)):
        found = json.loads(text)
        for name, value in expected.items():
            if name == "model" and identity_kind(found[name]) != identity_kind(value):
                continue  # one was hashed as files, the other as tensors: not comparable
            if found[name] != value:
                raise ValueError(
                    f"responses of {what} must be draws of the reference policy; got {name} "
                    f"{found[name]!r} instead of {value!r}. Calibrated rewards hold for the "
                    "distribution they were drawn from: sample again, use calibration='weighted', "
                    f"or remove the column {columns.SAMPLED_FROM!r} if you know better."
                )


def computation(model: Any, identity: str, tokenizer: Any, share: bool) -> str:
    """Record everything besides the tokens that decides a log-probability to the last bit.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The reference policy, on the device and in the precision in which it computes.
    identity : str
        Of the reference policy.
    tokenizer : transformers.PreTrainedTokenizerBase
        Its template.
    share : bool
        Row layout: whether a prompt is computed once for all its responses.

    Returns
    -------
    str
        JSON. A dataset's column ``reference_logps`` needs a column ``reference_computed`` with it;
        a trainer's own is its attribute ``reference_computed``.
    """
    record = {"model": identity, "template": _template(tokenizer), "share_prompt": share}
    record |= numerics(model)
    return json.dumps(record, sort_keys=True)


def check_computation(dataset: Dataset, expected: str) -> None:
    """Raise unless a dataset's log-probabilities are those that training would compute.

    Parameters
    ----------
    dataset : Dataset
        Training data; without the column ``reference_logps`` there is nothing to check.
    expected : str
        From :func:`computation`.

    Raises
    ------
    ValueError
        If there is no record of how they were computed, or it differs.
    """
    if columns.REFERENCE_LOGPS not in dataset.column_names:
        return
    remedy = f"Remove the column {columns.REFERENCE_LOGPS!r}, and they are computed."
    if columns.REFERENCE_COMPUTED not in dataset.column_names:
        raise ValueError(
            f"{columns.REFERENCE_LOGPS} must come with {columns.REFERENCE_COMPUTED!r}, the record "
            f"of how they were computed; got {sorted(dataset.column_names)}. {remedy}"
        )
    wanted = json.loads(expected)
    for text in dataset.unique(columns.REFERENCE_COMPUTED):
        found = json.loads(text or "{}")
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{columns.REFERENCE_LOGPS} must be computed as in training; got {name} "
                    f"{found.get(name)!r} instead of {value!r}. {remedy}"
                )


def _template(tokenizer: Any) -> str:
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
