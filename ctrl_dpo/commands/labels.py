"""Commands from responses to labels: ``score`` and ``relabel``."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ctrl_dpo.commands.options import (
    Anchor,
    AttributeWeight,
    Beta,
    Calibration,
    Column,
    EmptyPrompts,
    EmptyResponses,
    Estimator,
    Extremes,
    Invalid,
    Layout,
    MinEffectiveSampleSize,
    NumProc,
    Output,
    Pairs,
    Procedure,
    RanksAsRewards,
    SamePrompt,
    ScoreFirst,
    TargetKL,
    Ties,
    Transformation,
    assigned,
    finished,
    reading_options,
    tabulated,
)


def score(
    groups: Annotated[
        str, typer.Argument(help="Responses in any layout: stage folder, file, hub name.")
    ],
    reward: Annotated[str, typer.Option(help="Sequence-classification model, or module:function.")],
    output: Output,
    layout: Layout = "auto",
    column: Column = None,
    invalid: Invalid = "error",
    same_prompt: SamePrompt = "merge",
    empty_prompts: EmptyPrompts = "error",
    empty_responses: EmptyResponses = "keep",
    batch_size: Annotated[int, typer.Option(help="Responses per forward pass.")] = 16,
    cache: Annotated[
        Path | None, typer.Option(help="File of scores; default: beside the output.")
    ] = None,
) -> None:
    """Add a reward to every response."""
    from ctrl_dpo.data.folders import StageFolder, content_hash, read_rows, run_once
    from ctrl_dpo.data.layouts import read_groups
    from ctrl_dpo.score import load_reward

    reading = reading_options(layout, column, invalid, same_prompt, empty_prompts, empty_responses)
    model = load_reward(reward)
    settings = {"reward": reward, "identity": model.identity} | reading

    def make() -> tuple[Any, dict[str, Any]]:
        found, report = read_groups(read_rows(groups), **reading)
        scored = _scored(found, report, model, cache or _beside(output), batch_size)
        return scored, report.summary() | _reward_summary(scored["rewards"])

    run_once(StageFolder(output, "score", settings, {"groups": content_hash(groups)}), make)
    finished(output)


def relabel(
    source: Annotated[
        str, typer.Argument(help="Scored responses in any layout: stage folder, file, hub name.")
    ],
    output: Output,
    procedure: Procedure = "best_of_4",
    transformation: Transformation = "optimal",
    target_kl: TargetKL = None,
    beta: Beta = None,
    estimator: Estimator = None,
    pairs: Pairs = None,
    ties: Ties = "drop",
    calibration: Calibration = "empirical",
    min_effective_sample_size: MinEffectiveSampleSize = 2.0,
    extremes: Extremes = None,
    anchor: Anchor = 0.0,
    reward: ScoreFirst = None,
    layout: Layout = "auto",
    column: Column = None,
    attribute_weight: AttributeWeight = None,
    invalid: Invalid = "error",
    same_prompt: SamePrompt = "merge",
    empty_prompts: EmptyPrompts = "error",
    empty_responses: EmptyResponses = "keep",
    ranks_as_rewards: RanksAsRewards = False,
    num_proc: NumProc = None,
) -> None:
    """Calibrate and transform rewards into training targets: groups, or pairs with margins."""
    from ctrl_dpo.calibrate import RewardCalibrator

    reading = reading_options(layout, column, invalid, same_prompt, empty_prompts, empty_responses)
    reading |= {
        "attribute_weights": _numbers(assigned("--attribute-weight", attribute_weight)),
        "ranks_as_rewards": ranks_as_rewards,
    }
    labels: dict[str, Any] = {
        "procedure": procedure,
        "transformation": transformation,
        "target_kl": target_kl,
        "beta": beta,
        "estimator": estimator,
        "extremes": extremes,
        "anchor": anchor,
    }
    calibrator = RewardCalibrator(calibration, min_effective_sample_size)
    pairing = {"pairs": pairs, "ties": ties}
    _relabel_once(source, output, reading, labels, calibrator, pairing, reward, num_proc)
    tabulated(output)


def _relabel_once(
    source: str,
    output: Path,
    reading: dict[str, Any],
    labels: dict[str, Any],
    calibrator: Any,
    pairing: dict[str, Any],
    reward: str | None,
    num_proc: int | None,
) -> None:
    """Read, score where a reward is named, and label, unless the output holds just that."""
    from ctrl_dpo.data.folders import StageFolder, content_hash, read_rows, run_once
    from ctrl_dpo.data.layouts import read_groups

    model = _reward(reward)
    settings = reading | labels | calibrator.get_params() | pairing
    settings |= {"reward": None if model is None else model.identity}

    def make() -> tuple[Any, dict[str, Any]]:
        groups, report = read_groups(read_rows(source), num_proc=num_proc, **reading)
        if model is not None:
            groups = _scored(groups, report, model, _beside(output))
        labels_of = labels | {"calibration": calibrator, "num_proc": num_proc}
        return _labelled(groups, report.summary(), labels_of, pairing["pairs"], pairing["ties"])

    folder = StageFolder(output, "relabel", settings, {"source": content_hash(source)})
    run_once(folder, make)


def _labelled(
    groups: Any, reading: Mapping[str, Any], labels: dict[str, Any], strategy: str | None, ties: str
) -> tuple[Any, dict[str, Any]]:
    """Return labelled groups, or pairs of them, and their summary."""
    from ctrl_dpo.measures.label_summary import summarise_labels
    from ctrl_dpo.relabel import count_pairs, pairs, relabel

    made = relabel(groups, **labels)
    counts = None if strategy is None else count_pairs(made, strategy, ties=ties)
    method = labels["calibration"].method
    summary = summarise_labels(made, method, draws=groups, reading=reading, pairs=counts)
    rows = made if strategy is None else pairs(made, strategy, ties=ties)
    return rows, summary.to_dict()


def _reward(name: str | None) -> Any:
    if name is None:
        return None
    from ctrl_dpo.score import load_reward

    return load_reward(name)


def _scored(groups: Any, report: Any, model: Any, store: Path, batch_size: int = 16) -> Any:
    """Return the groups with rewards, through the cache of scores; count flips of known labels."""
    from ctrl_dpo.data.detection import PAIRED
    from ctrl_dpo.score import score

    store.parent.mkdir(parents=True, exist_ok=True)
    scored = score(groups, model, batch_size=batch_size, cache=store)
    if report.layout in PAIRED:
        report.count_labels(scored)
    return scored


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.scores.jsonl")


def _numbers(weights: Mapping[str, str] | None) -> dict[str, float] | None:
    from ctrl_dpo.data.layout_rows import to_float

    if weights is None:
        return None
    return {name: to_float(f"--attribute-weight {name}", text) for name, text in weights.items()}


def _reward_summary(rewards: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Count scores, and the pairs within prompts that they leave tied."""
    groups = [list(group) for group in rewards]
    values = [value for group in groups for value in group]
    pairs = [a == b for group in groups for a, b in itertools.combinations(group, 2)]
    summary = {"prompts": len(groups), "responses": len(values), "mean": statistics.fmean(values)}
    return summary | ({"tied_pairs": statistics.fmean(pairs)} if pairs else {})
