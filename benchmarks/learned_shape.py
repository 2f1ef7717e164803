"""Did policies learn the shape of their labels, or only which way they point? A measurement.

    python benchmarks/learned_shape.py recipes/configs/headline_readable.yaml --model MODEL --quick

Takes every finished policy of an experiment of `headline.py` and computes its log-ratios of the
held-out draws of the reference policy. Averaged by the rank of the training reward among the draws
of a prompt they say how the policy depends on the reward: `bend` and `flattening` are the parts
along the second and third orthogonal polynomial of the ranks' normal scores, in units of that along
the first (0 for a policy that tilts by a straight line), `share` is the squared correlation with
the first. `skewness` and `kurtosis` (0 and 3 if normal) are of the log-ratios themselves. The same
is computed for what each loss tends to in the model of `partial_fit.py`, where a share r2 is
learned, and for a straight line there, with win rates at 1 nat; those of policies are at the KL
they pay. Log-ratios are kept beside the policy, so that a second run computes none.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from experiment.cells import Bench, add_options, cell_of, open_bench
from numpy.typing import NDArray
from partial_fit import GRID, KL, METHODS, PartialView, order_statistic, population_fits
from recording import circumstances, merge_rows
from scipy import stats

from ctrl_dpo.data import columns
from ctrl_dpo.data.folders import write_atomically
from ctrl_dpo.data.tokens import prompt_tokens
from ctrl_dpo.engine.models import load_policy
from ctrl_dpo.engine.reference import compute_rows
from ctrl_dpo.measures.estimates import bootstrap_interval
from ctrl_dpo.measures.tables import table
from ctrl_dpo.theory.procedures import parse_procedure

FloatArray = NDArray[np.float64]
SHARES = (0.2, 0.35, 0.5)
STRAIGHT = "straight"  # log-ratios that are the feature itself
TOKENS = 2048  # of a forward pass
NUMBERS = ("bend", "flattening", "share", "skewness", "kurtosis")
_KEY = ("task", "source", "method", "strength", "seed", "share_seen")


def polynomials(ranks: FloatArray) -> FloatArray:
    """Return orthonormal polynomials of degree 1 to 3 of normal scores, ``(3, ..., draws)``."""
    scores = stats.norm.ppf((ranks - 0.5) / ranks.shape[-1])
    found = np.empty((3, *scores.shape))
    for degree in range(3):
        power = scores ** (degree + 1)
        power = power - power.mean(axis=-1, keepdims=True)
        for lower in found[:degree]:
            power = power - lower * (power * lower).mean(axis=-1, keepdims=True)
        found[degree] = power / np.sqrt(np.square(power).mean(axis=-1, keepdims=True))
    return found


def ratio(upper: FloatArray, lower: FloatArray, axis: int = -1) -> FloatArray:
    """Return a ratio of means over prompts."""
    return np.asarray(upper.mean(axis=axis) / lower.mean(axis=axis))


def share(straight: FloatArray, variance: FloatArray, axis: int = -1) -> FloatArray:
    """Return the squared correlation of log-ratios with the ranks' normal scores."""
    return np.asarray(np.square(straight.mean(axis=axis)) / variance.mean(axis=axis))


def skewness(third: FloatArray, variance: FloatArray, axis: int = -1) -> FloatArray:
    """Return the third standardised moment of log-ratios."""
    return np.asarray(third.mean(axis=axis) / variance.mean(axis=axis) ** 1.5)


def kurtosis(fourth: FloatArray, variance: FloatArray, axis: int = -1) -> FloatArray:
    """Return the fourth standardised moment of log-ratios, 3 if they are normal."""
    return np.asarray(fourth.mean(axis=axis) / variance.mean(axis=axis) ** 2)


def log_ratios(policy: Any, tokenizer: Any, reference: Dataset) -> FloatArray:
    """Return a policy's log-ratios of the reference policy's draws, ``(prompts, draws)``."""
    drawn = reference.to_list()
    prompts = [prompt_tokens(tokenizer, row["prompt"]) for row in drawn]
    asked = [
        {"prompt_ids": prompt, "response_ids": row[columns.RESPONSE_IDS]}
        for prompt, row in zip(prompts, drawn, strict=True)
    ]
    found = dict(compute_rows(policy, asked, TOKENS, share=True))
    logps = np.array([found[place] for place in range(len(drawn))])
    return logps - np.array([row[columns.SAMPLER_LOGPS] for row in drawn])


