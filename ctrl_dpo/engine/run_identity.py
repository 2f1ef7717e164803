"""What a training run is: everything that decides its numbers, by name, to resume no other run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ctrl_dpo.config import CTRLDPOConfig
from ctrl_dpo.data import columns
from ctrl_dpo.data.folders import installed_versions

if TYPE_CHECKING:
    from datasets import Dataset

# settings that say where, how often and how loudly, and change no weight; all others are compared
_FREE_PREFIXES = ("hub_", "log", "push_", "report_", "save_", "trackio_", "do_", "dataloader_p")
_FREE = {
    "allow_changed",
    "batch_eval_metrics",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "ddp_timeout",
    "debug",
    "disable_tqdm",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "greater_is_better",
    "include_for_metrics",
    "include_num_input_tokens_seen",
    "load_best_model_at_end",
    "local_rank",
    "metric_for_best_model",
    "output_dir",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "project",
    "reference_cache",
    "restore_callback_states_from_checkpoint",
    "resume_from_checkpoint",
    "run_name",
    "skip_memory_metrics",
}
# rows are hashed as they are, so these cannot change a run unseen
_FREE_PACKAGES = {"datasets", "numpy", "scipy"}
_FREE_ADAPTER = {"base_model_name_or_path", "inference_mode", "peft_version", "revision"}


def run_identity(
    args: CTRLDPOConfig,
    rows: Iterable[Mapping[str, Any]],
    adapter: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Describe a run so that two runs with one description give the same weights.

    Parameters
    ----------
    args : CTRLDPOConfig
        Settings; those of logging, saving and places are left out.
    rows : iterable of mapping
        Training rows in their order, reference log-probabilities included.
    adapter : mapping
        The adapter's configuration; empty without one.
    facts : mapping of str to Any
        What else decides: identities of the models, beta, number of processes.

    Returns
    -------
    dict of str to Any
        JSON-ready values by name; data as hashes.
    """
    free = {name for name in args.to_dict() if name.startswith(_FREE_PREFIXES)} | _FREE
    settings = {name: value for name, value in args.to_dict().items() if name not in free}
    parts = {f"adapter.{n}": v for n, v in adapter.items() if n not in _FREE_ADAPTER}
    packages = {n: v for n, v in installed_versions().items() if n not in _FREE_PACKAGES}
    versions = {f"version of {name}": value for name, value in packages.items()}
    whole = {**settings, **parts, **_hashes(rows), **versions, **facts}
    ready: dict[str, Any] = json.loads(json.dumps(whole, default=_plain))
    return ready


def origin(dataset: Dataset) -> dict[str, Any]:
    """Return the procedures and transformations a dataset was relabelled for, as far as it tells.

    Parameters
    ----------
    dataset : Dataset
        Training data.

    Returns
    -------
    dict of str to list of str
        By column; the hash of the targets says the same, but not to people.
    """
    told = {columns.PROCEDURE, columns.TRANSFORMATION} & set(dataset.column_names)
    return {f"{name} of the data": sorted(dataset.unique(name)) for name in sorted(told)}


def check_same_run(
    found: Mapping[str, Any], wanted: Mapping[str, Any], place: str, allowed: bool
) -> list[str]:
    """Raise where a checkpoint is of another run, naming every difference.

    Parameters
    ----------
    found, wanted : mapping of str to Any
        Identities of the checkpoint's run and of this one.
    place : str
        Where the checkpoint is.
    allowed : bool
        Return the differences instead.

    Returns
    -------
    list of str
        One text per difference.

    Raises
    ------
    ValueError
        If there are differences that are not allowed.
    """
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    texts = [f"{n} {_short(wanted.get(n))} instead of {_short(found.get(n))}" for n in names]
    if texts and not allowed:
        raise ValueError(
            f"run must be that of {place!r} to resume it; got {', '.join(texts)}. Restore that, "
            "name another output_dir, or set allow_changed=True to go on all the same."
        )
    return texts


def _hashes(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Hash tokens and targets apart from the reference policy's numbers, to name what differs."""
    data, reference = hashlib.sha256(), hashlib.sha256()
    for row in rows:
        rest = {name: value for name, value in row.items() if name != "reference_logps"}
        data.update(json.dumps(rest, sort_keys=True, default=_plain).encode())
        reference.update(json.dumps(row.get("reference_logps"), default=_plain).encode())
    return {"train_dataset": data.hexdigest(), "reference_logps": reference.hexdigest()}


def _plain(value: Any) -> Any:
    """Turn what JSON does not know into something it does, the same in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-4:]}"
