"""The ways to run a filter, and the one that is predicted to be fastest on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from lowrank import engine, perfmodel, selection
from lowrank._typing import Array, Ints
from lowrank.core import chain_algebra, tables
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import fourier
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable

Method = Literal["auto", "direct", "separable", "fft"]

#: Families that have something to offer for a filter of one channel.
FAMILIES_OF_FILTERS = ("spatial_svd", "separable_sum", "tensor_train")
LEVELS = 255.0  # of grey, that bounds are stated for
LONG = 64  # numbers that are worth an axis of their own
MOVE = 6e-9  # seconds that a sample takes to its plane and back, roughly
BLOCKS = 8.0  # how much longer than wide a block of transforms may be


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One way to run a filter.

    Attributes
    ----------
    method : str
        ``"direct"``, ``"separable"`` or ``"fft"``.
    rank : tuple of int
        Terms of a separable form, as its family documents; else empty.
    error : float
        Relative Frobenius error of the kernel that is run.
    grey : float
        No result on values from 0 to 255 is farther off than this, rounding aside.
    seconds : float
        Predicted for this machine.
    chain : Factorization
        What is run.
    block : tuple of int or None
        For ``"fft"``, points of a transform along each axis.
    woven : bool
        Whether numbers that lie together, such as the colours of a pixel, go through in one pass
        as they lie; else plane by plane.
    """

    method: str
    rank: Ints
    error: float
    grey: float
    seconds: float
    chain: Factorization
    block: Ints | None = None
    woven: bool = False

    @property
    def name(self) -> str:
        """The method with its form or block."""
        if self.block is not None:
            return f"fft, blocks of {'x'.join(map(str, self.block))}"
        return " ".join(filter(None, (self.method, self.chain.variant)))


@dataclass(frozen=True, slots=True, eq=False)
class FilterPlan:
    """The ways to run a filter on images of one size; prints itself as a table.

    Attributes
    ----------
    options : tuple of Option
        Fastest predicted first.  Those beyond the tolerance are shown, and not taken.
    tolerance : float
        Largest relative Frobenius error of the kernel.
    kernel : ndarray
        The filter.
    shape : tuple of int
        Size of the images along the filter's axes.
    choice : Option
        The fastest within the tolerance, or the fastest of the method that was asked for.

    Examples
    --------
    >>> from lowrank import filters
    >>> plan = filters.plan_filter(filters.gauss(3.0), (512, 512))
    >>> plan.choice.method, plan.choice.rank
    ('separable', (1,))
    """

    options: tuple[Option, ...]
    tolerance: float
    kernel: Array
    shape: Ints
    choice: Option

    def __repr__(self) -> str:
        return "\n".join([self._title(), *tables.align_columns(self._rows())])

    def _repr_html_(self) -> str:
        return tables.html_table(self._rows(), [self._title()])

    def _title(self) -> str:
        taps, size = ("x".join(map(str, s)) for s in (self.kernel.shape, self.shape))
        return f"{taps} taps on {size}, tolerance {self.tolerance:.3g}; > is what is run"

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("  way", "rank", "error", "grey levels", "predicted", "of the fastest")
        ]
        least = self.choice.seconds
        for o in self.options:
            mark = "> " if o is self.choice else "  "
            rows.append(
                (
                    mark + o.name + ("" if o.error <= self.tolerance else " (beyond tolerance)"),
                    ",".join(map(str, o.rank)) or "-",
                    f"{o.error:.2g}",
                    f"{o.grey:.2g}",
                    tables.format_seconds(o.seconds),
                    f"{o.seconds / least:.2f}x",
                )
            )
        return rows


