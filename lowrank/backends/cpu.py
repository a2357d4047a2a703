"""The compiled engine: chains lowered to what it runs, planned once, run many times.

Lowering changes the words, never the meaning:

* spatial axes become the last of three, and axes of length one disappear;
* a border mode other than zeros moves to the chain's input, where one table of indices an
  axis stands for any mode.  That is exact while the stages before are pointwise along the
  axis, which is the rule that chains are built by; other chains are cut in two there;
* a transposed stage becomes a plain one with its taps reversed; with a stride s, one that
  gives s output phases as channels, which are woven together afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lowrank import reference
from lowrank._kernels.spec import StageSpec
from lowrank._typing import Array, Ints, trailing
from lowrank.backends import INTEGERS, Step, tiling
from lowrank.cost import chain_shapes
from lowrank.geometry import integers
from lowrank.stage import Epilogue, Stage

try:
    from lowrank._kernels import _core
except ImportError as missing:
    raise ImportError(
        "lowrank's compiled engine is not there. In a checkout, build it with "
        "'python setup.py build_ext --inplace' or 'pip install -e .'; a folder named lowrank in "
        "the current directory hides an installed one"
    ) from missing

AXES = 3  # spatial axes of the engine
Link = tuple[Stage, Epilogue]  # of a chain
BATCHES = 8  # that a plan keeps segments for
WORTH = 1e-4  # seconds of work that are worth a team for each stage


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A part of a chain that the engine runs in one go, and what NumPy does around it."""

    core: _core.Plan
    engine_in: Ints  # spatial sizes as the engine has them
    engine_out: Ints
    size_out: Ints  # and as the chain has them, before `after`
    spare: bool  # whether the engine has an axis to spare
    batched: bool  # whether the examples go along it
    before: Callable[[Array], Array] | None
    after: Callable[[Array], Array] | None
    names: tuple[str, ...]  # of its stages
    seconds: float  # a guess of one example on one thread


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A chain planned for one input shape and precision; safe from many threads.

    Where the engine has an axis to spare, the examples of a batch go along it, so that weights
    that are in the cache serve several of them: a batch has segments of its own, made when it
    first comes and kept.
    """

    planned: dict[int, tuple[Segment, ...]]  # by batch
    make: Callable[[int], tuple[Segment, ...]]
    in_shape: Ints
    out_shape: Ints
    dtype: Any
    threads: int

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those of a single example."""
        return self._segments(1)

    def _segments(self, batch: int) -> tuple[Segment, ...]:
        batch = max(batch, 1)
        if not any(s.spare for s in self.planned[1]):  # then only this matters of a batch
            batch = 1 if batch < self.threads else self.threads
        found = self.planned.get(batch)
        if found is None:
            found = self.make(batch)
            if len(self.planned) >= BATCHES:  # the oldest goes, but never that of one example
                self.planned.pop(next(n for n in list(self.planned) if n > 1), None)
            self.planned[batch] = found
        return found

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run the plan on `x`, (batch, channels, *spatial); see Factorization.compile."""
        x, out = self._checked(x, out)
        segments = self._segments(len(x))
        last = len(segments) - 1
        for i, segment in enumerate(segments):
            direct = out is not None and out.flags.aligned and segment.after is None
            x = self._run(segment, x, out if i == last and direct else None)
        if out is None or x is out:
            return x
        out[...] = reference.saturated(x, out.dtype) if out.dtype in INTEGERS else x
        return out

    def breakdown(self, x: Array, out: Array | None = None, *, repeat: int = 5) -> tuple[Step, ...]:
        """Where the time of a run on `x` goes; see Step."""
        (repeat,) = integers("repeat", repeat, 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        out = self(x, out)
        runs = [self._timed(x, out) for _ in range(repeat)]
        runs.sort(key=lambda steps: sum(s.seconds for s in steps))
        return tuple(runs[len(runs) // 2])

    def _timed(self, x: Array, out: Array) -> list[Step]:
        x, _ = self._checked(x, out)
        found = []
        segments = self._segments(len(x))
        for i, segment in enumerate(segments):
            target = out if i == len(segments) - 1 and segment.after is None else None
            start = time.perf_counter()
            clocked: list[Any] = []
            x = self._run(segment, x, target, clocked)
            whole = time.perf_counter() - start
            took, team, steps = clocked[0]
            rest = took
            for stage, name, seconds, macs, moved in steps:
                seconds /= team
                rest -= seconds
                if name != "deliver":
                    found.append(Step(segment.names[stage], name, seconds, macs, moved))
                elif moved:
                    found.append(Step("run", name, seconds, macs, moved))
            found.append(Step("run", "rest", rest, 0, 0))
            if segment.before is not None or segment.after is not None:
                found.append(Step("run", "prepare", whole - took, 0, 0))
        return found

    def _checked(self, x: Array, out: Array | None) -> tuple[Array, Array | None]:
        if not isinstance(x, np.ndarray) or (x.dtype != self.dtype and x.dtype not in INTEGERS):
            raise TypeError(
                f"this plan takes {self.dtype} arrays, or 8- or 16-bit integers, got "
                f"{getattr(x, 'dtype', None) or type(x).__qualname__}"
            )
        if x.shape[1:] != self.in_shape:
            raise ValueError(f"this plan takes (batch, {self.in_shape}), got {x.shape}")
        if not x.flags.aligned:
            x = x.copy()
        if out is None:
            return x, out
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array, got {type(out).__qualname__}")
        shape = (len(x), *self.out_shape)
        if out.shape != shape or (out.dtype != self.dtype and out.dtype not in INTEGERS):
            raise ValueError(
                f"out must be {self.dtype}, or 8- or 16-bit integers, of shape {shape}, got "
                f"{out.dtype} of {out.shape}"
            )
        if not out.flags.writeable:
            raise ValueError("out is read-only")
        return x, out

    def _run(
        self, segment: Segment, x: Array, out: Array | None, clocked: list[Any] | None = None
    ) -> Array:
        if segment.before is not None:
            x = segment.before(x.astype(self.dtype, copy=False))
        if out is None:
            out = np.empty((len(x), segment.core.out_shape[0], *segment.size_out), self.dtype)
        if segment.batched:
            x, y = x.swapaxes(0, 1), out.swapaxes(0, 1)
            x, y = (a.reshape(1, len(a), *size) for a, size in (
                (x, segment.engine_in), (y, segment.engine_out)
            ))  # fmt: skip
        else:
            x = x.reshape(*x.shape[:2], *segment.engine_in)
            y = out.reshape(*out.shape[:2], *segment.engine_out)
        if clocked is None:
            segment.core(x, y, self.threads)
        else:
            clocked.append(segment.core.breakdown(x, y, self.threads))
        return out if segment.after is None else segment.after(out)


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: Any,
    epilogues: Sequence[Epilogue],
    threads: int | None = None,
    interleaved: int = 1,
) -> Plan:
    """Lower `stages` for inputs of `shape` = (channels, *spatial) and let the engine plan them."""
    threads = threads or _core.max_threads()
    links = list(zip(stages, epilogues))
    make = partial(_segments, links, shape, dtype, threads, interleaved)
    ends = shape, chain_shapes(stages, shape)[-1]
    (*a, wide_in), (*b, wide_out) = ends
    in_shape, out_shape = (*a, wide_in * interleaved), (*b, wide_out * interleaved)
    return Plan({1: make(1)}, make, in_shape, out_shape, np.dtype(dtype), threads)


def _segments(
    links: Sequence[Link], shape: Ints, dtype: Any, threads: int, interleaved: int, batch: int
) -> tuple[Segment, ...]:
    """The segments for a batch of this size."""
    fused = _planned(_cut(links), shape, dtype, threads, interleaved, batch)
    small = sum(s.seconds for s in fused) < WORTH
    if min(s.core.jobs for s in fused) >= threads or len(links) == 1 or batch >= threads or small:
        return fused
    # Too few samples for a tile a thread: stage by stage, where threads share output channels.
    return _planned([[link] for link in links], shape, dtype, threads, interleaved, batch)


def _planned(
    parts: Sequence[Sequence[Link]],
    shape: Ints,
    dtype: Any,
    threads: int,
    interleaved: int,
    batch: int,
) -> tuple[Segment, ...]:
    """The segments of a chain that is cut into `parts`."""
    segments, at = [], shape
    first = parts[0][0][0]
    outside = np.full(shape[0], first.geometry.value, dtype)
    number = 0
    for part in parts:
        segments.append(_segment(part, at, dtype, threads, interleaved, batch, outside, number))
        at = chain_shapes([stage for stage, _ in part], at)[-1]
        for stage, epilogue in part:
            outside = reference.ended(reference.still(stage, outside), epilogue)
        number += len(part)
    return tuple(segments)


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


def _segment(
    links: Sequence[Link],
    shape: Ints,
    dtype: Any,
    threads: int,
    interleaved: int,
    batch: int,
    outside: Array,
    number: int,
) -> Segment:
    """The engine's plan of `links`, of which the first is stage `number` of the whole chain."""
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

    lowered = [
        StageSpec(
            np.ascontiguousarray(
                s.weight.reshape(*s.weight.shape[:2], *placed(s.kernel, 1)), dtype=dtype
            ),
            s.left,
            s.groups,
            s.right,
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
    ]
    batched = batch > 1 and lead > 0

    def sized(values: Sequence[int]) -> Ints:
        given = placed(values, 1)
        return (*given[: lead - 1], batch, *given[lead:]) if batched else given

    engine_in = sized(size_in)
    whole = (shape[0], *engine_in)
    itemsize = np.dtype(dtype).itemsize
    tile = tiling.tile(lowered, whole, threads, itemsize, *_core.caches(), _core.wake(threads))
    seconds = tiling.seconds(lowered, whole)
    core = _core.Plan(
        lowered,
        whole,
        dtype=np.dtype(dtype).name,
        border=placed([border.get(a) for a in range(len(size_in))], None) if border else None,
        fill=fill,
        tile=tile,
        parts=tiling.parts(lowered, whole, tile, threads),
        seconds=seconds,
    )
    engine_out = core.out_shape[1:]
    spatial = engine_out[lead:]
    plain = [1] * len(size_in)
    for a, n in zip(keep, spatial):
        plain[a] = n
    names = tuple(f"{number + i}: {_shape(s.weight)}" for i, s in enumerate(part))
    return Segment(
        core,
        engine_in,
        engine_out,
        tuple(plain),
        lead > 0,
        batched,
        before,
        after,
        names,
        seconds,
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
    left: int
    groups: int
    right: int
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
        stage.left,
        stage.groups,
        stage.right,
        list(g.stride),
        list(g.dilation),
        [b if zeros else 0 for b, _ in g.padding],
        [a if zeros else 0 for _, a in g.padding],
        stage.source().astype(np.int32) if stage.shuffle != (1, 1) else None,
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
    return _Spec(weight, stage.left, groups, stage.right, [1] * n, dilation, before, after)


def _weave(stage: Stage, y: Array, size: Ints) -> Array:
    """Put the phases of a strided transposed stage in their places and crop to `size`."""
    g, n = stage.geometry, stage.geometry.ndim
    if max(g.stride) > 1:
        per = stage.left * stage.groups * stage.weight.shape[1]
        y = y.reshape(len(y), per, *g.stride, stage.right, *y.shape[2:])
        y = np.moveaxis(y, 2 + n, 2)
        order = [axis for a in range(n) for axis in (3 + n + a, 3 + a)]
        y = y.transpose(0, 1, 2, *order)
        whole = [y.shape[3 + 2 * a] * y.shape[4 + 2 * a] for a in range(n)]
        y = y.reshape(len(y), per * stage.right, *whole)
        y = y[trailing(*(slice(b, b + k) for (b, _), k in zip(g.padding, size)))]
    return np.ascontiguousarray(y[:, np.argsort(stage.source())])


def _unwoven(stage: Stage, bias: Array) -> Array:
    """The bias of each channel of :func:`_phases`."""
    phases = math.prod(stage.geometry.stride) if max(stage.geometry.stride) > 1 else 1
    each = bias[stage.source()].reshape(-1, 1, stage.right)
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
