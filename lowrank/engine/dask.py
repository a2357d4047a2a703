"""Chains on Dask arrays: arrays larger than memory, chunk by chunk.

A Dask array that is given to a :class:`~lowrank.Factorization` runs here and gives a lazy Dask
array.  ``dask.array.map_overlap`` computes each output chunk from an input chunk and its halo.
The result has the bits of a run with ``algorithm="direct"`` on the whole array in memory: the
engine adds the taps of an output sample in the same order wherever it lies, and whatever depends on
the whole array is decided once:

* chunk boundaries are moved to multiples of the strides;
* chunks at the ends of the array get the padding of the whole array, all others real samples.

Dask is imported when the first of its arrays arrives.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints, trailing
from lowrank.core.arrays import as_floating
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.threads import as_threads

_CACHED_PLANS = 32  # most chunks of an array share one plan, those at its ends have their own

Ends = tuple[int, int, int]  # padding (before, after) and output padding of a stage along an axis


class Chain(Hashable, Protocol):
    """Stages and bias, as a Factorization has them; hashable, since plans are cached by it."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Stages in the order in which they run."""

    @property
    def bias(self) -> Array | None:
        """Bias after the last stage."""


class AxisChunks(NamedTuple):
    """Chunks of a spatial axis, and the input samples that each output chunk reads."""

    input_chunks: Ints
    output_chunks: Ints
    depth: Ints  # samples that a chunk gets from its neighbours (before, after)
    is_circular: bool  # the first and the last chunk are neighbours
    reads: tuple[tuple[int, int], ...]  # (start, stop) in input samples, per chunk
    ends: tuple[tuple[Ends, ...], ...]  # per chunk and stage

    def window(self, k: int) -> slice:
        """Return the samples that chunk `k` reads, as a slice of its block."""
        start = sum(self.input_chunks[:k]) - (self.depth[0] if k or self.is_circular else 0)
        return slice(*(end - start for end in self.reads[k]))


def is_dask_array(x: object) -> bool:
    """Return whether `x` comes from ``dask.array``, without importing Dask."""
    return type(x).__module__.startswith("dask.array")


def run(f: Chain, x: Any, *, threads: int | None = None) -> Any:
    r"""Run a chain on a Dask array; ``f(x)`` calls this.

    Parameters
    ----------
    f : Factorization
        Any chain, plain or transposed.
    x : dask.array.Array, shape (batch, channels, \*spatial)
        Floating-point, in any chunks.  Channels are rechunked to a single chunk, and so are
        spatial axes that cannot be cut: those along which two stages are padded, by other samples
        than zeros.  Chunks that are smaller than the halo are merged, and boundaries are moved to
        multiples of the strides.
    threads : int, optional
        Number of threads per chunk.  If not given: one in a worker of a pool, whose workers share
        the cores already, and all that OpenMP offers in the main thread, where
        ``scheduler="synchronous"`` runs.

    Returns
    -------
    dask.array.Array, shape (batch, out, \*spatial)
        Lazy; has the bits of `f` on the whole array in memory once computed.

    Raises
    ------
    TypeError
        If `x` is no Dask array of NumPy arrays, or not floating-point.
    ValueError
        If its shape does not fit, or is unknown.

    Examples
    --------
    >>> import numpy as np, pytest
    >>> import lowrank
    >>> da = pytest.importorskip("dask.array")
    >>> f = lowrank.dense(np.ones((4, 2, 3, 3)), stride=2, padding=1)
    >>> x = da.ones((1, 2, 100, 120), chunks=(1, 2, 30, 50))
    >>> y = f(x)
    >>> y.shape, y.chunks[2:]
    ((1, 4, 50, 60), ((15, 15, 15, 5), (25, 25, 10)))
    >>> bool((y == f(np.ones(x.shape))).all())
    True
    """
    check_array("x", x)
    threads = as_threads(threads)
    ndim, channels = f.stages[0].geometry.ndim, f.stages[0].in_channels
    if x.ndim != ndim + 2:
        raise ValueError(f"x must be (batch, channels, and {ndim} spatial axes), got {x.shape}")
    dtype = _load(x._meta, f).dtype
    if x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels, got shape {x.shape}")
    axes = cut_axes(f.stages, x.shape[1:], x.chunks[2:])
    work = functools.partial(_run_chunk, f=f, axes=axes, threads=threads)
    outs = {1: (f.stages[-1].out_channels,)}
    return map_chunks(work, x.rechunk({1: -1}), axes, range(2, x.ndim), dtype, outs)


def _load(block: Array, f: Chain) -> Array:
    engine.check_array("x", block, f.stages)
    return as_floating("x", block)


