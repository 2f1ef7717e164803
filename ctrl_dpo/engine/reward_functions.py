"""Rewards as functions of prompts and responses, with an identity for the score cache."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

RewardCallable = Callable[[list[Any], list[str]], Sequence[float]]


@dataclass(frozen=True)
class Candidate:
    """One response to score.

    Parameters
    ----------
    prompt : str or list of dict
        Text, or messages.
    response : str
        Text of the response.
    place : str
        What errors call it, "row 3, response 0".
    """

    prompt: Any
    response: str
    place: str


class Reward(Protocol):
    """What the score stage needs of a reward: a function here, a model in ``reward_models``."""

    @property
    def identity(self) -> str:
        """Text that changes whenever the scores could: a part of every cache key."""

    def batches(
        self, candidates: Sequence[Candidate], batch_size: int
    ) -> Iterator[dict[int, float]]:
        """Yield scores by position, in the order that is fastest."""


class FunctionReward:
    """A function that takes a list of prompts and a list of responses, and returns as many numbers.

    Parameters
    ----------
    function : callable
        Prompts arrive as the dataset has them: text, or a list of messages.
    """

    def __init__(self, function: RewardCallable) -> None:
        self.function = function
        owner = function if hasattr(function, "__qualname__") else type(function)
        self.name = f"{owner.__module__}:{owner.__qualname__}"

    @property
    def identity(self) -> str:
        """Module, name and the hash of the module's source: a function may call its neighbours.

        Returns
        -------
        str
            ``module:function:sha256``.

        Raises
        ------
        ValueError
            If the scores could depend on more than a source file: a lambda, a closure, an object.
        """
        function = self.function
        source = inspect.getsourcefile(function) if inspect.isfunction(function) else None
        if source is None or "<" in self.name or not Path(source).is_file():
            raise ValueError(
                "reward must be a function at the top of a module for its scores to be cached; got "
                f"{self.name!r}. Move it to a module, or give no cache."
            )
        return f"{self.name}:{hashlib.sha256(Path(source).read_bytes()).hexdigest()}"

    def batches(
        self, candidates: Sequence[Candidate], batch_size: int
    ) -> Iterator[dict[int, float]]:
        """Call the function on consecutive parts.

        Parameters
        ----------
        candidates : sequence of Candidate
            What to score.
        batch_size : int
            Responses a call.

        Yields
        ------
        dict of int to float
            Scores by position.

        Raises
        ------
        TypeError
            If the function returns no list of numbers.
        ValueError
            If it returns another number of scores than it was given responses.
        """
        for start in range(0, len(candidates), batch_size):
            part = candidates[start : start + batch_size]
            scores = self._list(self.function([c.prompt for c in part], [c.response for c in part]))
            if len(scores) != len(part):
                raise ValueError(
                    f"reward {self.name} must return one score a response; got {len(scores)} for "
                    f"{len(part)} responses from {part[0].place}."
                )
            yield {start + i: self._number(value) for i, value in enumerate(scores)}

    def _list(self, returned: Any) -> list[Any]:
        """List what the function returned; a mapping or a set has no scores in an order."""
        shape = tuple(getattr(returned, "shape", (0,)))
        if shape[1:] == (1,):  # the logits of a reward model
            return list(returned.reshape(-1))
        other = isinstance(returned, (str, bytes, Mapping, Set))
        if other or len(shape) != 1 or not isinstance(returned, Iterable):
            kind = f"{type(returned).__name__} of shape {shape}"
            raise TypeError(
                f"reward {self.name} must return one number a response, in a list or an array of "
                f"one dimension; got {reprlib.repr(returned) if len(shape) == 1 else kind}."
            )
        return list(returned)

    def _number(self, score: Any) -> float:
        """Convert one score, of Python, numpy or torch."""
        shape = tuple(getattr(score, "shape", ()))
        several = any(size != 1 for size in shape)
        if isinstance(score, str) or several or not hasattr(score, "__float__"):
            raise TypeError(f"reward {self.name} must return numbers; got {reprlib.repr(score)}.")
        return float(score)


def import_function(text: str) -> RewardCallable:
    """Import a function from text.

    Parameters
    ----------
    text : str
        ``module:function``; the module is installed, on ``PYTHONPATH``, or in the working
        directory, which stays on the path, at its end.

    Returns
    -------
    callable
        The function.

    Raises
    ------
    ImportError
        If there is no such module, or it does not import.
    ValueError
        If the module has no function of that name.
    """
    module_name, _, name = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # not there in a console script; at the end, it hides nothing
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"reward must name a module that imports; got {module_name!r}: {error}. It was looked "
            f"for in {here!r} and on the path: name its folder in PYTHONPATH, or install what it "
            "needs."
        ) from error
    found = {n: f for n, f in vars(module).items() if inspect.isfunction(f)}
    if name not in found:
        raise ValueError(
            f"reward must name a function of module {module_name!r}; got {name!r}. It has "
            f"{sorted(found)}."
        )
    return found[name]
