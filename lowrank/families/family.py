"""What a family is: the forms it has for a convolution, a sweep over its ranks, and a fit."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.core.stage import Stage, is_abstract
from lowrank.factorization import Factorization

#: Names of the spatial axes, last ones first taken: 1-D has w, 2-D h and w.
LETTERS = "dhw"


class NotApplicable(ValueError):
    """A family has nothing to offer for this convolution; the message says why."""


class SweepPoint(NamedTuple):
    """One rank of a sweep: priced and certified, but without its weights.

    Attributes
    ----------
    rank : tuple of int
        In the order that the family documents.
    error : float
        Relative Frobenius error of the weights that `build` gives, or, for a family that is not
        exact, of a start that `build` may improve on.
    bound : float
        No chain of this family, variant and rank can have a smaller error.
    stages : tuple of Stage
        The chain with blank weights, for costs.
    build : callable
        Makes the stages with their weights.
    """

    rank: Ints
    error: float
    bound: float
    stages: tuple[Stage, ...]
    build: Callable[[], tuple[Stage, ...]]


class Family(NamedTuple):
    """How to fit one rank, and how to walk all ranks that are worth having.

    Attributes
    ----------
    forms : callable
        ``variants(conv)``: the variants that apply to a convolution; raises NotApplicable.
    sweep : callable
        ``sweep(conv, variant)``: yields a Point a rank, from one decomposition.
    fit : callable
        ``fit(conv, rank, variant)``: the chain at one rank.
    bound : callable
        ``bound(conv, rank, variant)``: no chain of that form and rank has a smaller error.
    exact : bool
        Whether the sweep holds every rank, each with the smallest error possible.
    """

    variants: Callable[[Factorization], tuple[str, ...]]
    sweep: Callable[[Factorization, str], Iterator[SweepPoint]]
    fit: Callable[[Factorization, Ints, str], Factorization]
    bound: Callable[[Factorization, Ints, str], float]
    exact: bool


@dataclass(frozen=True, slots=True)
class Kernel:
    """A dense convolution as the families see it.

    Attributes
    ----------
    tensor : ndarray of float64, shape (groups, out, in, *kernel)
        Channels a group, divided by `scale`, so that squares neither over- nor underflow.
    scale : float
        ``max|weight|``, 1 for a zero weight.
    axes : tuple of str
        Spatial axes that stages run along, as strings of letters: ``("h", "w")``.  An axis
        with one tap goes with the first of the others, for its stride and padding.
    """

    tensor: Array
    scale: float
    axes: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Groups of the convolution."""
        return int(self.tensor.shape[0])

    @property
    def outs(self) -> int:
        """Output channels a group (of a transposed convolution: input channels)."""
        return int(self.tensor.shape[1])

    @property
    def ins(self) -> int:
        """Input channels a group (of a transposed convolution: output channels)."""
        return int(self.tensor.shape[2])

    @property
    def pointwise(self) -> bool:
        """Whether there is one tap only."""
        return int(self.tensor[0, 0, 0].size) == 1

    @property
    def letters(self) -> str:
        """All spatial axes in order."""
        return LETTERS[3 - (self.tensor.ndim - 3) :]


Fit = TypeVar("Fit", bound=Callable[..., Factorization])


def on_weight_device(fit: Fit) -> Fit:
    """A fit whose arrays are made where the weights are: on their GPU, whichever is current."""

    @functools.wraps(fit)
    def there(*arguments: Any, **options: Any) -> Factorization:
        conv = next((a for a in arguments if isinstance(a, Factorization)), None)
        with engine.at(None if conv is None else conv.stages[0].weight):
            return fit(*arguments, **options)

    return there  # type: ignore[return-value]


def as_kernel(conv: Factorization) -> Kernel:
    """`conv` as families see it; ValueError if it is not a single dense stage."""
    if not isinstance(conv, Factorization):
        raise TypeError(
            f"conv must come from lowrank.dense(weight, ...), got {type(conv).__qualname__}"
        )
    stage = conv.stages[0]
    tied = stage.left * stage.right > 1 or stage.shuffle != (1, 1)
    if len(conv.stages) != 1 or tied or stage.groups != conv.groups:
        raise ValueError(
            f"conv must be one dense stage, from lowrank.dense(weight, ...), got {conv!r}"
        )
    g, taps = conv.groups, stage.kernel
    scale = chain_algebra.magnitude(stage.weight) or 1.0
    tensor = stage.weight.astype(np.float64) / scale
    letters = LETTERS[3 - len(taps) :]
    long = [a for a, k in zip(letters, taps) if k > 1]
    unit = "".join(a for a, k in zip(letters, taps) if k == 1)
    joined = ("".join(sorted(a + unit * (i == 0))) for i, a in enumerate(long))
    axes = tuple(joined) or (letters,)
    return Kernel(tensor.reshape(g, -1, *tensor.shape[1:]), scale, axes)


def index(letters: str, ndim: int) -> tuple[int, ...]:
    """Numbers of the spatial axes with these letters."""
    return tuple(LETTERS.index(a) - (3 - ndim) for a in letters)


def oriented(conv: Factorization, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """`stages`, fitted to the weight as a plain convolution, in the direction of `conv`."""
    dtype = conv.dtype
    if not is_abstract(stages[0].weight):
        kept = [s.weight.astype(dtype, order="C", copy=False) for s in stages]
        stages = [replace(s, weight=w) for s, w in zip(stages, kept)]
    if conv.transposed:
        stages = [s.adjoint() for s in reversed(stages)]
    return tuple(stages)


def norm_balance(stages: Sequence[Stage]) -> list[Stage]:
    """The same chain with weights of equal norm: no stage runs into the range of half floats."""
    norms = [float(np.linalg.norm(s.weight)) for s in stages]
    if not all(norms):
        return list(stages)
    each = math.exp(sum(map(math.log, norms)) / len(norms))
    return [replace(s, weight=s.weight * (each / n)) for s, n in zip(stages, norms)]


def checked_rank(rank: int | Sequence[int], largest: Sequence[int], names: str) -> Ints:
    """`rank` as a tuple of integers between 1 and `largest`."""
    try:
        ranks = tuple(operator.index(r) for r in (rank if isinstance(rank, Iterable) else (rank,)))
    except TypeError:
        raise TypeError(f"rank must be {names}, integers, got {rank!r}") from None
    if len(ranks) != len(largest):
        raise ValueError(f"rank must be {names}, {len(largest)} numbers, got {rank!r}")
    if any(not 1 <= r <= m for r, m in zip(ranks, largest)):
        limits = ", ".join(f"1 to {m}" for m in largest)
        raise ValueError(f"rank ({names}) must be from {limits}, got {rank!r}")
    return ranks


def checked_variant(variant: str | None, variants: Sequence[str]) -> str:
    """`variant`, or the first of `variants` if it is not given."""
    if variant is None:
        return variants[0]
    if variant not in variants:
        raise ValueError(f"variant must be one of {', '.join(variants)}, got {variant!r}")
    return variant