def _run_chunk(
    block: Array, f: Chain, axes: Sequence[AxisChunks], threads: int | None, block_info: Any
) -> Array:
    location = block_info[0]["chunk-location"][2:]
    x = _load(block[window(axes, location)], f)
    return plan_chunk(f, axes, location, x.shape[1:], x.dtype, threads)(x)


def check_array(name: str, x: Any) -> None:
    """Raise unless `x` is a Dask array of NumPy arrays with a known shape."""
    import dask.array

    if not isinstance(x, dask.array.Array) or type(x._meta) is not np.ndarray:
        of_type = f" of {type(x._meta).__qualname__}" if hasattr(x, "_meta") else ""
        raise TypeError(
            f"{name} must be a Dask array of NumPy arrays, got {type(x).__qualname__}{of_type}"
        )
    if any(map(math.isnan, x.shape)):
        raise ValueError(f"{name} has chunks of unknown size: call its compute_chunk_sizes() first")


def map_chunks(
    work: Callable[..., Array],
    x: Any,
    axes: Sequence[AxisChunks],
    along: Sequence[int],
    dtype: np.dtype[Any],
    output_chunks: Mapping[int, Ints],
) -> Any:
    """Apply `work` to every chunk of `x` with its halo.

    Parameters
    ----------
    work : callable
        Takes a block and ``block_info``, and gives an output chunk.
    x : dask.array.Array
        Input.
    axes : sequence of AxisChunks
        Chunks of the spatial axes.
    along : sequence of int
        Numbers of these axes in `x`.
    dtype : dtype
        Data type of the output.
    output_chunks : mapping of int to tuple of int
        Chunks of the output along other axes, where they are not those of `x`.

    Returns
    -------
    dask.array.Array
        Lazy.
    """
    import dask.array

    x = x.rechunk({a: axis.input_chunks for a, axis in zip(along, axes)})
    outs = {**output_chunks, **{a: axis.output_chunks for a, axis in zip(along, axes)}}
    return dask.array.map_overlap(
        work,
        x,
        depth={a: c.depth[0] if c.is_circular else c.depth for a, c in zip(along, axes)},
        boundary={a: "periodic" if c.is_circular else "none" for a, c in zip(along, axes)},
        trim=False,
        allow_rechunk=False,
        chunks=tuple(outs.get(a, c) for a, c in enumerate(x.chunks)),
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
    )


def window(axes: Sequence[AxisChunks], location: Sequence[int]) -> Any:
    """Return the samples that the chunk at `location` reads, as an index into its block."""
    return trailing(*(axis.window(k) for axis, k in zip(axes, location)))


def plan_chunk(
    f: Chain,
    axes: Sequence[AxisChunks],
    location: Sequence[int],
    shape: Ints,
    dtype: np.dtype[Any],
    threads: int | None,
) -> engine.Runner:
    r"""Plan a chain for the chunk at `location`, which reads `shape` = (channels, \*spatial)."""
    ends = tuple(zip(*(axis.ends[k] for axis, k in zip(axes, location))))
    return _plan(f, ends, shape, dtype, _thread_count(threads))


@functools.lru_cache(_CACHED_PLANS)
def _plan(
    f: Chain,
    ends: tuple[tuple[Ends, ...], ...],
    shape: Ints,
    dtype: np.dtype[Any],
    threads: int | None,
) -> engine.Runner:
    stages = []
    for stage, axes in zip(f.stages, ends):
        g = replace(
            stage.geometry,
            padding=tuple((before, after) for before, after, _ in axes),
            output_padding=tuple(more for _, _, more in axes),
        )
        stages.append(replace(stage, geometry=g))
    epilogues = [*(Epilogue() for _ in stages[1:]), Epilogue(f.bias)]
    return engine.plan(stages, shape, dtype, epilogues, threads)


