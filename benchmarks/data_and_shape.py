"""How much data until the shape of the labels is learned, and pays? A transformer of letters.

    python benchmarks/data_and_shape.py

A small Llama writes eight letters to a prompt of four; the reward is the sum of a fixed number a
letter. That is as readable as a reward can be, and there is data without end, so that what a model
of language and a few hundred prompts cannot show is seen: when theory's order of methods comes.
Groups of 16 draws, the two best and the two worst trained on (DPO: best against worst), every group
seen once, with the package's trainer and the labels of `headline.py`; then fresh draws to fresh
prompts, used through worst-of-4. Hard labels have no finite optimum, and how far they go is set by
the rate, so that is what DPO is swept over. Per number of groups: each policy, win rates at a KL of
1 nat, read off a method's curve, and the kurtosis of the log-ratios (3 for a straight tilt, 1.5 for
a step; see `learned_shape.py`). A finished cell is not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from experiment.methods import METHODS
from experiment.results import curve_of, flat
from experiment.settings import Experiment
from learned_shape import NUMBERS, log_ratios, measured
from recording import circumstances, merge_rows

from ctrl_dpo import CTRLDPOConfig
from ctrl_dpo.data.folders import write_atomically
from ctrl_dpo.engine.generation import Sampler
from ctrl_dpo.evaluate import evaluate
from ctrl_dpo.measures.equal_kl import Curve, difference_at_kl, win_rate_at_kl
from ctrl_dpo.measures.tables import cell, table
from ctrl_dpo.sample import sample

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from tiny import tiny_llama, tiny_tokenizer

NAME = "data_and_shape"
KL = 1.0
LETTERS, PROMPT, RESPONSE, DRAWS = 32, 4, 8, 16
PROCEDURE = "worst_of_4"
GROUPS = (64, 1024, 4096)
PROMPTS, FRESH = 256, 32  # held out, draws of each
SETTINGS = {  # budget in nats or beta, and learning rate
    "optimal": ((0.15, 1e-3), (0.25, 1e-3), (0.4, 1e-3)),
    "dpo": ((4.0, 1.5e-4), (4.0, 3e-4), (4.0, 5e-4), (4.0, 7e-4)),
    "rebel": ((1.4, 1e-3), (1.0, 1e-3), (0.7, 1e-3), (0.6, 1e-3), (0.5, 1e-3)),
}
_KEY = ("groups", "method", "strength", "rate", "seed")
Record = dict[str, Any]
WORTH = np.random.default_rng(7).normal(size=LETTERS)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One policy: groups trained on, method, its strength and learning rate, seed."""

    groups: int
    method: str
    strength: float
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Stem of the cell's file."""
        return f"{self.groups}-{self.method}-{self.strength:g}-{self.rate:g}-seed{self.seed}"


def policy() -> Any:
    """Return the reference policy, seeded."""
    return tiny_llama(seed=5, vocab_size=LETTERS, hidden_size=64, initializer_range=0.07)


@functools.cache
def tokenizer() -> Any:
    """Return a tokenizer of one token a letter."""
    return tiny_tokenizer(chat_template=None, size=LETTERS)


def drawn(
    model: Any, n_prompts: int, draws: int, prompts: int, seed: int, **options: Any
) -> Dataset:
    """Draw responses to random prompts, each of a seed, and add their rewards."""
    letters = np.array(tokenizer().convert_ids_to_tokens(range(3, LETTERS)))
    chosen = np.random.default_rng(prompts).integers(len(letters), size=(n_prompts, PROMPT))
    rows = Dataset.from_dict({"prompt": ["".join(letters[row]) for row in chosen]})
    sampler = Sampler(draws, RESPONSE, seed=seed)
    found = sample(rows, model, sampler, tokenizer=tokenizer(), batch_rows=4096, **options)
    rewards = [[float(WORTH[ids].sum()) for ids in row] for row in found["response_ids"]]
    return found.add_column("rewards", rewards)


@functools.cache
def reference_draws() -> Dataset:
    """Return the reference policy's draws to the prompts that are measured on."""
    return drawn(policy(), PROMPTS, FRESH, prompts=1, seed=2)


@functools.cache
def groups(count: int, seed: int) -> Dataset:
    """Return scored groups to train on."""
    return drawn(policy(), count, DRAWS, 100 + seed, 100 + seed).remove_columns("sampler_logps")


