"""One YAML file an experiment: the task, what is drawn, how rewards and policies are trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ctrl_dpo._validation import check_choice
from ctrl_dpo.theory.procedures import parse_procedure

WHERE = ("held_out", "train")


@dataclass(frozen=True)
class Cell:
    """One trained and measured policy.

    Parameters
    ----------
    method : str
        Name in :data:`experiment.methods.METHODS`.
    strength : float
        What sets the KL: the method's budget, penalty or step size, see there.
    seed : int
        Seed of adapter, order of the prompts and draws.
    ablation : str
        What it belongs to; ``main`` for the comparison itself.
    changes : tuple
        Settings of the experiment that this cell changes, as pairs.
    """

    method: str
    strength: float
    seed: int
    ablation: str = "main"
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Folder of the cell."""
        changes = "".join(f"-{key}={value}" for key, value in self.changes)
        return f"{self.ablation}-{self.method}-{self.strength:g}-seed{self.seed}{changes}"


@dataclass(frozen=True)
class Experiment:
    """What a YAML file of `headline.py` sets; see `recipes/configs/headline_harmless.yaml`.

    Every field but `kls` and the last four changes the numbers of a cell, and an ablation can
    change it.
    """

    task: str
    procedure: str
    prompts: str
    prompts_hub: tuple[str, str, str]  # data set, folder, split
    n_train: int
    n_held_out: int
    max_prompt_tokens: int
    max_new_tokens: int
    draws: int
    held_out_draws: int
    measured: tuple[str, ...]
    reward: Mapping[str, Any]
    training: Mapping[str, Any]
    kls: tuple[float, ...]
    pairs: str = ""  # of the reward models; unused where rewards are functions
    pairs_hub: tuple[str, str, str] = ("", "", "")
    extremes: int | None = None
    anchor: float = 0.0
    loss: str = "squared"
    estimator: str | None = None
    load_in_8bit: bool = False
    lora_r: int = 16  # 0: the whole model, in float32
    as_pairs: str | None = None
    where: str = "held_out"
    strengths: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    ablations: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Check what would otherwise fail after hours."""
        parse_procedure(self.procedure)
        check_choice("where", self.where, WHERE)

    def changed(self, cell: Cell) -> Experiment:
        """Return the experiment as the cell runs it."""
        changes = dict(cell.changes)
        training = {k: changes.pop(k) for k in list(changes) if k in self.training}
        return dataclasses.replace(self, **changes, training={**self.training, **training})

    def cells(self) -> Iterator[Cell]:
        """List the cells, first every method with one seed from its middle strength outwards."""
        orders = {
            method: sorted(values, key=lambda s, v=values: (abs(v.index(s) - len(v) // 2), s))
            for method, values in {**self.strengths, **self.others}.items()
        }
        for seed, rank in itertools.product(self.seeds, range(max(map(len, orders.values())))):
            for method, order in orders.items():
                if rank < len(order):
                    yield Cell(method, order[rank], seed)
        for entry in self.ablations:
            changes = tuple((k, v) for k, v in entry.items() if k not in Cell.__annotations__)
            seeds = entry.get("seeds", self.seeds[:1])
            base = entry["method"], float(entry["strength"])
            changes = tuple(c for c in changes if c[0] != "seeds")
            yield from (Cell(*base, seed, entry["ablation"], changes) for seed in seeds)


def read_experiment(path: str | Path, quick: bool = False) -> Experiment:
    """Read an experiment; its section ``quick`` replaces settings if asked for.

    A file that names a ``base`` beside it sets what it changes of that one.
    """
    loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if base := loaded.pop("base", None):
        whole = yaml.safe_load((Path(path).parent / base).read_text(encoding="utf-8"))
        loaded = {**whole, **loaded}
    changes = loaded.pop("quick", {})
    settings = {**loaded, **(changes if quick else {})}
    known = {f.name for f in dataclasses.fields(Experiment)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"settings must be among {sorted(known)}; got {unknown} in {path}.")
    return Experiment(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
