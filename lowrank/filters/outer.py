"""Kernels that are outer products of vectors, which are filtered without ever being multiplied."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from lowrank._kernels._core import Passes
from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core.geometry import Geometry
from lowrank.factorization import Factorization
from lowrank.filters import arguments, boxes, choose
from lowrank.filters.factors import levelled, outer_factors, outer_product
from lowrank.filters.window import Window

FAR_FROM_ONE = 16  # power of two
KEPT = 256  # latest filters that are kept compiled


class OuterProduct(NDArrayOperatorsMixin):
    """Kernel that is the outer product of one vector per axis; an array where one is needed.

    Filters of this library read its factors.  For everything else it is the array of its values,
    which is computed at the first use: NumPy's functions and operators take it and return arrays.

    Parameters
    ----------
    factors : sequence of array_like
        One vector per axis.

    Attributes
    ----------
    factors : tuple of ndarray
        Vectors in float64.
    shape : tuple of int
        Number of taps along each axis.
    key : tuple of bytes
        Their bytes, scaled by powers of two where sums between the passes might overflow.
    largest : float
        Magnitude of the largest tap.

    Raises
    ------
    ValueError, TypeError
        If there is none, or a factor is no vector, empty, not finite or not real.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import filters
    >>> kernel = filters.gauss([16.0, 16.0, 16.0])
    >>> kernel.shape, [len(f) for f in kernel.factors]
    ((129, 129, 129), [129, 129, 129])
    >>> filters.sobel() / 8
    array([[-0.125,  0.   ,  0.125],
           [-0.25 ,  0.   ,  0.25 ],
           [-0.125,  0.   ,  0.125]])
    """

    def __init__(self, factors: Sequence[Any]) -> None:
        if not isinstance(factors, Iterable):
            raise TypeError(f"factors must be vectors, one per axis, got {factors!r}")
        arrays = [arguments.as_array("factors", f) for f in factors]
        if not arrays or any(f.ndim != 1 or not f.size for f in arrays):
            shapes = [f.shape for f in arrays]
            raise ValueError(f"factors must be vectors, one per axis, got shapes {shapes}")
        for f in arrays:
            if f.dtype.kind not in "biuf":
                raise TypeError(f"factors must be real, got {f.dtype}")
        self.factors = tuple(np.array(f, np.float64) for f in arrays)
        for f in self.factors:
            if not np.isfinite(f).all():
                raise ValueError("factors must be finite, got NaN or infinite values")
            f.flags.writeable = False
        self.shape = tuple(map(len, self.factors))
        self.key = tuple(f.tobytes() for f in _balanced(self.factors))
        self.largest = math.prod(float(np.abs(f).max()) for f in self.factors)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.factors)

    @property
    def size(self) -> int:
        """Number of taps."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float64."""
        return np.dtype(np.float64)

    @property
    def equal_tap(self) -> float | None:
        """Tap of a box, whose taps are all equal, or None."""
        return self._equal_tap

    @functools.cached_property
    def _equal_tap(self) -> float | None:
        return boxes.equal_tap(self.factors)

    @functools.cached_property
    def _values(self) -> Array:
        values = outer_product(self.factors)
        values.flags.writeable = False
        return values

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._values.__array_interface__

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self._values, dtype) if copy else np.asarray(self._values, dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(x) if isinstance(x, OuterProduct) else x for x in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._values, name)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __len__(self) -> int:
        return len(self.factors[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    @functools.cached_property
    def _flipped(self) -> OuterProduct:
        return OuterProduct([f[::-1] for f in self.factors])

    def flipped(self) -> OuterProduct:
        """Return the kernel flipped along every axis.

        Returns
        -------
        OuterProduct

        Examples
        --------
        >>> from lowrank.filters import OuterProduct
        >>> OuterProduct([[1, 2], [3, 4]]).flipped()
        array([[8., 6.],
               [4., 3.]])
        """
        return self._flipped


def _balanced(factors: Sequence[Array]) -> Sequence[Array]:
    """Return factors of the same product, of which at most the last is far from 1."""
    exponents = [int(np.frexp(np.abs(f).max())[1]) for f in factors]
    if max(map(abs, exponents)) <= FAR_FROM_ONE:
        return factors
    last = sum(exponents[:-1])
    return [
        *(np.ldexp(f, -e) for f, e in zip(factors[:-1], exponents)), np.ldexp(factors[-1], last)
    ]  # fmt: skip


def as_outer_product(kernel: Array, tolerance: float) -> OuterProduct | None:
    """Return a kernel as an outer product, or None if it is none within a relative error."""
    return _as_outer_product(kernel.tobytes(), kernel.shape, kernel.dtype.str, tolerance)


@functools.lru_cache(KEPT)
def _as_outer_product(
    kernel: bytes, taps: Ints, dtype: str, tolerance: float
) -> OuterProduct | None:
    factors = outer_factors(np.frombuffer(kernel, dtype).reshape(taps), tolerance)
    return None if factors is None else OuterProduct(factors)


class OuterPasses(NamedTuple):
    """Passes of an outer product over images with some number of axes."""

    run: Passes
    axes: Ints  # of the image, one per pass
    before: Ints  # taps ahead of the output, one per pass
    border: PaddingMode
    has_zeros: bool

    def takes_images(self, shape: Ints) -> bool:
        """Return whether the passes filter images of a shape by bands of rows, in one go."""
        return len(self.axes) < 3 and self.run.takes_integers(shape, self.axes)


@functools.lru_cache(KEPT)
def outer_passes(key: tuple[bytes, ...], window: Window, dtype: str) -> OuterPasses:
    """Make the passes of an outer product."""
    lines = levelled([np.frombuffer(f) for f in key])
    some = [a for a, f in enumerate(lines) if len(f) > 1 or f[0] != 1] or [len(lines) - 1]
    return OuterPasses(
        Passes([lines[a] for a in some], np.dtype(dtype).name),
        tuple(window.along[a] for a in some),
        tuple(window.before[a] for a in some),
        window.border,
        not all(f.all() for f in lines),
    )


@functools.lru_cache(KEPT)
def outer_chain(key: tuple[bytes, ...], window: Window, dtype: str, cval: float) -> Factorization:
    """Return the chain of passes of an outer product over 1 to 3 axes."""
    lines = levelled([np.frombuffer(f) for f in key])
    geometry = Geometry.of(len(lines), padding=window.pads, padding_mode=window.border, value=cval)
    stages = choose.factored_stages(geometry, lines, np.dtype(dtype))
    return Factorization(stages, geometry, family="separable_sum", rank=(1,))


@functools.lru_cache(KEPT)
def compile_outer(
    chain: Factorization,
    dtype: str,
    spatial: Ints,
    channels: int,
    interleaved: bool,
    threads: int | None,
) -> tuple[Any, Ints, bool]:
    """Compile an outer product for images of one size.

    Returns
    -------
    run : callable
        Compiled filter.
    shape : tuple of int
        Spatial shape of the arrays that it takes.
    interleaved : bool
        Whether these hold interleaved channels.
    """
    itemsize = np.dtype(dtype).itemsize
    seconds, in_one_pass = choose.predict(
        chain, spatial, channels, interleaved and channels > 1, itemsize, threads
    )
    method = choose.FilterMethod(
        "separable", (1,), 0.0, 0.0, seconds, chain, interleaved=in_one_pass
    )
    run = choose.compile_method(method, spatial, np.dtype(dtype), threads, channels)
    return run, choose.runner_shape(method, spatial, channels), in_one_pass
