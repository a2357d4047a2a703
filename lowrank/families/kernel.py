"""A dense kernel as the families see it, and the checks and conversions that they share."""

from __future__ import annotations

import functools
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra
from lowrank.core.stage import Stage, is_abstract
from lowrank.factorization import Factorization

#: Letters of the spatial axes; 1-D kernels use the last, 2-D kernels the last two.
LETTERS = "dhw"


class NotApplicable(ValueError):
    """A family has no variant for this convolution; the message says why."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Kernel:
    """A dense convolution as the families see it.  All sweeps of one kernel share it.

    Attributes
    ----------
    tensor : ndarray of float64, shape (groups, out, in, *kernel)
        Weight per group, divided by `scale` so that squares neither overflow nor underflow.
    scale : float
        ``max|weight|``, 1 for a zero weight.
    axes : tuple of str
        Spatial axes that stages run along, as strings of letters: ``("h", "w")``.  Axes with
        one tap join the first of the others, which takes over their stride and padding.
    weight : ndarray
        Weight that it was made from.
    """

    tensor: Array
    scale: float
    axes: tuple[str, ...]
    weight: Array

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.tensor.shape[0])

    @property
    def outs(self) -> int:
        """Output channels per group (input channels of a transposed convolution)."""
        return int(self.tensor.shape[1])

    @property
    def ins(self) -> int:
        """Input channels per group (output channels of a transposed convolution)."""
        return int(self.tensor.shape[2])

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel has a single tap."""
        return int(self.tensor[0, 0, 0].size) == 1

    @property
    def letters(self) -> str:
        """Letters of all spatial axes, in order."""
        return LETTERS[3 - (self.tensor.ndim - 3) :]


Fit = TypeVar("Fit", bound=Callable[..., Factorization])


def on_weight_device(fit: Fit) -> Fit:
    """Run a fit with the device of the weights as the current one."""

    @functools.wraps(fit)
    def wrapper(*arguments: Any, **options: Any) -> Factorization:
        conv = next((a for a in arguments if isinstance(a, Factorization)), None)
        with engine.device_context(None if conv is None else conv.stages[0].weight):
            return fit(*arguments, **options)

    return wrapper  # type: ignore[return-value]


#: Kernels in use, by the identity of their weight and their number of groups.
_KERNELS: weakref.WeakValueDictionary[tuple[int, int], Kernel] = weakref.WeakValueDictionary()


def as_kernel(conv: Factorization) -> Kernel:
    """Return `conv` as the families see it; ValueError if it is not a single dense stage."""
    if not isinstance(conv, Factorization):
        raise TypeError(
            f"conv must come from lowrank.dense(weight, ...), got {type(conv).__qualname__}"
        )
    stage = conv.stages[0]
    tied = stage.outer * stage.inner > 1 or stage.shuffle != (1, 1)
    if len(conv.stages) != 1 or tied or stage.groups != conv.groups:
        raise ValueError(
            f"conv must be one dense stage, from lowrank.dense(weight, ...), got {conv!r}"
        )
    g, taps = conv.groups, stage.kernel
    # Weights are read-only, and a kernel keeps its own, so that the number is that of no other.
    key = id(stage.weight), g
    if (known := _KERNELS.get(key)) is not None:
        return known
    scale = chain_algebra.max_abs(stage.weight) or 1.0
    tensor = stage.weight.astype(np.float64) / scale
    letters = LETTERS[3 - len(taps) :]
    spatial = [a for a, k in zip(letters, taps) if k > 1]
    unit = "".join(a for a, k in zip(letters, taps) if k == 1)
    joined = ("".join(sorted(a + unit * (i == 0))) for i, a in enumerate(spatial))
    axes = tuple(joined) or (letters,)
    kernel = Kernel(tensor.reshape(g, -1, *tensor.shape[1:]), scale, axes, stage.weight)
    if isinstance(stage.weight, np.ndarray):  # others may be written to
        _KERNELS[key] = kernel
    return kernel


def axis_indices(letters: str, ndim: int) -> tuple[int, ...]:
    """Return the indices of the spatial axes with these letters."""
    return tuple(LETTERS.index(a) - (3 - ndim) for a in letters)


def orient(conv: Factorization, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Return `stages`, which were fitted as a plain chain, in the dtype and direction of `conv`."""
    dtype = conv.dtype
    if not is_abstract(stages[0].weight):
        stages = [replace(s, weight=s.weight.astype(dtype, order="C", copy=False)) for s in stages]
    if conv.transposed:
        stages = [s.adjoint() for s in reversed(stages)]
    return tuple(stages)


def balance_norms(stages: Sequence[Stage]) -> list[Stage]:
    """Scale the weights of a chain to equal norms, which keeps all within the range of float16."""
    norms = [float(np.linalg.norm(s.weight)) for s in stages]
    if not all(norms):
        return list(stages)
    mean = math.exp(sum(map(math.log, norms)) / len(norms))
    return [replace(s, weight=s.weight * (mean / n)) for s, n in zip(stages, norms)]


def checked_rank(rank: int | Sequence[int], largest: Sequence[int], names: str) -> Ints:
    """Return `rank` as a tuple of integers between 1 and `largest`."""
    try:
        given = tuple(rank if isinstance(rank, Iterable) else (rank,))
        if any(isinstance(r, bool) for r in given):
            raise TypeError
        ranks = tuple(map(operator.index, given))
    except TypeError:
        raise TypeError(
            f"rank must be {names}, integers, or a share of the parameters between 0 and 1, got "
            f"{rank!r}"
        ) from None
    if len(ranks) != len(largest):
        raise ValueError(f"rank must be {names}, {len(largest)} numbers, got {rank!r}")
    if any(not 1 <= r <= m for r, m in zip(ranks, largest)):
        limits = ", ".join(f"1 to {m}" for m in largest)
        raise ValueError(f"rank ({names}) must be from {limits}, got {rank!r}")
    return ranks


def checked_variant(variant: str | None, variants: Sequence[str]) -> str:
    """Return `variant`, or the first of `variants` if it is None."""
    if variant is None:
        return variants[0]
    if variant not in variants:
        raise ValueError(f"variant must be one of {', '.join(variants)}, got {variant!r}")
    return variant