def train(cell: Cell) -> Any:
    """Return a trained policy."""
    made = Experiment(
        task=NAME,
        procedure=PROCEDURE,
        prompts="",
        prompts_hub=("", "", ""),
        n_train=cell.groups,
        n_held_out=PROMPTS,
        max_prompt_tokens=PROMPT,
        max_new_tokens=RESPONSE,
        draws=DRAWS,
        held_out_draws=FRESH,
        measured=(PROCEDURE,),
        reward={},
        training={},
        kls=(KL,),
        extremes=2,
    )
    job = METHODS[cell.method](groups(cell.groups, cell.seed), cell.strength, made)
    with tempfile.TemporaryDirectory() as folder:
        args = CTRLDPOConfig(
            folder,
            learning_rate=cell.rate,
            num_train_epochs=1,
            per_device_train_batch_size=16,
            warmup_steps=0.1,
            seed=cell.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **job.config,
        )
        model = policy()
        options = {"processing_class": tokenizer(), "ref_model": policy()}
        job.trainer(model, args, job.data, **options).train()
    return model.eval()


def measure(cell: Cell) -> dict[str, Any]:
    """Return a cell's row, and KL and win rate of every prompt."""
    model, reference = train(cell), reference_draws()
    options = {"log_ratios": True, "reference": policy()}
    fresh = drawn(model, PROMPTS, FRESH, prompts=1, seed=1000 + cell.seed, **options)
    record = evaluate(fresh, reference, name=cell.method, procedures=(PROCEDURE,))
    rate, kl = record["win_rates"][PROCEDURE], record["kl"]
    shape = measured(log_ratios(model, tokenizer(), reference), np.array(reference["rewards"]))
    row = {
        **dataclasses.asdict(cell),
        "kl": round(kl["value"], 4),
        "win_rate": round(rate["value"], 4),
        "attainment": round(record["attainment"][PROCEDURE]["value"], 4),
        **{name: shape[name] for name in NUMBERS},
        **circumstances(),
    }
    return {"row": row, "kls": kl["per_prompt"], "win_rates": rate["per_prompt"]}


def cells(sizes: Sequence[int], seeds: Sequence[int]) -> Iterator[Cell]:
    """List the cells, few groups first."""
    for count, seed, (method, settings) in itertools.product(sizes, seeds, SETTINGS.items()):
        yield from (Cell(count, method, strength, rate, seed) for strength, rate in settings)


def curves(found: Sequence[Record], count: int) -> dict[str, Curve]:
    """Return each method's curve of one number of groups; seeds of a setting are averaged."""
    points: dict[str, dict[tuple[float, float], list[Any]]] = defaultdict(lambda: defaultdict(list))
    for record in found:
        row = record["row"]
        if row["groups"] == count:
            setting = row["strength"], row["rate"]
            points[row["method"]][setting].append((record["kls"], record["win_rates"]))
    return {method: curve_of(settings) for method, settings in points.items()}


def comparison(found: Sequence[Record]) -> list[dict[str, Any]]:
    """Return win rates at the KL, per number of groups."""
    rows = []
    for count in sorted({record["row"]["groups"] for record in found}):
        of = curves(found, count)
        rows += [
            {
                "groups": count,
                "seeds": len({r["row"]["seed"] for r in found if r["row"]["groups"] == count}),
                "kl": KL,
                "method": method,
                "win_rate": win_rate_at_kl(curve, KL, PROCEDURE),
                "ours_minus_method": None
                if method == "optimal"
                else difference_at_kl(of["optimal"], curve, KL, PROCEDURE),
            }
            for method, curve in of.items()
        ]
    return rows


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Write the comparison as a Markdown table."""
    lines = [
        [
            str(row["groups"]),
            row["method"],
            cell(row["win_rate"], "{:.1%}"),
            cell(row["ours_minus_method"], "{:+.1%}"),
        ]
        for row in rows
    ]
    return table(["groups", "method", f"at {KL:g} nat", "optimal minus it"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", nargs="*", type=int, default=GROUPS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs") / NAME)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    for each in cells(args.groups, args.seeds):
        path = args.runs / f"{each.name}.json"
        if not path.exists():
            write_atomically(path, (json.dumps(measure(each)) + "\n").encode("utf-8"))
            print(f"{path.stem} done", flush=True)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in args.runs.glob("*.json")]
    found.sort(key=lambda record: [record["row"][name] for name in _KEY])
    merge_rows(NAME, [record["row"] for record in found], _KEY)
    shown = [*_KEY, "kl", "win_rate", "attainment", *NUMBERS]
    print(table(shown, [[str(record["row"][name]) for name in shown] for record in found]))
    rows = comparison(found)
    merge_rows(f"{NAME}_equal_kl", flat(rows, circumstances()), ("groups", "seeds", "method"))
    print(f"\n{page(rows)}")


if __name__ == "__main__":
    main()
