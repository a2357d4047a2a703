"""Lowering of a chain to segments: what the C engine runs at once, and in which tiles.

Lowering changes the representation, never the result:

* spatial axes become the last of three, and axes of length one disappear;
* a padding mode other than zeros moves to the chain's input, where one table of indices per axis
  expresses any mode.  This is exact while the stages before are pointwise along the axis, which
  holds for chains of this library; other chains are split there;
* a transposed stage becomes a plain one with its taps reversed; with a stride s, its s output
  phases become channels, and depth-to-space interleaves them afterwards.

Weights are passed through unread: chains of abstract weights can be lowered for predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from lowrank._kernels import _core
from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array, Ints, trailing
from lowrank.core import reference
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage, is_abstract
from lowrank.engine import tiling
from lowrank.engine.machine import fork_join_seconds
from lowrank.engine.padding import padded_indices

AXES = 3  # spatial axes of the engine
MIN_SPLIT_SECONDS = 1e-4  # of a chain that is worth one parallel region per stage
Link = tuple[Stage, Epilogue]


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Consecutive stages that the C engine runs at once, with NumPy steps around them.

    Attributes
    ----------
    specs : tuple of StageSpec
        The stages.
    in_shape, out_shape : tuple of int
        (channels, d, h, w) of the engine's input and output.
    out_size : tuple of int
        Spatial size of the output on the chain's own axes, before `after`.
    border : tuple or None
        Index in the input per padded position, -1 for `fill`, per axis.
    fill : float
        Border value.
    tile : (int, int, int)
        Output tile.
    splits : int
        Splits of the output channels.
    has_free_axis : bool
        Whether one of the engine's axes is unused.
    is_batched : bool
        Whether the examples of a batch lie along this axis.
    before, after : callable or None
        Padding ahead of the engine, depth-to-space behind it.
    names : tuple of str
        Number and weight shape of each stage.
    seconds : float
        Estimated time of one example on one thread.
    fork_join : float
        Fork/join latency in seconds, which threads have to save.
    """

    specs: tuple[StageSpec, ...]
    in_shape: Ints
    out_shape: Ints
    out_size: Ints
    border: tuple[Any, Any, Any] | None
    fill: float
    tile: Three
    splits: int
    has_free_axis: bool
    is_batched: bool
    before: Callable[[Array], Array] | None
    after: Callable[[Array], Array] | None
    names: tuple[str, ...]
    seconds: float
    fork_join: float

    @property
    def tasks(self) -> int:
        """Number of tasks of one example: tiles times output-channel splits."""
        tiles = (-(-n // t) for n, t in zip(self.out_shape[1:], self.tile))
        return math.prod(tiles) * self.splits


def lower(
    links: Sequence[Link], shape: Ints, dtype: Any, threads: int, interleaved: int, batch: int
) -> tuple[Segment, ...]:
    """Lower a chain for inputs of `shape` = (channels, *spatial), `batch` at a time."""
    fused = _lower_runs(_split(links), shape, dtype, threads, interleaved, batch)
    is_small = sum(s.seconds for s in fused) < MIN_SPLIT_SECONDS
    if min(s.tasks for s in fused) >= threads or len(links) == 1 or batch >= threads or is_small:
        return fused
    # Fewer tiles than threads: one segment per stage, whose output channels threads can split.
    return _lower_runs([[link] for link in links], shape, dtype, threads, interleaved, batch)


def lower_untiled(links: Sequence[Link], shape: Ints, dtype: Any) -> tuple[Segment, ...]:
    """Lower a chain for one input of `shape` in tiles that are whole images: for its counts."""
    return _lower_runs(_split(links), shape, dtype, None, 1, 1)


def _lower_runs(
    runs: Sequence[Sequence[Link]],
    shape: Ints,
    dtype: Any,
    threads: int | None,
    interleaved: int,
    batch: int,
) -> tuple[Segment, ...]:
    """Lower each run of links to one segment."""
    segments: list[Segment] = []
    border_value = np.full(shape[0], runs[0][0][0].geometry.value, dtype)
    number = 0
    for links in runs:
        segments.append(
            _lower_run(links, shape, dtype, threads, interleaved, batch, border_value, number)
        )
        shape = chain_shapes([stage for stage, _ in links], shape)[-1]
        if len(segments) < len(runs):
            for stage, epilogue in links:
                if is_abstract(stage.weight):  # values do not matter to predictions
                    border_value = np.zeros(stage.out_channels, dtype)
                else:
                    response = reference.dc_response(stage, border_value)
                    border_value = reference.apply_epilogue(response, epilogue)
        number += len(links)
    return tuple(segments)


def _split(links: Sequence[Link]) -> list[list[Link]]:
    """Split a chain into runs that the engine can take at once: nearly always one."""
    runs: list[list[Link]] = [[]]
    max_stages = _core.plane_limits().max_stages
    for link in links:
        earlier = [stage for stage, _ in runs[-1]]
        if earlier and (
            len(earlier) == max_stages
            or _needs_rearranging(earlier[-1])
            or not _can_pad_at_input(earlier, link[0], len(runs) == 1)
        ):
            runs.append([])
        runs[-1].append(link)
    return runs


def _can_pad_at_input(earlier: Sequence[Stage], stage: Stage, is_first_run: bool) -> bool:
    """Return whether padding the input of `earlier` equals padding the input of `stage`."""
    axes = _padded_axes(stage)
    if stage.geometry.padding_mode == "zeros" or not axes:
        return True  # the engine pads intermediate results with zeros
    is_constant = stage.geometry.padding_mode == "constant"
    for s in earlier:
        same_mode = s.geometry.padding_mode == stage.geometry.padding_mode
        mixes_constant = is_constant or s.geometry.padding_mode == "constant"
        if _padded_axes(s) and mixes_constant and not same_mode:
            return False  # a segment has one fill value
        if s.transposed or set(axes) & {*_padded_axes(s)}:
            return False
        if any(s.kernel[a] > 1 or s.geometry.stride[a] > 1 for a in axes):
            return False
    return is_first_run or not is_constant


def _padded_axes(stage: Stage) -> list[int]:
    return [a for a, p in enumerate(stage.geometry.padding) if any(p)]


def _needs_rearranging(stage: Stage) -> bool:
    """Return whether the result needs depth-to-space or a channel permutation in NumPy."""
    return stage.transposed and (max(stage.geometry.stride) > 1 or stage.shuffle != (1, 1))


def _lower_run(
    links: Sequence[Link],
    shape: Ints,
    dtype: Any,
    threads: int | None,
    interleaved: int,
    batch: int,
    border_value: Array,
    number: int,
) -> Segment:
    """Lower `links` to one segment; the first is stage `number` of the whole chain."""
    stages = [stage for stage, _ in links]
    size_in, size_out = shape[1:], chain_shapes(stages, shape)[-1][1:]
    before = after = None
    g = stages[0].geometry
    if _padded_axes(stages[0]) and g.padding_mode == "constant" and np.ptp(border_value):
        # Border values differ between channels: NumPy pads.
        before = partial(reference.pad, padding=g.padding, mode=g.padding_mode, border=border_value)
        size_in = tuple(n + sum(p) for n, p in zip(size_in, g.padding))
        stages = [replace(stages[0], geometry=replace(g, padding=((0, 0),) * g.ndim)), *stages[1:]]
    specs = [_lower_stage(s) for s in stages]
    widths = [1] * (len(size_in) - 1) + [interleaved]  # values per sample along each axis
    for spec in specs:
        for values in (spec.dilation, spec.before, spec.after):
            values[-1] *= interleaved
    size_in = tuple(n * m for n, m in zip(size_in, widths))
    size_out = tuple(n * m for n, m in zip(size_out, widths))
    if _needs_rearranging(stages[-1]):
        after = partial(_depth_to_space, stages[-1], size=size_out)
    border: dict[int, Array] = {}
    fill = 0.0
    for stage, spec in zip(stages, specs):
        mode = stage.geometry.padding_mode
        if mode == "zeros":
            continue
        for axis in _padded_axes(stage):
            b, a = stage.geometry.padding[axis]
            m = widths[axis]
            table = padded_indices(size_in[axis] // m, b, a, mode, m)
            padded_spec = specs[0]
            is_row = axis == len(size_in) - 1 and size_in[axis] > 1
            in_image = min(table) >= 0
            if spec is not specs[0] and is_row and stage.geometry.stride[axis] == 1 and in_image:
                # Rows are whole: border columns are copies of columns of the stage's own input.
                padded_spec, spec.padded_columns = spec, table
            else:
                border[axis] = table
            padded_spec.before[axis], padded_spec.after[axis] = b * m, a * m
            if mode == "constant":
                fill = float(border_value[0])
    # Axes of length one that no stage extends are dropped; missing axes come first.
    kept_axes = [
        a
        for a, n in enumerate(size_in)
        if n != 1 or any(s.kernel[a] > 1 or s.before[a] or s.after[a] for s in specs)
    ]
    free = AXES - len(kept_axes)

    def on_three(values: Sequence[Any], neutral: Any) -> tuple[Any, ...]:
        return (neutral,) * free + tuple(values[a] for a in kept_axes)

    stage_specs = tuple(
        StageSpec(
            s.weight.reshape(*s.weight.shape[:2], *on_three(s.kernel, 1)),
            s.outer,
            s.groups,
            s.inner,
            on_three(s.stride, 1),
            on_three(s.dilation, 1),
            on_three(s.before, 0),
            on_three(s.after, 0),
            s.permutation,
            s.padded_columns,
            _lower_bias(stage, epilogue.bias, dtype),
            epilogue.activation,
        )
        for s, (stage, epilogue) in zip(specs, links)
    )
    is_batched = batch > 1 and free > 0
    sizes = on_three(size_in, 1)
    if is_batched:
        sizes = (*sizes[: free - 1], batch, *sizes[free:])
    in_shape = (shape[0], *sizes)
    layouts = tiling.Layouts(stage_specs, in_shape, np.dtype(dtype).name)
    out_shape = layouts(None).out_shape
    tile, splits, latency = layouts(None).tile, 1, 0.0
    if threads is not None:
        l1, l2, _ = _core.caches()
        latency = fork_join_seconds() if threads > 1 else 0.0
        tile = tiling.choose_tile(layouts, threads, l1, l2, latency)
        splits = tiling.channel_splits(layouts, tile, threads)
    out_size = [1] * len(size_in)
    for a, n in zip(kept_axes, out_shape[1 + free :]):
        out_size[a] = n
    return Segment(
        stage_specs,
        in_shape,
        out_shape,
        tuple(out_size),
        on_three([border.get(a) for a in range(len(size_in))], None) if border else None,
        fill,
        tile,
        splits,
        free > 0,
        is_batched,
        before,
        after,
        tuple(f"{number + i}: {_shape_text(s.weight)}" for i, s in enumerate(stages)),
        tiling.estimate_seconds(layouts),
        latency,
    )


def _shape_text(weight: Array) -> str:
    return "x".join(map(str, weight.shape))


def _lower_bias(stage: Stage, bias: Array | None, dtype: Any) -> Array | None:
    if bias is None:
        return None
    if _needs_rearranging(stage):
        bias = _phase_bias(stage, bias)
    return np.ascontiguousarray(bias, dtype)


@dataclass(slots=True)
class _ChainSpec:
    """A stage that is not transposed, on the chain's own spatial axes; becomes a StageSpec."""

    weight: Array
    outer: int
    groups: int
    inner: int
    stride: list[int]
    dilation: list[int]
    before: list[int]
    after: list[int]
    permutation: Array | None = None
    padded_columns: Array | None = None

    @property
    def kernel(self) -> Ints:
        return tuple(self.weight.shape[2:])


def _lower_stage(stage: Stage) -> _ChainSpec:
    g = stage.geometry
    if stage.transposed:
        return _lower_transposed(stage)
    zeros = g.padding_mode == "zeros"
    return _ChainSpec(
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


def _lower_transposed(stage: Stage) -> _ChainSpec:
    r"""Lower a transposed stage to one of stride 1 whose output channels are (c, \*phase).

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
        at = 3 + 2 * axis  # earlier axes are already split into (phase, tap)
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
        # ceil(((n - 1) s + extent + extra) / s) outputs per phase, from n inputs
        before.append(taps - 1)
        after.append(-(-(e + extra) // s) - 1)
        phases.append(s)
        dilation.append(1)
    n = g.ndim
    w = w.transpose(0, 1, *(3 + 2 * a for a in range(n)), 2, *(4 + 2 * a for a in range(n)))
    weight = w.reshape(groups * c * math.prod(phases), o // groups, *w.shape[3 + n :])
    return _ChainSpec(weight, stage.outer, groups, stage.inner, [1] * n, dilation, before, after)


def _depth_to_space(stage: Stage, y: Array, size: Ints) -> Array:
    """Interleave the phases of a strided transposed stage, crop to `size`, permute channels."""
    g, n = stage.geometry, stage.geometry.ndim
    if max(g.stride) > 1:
        channels = stage.outer * stage.groups * stage.weight.shape[1]
        y = y.reshape(len(y), channels, *g.stride, stage.inner, *y.shape[2:])
        y = np.moveaxis(y, 2 + n, 2)
        order = [axis for a in range(n) for axis in (3 + n + a, 3 + a)]
        y = y.transpose(0, 1, 2, *order)
        uncropped = [y.shape[3 + 2 * a] * y.shape[4 + 2 * a] for a in range(n)]
        y = y.reshape(len(y), channels * stage.inner, *uncropped)
        y = y[trailing(*(slice(b, b + k) for (b, _), k in zip(g.padding, size)))]
    return np.ascontiguousarray(y[:, np.argsort(stage.channel_permutation())])


def _phase_bias(stage: Stage, bias: Array) -> Array:
    """Return the bias of each output channel of :func:`_lower_transposed`."""
    phases = math.prod(stage.geometry.stride) if max(stage.geometry.stride) > 1 else 1
    by_channel = bias[stage.channel_permutation()].reshape(-1, 1, stage.inner)
    return np.repeat(by_channel, phases, axis=1).reshape(-1)
