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
from lowrank.filters import choose, conversion
from lowrank.filters.request import FilterRequest


def correlate(
    image: Any, along: Ints, request: FilterRequest, factors: Sequence[Array] | None
) -> Any:
    """Filter a Dask array; :func:`lowrank.filters.correlate` calls this.

    Parameters
    ----------
    image : dask.array.Array
        Real, in any chunks.
    along : tuple of int
        Axes that the filter runs along.
    request : FilterRequest
        Other arguments of :func:`lowrank.filters.correlate`, checked.  ``threads`` is the number
        of threads per chunk, as in :func:`lowrank.engine.dask.run`.
    factors : sequence of ndarray or None
        Vectors whose outer product runs; None for the method of the request.

    Returns
    -------
    dask.array.Array
        Lazy, with the shape and dtype of `image`.  Computed, it has the bits of the whole array
        filtered in memory, by the fastest method that is not a transform.

    Raises
    ------
    TypeError
        If `image` is no Dask array of NumPy arrays.
    ValueError
        If its shape is unknown, or the method is a transform.

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
    chunked.check_array("image", image)
    if 0 in image.shape:
        return image
    if factors is None:
        method = request.exact_method(request.plan())
        if method.block is not None:
            raise ValueError(
                "method must be auto, direct or separable for a Dask array, got 'fft': the "
                "rounding of a transform depends on where blocks are cut"
            )
        f = method.chain
    else:
        f = choose.factored_chain(request.convolution(), factors)
    axes = chunked.cut_axes(f.stages, (1, *request.spatial), [image.chunks[a] for a in along])
    work = functools.partial(
        _filter_chunk,
        f=f,
        axes=axes,
        along=along,
        dtype=np.dtype(request.dtype),
        threads=request.threads,
    )
    return chunked.map_chunks(work, image, axes, along, image.dtype, {})


def _filter_chunk(
    block: Array,
    f: chunked.Chain,
    axes: Sequence[chunked.AxisChunks],
    along: Ints,
    dtype: np.dtype[Any],
    threads: int | None,
    block_info: Any,
) -> Array:
    location = [block_info[0]["chunk-location"][a] for a in along]
    n = len(along)
    last = range(-n, 0)
    window = np.moveaxis(block, along, last)[chunked.window(axes, location)]
    x = conversion.as_engine_input(window, dtype)
    lead, size = x.shape[:-n], [axis.output_chunks[k] for axis, k in zip(axes, location)]
    x = x.reshape(-1, 1, *x.shape[-n:])
    y = np.empty((len(x), 1, *size), x.dtype)
    chunked.plan_chunk(f, axes, location, x.shape[1:], dtype, threads)(x, y)
    y = conversion.as_image(y.reshape(*lead, *size), block.dtype)
    return np.ascontiguousarray(np.moveaxis(y, last, along))
