"""Options of the commands, and what they print when they are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Output = Annotated[Path, typer.Option(help="Folder to write; finished work in it is not redone.")]
Procedure = Annotated[
    str, typer.Option(help="How the model will be used: single_draw, best_of_4, worst_of_8, ...")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of every random number.")]

# how any public layout is read
Layout = Annotated[str, typer.Option(help="Layout of the data; found by its columns by default.")]
Column = Annotated[
    list[str] | None, typer.Option(help="OURS=THEIRS, such as rewards=scores; repeatable.")
]
Invalid = Annotated[str, typer.Option(help="Rows that break the rules: error or drop.")]
SamePrompt = Annotated[
    str, typer.Option(help="Rows of one prompt: merge into one group, or keep apart.")
]
EmptyPrompts = Annotated[str, typer.Option(help="Prompts without text: error or keep.")]
EmptyResponses = Annotated[str, typer.Option(help="Responses without text: keep or drop.")]
AttributeWeight = Annotated[
    list[str] | None,
    typer.Option(help="NAME=NUMBER: one reward out of HelpSteer2's attributes; repeatable."),
]
RanksAsRewards = Annotated[
    bool, typer.Option(help="Accept ranks, which tell the order only, as rewards.")
]

# how rewards become labels
ScoreFirst = Annotated[
    str | None, typer.Option(help="Score unscored responses first, as `ctrl-dpo score` does.")
]
Calibration = Annotated[
    str, typer.Option(help="empirical, pooled (few draws) or weighted (another policy's).")
]
MinEffectiveSampleSize = Annotated[
    float, typer.Option(help="weighted refuses prompts whose draws are worth fewer.")
]
Transformation = Annotated[
    str, typer.Option(help="optimal, identity, log, normal_quantile or exponential:RATE.")
]
TargetKL = Annotated[float | None, typer.Option(help="KL budget in nats per response; sets beta.")]
Beta = Annotated[float | None, typer.Option(help="KL penalty, instead of a budget.")]
Estimator = Annotated[
    str | None,
    typer.Option(
        help="rank_optimal (default of optimal), posterior (of others), plug_in or levels."
    ),
]
Extremes = Annotated[
    int | None, typer.Option(help="Keep only so many best and worst responses of each group.")
]
Anchor = Annotated[float, typer.Option(help="Anchor of the squared loss that will fit them.")]
Pairs = Annotated[
    str | None,
    typer.Option(help="Write pairs: best_worst, adjacent, all, random:N or margin:T."),
]
Ties = Annotated[str, typer.Option(help="Pairs of margin 0: drop or keep.")]
NumProc = Annotated[int | None, typer.Option(help="Processes.")]


def reading_options(
    layout: str,
    column: Sequence[str] | None,
    invalid: str,
    same_prompt: str,
    empty_prompts: str,
    empty_responses: str,
) -> dict[str, Any]:
    """Return how a public layout is read, by the names that the library has for it.

    Parameters
    ----------
    layout, invalid, same_prompt, empty_prompts, empty_responses : str
        As they were given.
    column : sequence of str, optional
        Each OURS=THEIRS.

    Returns
    -------
    dict
        Arguments of :func:`ctrl_dpo.data.layouts.read_groups`.
    """
    return {
        "layout": layout,
        "columns": assigned("--column", column),
        "invalid": invalid,
        "same_prompt": same_prompt,
        "empty_prompts": empty_prompts,
        "empty_responses": empty_responses,
    }


def assigned(option: str, words: Sequence[str] | None) -> dict[str, str] | None:
    """Return the mapping that words ``KEY=VALUE`` stand for, None without any.

    Parameters
    ----------
    option : str
        The option they were given by, for the error.
    words : sequence of str, optional
        Each with an equals sign.

    Returns
    -------
    dict of str to str, or None
        Values by key.

    Raises
    ------
    ValueError
        If a word has no equals sign, or a key is given twice.
    """
    found: dict[str, str] = {}
    for word in words or []:
        if "=" not in word:
            raise ValueError(f"{option} must be KEY=VALUE; got {word!r}.")
        key, value = word.split("=", 1)
        if key in found:
            raise ValueError(
                f"{option} must give each key once; got {key!r} as {found[key]!r} and {value!r}. "
                "Remove one."
            )
        found[key] = value
    return found or None


def finished(output: Path) -> None:
    """Print a stage's own summary."""
    from ctrl_dpo.data.folders import read_record
    from ctrl_dpo.measures.tables import figures

    rows = figures(read_record(output)["summary"])
    typer.echo(f"{output}: {', '.join(f'{name} {value}' for name, value in rows)}")


def tabulated(output: Path) -> None:
    """Print a stage's own summary, one line a number."""
    from ctrl_dpo.data.folders import read_record
    from ctrl_dpo.measures.tables import figures, table

    typer.echo(table([str(output), "value"], figures(read_record(output)["summary"])))
