"""What a report shows, read from the folders that commands leave."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_dpo.calibrate import calibrated_reward
from ctrl_dpo.data.columns import REWARDS
from ctrl_dpo.data.folders import content_hash, read_record, read_rows
from ctrl_dpo.measures.draws import gather_draws

Record = Mapping[str, Any]
EVALUATION = "evaluation.json"  # what `ctrl-dpo evaluate` leaves
METRICS = "metrics.jsonl"  # what the trainer leaves beside the adapter


def relative_source(source: str, folder: str | Path) -> str:
    """Return a source as seen from a folder, so that both can move; a hub name as it is.

    Parameters
    ----------
    source : str
        What :func:`~ctrl_dpo.data.folders.read_rows` accepts.
    folder : str or Path
        Folder of the record that names it.

    Returns
    -------
    str
        Path from the folder, which :func:`read_evaluation` turns back.
    """
    path = Path(source)
    return os.path.relpath(path.resolve(), Path(folder).resolve()) if path.exists() else source


def read_evaluation(folder: str | Path) -> dict[str, Any]:
    """Read the record of an evaluation, with the hashes of what it read.

    Parameters
    ----------
    folder : str or Path
        Folder of ``ctrl-dpo evaluate``.

    Returns
    -------
    dict
        Record of :func:`~ctrl_dpo.evaluate.evaluate`; ``sources`` as seen from here, and
        ``inputs``, their content hashes, where the command wrote it.

    Raises
    ------
    ValueError
        If the folder holds no evaluation.
    """
    path = Path(folder) / EVALUATION
    if not path.is_file():
        raise ValueError(
            f"evaluations must be folders of `ctrl-dpo evaluate`; got {str(folder)!r}, without "
            f"{EVALUATION}. Run that command first."
        )
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    record |= {name: v for name, v in read_record(folder).items() if name == "inputs"}
    if "sources" in record:
        record["sources"] = {k: _from_here(v, path.parent) for k, v in record["sources"].items()}
    return record


def _from_here(source: str, folder: Path) -> str:
    """Undo :func:`relative_source`; hub names and records from before it keep what was typed."""
    path = folder.resolve() / source
    return os.path.relpath(path) if path.exists() else source


def check_names(records: Sequence[Record]) -> None:
    """Raise where two evaluations have one name.

    Parameters
    ----------
    records : sequence of mapping
        Records of :func:`~ctrl_dpo.evaluate.evaluate`.

    Raises
    ------
    ValueError
        If a name is repeated: tables and figures could not tell the two apart.
    """
    names = [record["name"] for record in records]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(
                f"records must have different names; got {name!r} for numbers {names.index(name)} "
                f"and {number}. Evaluate one again with another --name."
            )


def report_inputs(records: Sequence[Record], training: Mapping[str, str]) -> dict[str, Any]:
    """Read what a report shows besides its records: draws they name, and training logs.

    Parameters
    ----------
    records : sequence of mapping
        From :func:`read_evaluation`. Those without ``sources`` have no draws to show.
    training : mapping of str to str
        Folder of ``ctrl-dpo train`` by the name its curves get.

    Returns
    -------
    dict
        Keyword arguments of :func:`~ctrl_dpo.report.report`. Reference draws are split in halves by
        lot: one half of a prompt's draws calibrates the other, where every prompt has two or more.

    Raises
    ------
    ValueError
        If two records have one name, draws are no longer those that were evaluated, or a folder
        holds no training log.
    """
    check_names(records)
    found: dict[str, Any] = {"training_logs": {n: _log(folder) for n, folder in training.items()}}
    drawn = [record for record in records if "sources" in record]
    if not drawn:
        return found
    reference = _rewards(drawn[0], "reference")
    found |= {
        "reference_rewards": np.concatenate(reference),
        "policy_rewards": {r["name"]: np.concatenate(_rewards(r, "policy")) for r in drawn},
        "settings": {r["name"]: {"sources": r["sources"], "seed": r["seed"]} for r in drawn},
    }
    half = min(map(len, reference)) // 2
    if half > 0:
        # by lot: datasets list responses from the best to the worst
        lot = np.random.default_rng(drawn[0]["seed"])
        draws = np.array([lot.permutation(row)[: 2 * half] for row in reference])
        calibrated = calibrated_reward(draws[:, half:], draws[:, :half])
        found |= {"calibrated_rewards": calibrated, "k": half}
    return found


def _log(folder: str) -> list[dict[str, Any]]:
    """Read the training log of a folder."""
    path = Path(folder) / METRICS
    if not path.is_file():
        raise ValueError(
            f"--training must name folders of `ctrl-dpo train`; got {folder!r}, without {METRICS}. "
            "Correct the path."
        )
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def _rewards(record: Record, side: str) -> list[list[float]]:
    """Read the rewards of one side of an evaluation, one list a prompt."""
    source = record["sources"][side]
    evaluated = record.get("inputs", {}).get(side)
    if evaluated is not None and content_hash(source) != evaluated:
        raise ValueError(
            f"draws of the {side} must be those that {record['name']!r} was evaluated on; got "
            f"{source!r}, which has changed or is not there. Put it back, or evaluate again."
        )
    draws = gather_draws(read_rows(source), record.get("columns"))
    return [columns[REWARDS] for columns in draws.values()]


def label_summaries(folders: Sequence[Path]) -> dict[str, Record]:
    """Read what stages of labels say about themselves.

    Parameters
    ----------
    folders : sequence of Path
        Finished folders of ``ctrl-dpo relabel``.

    Returns
    -------
    dict of str to mapping
        Summaries by folder, as :func:`~ctrl_dpo.report.report` takes them.

    Raises
    ------
    ValueError
        If one is something else.
    """
    found = {}
    for folder in folders:
        record = read_record(folder)
        if "histograms" not in record.get("summary", {}):
            raise ValueError(
                f"labels must be finished folders of `ctrl-dpo relabel`; got {str(folder)!r} of "
                f"stage {record.get('stage')!r}. Run that command first."
            )
        found[str(folder)] = record["summary"]
    return found
