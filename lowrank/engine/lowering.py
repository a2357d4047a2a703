"""A chain in the engine's words: what is run in one go, and cut into which tiles.

Lowering changes the words, never the meaning:

* spatial axes become the last of three, and axes of length one disappear;
* a border mode other than zeros moves to the chain's input, where one table of indices an
  axis stands for any mode.  That is exact while the stages before are pointwise along the
  axis, which is the rule that chains are built by; other chains are cut in two there;
* a transposed stage becomes a plain one with its taps reversed; with a stride s, one that
  gives s output phases as channels, which are woven together afterwards.

Weights are passed through as they are: a chain of blank ones can be lowered to be priced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lowrank._kernels import _core
from lowrank._kernels.layout import Layout
from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array, Ints, trailing
from lowrank.core import reference
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage, is_abstract
from lowrank.engine import tiling

AXES = 3  # spatial axes of the engine
Link = tuple[Stage, Epilogue]  # of a chain
WORTH = 1e-4  # seconds of work that are worth a team for each stage


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A part of a chain that the engine runs in one go, and what NumPy does around it."""

    specs: tuple[StageSpec, ...]
    shape: Ints  # (channels, d, h, w) of its input
    out_shape: Ints  # and of its output
    size_out: Ints  # spatial sizes of the output as the chain has them, before `after`
    border: tuple[Any, Any, Any] | None  # tables of indices
    fill: float  # what -1 in them stands for
    tile: Three
    parts: int  # of the output channels
    spare: bool  # whether the engine has an axis to spare
    batched: bool  # whether the examples go along it
    before: Callable[[Array], Array] | None
    after: Callable[[Array], Array] | None
    names: tuple[str, ...]  # of its stages
    seconds: float  # a guess of one example on one thread

    @property
    def jobs(self) -> int:
        """Pieces of work that one example is shared out in."""
        tiles = (-(-n // t) for n, t in zip(self.out_shape[1:], self.tile))
        return math.prod(tiles) * self.parts


def lowered(
    links: Sequence[Link], shape: Ints, dtype: Any, threads: int, interleaved: int, batch: int
) -> tuple[Part, ...]:
    """The parts of a chain for inputs of `shape` = (channels, *spatial), `batch` at a time."""
    fused = _parts(_cut(links), shape, dtype, threads, interleaved, batch)
    small = sum(s.seconds for s in fused) < WORTH
    if min(s.jobs for s in fused) >= threads or len(links) == 1 or batch >= threads or small:
        return fused
    # Too few samples for a tile a thread: stage by stage, where threads share output channels.
    return _parts([[link] for link in links], shape, dtype, threads, interleaved, batch)


def _parts(
    cut: Sequence[Sequence[Link]],
    shape: Ints,
    dtype: Any,
    threads: int,
    interleaved: int,
    batch: int,
) -> tuple[Part, ...]:
    """The parts of a chain that is cut so."""
    parts, at = [], shape
    first = cut[0][0][0]
    outside = np.full(shape[0], first.geometry.value, dtype)
    number = 0
    for links in cut:
        parts.append(_part(links, at, dtype, threads, interleaved, batch, outside, number))
        at = chain_shapes([stage for stage, _ in links], at)[-1]
        if len(parts) < len(cut):
            for stage, epilogue in links:
                if is_abstract(stage.weight):  # what it makes of a border has no price
                    outside = np.zeros(stage.out_channels, dtype)
                else:
                    outside = reference.apply_epilogue(reference.dc_response(stage, outside), epilogue)
        number += len(links)
    return tuple(parts)


def _cut(links: Sequence[Link]) -> list[list[Link]]:
    """Runs of stages that the engine takes in one go: nearly always one run."""
    parts: list[list[Link]] = [[]]
    for link in links:
        earlier = [stage for stage, _ in parts[-1]]
        full = len(earlier) == _core.MAX_STAGES
        if earlier and (
            full or _woven(earlier[-1]) or not _reaches(earlier, link[0], len(parts) == 1)
        ):
            parts.append([])
        parts[-1].append(link)
    return parts


def _reaches(earlier: Sequence[Stage], stage: Stage, from_input: bool) -> bool:
    """Whether the border that `stage` wants can be put around the input of `earlier` instead."""
    axes = _padded(stage)
    if stage.geometry.padding_mode == "zeros" or not axes:
        return True  # the engine frames intermediate results with zeros
    filled = stage.geometry.padding_mode == "constant"
    for s in earlier:
        alike = s.geometry.padding_mode == stage.geometry.padding_mode
        if _padded(s) and (filled or s.geometry.padding_mode == "constant") and not alike:
            return False  # one constant a run
        if s.transposed or set(axes) & {*_padded(s)}:
            return False
        if any(s.kernel[a] > 1 or s.geometry.stride[a] > 1 for a in axes):
            return False
    return from_input or not filled


def _padded(stage: Stage) -> list[int]:
    return [a for a, p in enumerate(stage.geometry.padding) if any(p)]


def _woven(stage: Stage) -> bool:
    """Whether the result of `stage` has to be rearranged before the next stage can read it."""
    return stage.transposed and (max(stage.geometry.stride) > 1 or stage.shuffle != (1, 1))


def _part(
    links: Sequence[Link],
    shape: Ints,
    dtype: Any,
    threads: int,
    interleaved: int,
    batch: int,
    outside: Array,
    number: int,
) -> Part:
    """`links` as one part, of which the first is stage `number` of the whole chain."""
    part = [stage for stage, _ in links]
    size_in, size_out = shape[1:], chain_shapes(part, shape)[-1][1:]
    before = after = None
    g = part[0].geometry
    if _padded(part[0]) and g.padding_mode == "constant" and np.ptp(outside):
        # Each channel has a constant of its own here: padded in NumPy.
        before = partial(reference.pad, padding=g.padding, mode=g.padding_mode, outside=outside)
        size_in = tuple(n + sum(p) for n, p in zip(size_in, g.padding))
        part = [replace(part[0], geometry=replace(g, padding=((0, 0),) * g.ndim)), *part[1:]]
    specs = [_lower(s) for s in part]
    widths = [1] * (len(size_in) - 1) + [interleaved]  # numbers a sample, along each axis
    for spec in specs:
        for values in (spec.dilation, spec.before, spec.after):
            values[-1] *= interleaved
    size_in = tuple(n * m for n, m in zip(size_in, widths))
    size_out = tuple(n * m for n, m in zip(size_out, widths))
    if _woven(part[-1]):
        after = partial(_weave, part[-1], size=size_out)
    border: dict[int, Array] = {}
    fill = 0.0
    for stage, spec in zip(part, specs):
        mode = stage.geometry.padding_mode
        if mode == "zeros":
            continue
        for axis in _padded(stage):
            b, a = stage.geometry.padding[axis]
            m = widths[axis]
            table = _border(size_in[axis] // m, b, a, mode, m)
            b, a = b * m, a * m
            owner = specs[0]
            row = axis == len(size_in) - 1 and size_in[axis] > 1
            if spec is not owner and row and stage.geometry.stride[axis] == 1 and min(table) >= 0:
                # Rows are whole: their ends can be copied from what the stage before has put there.
                owner, spec.fold = spec, table
            else:
                border[axis] = table
            owner.before[axis], owner.after[axis] = b, a
            if mode == "constant":
                fill = float(outside[0])
    # The engine has three spatial axes; those of length one that nothing happens on go first.
    idle = [
        a
        for a, n in enumerate(size_in)
        if n == 1 and all(s.kernel[a] == 1 and not s.before[a] and not s.after[a] for s in specs)
    ]
    keep = [a for a in range(len(size_in)) if a not in idle]
    lead = AXES - len(keep)

    def placed(values: Sequence[Any], neutral: Any) -> tuple[Any, ...]:
        return (neutral,) * lead + tuple(values[a] for a in keep)

    specs_placed = tuple(
        StageSpec(
            s.weight.reshape(*s.weight.shape[:2], *placed(s.kernel, 1)),
            s.outer,
            s.groups,
            s.inner,
            placed(s.stride, 1),
            placed(s.dilation, 1),
            placed(s.before, 0),
            placed(s.after, 0),
            s.source,
            s.fold,
            _bias(stage, epilogue.bias, dtype),
            epilogue.activation,
        )
        for s, (stage, epilogue) in zip(specs, links)
    )
    batched = batch > 1 and lead > 0
    sizes = placed(size_in, 1)
    if batched:
        sizes = (*sizes[: lead - 1], batch, *sizes[lead:])
    whole = (shape[0], *sizes)
    itemsize = np.dtype(dtype).itemsize
    l1, l2, _ = _core.caches()
    tile = tiling.tile(specs_placed, whole, threads, itemsize, l1, l2, _core.wake(threads))
    out_shape = Layout(specs_placed, whole, None).out_shape
    plain = [1] * len(size_in)
    for a, n in zip(keep, out_shape[1 + lead :]):
        plain[a] = n
    return Part(
        specs_placed,
        whole,
        out_shape,
        tuple(plain),
        placed([border.get(a) for a in range(len(size_in))], None) if border else None,
        fill,
        tile,
        tiling.parts(specs_placed, whole, tile, threads),
        lead > 0,
        batched,
        before,
        after,
        tuple(f"{number + i}: {_shape(s.weight)}" for i, s in enumerate(part)),
        tiling.seconds(specs_placed, whole),
    )


def _shape(weight: Array) -> str:
    return "x".join(map(str, weight.shape))


def _bias(stage: Stage, bias: Array | None, dtype: Any) -> Array | None:
    if bias is None:
        return None
    return np.ascontiguousarray(_unwoven(stage, bias) if _woven(stage) else bias, dtype)


@dataclass(slots=True)
class _Spec:
    """A plain stage with the chain's own spatial axes, on its way to a StageSpec."""

    weight: Array
    outer: int
    groups: int
    inner: int
    stride: list[int]
    dilation: list[int]
    before: list[int]
    after: list[int]
    source: Array | None = None
    fold: Array | None = None

    @property
    def kernel(self) -> Ints:
        return tuple(self.weight.shape[2:])


def _lower(stage: Stage) -> _Spec:
    g = stage.geometry
    if stage.transposed:
        return _phases(stage)
    zeros = g.padding_mode == "zeros"
    return _Spec(
        stage.weight,
        stage.outer,
        stage.groups,
        stage.inner,
        list(g.stride),
        list(g.dilation),
        [b if zeros else 0 for b, _ in g.padding],
        [a if zeros else 0 for _, a in g.padding],
        stage.channel_permutation().astype(np.int32) if stage.shuffle != (1, 1) else None,
    )


def _phases(stage: Stage) -> _Spec:
    r"""A transposed stage as a plain one of stride 1 whose output channels are (c, \*phase).

    Output sample ``y`` of the uncropped result has phase ``y % s`` and sees input sample
    ``y // s - u`` through tap ``phase + s * u``, so each phase is a plain convolution with
    ``ceil(extent / s)`` taps, in reverse order.
    """
    g, groups = stage.geometry, stage.groups
    o, c = stage.weight.shape[:2]
    w = stage.weight.reshape(groups, o // groups, c, *stage.kernel).swapaxes(1, 2)
    strided = max(g.stride) > 1
    before, after, phases, dilation = [], [], [], []
    for axis, (s, d, k, (b, a), e, extra) in enumerate(
        zip(g.stride, g.dilation, stage.kernel, g.padding, g.extent(stage.kernel), g.output_padding)
    ):
        at = 3 + 2 * axis  # the axis is taken apart into (phase, tap) as we go
        if not strided:
            w = np.expand_dims(np.flip(w, at), at)
            before.append(d * (k - 1) - b)
            after.append(d * (k - 1) - a + extra)
            phases.append(1)
            dilation.append(d)
            continue
        taps = -(-e // s)
        spread = np.zeros((*w.shape[:at], taps * s, *w.shape[at + 1 :]), w.dtype)
        spread[(slice(None),) * at + (slice(0, e, d),)] = w
        spread = spread.reshape(*w.shape[:at], taps, s, *w.shape[at + 1 :])
        w = np.flip(spread, at).swapaxes(at, at + 1)
        # ceil(((n - 1) s + extent + extra) / s) outputs a phase, from n inputs
        before.append(taps - 1)
        after.append(-(-(e + extra) // s) - 1)
        phases.append(s)
        dilation.append(1)
    n = g.ndim
    w = w.transpose(0, 1, *(3 + 2 * a for a in range(n)), 2, *(4 + 2 * a for a in range(n)))
    weight = w.reshape(groups * c * math.prod(phases), o // groups, *w.shape[3 + n :])
    return _Spec(weight, stage.outer, groups, stage.inner, [1] * n, dilation, before, after)


def _weave(stage: Stage, y: Array, size: Ints) -> Array:
    """Put the phases of a strided transposed stage in their places and crop to `size`."""
    g, n = stage.geometry, stage.geometry.ndim
    if max(g.stride) > 1:
        per = stage.outer * stage.groups * stage.weight.shape[1]
        y = y.reshape(len(y), per, *g.stride, stage.inner, *y.shape[2:])
        y = np.moveaxis(y, 2 + n, 2)
        order = [axis for a in range(n) for axis in (3 + n + a, 3 + a)]
        y = y.transpose(0, 1, 2, *order)
        whole = [y.shape[3 + 2 * a] * y.shape[4 + 2 * a] for a in range(n)]
        y = y.reshape(len(y), per * stage.inner, *whole)
        y = y[trailing(*(slice(b, b + k) for (b, _), k in zip(g.padding, size)))]
    return np.ascontiguousarray(y[:, np.argsort(stage.channel_permutation())])


def _unwoven(stage: Stage, bias: Array) -> Array:
    """The bias of each channel of :func:`_phases`."""
    phases = math.prod(stage.geometry.stride) if max(stage.geometry.stride) > 1 else 1
    each = bias[stage.channel_permutation()].reshape(-1, 1, stage.inner)
    return np.repeat(each, phases, axis=1).reshape(-1)


def _border(n: int, before: int, after: int, mode: str, width: int) -> Array:
    """Index of the number that stands at each padded position; -1 is the constant.

    A sample is `width` numbers.
    """
    index = np.arange(n, dtype=np.int32).reshape(1, 1, n)
    minus = np.full(1, -1, np.int32)
    padded: Array = reference.pad(index, ((before, after),), mode, minus).reshape(-1, 1)
    numbers = np.where(padded < 0, -1, padded * width + np.arange(width, dtype=np.int32))
    return np.ascontiguousarray(numbers.reshape(-1), np.int32)
