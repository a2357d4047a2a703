"""Chains and filters on Dask arrays: what is larger than memory, a chunk at a time.

A Dask array that is given to a :class:`~lowrank.Factorization`, to
:func:`lowrank.filters.correlate` or to :func:`lowrank.filters.filter_image` comes here, and a lazy
Dask array comes back.  Each of its chunks is computed from a chunk of the input and as much of the
neighbours as it sees, by ``dask.array.map_overlap``.  Results are those of the whole array in
memory, bit for bit: the engine adds the taps of an output in the same order wherever it lies, and
all that looks at the whole array is decided once for the whole array:

* the chunk boundaries, which are moved so that strides fall on the same samples;
* the border: chunks at the ends of the array have what the call on the whole array has there, all
  other ends of chunks are made of real data;
* the way that a filter is run.  Transforms are not taken, since the rounding of each output
  depends on the whole block that is transformed; nor is what they do to NaN.

Nothing of Dask is imported until an array of it arrives.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lowrank import engine
from lowrank._typing import Array, Ints, trailing
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization, as_input
from lowrank.filters.run import PLANS, Request, readable, written

Ends = tuple[int, int, int]  # padding (before, after) and output padding of a stage along an axis


class _Axis(NamedTuple):
    """How a spatial axis is cut, and what each chunk of the output reads of the input."""

    chunks: Ints  # of the input
    out: Ints  # of the output
    depth: Ints  # samples that a chunk gets of the neighbours (before, after)
    wraps: bool  # whether the first and the last chunk are neighbours
    reads: tuple[tuple[int, int], ...]  # (start, stop) in samples of the input
    ends: tuple[tuple[Ends, ...], ...]  # of each stage, for each chunk

    def within(self, k: int) -> slice:
        """What chunk `k` reads, in the block that it is given."""
        given = sum(self.chunks[:k]) - (self.depth[0] if k or self.wraps else 0)
        return slice(*(end - given for end in self.reads[k]))


def run(f: Factorization, x: Any, *, threads: int | None = None) -> Any:
    r"""Run a chain on a Dask array; what ``f(x)`` calls.

    Parameters
    ----------
    f : Factorization
        Any chain, plain or transposed.
    x : dask.array.Array, shape (batch, channels, \*spatial)
        Floating-point, in any chunks.  Channels are rechunked to a single one, and so are spatial
        axes along which a chain cannot be cut, as two of its stages have a border there that is
        neither zeros nor none.  Other chunks are made larger where they are smaller than what an
        output sees, and are moved to whole strides.
    threads : int, optional
        Threads of each chunk.  If not given it is chosen where the chunk runs: one in a worker
        of a pool, since its workers share the cores already; all that OpenMP offers in the main
        thread, which is where ``scheduler="synchronous"`` runs.

    Returns
    -------
    dask.array.Array, shape (batch, out, \*spatial)
        Lazy.  Computed it has the bits of `f` on the whole array in memory.

    Raises
    ------
    TypeError
        If `x` is no Dask array of NumPy arrays, or not floating-point.
    ValueError
        If its shape does not fit, or is not known.

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
    _check("x", x)
    if x.ndim != f.ndim + 2:
        raise ValueError(f"x must be (batch, channels, and {f.ndim} spatial axes), got {x.shape}")
    dtype = as_input(f, x._meta).dtype
    cuts = _cut(f.stages, f.input_shape(x.shape[1:]), x.chunks[2:])
    work = functools.partial(_run, f=f, cuts=cuts, threads=threads)
    return _mapped(work, x.rechunk({1: -1}), cuts, range(2, x.ndim), dtype, {1: (f.out_channels,)})