def _thread_count(threads: int | None) -> int | None:
    """Return `threads` if given, else 1 in a worker of a pool and None (all) in the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    is_alone = is_main and multiprocessing.parent_process() is None
    return threads if threads is not None or is_alone else 1


def cut_axes(
    stages: Sequence[Stage], shape: Ints, chunks: Sequence[Ints]
) -> tuple[AxisChunks, ...]:
    r"""Cut the spatial axes as near to `chunks` as possible.

    Parameters
    ----------
    stages : sequence of Stage
        Chain that runs on the chunks.
    shape : tuple of int
        (channels, \*spatial) of its input.
    chunks : sequence of tuple of int
        Desired chunks of the input, per spatial axis.

    Returns
    -------
    tuple of AxisChunks
        One per spatial axis.
    """
    sizes = [s[1:] for s in chain_shapes(stages, shape)]
    return tuple(_cut_axis(stages, [s[a] for s in sizes], a, c) for a, c in enumerate(chunks))


def _cut_axis(stages: Sequence[Stage], sizes: Sequence[int], axis: int, chunks: Ints) -> AxisChunks:
    """Cut one axis with `sizes` samples in the input and after each stage."""
    n, border = sizes[0], _border(stages, axis)
    down = math.prod(s.geometry.stride[axis] for s in stages if not s.transposed)
    up = math.prod(s.geometry.stride[axis] for s in stages if s.transposed)
    unit = down // math.gcd(down, up)  # smallest step in the input to a whole number of outputs
    ends = sorted({round(end / unit) * unit for end in itertools.accumulate(chunks[:-1])})
    least = 1
    while border is not None:
        edges = _drop_close_edges(ends, n, least)
        if len(edges) == 2:
            break
        outs = [min(edge * up // down, sizes[-1]) for edge in edges[:-1]] + [sizes[-1]]
        spans = list(itertools.pairwise(outs))
        found = [_input_range(stages, sizes, axis, *span, border) for span in spans]
        ranges = [f for f in found if f is not None]
        if len(ranges) < len(found):
            least *= 2  # a chunk has no output, or reads padding alone
            continue
        reads, pads = zip(*ranges)
        depth = (
            max(0, *(edge - start for edge, (start, _) in zip(edges, reads))),
            max(0, *(stop - edge for edge, (_, stop) in zip(edges[1:], reads))),
        )
        if border == "circular":
            depth = (max(depth), max(depth))
        lengths = _lengths(edges)
        if max(depth) <= min(lengths):  # map_overlap reads direct neighbours only
            return AxisChunks(lengths, _lengths(outs), depth, border == "circular", reads, pads)
        least = max(*depth, least + 1)
    as_is = tuple((*s.geometry.padding[axis], s.geometry.output_padding[axis]) for s in stages)
    return AxisChunks((n,), (sizes[-1],), (0, 0), False, ((0, n),), (as_is,))


def _border(stages: Sequence[Stage], axis: int) -> str | None:
    """Return the padding mode of an axis that can be cut, None for one that cannot.

    It can if the padding is zeros or surrounds the input of the chain: then the padding of a
    chunk is a part of that of the whole array.
    """
    padded = [s for s in stages if not s.transposed and any(map(any, s.geometry.padding))]
    modes = {s.geometry.padding_mode for s in padded}
    owners = [i for i, s in enumerate(stages) if s in padded and any(s.geometry.padding[axis])]
    if modes <= {"zeros"}:
        return "zeros"
    if len(modes) > 1 or len(owners) > 1:
        return None
    for s in stages[: owners[0]] if owners else ():
        if s.kernel[axis] * s.geometry.stride[axis] > 1 or any(s.geometry.padding[axis]):
            return None
    return modes.pop() if owners else "zeros"


def _input_range(
    stages: Sequence[Stage], sizes: Sequence[int], axis: int, start: int, stop: int, border: str
) -> tuple[tuple[int, int], tuple[Ends, ...]] | None:
    """Return the (start, stop) of the inputs that outputs `start` to `stop` read, and all padding.

    None if there is no such output, or if padding would repeat samples from beyond the inputs.
    """
    ends: list[Ends] = []
    for stage, n in zip(reversed(stages), reversed(sizes[:-1])):
        if stop <= start:
            return None
        g = stage.geometry
        (before, _), stride, count = g.padding[axis], g.stride[axis], stop - start
        extent = g.dilation[axis] * (stage.kernel[axis] - 1) + 1
        if stage.transposed:
            # All inputs of a phase of the output, including those whose taps are zero.
            first = (start + before) // stride - (-(-extent // stride) - 1)
            last = (stop - 1 + before) // stride + 1
            first, last = max(first, 0), min(last, n)
            crop = start + before - first * stride
            more = count + crop - (last - first - 1) * stride - extent
            ends.append((crop, max(-more, 0), max(more, 0)))
        else:
            low = start * stride - before
            high = low + (count - 1) * stride + extent
            first, last = max(low, 0), min(high, n)
            if border == "circular":
                first, last = low, high
            ends.append((first - low, high - last, 0))
            if max(ends[-1]) > last - first - 1 and border not in ("zeros", "constant"):
                return None
        start, stop = first, last
    return ((start, stop), tuple(reversed(ends))) if start < stop else None


def _drop_close_edges(ends: Sequence[int], n: int, least: int) -> list[int]:
    """Return edges from 0 to `n`, without those of `ends` closer than `least` to the one before."""
    edges = [0]
    for end in ends:
        if min(end - edges[-1], n - end) >= least:
            edges.append(end)
    return [*edges, n]


def _lengths(edges: Sequence[int]) -> Ints:
    return tuple(b - a for a, b in itertools.pairwise(edges))
