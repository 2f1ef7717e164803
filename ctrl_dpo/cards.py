"""Model card and dataset card for the hub, from records alone: offline, and without any text."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, ModelCard, ModelCardData

from ctrl_dpo.data import columns
from ctrl_dpo.data.folders import read_record, read_rows, write_atomically
from ctrl_dpo.measures.tables import figures, table
from ctrl_dpo.report import evaluation_sections

# the hub refuses a card whose base model is a path
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_TAGS = ["ctrl_dpo", "inference-aware", "preference-optimisation"]
_PAPER = (
    "For a model that is served through a known inference-time procedure: InfAlign "
    "([arXiv 2412.19792](https://arxiv.org/abs/2412.19792)), offline, with `ctrl_dpo`."
)
_LICENCE = (
    "Not stated here: it follows from those of the prompts and of the model that wrote the "
    "responses. Add `license:` to the block at the top."
)
_OPTIONS = {"columns": "column", "attribute_weights": "attribute-weight", "method": "calibration"}


def write_cards(
    folder: str | Path,
    records: Sequence[Mapping[str, Any]],
    policies: Mapping[str, str | Path],
    labels: Sequence[str | Path],
) -> list[Path]:
    """Write a model card for every evaluation and a dataset card for every folder of labels.

    Parameters
    ----------
    folder : str or Path
        Where they go: ``model_card.md``, ``model_card1.md``, ...; ``dataset_card.md``, ...
    records : sequence of mapping
        Records of :func:`~ctrl_dpo.evaluate.evaluate`.
    policies : mapping of str to str or Path
        Folder of ``ctrl-dpo train`` by the name of the evaluation, as far as known.
    labels : sequence of str or Path
        Finished folders of ``ctrl-dpo relabel``.

    Returns
    -------
    list of Path
        The cards.
    """
    models = [model_card(record, policies.get(record["name"]), labels) for record in records]
    written = []
    for name, cards in (("model_card", models), ("dataset_card", map(dataset_card, labels))):
        for number, card in enumerate(cards):
            written.append(Path(folder) / f"{name}{number or ''}.md")
            write_atomically(written[-1], str(card).encode("utf-8"))
    return written


def model_card(
    record: Mapping[str, Any],
    policy: str | Path | None = None,
    labels: Sequence[str | Path] = (),
) -> ModelCard:
    """Describe a policy: how it was trained, what its weights are, what was measured.

    Parameters
    ----------
    record : mapping
        Record of :func:`~ctrl_dpo.evaluate.evaluate`.
    policy : str or Path, optional
        Folder of the trained policy; how it was trained is known where ``ctrl-dpo train`` made it.
    labels : sequence of str or Path
        Folders of ``ctrl-dpo relabel``; the one that was trained on tells the KL budget.

    Returns
    -------
    huggingface_hub.ModelCard
        What is not known is left out. The block at the top names a base model of the hub only.
    """
    made: dict[str, Any] = {"settings": {}, "inputs": {}, "summary": {}, "versions": {}}
    adapter: dict[str, Any] = {}
    if policy is not None:
        made |= read_record(policy)
        config = Path(policy) / "adapter_config.json"
        adapter = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    base = adapter.get("base_model_name_or_path") or ""
    dataset = made["inputs"].get("data", "").partition("hub:")[2]
    data = ModelCardData(
        base_model=base if _HUB_NAME.fullmatch(base) and not Path(base).exists() else None,
        datasets=[dataset] if dataset else None,
        library_name=None if policy is None else "peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=_TAGS,
    )
    sides = {k: read_record(v) for k, v in record.get("sources", {}).items()}
    read = {"reward": sides.get("policy", {}).get("settings", {}).get("identity")}
    read |= {f"draws of the {k}": side.get("content_hash") for k, side in sides.items()}
    read["prompts"] = record["prompts_hash"]
    options = {n: record.get(n) for n in ("name", "against", "columns", "confidence", "seed")}
    options["procedure"] = list(record["win_rates"])
    start = "ctrl-dpo evaluate --policy DRAWS --reference REFERENCE_DRAWS --output EVALUATION"
    sections = {
        "Training": _training(made, base, labels),
        "Weights": _weights(made["summary"]),
        **evaluation_sections([record]),
        "What the evaluation read": _facts(read),
        "To make it again": _again(_train_command(made, base) + _command(start, options), made),
    }
    return ModelCard(_text(data, str(record["name"]), sections))


def dataset_card(folder: str | Path) -> DatasetCard:
    """Describe labels: columns, what they are for, how they are distributed, where they come from.

    Parameters
    ----------
    folder : str or Path
        Finished folder of ``ctrl-dpo relabel``.

    Returns
    -------
    huggingface_hub.DatasetCard
        Its licence is left to its owner.
    """
    made, rows = read_record(folder), read_rows(folder)
    settings = made["settings"]
    names = ("procedure", "transformation", "target_kl", "estimator", "extremes", "pairs", "reward")
    facts = {name: settings[name] for name in names}
    facts |= {"sha256": made["content_hash"], "source": made["inputs"]["source"]}
    schema = rows.features.arrow_schema
    held = [[n, str(schema.field(n).type), columns.MEANINGS.get(n, "")] for n in rows.column_names]
    known = columns.SAMPLED_FROM in rows.column_names
    origins = filter(None, rows.unique(columns.SAMPLED_FROM)) if known else []
    options = settings | ({} if settings["reward"] is None else {"reward": "REWARD"})
    sections = {
        "Columns": f"{len(rows)} rows.\n\n{table(['column', 'type', 'holds'], held)}",
        "Labels": _facts(facts | made["summary"]),
        "What the responses are draws of": "\n\n".join(_facts(json.loads(o)) for o in origins),
        "Licence": _LICENCE,
        "To make it again": _again(
            _command("ctrl-dpo relabel SOURCE --output LABELS", options), made
        ),
    }
    data = DatasetCardData(tags=_TAGS, task_categories=["text-generation"])
    return DatasetCard(_text(data, f"Labels for {settings['procedure']}", sections))


def _training(made: Mapping[str, Any], base: str, labels: Sequence[str | Path]) -> str:
    """Tabulate what ``ctrl-dpo train`` recorded, and the budget of the labels it read."""
    settings, summary, data = made["settings"], made["summary"], made["inputs"].get("data")
    run = summary.get("run", {})
    read = [r for r in map(read_record, labels) if data and r.get("content_hash") == data]
    budget = read[0]["settings"]["target_kl"] if read else settings.get("target_kl")
    names = ("loss", "anchor", "seed", "data_seed", "lora_r", "lora_alpha", "lora_dropout")
    facts = {
        "procedure": run.get("procedure of the data", settings.get("procedure")),
        "transformation of the data": run.get("transformation of the data"),
        "KL budget (nats)": budget,
        "beta": run.get("beta"),
        **{name: settings.get(name) for name in names},
        **{name: summary.get(name) for name in ("rows", "prompts", "responses")},
        "base model": base or None,
        "identity of the base model": run.get("model"),
        "reference policy": run.get("reference_model"),
        "data": data,
    }
    return _facts(facts)


def _weights(summary: Mapping[str, Any]) -> str:
    """Tabulate what the weights were in memory: settings alone do not prove it."""
    found = summary.get("weights", {}).items()
    rows = [[kind, f"{v['bits']:.2f}", f"{v['bytes'] / 1e6:.2f}"] for kind, v in found]
    if not rows:
        return ""
    measured = table(["layers", "bits per weight", "MB"], rows)
    return f"As they were in memory; activations are {summary['dtype']}.\n\n{measured}"


def _facts(facts: Mapping[str, Any]) -> str:
    known = {name: value for name, value in facts.items() if value is not None}
    told = {n: ", ".join(map(str, v)) if isinstance(v, list) else v for n, v in known.items()}
    return table(["", "value"], figures(told)) if told else ""


def _train_command(made: Mapping[str, Any], base: str) -> str:
    """Return the command, with every setting that decides the weights and is not a default."""
    run = made["summary"].get("run")
    if run is None:
        return ""
    from ctrl_dpo.arguments import changed_words

    launched = f"accelerate launch --num_processes {run['processes']} -m ctrl_dpo"
    start = "ctrl-dpo" if run["processes"] == 1 else launched
    settings = {n: v for n, v in made["settings"].items() if n in run or n.startswith("lora_")}
    words = [base or "MODEL", "DATA", "--output_dir", "POLICY", *changed_words(settings)]
    return f"{start} train {shlex.join(words)}\n"


def _command(start: str, options: Mapping[str, Any]) -> str:
    """Append options by the names that the command line has for them."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value
        option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
        for part in pairs if isinstance(pairs, list) else [pairs]:
            words += [option] if part is True else [option, str(part)]
    return f"{start} {shlex.join(words)}"


def _again(commands: str, made: Mapping[str, Any]) -> str:
    return f"```\n{commands}\n```\n\n{_facts(made['versions'])}"


def _text(data: CardData, title: str, sections: Mapping[str, str]) -> str:
    """Compose block, title, and the sections that hold something."""
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items() if text)
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{_PAPER}\n\n{body}\n"
