"""Filters on Dask arrays, chunk by chunk; see :mod:`lowrank.engine.dask`.

The filter method is that of the whole array.  Transforms are not used: their rounding, and how far
they spread NaN, depends on the whole block that is transformed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.engine import dask as chunked
from lowrank.filters import conversion
from lowrank.filters.outer import OuterProduct, outer_chain
from lowrank.filters.request import Call, chunk_chain


def correlate(
    image: Any, kernel: Array | OuterProduct, call: Call, dtype: np.dtype[Any], out: Any
) -> Any:
    """Filter a Dask array; :func:`lowrank.filters.correlate` calls this.

    Parameters
    ----------
    image : dask.array.Array
        Real, in any chunks.
    kernel : ndarray or OuterProduct
        Kernel over 1 to 3 axes; an outer product runs by its factors.
    call : Call
        Other arguments of :func:`lowrank.filters.correlate`, checked.  ``threads`` is the number
        of threads per chunk, as in :func:`lowrank.engine.dask.run`.
    dtype : dtype
        Data type of the result.
    out : None
        Results are computed later.

    Returns
    -------
    dask.array.Array
        Lazy, with the shape of `image`.  Computed, it has the bits of the whole array filtered in
        memory, by the fastest method that is not a transform; for an outer product only its
        accuracy, since passes over a whole image add samples of equal taps first.

    Raises
    ------
    ValueError
        If the method is a transform.

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
    window = call.window
    if isinstance(kernel, OuterProduct):
        f = outer_chain(kernel.key, window, call.work.str, call.cval)
    else:
        f = chunk_chain(call.request(kernel, image.shape, True))
    along = window.along
    spatial = [image.shape[a] for a in along]
    axes = chunked.cut_axes(f.stages, (1, *spatial), [image.chunks[a] for a in along])
    work = functools.partial(
        _filter_chunk, f=f, axes=axes, along=along, work=call.work, result=dtype,
        threads=call.threads,
    )  # fmt: skip
    return chunked.map_chunks(work, image, axes, along, dtype, {})


def _filter_chunk(
    block: Array,
    f: chunked.Chain,
    axes: Sequence[chunked.AxisChunks],
    along: Ints,
    work: np.dtype[Any],
    result: np.dtype[Any],
    threads: int | None,
    block_info: Any,
) -> Array:
    location = [block_info[0]["chunk-location"][a] for a in along]
    n = len(along)
    last = range(-n, 0)
    window = np.moveaxis(block, along, last)[chunked.window(axes, location)]
    x = conversion.as_engine_input(window, work)
    lead, size = x.shape[:-n], [axis.output_chunks[k] for axis, k in zip(axes, location)]
    x = x.reshape(-1, 1, *x.shape[-n:])
    y = np.empty((len(x), 1, *size), conversion.result_dtype(result, work))
    chunked.plan_chunk(f, axes, location, x.shape[1:], work, threads)(x, y)
    y = conversion.as_image(y.reshape(*lead, *size), result)
    return np.ascontiguousarray(np.moveaxis(y, last, along))
