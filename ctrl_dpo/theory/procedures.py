"""Inference-time procedures: one draw, best-of-n, worst-of-n, order statistics, mixtures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctrl_dpo._validation import check_finite, check_integer
from ctrl_dpo.theory.distortion import Procedure

__all__ = [
    "BestOfN",
    "Mixture",
    "OrderStatistic",
    "Procedure",
    "SingleDraw",
    "WorstOfN",
    "parse_procedure",
]


@dataclass(frozen=True)
class SingleDraw(Procedure):
    """Serve one draw: h(q) = q.

    Examples
    --------
    >>> str(SingleDraw())
    'single_draw'
    """

    @property
    def order_statistics(self) -> tuple[tuple[float, int, int], ...]:
        """One part: the best of one."""
        return ((1.0, 1, 1),)

    def __str__(self) -> str:
        """Return the name `parse_procedure` reads."""
        return "single_draw"


@dataclass(frozen=True)
class BestOfN(Procedure):
    """Serve the best of ``n`` draws: h(q) = q^n.

    Parameters
    ----------
    n : int
        Number of draws, >= 1.

    Examples
    --------
    >>> str(BestOfN(4))
    'best_of_4'
    """

    n: int

    def __post_init__(self) -> None:
        """Check the number of draws."""
        object.__setattr__(self, "n", check_integer("n", self.n, 1, "BestOfN"))

    @property
    def order_statistics(self) -> tuple[tuple[float, int, int], ...]:
        """One part: the best of n."""
        return ((1.0, 1, self.n),)

    def __str__(self) -> str:
        """Return the name `parse_procedure` reads."""
        return f"best_of_{self.n}"


@dataclass(frozen=True)
class WorstOfN(Procedure):
    """Serve the worst of ``n`` draws: h(q) = 1 - (1 - q)^n. A model of best-of-n jailbreaking.

    Parameters
    ----------
    n : int
        Number of draws, >= 1.

    Examples
    --------
    >>> str(WorstOfN(8))
    'worst_of_8'
    """

    n: int

    def __post_init__(self) -> None:
        """Check the number of draws."""
        object.__setattr__(self, "n", check_integer("n", self.n, 1, "WorstOfN"))

    @property
    def order_statistics(self) -> tuple[tuple[float, int, int], ...]:
        """One part: the n-th best of n."""
        return ((1.0, self.n, self.n),)

    def __str__(self) -> str:
        """Return the name `parse_procedure` reads."""
        return f"worst_of_{self.n}"


@dataclass(frozen=True)
class OrderStatistic(Procedure):
    """Serve the ``k``-th best of ``n`` draws: h(q) = I_q(n - k + 1, k).

    Parameters
    ----------
    k : int
        Rank from the top, 1 (best) to n (worst).
    n : int
        Number of draws, >= 1.

    Examples
    --------
    >>> str(OrderStatistic(2, 4))
    '2nd_best_of_4'
    """

    k: int
    n: int

    def __post_init__(self) -> None:
        """Check the rank and the number of draws."""
        object.__setattr__(self, "n", check_integer("n", self.n, 1, "OrderStatistic"))
        object.__setattr__(self, "k", check_integer("k", self.k, 1, "OrderStatistic"))
        if self.k > self.n:
            raise ValueError(f"k must be <= n = {self.n} for OrderStatistic; got {self.k}.")

    @property
    def order_statistics(self) -> tuple[tuple[float, int, int], ...]:
        """One part: the k-th best of n."""
        return ((1.0, self.k, self.n),)

    def __str__(self) -> str:
        """Return the name `parse_procedure` reads."""
        ends = {1: "st", 2: "nd", 3: "rd"}
        end = "th" if self.k % 100 in (11, 12, 13) else ends.get(self.k % 10, "th")
        return f"{self.k}{end}_best_of_{self.n}"


@dataclass(frozen=True)
class Mixture(Procedure):
    """Serve each request by one of several procedures, chosen with given probabilities.

    Parameters
    ----------
    procedures : sequence of Procedure
        The parts.
    weights : sequence of float
        Share of requests each part serves; positive, sums to 1.

    Examples
    --------
    >>> half = Mixture([SingleDraw(), BestOfN(8)], [0.5, 0.5])
    >>> str(half)
    '0.5*single_draw+0.5*best_of_8'
    >>> float(half.distortion(0.5))
    0.251953125
    """

    procedures: Sequence[Procedure]
    weights: Sequence[float]

    def __post_init__(self) -> None:
        """Check the parts and the weights, and store both as tuples."""
        for part in self.procedures:
            if not isinstance(part, Procedure):
                raise TypeError(f"procedures must be Procedure objects; got {part!r}.")
        weights = check_finite("weights", self.weights, ndim=1)
        if len(weights) == 0 or len(weights) != len(self.procedures):
            raise ValueError(
                f"weights must be one per procedure, at least one; got {len(weights)} "
                f"for {len(self.procedures)} procedures."
            )
        if (weights <= 0).any() or abs(weights.sum() - 1) > 1e-9:
            raise ValueError(f"weights must be > 0 and sum to 1; got {list(self.weights)}.")
        object.__setattr__(self, "procedures", tuple(self.procedures))
        object.__setattr__(self, "weights", tuple((weights / weights.sum()).tolist()))

    @property
    def order_statistics(self) -> tuple[tuple[float, int, int], ...]:
        """The parts of the parts."""
        return tuple(
            (share * weight, k, n)
            for share, part in zip(self.weights, self.procedures, strict=True)
            for weight, k, n in part.order_statistics
        )

    def __str__(self) -> str:
        """Return the text `parse_procedure` reads."""
        parts = zip(self.weights, self.procedures, strict=True)
        return "+".join(f"{weight!r}*{part}" for weight, part in parts)


_PATTERNS: tuple[tuple[str, Callable[[re.Match[str]], Procedure]], ...] = (
    (r"single_draw", lambda found: SingleDraw()),
    (r"best_of_(\d+)", lambda found: BestOfN(int(found[1]))),
    (r"worst_of_(\d+)", lambda found: WorstOfN(int(found[1]))),
    (
        r"(\d+)(?:st|nd|rd|th)_best_of_(\d+)",
        lambda found: OrderStatistic(int(found[1]), int(found[2])),
    ),
)


def parse_procedure(procedure: str | Procedure) -> Procedure:
    """Return the procedure a text names; a `Procedure` is returned as it is.

    Parameters
    ----------
    procedure : str or Procedure
        ``single_draw``, ``best_of_4``, ``worst_of_8``, ``2nd_best_of_4``, or a mixture such as
        ``0.5*single_draw+0.5*best_of_8``.

    Returns
    -------
    Procedure
        The procedure; ``str`` of it gives the text back.

    Raises
    ------
    ValueError
        If the text names no procedure.
    TypeError
        If it is neither text nor a `Procedure`.

    Examples
    --------
    >>> parse_procedure("2nd_best_of_4")
    OrderStatistic(k=2, n=4)
    """
    if isinstance(procedure, Procedure):
        return procedure
    if not isinstance(procedure, str):
        raise TypeError(f"procedure must be text or a Procedure; got {procedure!r}.")
    text = procedure.strip()
    if "*" in text:
        return _parse_mixture(text)
    for pattern, build in _PATTERNS:
        found = re.fullmatch(pattern, text)
        if found:
            return build(found)
    raise ValueError(
        f"procedure must be like 'single_draw', 'best_of_4', 'worst_of_8', '2nd_best_of_4' or "
        f"'0.5*single_draw+0.5*best_of_8'; got {procedure!r}."
    )


def _parse_mixture(text: str) -> Mixture:
    """Parse ``weight*procedure`` terms joined by plus signs."""
    weights, parts = [], []
    for term in re.split(r"\+\s*(?=[\d.])", text):
        found = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*(\w+)\s*", term)
        if found is None:
            raise ValueError(f"procedure must be weight*name terms joined by +; got {text!r}.")
        weights.append(float(found[1]))
        parts.append(parse_procedure(found[2]))
    return Mixture(parts, weights)