def kept_log_ratios(bench: Bench, adapter: Path, reference: Dataset) -> FloatArray:
    """Return the log-ratios of a policy, computed once."""
    kept = adapter.parent / "reference_log_ratios.json"
    if not kept.exists():
        policy = load_policy(adapter, load_in_8bit=bench.experiment.load_in_8bit).eval()
        found = log_ratios(policy, bench.tokenizer, reference).tolist()
        write_atomically(kept, (json.dumps(found) + "\n").encode("utf-8"))
    return np.array(json.loads(kept.read_text(encoding="utf-8")))


def measured(log_ratio: FloatArray, rewards: FloatArray) -> dict[str, object]:
    """Return the shape of a policy's log-ratios, with intervals over prompts."""
    log_ratio = log_ratio - log_ratio.mean(axis=1, keepdims=True)
    bases = polynomials(stats.rankdata(rewards, axis=1))
    straight, bent, third = (bases * log_ratio).mean(axis=-1)
    variance, cubes, fourths = ((log_ratio**power).mean(axis=1) for power in (2, 3, 4))
    row: dict[str, object] = {}
    for name, statistic, *parts in (
        ("bend", ratio, bent, straight),
        ("flattening", ratio, third, straight),
        ("share", share, straight, variance),
        ("skewness", skewness, cubes, variance),
        ("kurtosis", kurtosis, fourths, variance),
    ):
        row[name] = round(float(statistic(*parts)), 4)
        low, high = bootstrap_interval(tuple(parts), statistic, 0.95, 0)
        row |= {f"{name}_low": round(low, 4), f"{name}_high": round(high, 4)}
    return row


def modelled(method: str, procedure: str, seen: float, draws: int) -> dict[str, object]:
    """Return the same of what a loss tends to, where a share of the reward is seen."""
    view = PartialView(seen, parse_procedure(procedure))
    fits = [GRID] if method == STRAIGHT else population_fits(method, view)
    fit = view.best_fit(fits, KL)
    fit = fit - view.q @ fit
    by_rank = [order_statistic(view, r) @ view.features @ fit for r in range(1, draws + 1)]
    bases = polynomials(np.arange(1.0, draws + 1))
    straight, bent, third = (bases * np.array(by_rank)).mean(axis=-1)
    variance, cubes, fourths = (view.q @ fit**power for power in (2, 3, 4))
    found = {
        "win_rate": view.best([fit], KL),
        "bend": bent / straight,
        "flattening": third / straight,
        "share": straight**2 / variance,
        "skewness": cubes / variance**1.5,
        "kurtosis": fourths / variance**2,
    }
    return {name: round(float(value), 4) for name, value in found.items()}


def rows(bench: Bench) -> list[Mapping[str, Any]]:
    """Return a row a policy, and a row a method and share of the model."""
    experiment = bench.experiment
    reference = bench.reference_draws("held_out", experiment, measured=True)
    rewards = np.array(bench.scored(reference, "training")["rewards"])
    found: list[Mapping[str, Any]] = []
    for record in bench.finished():
        cell = cell_of(record)
        if cell.ablation == "main":
            base = {"method": cell.method, "strength": cell.strength, "seed": cell.seed}
            shape = measured(kept_log_ratios(bench, bench.adapter(record), reference), rewards)
            rate = round(record["training"]["win_rates"][experiment.procedure]["value"], 4)
            found.append({"source": "policy", **base, "share_seen": "", "win_rate": rate, **shape})
            print(cell.name, shape, flush=True)
    for method in (*METHODS, STRAIGHT):
        for seen in SHARES:
            shape = modelled(method, experiment.procedure, seen, experiment.draws)
            base = {"source": "model", "method": method, "strength": "", "seed": ""}
            found.append({**base, "share_seen": seen, **shape})
    return [{"task": bench.folder.name, **row, **circumstances()} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    found = rows(open_bench(parser.parse_args()))
    merge_rows("learned_shape", found, _KEY)
    shown = ("source", "method", "strength", "seed", "share_seen", "win_rate", *NUMBERS)
    print(table(list(shown), [[str(row[k]) for k in shown] for row in found]))


if __name__ == "__main__":
    main()