def correlate(image: Any, along: Ints, request: Request) -> Any:
    """Filter a Dask array; what :func:`lowrank.filters.correlate` calls.

    Parameters
    ----------
    image : dask.array.Array
        Real, in any chunks.
    along : tuple of int
        Axes that the filter runs along.
    request : Request
        The other arguments of :func:`lowrank.filters.correlate`, checked.  Without ``threads``
        those of a chunk are chosen as for :func:`run`; the way is the whole array's in memory.

    Returns
    -------
    dask.array.Array
        Lazy, of the shape and dtype of `image`.  Computed it has the bits of the whole array
        filtered in memory, unless that goes by transforms: then those of the fastest other way.

    Raises
    ------
    TypeError
        If `image` is no Dask array of NumPy arrays.
    ValueError
        If its shape is not known, or transforms are asked for.

    Examples
    --------
    >>> import numpy as np, pytest
    >>> from lowrank import filters
    >>> da = pytest.importorskip("dask.array")
    >>> volume = da.random.default_rng(0).random((60, 80, 90), chunks=32, dtype=np.float32)
    >>> kernel = filters.log(2.0, ndim=3)
    >>> blobs = filters.correlate(volume, kernel)
    >>> bool((blobs == filters.correlate(volume.compute(), kernel)).all())
    True
    """
    _check("image", image)
    if 0 in image.shape:
        return image
    option = request.lasting(request.plan())
    if option.block is not None:
        raise ValueError(
            "a Dask array is not filtered by transforms, whose rounding depends on where blocks "
            "are cut: method must be auto, direct or separable, got 'fft'"
        )
    f = option.chain
    cuts = _cut(f.stages, (1, *request.spatial), [image.chunks[a] for a in along])
    work = functools.partial(
        _filter, f=f, cuts=cuts, along=along, dtype=np.dtype(request.dtype), threads=request.threads
    )
    return _mapped(work, image, cuts, along, image.dtype, {})


def _run(
    block: Array, f: Factorization, cuts: Sequence[_Axis], threads: int | None, block_info: Any
) -> Array:
    """A chunk of :func:`run`."""
    at = block_info[0]["chunk-location"][2:]
    x = as_input(f, block[_inside(cuts, at)])
    return _planned(f, _ends(cuts, at), x.shape[1:], x.dtype, _team(threads))(x)


def _filter(
    block: Array,
    f: Factorization,
    cuts: Sequence[_Axis],
    along: Ints,
    dtype: np.dtype[Any],
    threads: int | None,
    block_info: Any,
) -> Array:
    """A chunk of :func:`correlate`."""
    at = [block_info[0]["chunk-location"][a] for a in along]
    last = range(-f.ndim, 0)
    x = readable(np.moveaxis(block, along, last)[_inside(cuts, at)], dtype)
    lead, size = x.shape[: -f.ndim], [axis.out[k] for axis, k in zip(cuts, at)]
    x = x.reshape(-1, 1, *x.shape[-f.ndim :])
    y = np.empty((len(x), 1, *size), x.dtype)
    _planned(f, _ends(cuts, at), x.shape[1:], dtype, _team(threads))(x, y)
    y = written(y.reshape(*lead, *size), block.dtype)
    return np.ascontiguousarray(np.moveaxis(y, last, along))


def _inside(cuts: Sequence[_Axis], at: Sequence[int]) -> Any:
    """What the chunk `at` reads, as an index into its block."""
    return trailing(*(axis.within(k) for axis, k in zip(cuts, at)))


def _ends(cuts: Sequence[_Axis], at: Sequence[int]) -> tuple[tuple[Ends, ...], ...]:
    """The padding of the chunk `at`, an entry a stage, an entry an axis."""
    return tuple(zip(*(axis.ends[k] for axis, k in zip(cuts, at))))


@functools.lru_cache(PLANS)
def _planned(
    f: Factorization,
    ends: tuple[tuple[Ends, ...], ...],
    shape: Ints,
    dtype: np.dtype[Any],
    threads: int | None,
) -> engine.Runner:
    """The chain with the borders of a chunk, planned; most chunks of an array share one."""
    stages = []
    for stage, axes in zip(f.stages, ends):
        g = replace(
            stage.geometry,
            padding=tuple((before, after) for before, after, _ in axes),
            output_padding=tuple(more for _, _, more in axes),
        )
        stages.append(replace(stage, geometry=g))
    return replace(f, stages=tuple(stages)).compile(shape, dtype, threads)


def _mapped(
    work: Any,
    x: Any,
    cuts: Sequence[_Axis],
    along: Sequence[int],
    dtype: np.dtype[Any],
    out: dict[int, Ints],
) -> Any:
    """`work` on every chunk of `x`, cut `along` its spatial axes, and what it sees around it."""
    import dask.array

    x = x.rechunk({a: axis.chunks for a, axis in zip(along, cuts)})
    out = out | {a: axis.out for a, axis in zip(along, cuts)}
    return dask.array.map_overlap(
        work,
        x,
        depth={a: c.depth[0] if c.wraps else c.depth for a, c in zip(along, cuts)},
        boundary={a: "periodic" if c.wraps else "none" for a, c in zip(along, cuts)},
        trim=False,
        allow_rechunk=False,
        chunks=tuple(out.get(a, c) for a, c in enumerate(x.chunks)),
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
    )