def plan_of(
    conv: Factorization,
    spatial: Sequence[int],
    tolerance: float,
    *,
    rank: int | None = None,
    method: Method = "auto",
    planes: int = 1,
    together: bool = False,
    itemsize: int = 4,
    threads: int | None = None,
) -> FilterPlan:
    """The options for a dense stage of one channel, and the choice among them.

    So many `planes` are filtered; `together` says that their samples lie side by side.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if rank is not None and method not in ("auto", "separable"):
        raise ValueError(f"rank asks for a separable form, which method {method!r} is not")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number, at least 0, got {tolerance!r}")
    weight = conv.to_dense()
    spatial = tuple(spatial)
    given = planes, together and planes > 1, itemsize, threads

    def option(method: str, chain: Factorization) -> Option:
        variant = chain.to_dense()
        error = chain_algebra.relative_error(variant, weight)
        grey = _grey(variant[0, 0].astype(np.float64) - weight[0, 0])
        seconds, woven = _timed(chain, spatial, *given)
        return Option(method, chain.rank, error, grey, seconds, chain, None, woven)

    if rank is None:
        found = [option("direct", conv)]
        found += [option("separable", f) for f in separable(conv, spatial, tolerance)]
        if weight.size > 1:
            found.append(_transforms(conv, weight.shape[2:], spatial, *given))
    else:
        found = [option("separable", of_rank(conv, rank))]
    found.sort(key=lambda o: o.seconds)
    taken = [
        o
        for o in found
        if method in ("auto", o.method) and (rank is not None or o.error <= tolerance)
    ]
    if not taken:
        near = min((o for o in found if o.method == method), key=lambda o: o.error, default=None)
        raise ValueError(
            f"no {method} form of error {tolerance:.3g} at the most has fewer multiply-adds than "
            "the kernel itself"
            + ("" if near is None else f"; that of rank {near.rank} has {near.error:.3g}")
            + ": give rank= for one of any rank"
        )
    return FilterPlan(tuple(found), tolerance, weight[0, 0], spatial, taken[0])


def _timed(
    chain: Factorization,
    spatial: Ints,
    planes: int,
    together: bool,
    itemsize: int,
    threads: int | None,
) -> tuple[float, bool]:
    """Predicted seconds, and whether samples that lie together had better stay so."""
    here = perfmodel.current()
    apart = here.of_stages(chain.stages, (1, *spatial), planes, threads, itemsize=itemsize).seconds
    if not together:
        return apart, False
    stages, shape, numbers = woven(chain, spatial, planes)
    joined = here.of_stages(
        stages, (1, *shape), 1, threads, itemsize=itemsize, interleaved=numbers
    ).seconds
    apart += MOVE * planes * math.prod(spatial)
    return min(joined, apart), joined <= apart


def woven(chain: Factorization, spatial: Ints, planes: int) -> tuple[tuple[Stage, ...], Ints, int]:
    """Stages and sizes for samples of so many numbers, and the numbers that are left a sample.

    A long row of numbers becomes an axis that nothing happens on, where there is one to spare.
    """
    if planes >= LONG and len(spatial) < 3:
        return tuple(map(_idle_axis, chain.stages)), (*spatial, planes), 1
    return chain.stages, spatial, planes


def _idle_axis(stage: Stage) -> Stage:
    """The stage with one more axis, behind the others, that nothing happens on."""
    g = stage.geometry
    longer = replace(
        g,
        stride=(*g.stride, 1),
        padding=(*g.padding, (0, 0)),
        dilation=(*g.dilation, 1),
        output_padding=(*g.output_padding, 0),
    )
    return replace(stage, weight=stage.weight[..., None], geometry=longer)


def separable(conv: Factorization, spatial: Ints, tolerance: float) -> list[Factorization]:
    """Chains for a filter that are worth a look: the cheapest of each form within the tolerance.

    And the last two beyond it, to show what a little more would buy.
    """
    front = selection.frontier(conv, spatial, FAMILIES_OF_FILTERS, axis="macs")
    found = [c for c in front if c.family != "dense"]
    within: dict[str, selection.Candidate] = {}
    for c in found:
        if c.error <= tolerance:
            within.setdefault(c.name, c)
    beyond = [c for c in found if c.error > tolerance][-2:]
    return [c.build() for c in (*beyond, *within.values())]


def of_rank(conv: Factorization, rank: int) -> Factorization:
    """The best sum of so many separable terms."""
    for family in ("spatial_svd", "separable_sum"):
        try:
            FAMILIES[family].variants(conv)
        except NotApplicable:
            continue
        long = sum(n > 1 for n in conv.stages[0].kernel)
        if family == "separable_sum" or long == 2:
            return FAMILIES[family].fit(conv, rank, None)  # type: ignore[arg-type]
    if rank != 1:
        raise ValueError(f"a filter along one axis has rank 1, got rank {rank}")
    return conv


def _transforms(
    conv: Factorization,
    taps: Ints,
    spatial: Ints,
    planes: int,
    together: bool,
    itemsize: int,
    threads: int | None,
) -> Option:
    """Transforms of the blocks that are predicted to be fastest."""
    here = perfmodel.current()
    found = []
    blocks = fourier.blocks(taps, spatial)
    for block in blocks:
        if block is blocks[0] or max(block) <= BLOCKS * min(block):
            took = here.of_transforms(taps, spatial, block, threads, itemsize)
            found.append((took.seconds * planes, block))
    seconds, block = min(found)
    seconds += MOVE * together * planes * math.prod(spatial)
    return Option("fft", (), 0.0, 0.0, seconds, conv, block)


def runner(
    option: Option, spatial: Ints, dtype: Any, threads: int | None, planes: int = 1
) -> engine.Runner | fourier.Plan:
    """What runs images of (n, 1, \\*spatial), of so many planes in one if the option is woven."""
    if option.block is not None:
        g = option.chain.geometry
        before = [b for b, _ in g.padding]
        kernel = option.chain.to_dense()[0, 0]
        return fourier.plan(
            kernel, spatial, dtype, before, g.padding_mode, g.value, threads, option.block
        )
    stages, numbers = option.chain.stages, 1
    if option.woven:
        stages, spatial, numbers = woven(option.chain, spatial, planes)
    ends = [Epilogue()] * len(stages)
    return engine.plan(stages, (1, *spatial), np.dtype(dtype), ends, threads, numbers)


def _grey(missed: Array) -> float:
    """The most that is lost on values from 0 to LEVELS: where all of one sign meet the most."""
    return LEVELS * max(float(missed[missed > 0].sum()), -float(missed[missed < 0].sum()))
