"""The ways to run a filter, and the one that is predicted to be fastest on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from lowrank import backends, machine, report, search
from lowrank._typing import Array, Ints
from lowrank.backends import fourier
from lowrank.factorization import Factorization
from lowrank.families import FAMILIES, NotApplicable
from lowrank.stage import Epilogue

Method = Literal["auto", "direct", "separable", "fft"]

#: Families that have something to offer for a filter of one channel.
FAMILIES_OF_FILTERS = ("spatial", "filter", "tensor_train")
LEVELS = 255.0  # of grey, that bounds are stated for
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
    """

    method: str
    rank: Ints
    error: float
    grey: float
    seconds: float
    chain: Factorization
    block: Ints | None

    @property
    def name(self) -> str:
        """The method with its form or block."""
        if self.block is not None:
            return f"fft, blocks of {'x'.join(map(str, self.block))}"
        return " ".join(filter(None, (self.method, self.chain.form)))


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
        return "\n".join([self._title(), *report.columns(self._rows())])

    def _repr_html_(self) -> str:
        return report.html_table(self._rows(), [self._title()])

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
                    report.time(o.seconds),
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
    batch: int = 1,
    itemsize: int = 4,
    threads: int | None = None,
) -> FilterPlan:
    """The options for a dense stage of one channel, and the choice among them."""
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number, at least 0, got {tolerance!r}")
    weight = conv.to_dense()
    kernel, spatial = weight[0, 0], tuple(spatial)
    here = machine.current()

    def option(method: str, chain: Factorization) -> Option:
        took = here.of_stages(chain.stages, (1, *spatial), batch, threads, itemsize=itemsize)
        grey = _grey(chain.to_dense()[0, 0].astype(np.float64) - kernel)
        return Option(method, chain.rank, chain.error(weight), grey, took.seconds, chain, None)

    if rank is None:
        found = [option("direct", conv)]
        found += [option("separable", f) for f in separable(conv, spatial, tolerance)]
        if kernel.size > 1:
            found.append(_transforms(conv, kernel.shape, spatial, batch, itemsize, threads))
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
            f"there is no {method} form of error {tolerance:.3g} at the most"
            + ("" if near is None else f"; that of rank {near.rank} has {near.error:.3g}")
        )
    return FilterPlan(tuple(found), tolerance, kernel, spatial, taken[0])


def separable(conv: Factorization, spatial: Ints, tolerance: float) -> list[Factorization]:
    """Chains for a filter that are worth a look: the cheapest of each form within the tolerance.

    And the last two beyond it, to show what a little more would buy.
    """
    front = search.frontier(conv, spatial, FAMILIES_OF_FILTERS, axis="macs")
    found = [c for c in front if c.family != "dense"]
    within: dict[str, search.Candidate] = {}
    for c in found:
        if c.error <= tolerance:
            within.setdefault(c.name, c)
    beyond = [c for c in found if c.error > tolerance][-2:]
    return [c.build() for c in (*beyond, *within.values())]


def of_rank(conv: Factorization, rank: int) -> Factorization:
    """The best sum of so many separable terms."""
    for family in ("spatial", "filter"):
        try:
            FAMILIES[family].forms(conv)
        except NotApplicable:
            continue
        long = sum(n > 1 for n in conv.stages[0].kernel)
        if family == "filter" or long == 2:
            return FAMILIES[family].fit(conv, rank, None)  # type: ignore[arg-type]
    if rank != 1:
        raise ValueError(f"a filter along one axis has rank 1, got rank {rank}")
    return conv


def _transforms(
    conv: Factorization, taps: Ints, spatial: Ints, batch: int, itemsize: int, threads: int | None
) -> Option:
    """Transforms of the blocks that are predicted to be fastest."""
    here = machine.current()
    found = []
    blocks = fourier.blocks(taps, spatial)
    for block in blocks:
        if block is blocks[0] or max(block) <= BLOCKS * min(block):
            took = here.of_transforms(taps, spatial, block, threads, itemsize)
            found.append((took.seconds * batch, block))
    seconds, block = min(found)
    return Option("fft", (), 0.0, 0.0, seconds, conv, block)


def runner(
    option: Option,
    spatial: Ints,
    dtype: Any,
    threads: int | None,
    interleaved: int = 1,
) -> backends.Runner | fourier.Plan:
    """What runs images of (n, 1, \\*spatial); transforms take no interleaved samples."""
    stages = option.chain.stages
    if option.block is not None:
        g = option.chain.geometry
        before = [b for b, _ in g.padding]
        kernel = option.chain.to_dense()[0, 0]
        return fourier.plan(
            kernel, spatial, dtype, before, g.padding_mode, g.value, threads, option.block
        )
    ends = [Epilogue()] * len(stages)
    return backends.plan(stages, (1, *spatial), np.dtype(dtype), ends, threads, interleaved)


def _grey(missed: Array) -> float:
    """The most that is lost on values from 0 to LEVELS: where all of one sign meet the most."""
    return LEVELS * max(float(missed[missed > 0].sum()), -float(missed[missed < 0].sum()))
