"""The command ``evaluate``: any two sets of scored draws, no model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ctrl_dpo.commands.options import Column, Output, Seed, assigned, finished

PROCEDURES = ["single_draw", "best_of_4", "worst_of_4"]


def evaluate(
    policy: Annotated[
        str, typer.Option(help="Scored draws of the policy: Parquet, JSON lines, stage folder.")
    ],
    reference: Annotated[str, typer.Option(help="Scored draws of the reference policy.")],
    output: Output,
    name: Annotated[str, typer.Option(help="What tables and figures call the policy.")] = "policy",
    procedure: Annotated[
        list[str], typer.Option(help="Inference-time procedures to measure.")
    ] = PROCEDURES,
    against: Annotated[
        str | None, typer.Option(help="Procedure of the reference policy, if another.")
    ] = None,
    column: Column = None,
    confidence: Annotated[float, typer.Option(help="Coverage of the intervals.")] = 0.95,
    plot: Annotated[bool, typer.Option(help="Draw figures; needs matplotlib.")] = True,
    seed: Seed = 0,
) -> None:
    """Measure win rates, KL and attainment from scored draws; no model is loaded.

    Rows have `prompt` and `rewards`: a list with one number a draw, or one number where a row is
    one draw. `policy_logps` and `reference_logps` of the policy's draws give the KL.
    """
    from ctrl_dpo.data.folders import StageFolder, content_hash, read_rows, write_atomically
    from ctrl_dpo.evaluate import evaluate as run
    from ctrl_dpo.report import attainment_table, report, win_rate_table
    from ctrl_dpo.report_inputs import EVALUATION, read_evaluation, relative_source, report_inputs

    options: dict[str, Any] = {
        "name": name,
        "against": against,
        "columns": assigned("--column", column),
        "confidence": confidence,
        "seed": seed,
    }
    settings = options | {"procedure": procedure, "plot": plot}
    inputs = {"policy": content_hash(policy), "reference": content_hash(reference)}
    with StageFolder(output, "evaluate", settings, inputs, n_shards=0).held() as folder:
        if not folder.is_complete:
            record = run(read_rows(policy), read_rows(reference), procedures=procedure, **options)
            sides = {"policy": policy, "reference": reference}
            record["sources"] = {side: relative_source(s, output) for side, s in sides.items()}
            record["columns"] = options["columns"]
            text = json.dumps(record, indent=1) + "\n"
            write_atomically(output / EVALUATION, text.encode("utf-8"))
            if plot:
                written = read_evaluation(output)
                report(output, [written], **report_inputs([written], {}))
            rates = {f"win rate {p}": r["value"] for p, r in record["win_rates"].items()}
            folder.finish(rates | ({} if record["kl"] is None else {"kl": record["kl"]["value"]}))
    found = read_evaluation(output)
    typer.echo(f"{win_rate_table([found])}\n")
    if found["kl"] is not None:
        typer.echo(f"Attainment:\n\n{attainment_table([found])}\n")
    finished(output)
