"""Geometry: stride, padding and dilation of a convolution, and the size of its output."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from lowrank._typing import Ints, PaddingMode, Pads

PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Stride, padding and dilation of a convolution, one entry per spatial axis.

    :meth:`Geometry.of` also accepts a single number for all axes.

    Attributes
    ----------
    stride : tuple of int
        Step between output samples, in input samples: output ``p`` reads from input
        ``p * stride - before`` on.
    padding : tuple of (int, int)
        Number of samples added (before, after) along each axis.
    dilation : tuple of int
        Distance between neighbouring taps, in input samples.
    padding_mode : str
        Values of the added samples: ``"zeros"``, ``"constant"`` (`value`),
        ``"replicate"`` (``a a | a b c | c c``), ``"reflect"`` (``c b | a b c | b a``),
        ``"symmetric"`` (``b a | a b c | c b``) or ``"circular"`` (``b c | a b c | a b``).
        ``scipy.ndimage`` calls the last five constant, nearest, mirror, reflect and wrap.
    value : float
        Border value of mode ``"constant"``.
    output_padding : tuple of int
        Samples that a transposed convolution adds at the end of its output.

    Examples
    --------
    >>> from lowrank import Geometry
    >>> g = Geometry.of(2, stride=2, padding=1)
    >>> g.output_size((56, 57), (3, 3))
    (28, 29)
    """

    stride: Ints
    padding: Pads
    dilation: Ints
    padding_mode: PaddingMode = "zeros"
    value: float = 0.0
    output_padding: Ints = ()

    def __post_init__(self) -> None:
        n = len(self.stride)
        if not 1 <= n <= 3:
            raise ValueError(f"a convolution must have 1 to 3 spatial axes, got {n}")
        if not self.output_padding:
            object.__setattr__(self, "output_padding", (0,) * n)
        for name in ("stride", "dilation", "output_padding"):
            values = getattr(self, name)
            object.__setattr__(self, name, as_integers(name, values, len(values)))
        pairs = tuple(as_integers("padding", pair, 2) for pair in self.padding)
        object.__setattr__(self, "padding", pairs)
        if not n == len(self.padding) == len(self.dilation) == len(self.output_padding):
            raise ValueError(
                "stride, padding, dilation and output_padding must have one entry per axis, "
                f"got {self.stride}, {self.padding}, {self.dilation} and {self.output_padding}"
            )
        for name in ("stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(map(min, self.padding)) < 0 or min(self.output_padding) < 0:
            raise ValueError(
                "padding and output_padding must not be negative, got "
                f"{self.padding} and {self.output_padding}"
            )
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(
                f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {self.padding_mode!r}"
            )
        if not math.isfinite(self.value):
            raise ValueError(f"value must be finite, got {self.value}")

    @classmethod
    def of(
        cls,
        ndim: int,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int | Sequence[int]] = 0,
        dilation: int | Sequence[int] = 1,
        padding_mode: PaddingMode = "zeros",
        value: float = 0.0,
        output_padding: int | Sequence[int] = 0,
    ) -> Geometry:
        """Make a geometry over `ndim` axes.

        Parameters
        ----------
        ndim : int
            Number of spatial axes.
        stride, dilation, output_padding : int or sequence of int
            One number for all axes, or one per axis.
        padding : int or sequence
            One entry for all axes, or one per axis: an int for both ends or a (before, after) pair.
        padding_mode : str
            See :class:`Geometry`.
        value : float
            Border value of mode ``"constant"``.

        Returns
        -------
        Geometry

        Raises
        ------
        ValueError
            If an entry is missing, not an integer, or out of range.

        Examples
        --------
        >>> from lowrank import Geometry
        >>> Geometry.of(2, padding=[1, (0, 2)]).padding
        ((1, 1), (0, 2))
        """
        pairs = [as_integers("padding", p, 2) for p in _entries("padding", padding, ndim)]
        return cls(
            as_integers("stride", stride, ndim),
            tuple((a, b) for a, b in pairs),
            as_integers("dilation", dilation, ndim),
            padding_mode,
            float(value),
            as_integers("output_padding", output_padding, ndim),
        )

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.stride)

    def only(self, axes: Iterable[int]) -> Geometry:
        """Return the geometry of a stage that runs along some axes only.

        Parameters
        ----------
        axes : iterable of int
            Axes of the stage.

        Returns
        -------
        Geometry
            Stride 1, dilation 1 and no padding along all other axes.

        Examples
        --------
        >>> from lowrank import Geometry
        >>> Geometry.of(2, stride=2, padding=1).only([0]).stride
        (2, 1)
        """
        return _only(self, frozenset(axes))

    def extent(self, kernel: Ints) -> Ints:
        """Return the number of input samples that a kernel spans.

        Parameters
        ----------
        kernel : tuple of int
            Taps per axis.

        Returns
        -------
        tuple of int
            ``dilation * (taps - 1) + 1`` per axis.

        Examples
        --------
        >>> from lowrank import Geometry
        >>> Geometry.of(2, dilation=(1, 4)).extent((3, 3))
        (3, 9)
        """
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, kernel))

    def output_size(self, size: Ints, kernel: Ints) -> Ints:
        """Return the spatial size of a convolution's output.

        Parameters
        ----------
        size : tuple of int
            Spatial size of the input, in samples.
        kernel : tuple of int
            Taps per axis.

        Returns
        -------
        tuple of int
            ``(size + before + after - extent) // stride + 1`` per axis.

        Raises
        ------
        ValueError
            If the kernel is larger than the padded input.

        Examples
        --------
        >>> from lowrank import Geometry
        >>> Geometry.of(1, dilation=4).output_size((20,), (3,))
        (12,)
        """
        if len(size) != self.ndim:
            raise ValueError(f"expected {self.ndim} spatial axes, got size {size}")
        out = []
        for n, (before, after), e, s in zip(size, self.padding, self.extent(kernel), self.stride):
            slack = n + before + after - e
            if slack < 0:
                raise ValueError(
                    f"kernel must not be larger than the padded input, got kernel {kernel} with "
                    f"dilation {self.dilation} on size {size} with padding {self.padding}"
                )
            out.append(slack // s + 1)
        return tuple(out)

    def transposed_size(self, size: Ints, kernel: Ints) -> Ints:
        """Return the spatial size of a transposed convolution's output, by PyTorch's rule.

        Parameters
        ----------
        size : tuple of int
            Spatial size of the input, in samples.
        kernel : tuple of int
            Taps per axis.

        Returns
        -------
        tuple of int
            ``(size - 1) * stride - before - after + extent + output_padding`` per axis.

        Raises
        ------
        ValueError
            If the output is empty.

        Examples
        --------
        >>> from lowrank import Geometry
        >>> Geometry.of(1, stride=2, padding=1).transposed_size((5,), (4,))
        (10,)
        """
        if len(size) != self.ndim:
            raise ValueError(f"expected {self.ndim} spatial axes, got size {size}")
        out = tuple(
            (n - 1) * s - sum(p) + e + o
            for n, s, p, e, o in zip(
                size, self.stride, self.padding, self.extent(kernel), self.output_padding
            )
        )
        if min(out) < 1:
            raise ValueError(
                "padding must leave at least one output sample of a transposed convolution, got "
                f"{self.padding} for size {size} with kernel {kernel}"
            )
        return out


@functools.lru_cache(1024)  # a sweep asks for a few geometries thousands of times
def _only(g: Geometry, axes: frozenset[int]) -> Geometry:
    def select(values: Ints, neutral: int) -> Ints:
        return tuple(v if a in axes else neutral for a, v in enumerate(values))

    return replace(
        g,
        stride=select(g.stride, 1),
        padding=tuple(p if a in axes else (0, 0) for a, p in enumerate(g.padding)),
        dilation=select(g.dilation, 1),
        output_padding=select(g.output_padding, 0),
    )


def _entries(name: str, value: Any, n: int) -> list[Any]:
    """Return `value` as a list of `n` entries; a single integer is repeated."""
    if hasattr(value, "__index__") and not getattr(value, "shape", ()):
        return [value] * n
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be an integer or a sequence of {n}, got {value!r}")
    entries = list(value)
    if len(entries) != n:
        raise ValueError(f"{name} must have {n} entries, got {value!r}")
    return entries


def as_integers(name: str, value: Any, n: int) -> Ints:
    """Return `value` as `n` integers; a single integer is repeated."""
    if type(value) is int and n == 1:  # the common cases, which sweeps check a million times
        return (value,)
    if type(value) is tuple and len(value) == n and all(type(v) is int for v in value):
        return value
    try:
        return tuple(operator.index(v) for v in _entries(name, value, n))
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of {n}, got {value!r}") from None
