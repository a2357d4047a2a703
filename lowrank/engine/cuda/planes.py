"""Steps of the kernels on planes: filters and depthwise stages of arrays with channels first."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from lowrank.engine.cuda import steps
from lowrank.engine.cuda.bound_stage import BoundStage, Run
from lowrank.engine.cuda.launch import CUDA_TYPES, VECTOR, Kernel
from lowrank.engine.cuda.steps import three

THREADS = 128  # per block
MAX_SUMS, MAX_TAPS, MAX_WORDS = 64, 64, 170  # words of a thread in registers: more would spill some
LONG = 7  # taps of a column, above which a thread computes single columns at the borders
MIN_RESIDENT = 1 << 17  # threads, so that a GPU's multiprocessors are half full
MAX_ROWS = 64  # outputs of a strip
TAPS, ONE_TERM, TERMS = 0, 1, 2  # forms of `planes` in kernels.cu


class Geometry(NamedTuple):
    """Sizes of planes and taps along two axes; samples of a row are `step` apart.

    `tables` are the input positions along both axes, `before` the border samples before each.
    """

    taps: tuple[int, int]
    size: tuple[int, int]
    out: tuple[int, int]
    before: tuple[int, int]
    tables: tuple[Any, Any]
    stride: int = 1
    step: int = 1

    def rows(self, periods: int) -> int:
        """Return the rows of outputs of a strip; see `planar` in kernels.cu."""
        period = -(-self.taps[0] // self.stride) * self.stride
        unrolled = period * max(1, 4 // period) if self.taps[0] > 1 else period
        return (periods * unrolled - self.taps[0]) // self.stride + 1

    def columns(self, itemsize: int, form: int) -> int:
        """Return the columns of outputs of a thread; `itemsize` is the larger one.

        The thread holds its sums, the samples of a row, at the borders also their positions, and
        the taps if they are few.
        """
        words = 2 if itemsize == 8 else 1
        taps = {TAPS: math.prod(self.taps), ONE_TERM: sum(self.taps), TERMS: 0}[form]
        held = taps * words if taps * words <= MAX_TAPS else 0
        sums = -(-self.taps[0] // self.stride) * words

        def fits(columns: int, positions: int) -> bool:
            span = (columns - 1) * self.stride + (self.taps[1] - 1) * self.step + 1
            used = min(span, columns * self.taps[1])
            return columns * sums + used * (words + positions) + held <= MAX_WORDS

        columns = VECTOR // itemsize
        while columns > 1 and not (
            columns * sums <= MAX_SUMS - (held if form == TAPS else 0)
            and fits(columns, 0)
            and (self.taps[0] > LONG or fits(columns, 1))
        ):
            columns //= 2
        return columns

    def periods(self, planes: int, columns: int) -> int:
        """Return the length of a strip: long ones read few rows twice, short ones are many."""
        across = -(-self.out[1] // columns)
        periods = 1
        while self.rows(periods) < min(self.taps[0], self.out[0]):
            periods += 1
        while self.rows(periods) < min(MAX_ROWS, self.out[0]):
            strips = -(-self.out[0] // self.rows(periods + 1))
            if planes * across * strips < MIN_RESIDENT:
                break
            periods += 1
        return periods


class Planes:
    """Launches of `planes` on arrays of any of the types that it reads and writes.

    Parameters
    ----------
    geometry : Geometry
        Sizes along the two axes.
    form : int
        TAPS, ONE_TERM or TERMS.
    weight, bias : array
        Taps, (sets, terms, taps), and bias per channel, in the type of the sums.
    per, channels : int
        Outputs per input plane, and output channels.
    depth : int
        Consecutive planes of a channel.
    activation : int
        Number of the activation.
    """

    def __init__(
        self, geometry: Geometry, form: int, weight: Any, bias: Any, *, per: int, channels: int,
        depth: int = 1, activation: int = 0,
    ) -> None:  # fmt: skip
        self._geometry, self._form = geometry, form
        (size, out, before) = geometry.size, geometry.out, geometry.before
        sets, terms = weight.shape[:2]
        self._fixed = (
            weight, bias, *geometry.tables, per, sets, channels, depth, *size, *out, *before, terms,
            activation,
        )  # fmt: skip
        self.compile = functools.cache(self._compile)
        self._launches: dict[tuple[int, int, int], tuple[Kernel, int, int]] = {}

    def __call__(self, x: Any, y: Any, planes: int) -> None:
        """Compute `planes` planes of outputs."""
        key = planes, x.dtype.num, y.dtype.num
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._prepare(x.dtype, y.dtype, planes)
        kernel, blocks, periods = launch
        kernel(blocks, x, y, planes, periods)

    def _prepare(self, x: Any, y: Any, planes: int) -> tuple[Kernel, int, int]:
        """Return the kernel for arrays of these types, its blocks, and the length of a strip."""
        kernel, columns = self.compile(x, y)
        periods = self._geometry.periods(planes, columns)
        high, wide = self._geometry.out
        strips = -(-high // self._geometry.rows(periods)) * -(-wide // columns)
        return kernel, -(-planes * strips // THREADS), periods

    def _compile(self, x: Any, y: Any) -> tuple[Kernel, int]:
        """Return the kernel for arrays of these types, and the columns of a thread."""
        g = self._geometry
        columns = g.columns(max(x.itemsize, y.itemsize), self._form)
        width = math.gcd(columns * g.stride, VECTOR // x.itemsize)
        is_aligned = g.size[1] % width == 0 and g.out[1] % columns == 0
        offset = -g.before[1] % width if is_aligned else -1
        kinds = f"{CUDA_TYPES[x.name]}, {CUDA_TYPES[y.name]}"
        numbers = *g.taps, g.stride, g.step, columns, offset, self._form
        name = f"planes<{kinds}, {', '.join(map(str, numbers))}>"
        return Kernel(name, *self._fixed, threads=THREADS), columns


def depthwise(bound: BoundStage, dtype: Any, sum_dtype: Any, interleaved: int) -> Run:
    """Build a step with one input channel per group."""
    s, g = bound.stage, bound.stage.geometry
    weight = cupy.ascontiguousarray(bound.weight).astype(sum_dtype)
    bias, activation = bound.bias(sum_dtype), bound.activation
    per, channels = weight.shape[1], bound.out_shape[0]
    size, out = bound.sizes
    tables = bound.padded_tables()
    if steps.is_planar(s):
        sizes = three(s.kernel)[1:], size[1:], out[1:], bound.before[1:]
        geometry = _interleaved(Geometry(*sizes, (tables[1], tables[2]), g.stride[-1]), interleaved)
        weight = weight.reshape(-1, 1, math.prod(s.kernel))
        planes = Planes(
            geometry, TAPS, weight, bias, per=per, channels=channels, activation=activation
        )
        planes.compile(dtype, dtype)
        return lambda x, y, _: planes(x, y, len(x) * channels)
    sets = s.groups * per
    kernel = Kernel(
        f"depthwise_any<{CUDA_TYPES[dtype.name]}>", weight, bias, *tables, per, sets, channels,
        *size, *out, *three(s.kernel), *three(g.stride), *three(g.dilation), activation,
    )  # fmt: skip
    blocks = -(-math.prod(out) // kernel.threads) * channels
    return lambda x, y, _: kernel(len(x) * blocks, x, y)


def filter_passes(
    chain: Sequence[BoundStage], step: steps.KernelStep, dtype: Any, sum_dtype: Any,
    interleaved: int,
) -> tuple[Run, int]:  # fmt: skip
    """Build the 1-D passes of a filter; also return the sums per example that it keeps.

    The passes along the last two axes are one kernel.  That along the first is another, which
    treats the other two as one.
    """
    first, last = chain[0], chain[-1]
    s = first.stage
    groups, terms, channels = s.groups, len(s.weight) // s.groups, step.out_shape[0]
    owners = {axis_of_three(bound): bound for bound in chain}
    size, out = three(step.in_shape[1:]), three(step.out_shape[1:])
    taps, tables, before = [], [], []
    for axis in range(3):
        bound = owners.get(axis)
        if bound is None:
            taps.append(cupy.ones((groups, terms, 1), sum_dtype))
            tables.append(cupy.arange(size[axis], dtype=np.int32))
            before.append(0)
        else:
            taps.append(bound.stage.weight.reshape(groups, terms, -1).astype(sum_dtype))
            tables.append(bound.padded_tables()[axis])
            before.append(bound.before[axis])
    bias, activation = last.bias(sum_dtype), last.activation
    depth, is_flat = size[0], step.taps[0] == 1
    geometry = Geometry(
        step.taps[1:], size[1:], out[1:], (before[1], before[2]), (tables[1], tables[2])
    )
    flat = Planes(
        _interleaved(geometry, interleaved), ONE_TERM if terms == 1 else TERMS,
        cupy.concatenate(taps[1:], axis=2), bias if is_flat else cupy.zeros_like(bias), per=1,
        channels=channels, depth=depth, activation=activation if is_flat else 0,
    )  # fmt: skip
    flat.compile(dtype, dtype if is_flat else sum_dtype)
    if is_flat:
        return (lambda x, y, _: flat(x, y, len(x) * channels * depth)), 0
    area = out[1] * out[2]
    across = Planes(
        Geometry(
            (step.taps[0], 1), (depth, area), (out[0], area), (before[0], 0),
            (tables[0], cupy.arange(area, dtype=np.int32)),
        ),
        ONE_TERM, cupy.concatenate([taps[0], cupy.ones((groups, 1, 1), sum_dtype)], axis=2), bias,
        per=1, channels=channels, activation=activation,
    )  # fmt: skip
    sums = channels * depth * area

    def run(x: Any, y: Any, scratch: Any) -> None:
        between = scratch.view(sum_dtype)[: len(x) * sums]
        flat(x, between, len(x) * channels * depth)
        across(between, y, len(x) * channels)

    return run, sums


def axis_of_three(bound: BoundStage) -> int:
    """Return the axis of a 1-D pass, of three."""
    (axis,) = steps.axes_of(bound.stage)
    return axis + 3 - bound.stage.geometry.ndim


def _interleaved(g: Geometry, step: int) -> Geometry:
    """Return the geometry of rows with `step` values per sample."""
    if step == 1:
        return g
    table = g.tables[1][:, None]
    values = cupy.where(table < 0, -1, table * step + cupy.arange(step, dtype=np.int32))
    table = cupy.ascontiguousarray(values.reshape(-1).astype(np.int32))
    size, out, before = ((n, m * step) for n, m in (g.size, g.out, g.before))
    return g._replace(size=size, out=out, before=before, tables=(g.tables[0], table), step=step)