def _check(name: str, x: Any) -> None:
    """Refuse what is lazy but no array, arrays of other libraries, and unknown sizes."""
    import dask.array

    if not isinstance(x, dask.array.Array) or type(x._meta) is not np.ndarray:
        held = f" of {type(x._meta).__qualname__}" if hasattr(x, "_meta") else ""
        raise TypeError(
            f"{name} must be a Dask array of NumPy arrays, got {type(x).__qualname__}{held}"
        )
    if any(map(math.isnan, x.shape)):
        raise ValueError(f"{name} has chunks of unknown size: call its compute_chunk_sizes() first")


def _team(asked: int | None) -> int | None:
    """Threads of a chunk: one for a worker of a pool, which has company."""
    main = threading.current_thread() is threading.main_thread()
    alone = main and multiprocessing.parent_process() is None
    return asked if asked is not None or alone else 1


def _cut(stages: Sequence[Stage], shape: Ints, chunks: Sequence[Ints]) -> tuple[_Axis, ...]:
    """How the spatial axes are cut, as near to `chunks` as can be."""
    sizes = [s[1:] for s in chain_shapes(stages, shape)]
    return tuple(_axis(stages, [s[a] for s in sizes], a, c) for a, c in enumerate(chunks))


def _axis(stages: Sequence[Stage], sizes: Sequence[int], axis: int, chunks: Ints) -> _Axis:
    """How one axis is cut, of `sizes` samples in the input and after each stage."""
    n, border = sizes[0], _border(stages, axis)
    down = math.prod(s.geometry.stride[axis] for s in stages if not s.transposed)
    up = math.prod(s.geometry.stride[axis] for s in stages if s.transposed)
    unit = down // math.gcd(down, up)  # inputs from one output at a boundary to the next
    ends = sorted({round(end / unit) * unit for end in itertools.accumulate(chunks[:-1])})
    least = 1
    while border is not None:
        edges = _apart(ends, n, least)
        if len(edges) == 2:
            break
        outs = [min(edge * up // down, sizes[-1]) for edge in edges[:-1]] + [sizes[-1]]
        found = [_seen(stages, sizes, axis, *span, border) for span in itertools.pairwise(outs)]
        seen = [f for f in found if f is not None]
        if len(seen) < len(found):
            least *= 2  # a chunk that gives nothing, or sees nothing but the border
            continue
        reads, pads = zip(*seen)
        depth = (
            max(0, *(edge - start for edge, (start, _) in zip(edges, reads))),
            max(0, *(stop - edge for edge, (_, stop) in zip(edges[1:], reads))),
        )
        if border == "circular":
            depth = (max(depth), max(depth))
        spans = _lengths(edges)
        if max(depth) <= min(spans):
            return _Axis(spans, _lengths(outs), depth, border == "circular", reads, pads)
        least = max(*depth, least + 1)
    as_is = tuple((*s.geometry.padding[axis], s.geometry.output_padding[axis]) for s in stages)
    return _Axis((n,), (sizes[-1],), (0, 0), False, ((0, n),), (as_is,))


def _border(stages: Sequence[Stage], axis: int) -> str | None:
    """The border along an axis that can be cut; None for one that cannot.

    It can where the border is that of the input as well, or zeros: then a chunk's own border is
    a piece of the whole one.
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


def _seen(
    stages: Sequence[Stage], sizes: Sequence[int], axis: int, start: int, stop: int, border: str
) -> tuple[tuple[int, int], tuple[Ends, ...]] | None:
    """Inputs (start, stop) that outputs from `start` to `stop` see, and the padding of each stage.

    None if there is no such output, or a border would be made of samples beyond the inputs.
    """
    ends: list[Ends] = []
    for stage, n in zip(reversed(stages), reversed(sizes[:-1])):
        if stop <= start:
            return None
        g = stage.geometry
        (before, _), stride, count = g.padding[axis], g.stride[axis], stop - start
        extent = g.dilation[axis] * (stage.kernel[axis] - 1) + 1
        if stage.transposed:
            # All inputs that a phase of the output is made of, those with taps of zero included.
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


def _apart(ends: Sequence[int], n: int, least: int) -> list[int]:
    """Edges from 0 to `n`, those of `ends` that are at least so far apart."""
    edges = [0]
    for end in ends:
        if min(end - edges[-1], n - end) >= least:
            edges.append(end)
    return [*edges, n]


def _lengths(edges: Sequence[int]) -> Ints:
    return tuple(b - a for a, b in itertools.pairwise(edges))
