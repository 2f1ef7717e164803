"""The trained policy and its reference policy: which model computes it, and how it is recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctrl_dpo.data.folders import write_atomically
from ctrl_dpo.engine.identity import base_identity, identity_kind, model_identity, tensors_hash
from ctrl_dpo.engine.models import (
    ADAPTER_CONFIG,
    DTYPES,
    REFERENCE_RECORD,
    adapter_off,
    recorded_reference,
)

ADAPTER_OFF = "the model with its adapter off"
FROZEN_ADAPTER = "a frozen copy of the adapter that came with the model"
SECOND_MODEL = "a second model"
FROM_DATASET = "log-probabilities of the dataset"


@dataclass(frozen=True)
class ReferencePolicy:
    """The policy that log-ratios are taken against.

    Parameters
    ----------
    kind : str
        Which one, for the log and the record.
    identity : str
        Hash of its weights, see :func:`ctrl_dpo.engine.identity.model_identity`.
    start : str
        The same of the policy that training starts from.
    model : transformers.PreTrainedModel or peft.PeftModel, optional
        What computes it; None where only the dataset's log-probabilities are there.
    adapter : dict of str to Tensor, optional
        Weights of the adapter as it came, where that is the reference policy.
    """

    kind: str
    identity: str
    start: str
    model: Any = None
    adapter: dict[str, torch.Tensor] | None = None

    @property
    def record(self) -> dict[str, str]:
        """What a trained policy keeps of it: which one, and the hash of its weights."""
        return {"kind": self.kind, "identity": self.identity}

    def save_record(self, folder: Path) -> None:
        """Write the record into a folder, beside the weights of the policy."""
        text = json.dumps(self.record, indent=1) + "\n"
        write_atomically(folder / REFERENCE_RECORD, text.encode("utf-8"))

    @contextmanager
    def computing(self) -> Iterator[Any]:
        """Yield the model, in evaluation mode, while it is the reference policy.

        Yields
        ------
        transformers.PreTrainedModel or peft.PeftModel
            The model; it is the trained policy again afterwards.

        Raises
        ------
        ValueError
            If there is no model to compute with.
        """
        if self.model is None:
            raise ValueError(
                "ref_model must be given for rows without reference_logps; got None. Give the "
                "reference policy, or the column for every row."
            )
        was_training = self.model.training
        contexts = {ADAPTER_OFF: adapter_off, FROZEN_ADAPTER: self._frozen_adapter}
        with contexts.get(self.kind, nullcontext)(self.model):
            try:
                yield self.model.eval()
            finally:
                self.model.train(was_training)

    @contextmanager
    def _frozen_adapter(self, model: Any) -> Iterator[None]:
        """Put the weights of the adapter as it came in place of the trained ones."""
        frozen = self.adapter or {}
        parameters = {name: p for name, p in model.named_parameters() if name in frozen}
        trained = {name: p.detach().clone() for name, p in parameters.items()}
        _fill(parameters, frozen)
        try:
            yield
        finally:
            _fill(parameters, trained)


@torch.no_grad()
def _fill(parameters: dict[str, torch.nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def check_recorded(model: Any, given: str | None) -> None:
    """Raise unless log-ratios of a policy are against the reference policy it was trained against.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy; without a record, all that is asked is that there is a reference policy.
    given : str or None
        Identity of the reference policy that was given; None for the model with its adapter off.

    Raises
    ------
    ValueError
        If none was given and the adapter off is not the reference policy, or another was given; if
        the adapter is on another model than it was trained on.
    """
    record = recorded_reference(model)
    known = record.get("identity", "")
    if given is not None:
        if identity_kind(known) == identity_kind(given) and known != given:
            raise ValueError(
                f"reference must be the policy that was trained against, {record['kind']} "
                f"({known}); got {given}. Give that one."
            )
        return
    kind = record.get("kind", ADAPTER_OFF)
    if kind != ADAPTER_OFF or not hasattr(model, "disable_adapter"):
        bare = f"without an adapter ({type(model).__name__})"
        what = bare if kind == ADAPTER_OFF else f"trained against {kind}"
        raise ValueError(
            f"reference must be given for log_ratios of a policy {what}; got None, which stands "
            f"for {ADAPTER_OFF}. Give the model or adapter that it was trained against "
            "(--reference MODEL)."
        )
    _check_base(model, known)


def _check_base(model: Any, known: str) -> None:
    """Raise unless the model below an adapter is the recorded reference policy."""
    # once known it stays so: made ready for drawing, it has other tensors of the same function
    if not known or vars(model).get("known_base") == known:
        return
    kind = identity_kind(known)
    identities = _base_identities(model, by_name=kind != "tensors")
    found = next(identities)
    if identity_kind(found) == kind and found != known and known not in identities:
        as_trained = f" If it is that one, {model.dtype} rounds it: load it as in training"
        raise ValueError(
            f"an adapter must be on the model it was trained on, {known}; got {found}, "
            f"{str(model.get_base_model().name_or_path)!r}. Save that model, such as one merged in "
            f"memory, and write its folder as base_model_name_or_path in {ADAPTER_CONFIG}."
            + (f"{as_trained} (--dtype, --load-in-8bit)." if kind == "tensors" else "")
        )
    model.known_base = known


def _base_identities(model: Any, *, by_name: bool) -> Iterator[str]:
    """Yield the identities of the model below an adapter: as it is, then as in another type."""
    yield base_identity(model, by_name=by_name)
    if not by_name:  # a policy may be drawn in another type than it was trained in
        for dtype in DTYPES.values():
            yield f"tensors:{tensors_hash(model, adapter=False, dtype=dtype)}"


def choose_reference(
    model: Any,
    ref_model: Any,
    name: Any,
    ref_name: Any = None,
    *,
    new_adapter: bool,
    from_dataset: bool,
) -> ReferencePolicy:
    """Settle on the one reference policy that a run has.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy as it came, a new adapter not yet attached.
    ref_model : transformers.PreTrainedModel or None
        A reference policy of its own.
    name, ref_name : str, Path or None
        Where the policy was loaded from, and where its reference policy.
    new_adapter : bool
        Whether an adapter is about to be attached.
    from_dataset : bool
        Whether the dataset has the log-probabilities of every row.

    Returns
    -------
    ReferencePolicy
        The second model if there is one; for a policy that came with an adapter a frozen copy of
        that, unless it does nothing; otherwise the model with its adapter off.
    """
    if ref_model is None and hasattr(model, "disable_adapter") and adapter_is_zero(model):
        base = base_identity(model, by_name=name is not None)
        return ReferencePolicy(ADAPTER_OFF, base, base, model)
    identity = model_identity(model, name)
    if ref_model is not None:
        known = model_identity(ref_model, ref_name)
        return ReferencePolicy(SECOND_MODEL, known, identity, ref_model)
    if not hasattr(model, "disable_adapter"):
        kind = FROM_DATASET if from_dataset and not new_adapter else ADAPTER_OFF
        return ReferencePolicy(kind, identity, identity, model if new_adapter else None)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return ReferencePolicy(FROZEN_ADAPTER, identity, identity, model, weights)


def adapter_is_zero(model: Any) -> bool:
    """Tell whether a LoRA adapter leaves the base model as it is, as one that was just made."""
    config = model.active_peft_config
    if getattr(config, "modules_to_save", None) or getattr(config, "use_dora", False):
        return False
    ends = [p for name, p in model.named_parameters() if "lora_B" in name]
    return bool(ends) and not any(p.any() for p in ends)
