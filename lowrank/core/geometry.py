"""Geometry: where a convolution looks, and how large its output is."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from lowrank._typing import Ints, PaddingMode, Pads

PADDING_MODES: tuple[str, ...] = get_args(PaddingMode)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Stride, padding and dilation of a convolution, one entry a spatial axis.

    Make one with :meth:`Geometry.of`, which accepts a single number for all axes.

    Attributes
    ----------
    stride : tuple of int
        Output sample ``p`` looks at input samples from ``p * stride - before`` on.
    padding : tuple of (int, int)
        Samples added (before, after) each axis.
    dilation : tuple of int
        Distance, in input samples, between neighbouring taps.
    padding_mode : str
        What stands outside the input: ``"zeros"``, ``"constant"`` (`value`),
        ``"replicate"`` (``a a | a b c | c c``), ``"reflect"`` (``c b | a b c | b a``),
        ``"symmetric"`` (``b a | a b c | c b``) or ``"circular"`` (``b c | a b c | a b``).
        In the words of ``scipy.ndimage``: constant, nearest, mirror, reflect, wrap.
    value : float
        What stands outside the input in mode ``"constant"``.
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
            raise ValueError(f"a convolution has 1 to 3 spatial axes, got {n}")
        if not self.output_padding:
            object.__setattr__(self, "output_padding", (0,) * n)
        for name in ("stride", "dilation", "output_padding"):
            values = getattr(self, name)
            object.__setattr__(self, name, as_integers(name, values, len(values)))
        pairs = tuple(as_integers("padding", pair, 2) for pair in self.padding)
        object.__setattr__(self, "padding", pairs)
        if not n == len(self.padding) == len(self.dilation) == len(self.output_padding):
            raise ValueError(
                f"stride {self.stride}, padding {self.padding} and dilation {self.dilation} "
                "must have one entry a spatial axis"
            )
        for name in ("stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(map(min, self.padding)) < 0 or min(self.output_padding) < 0:
            raise ValueError(
                f"padding must not be negative, got {self.padding} and "
                f"output_padding {self.output_padding}"
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
        """Geometry over `ndim` axes; one number stands for every axis.

        Parameters
        ----------
        ndim : int
            Number of spatial axes.
        stride, dilation, output_padding : int or sequence of int
            One for all axes, or one an axis.
        padding : int or sequence
            One for all axes, or one an axis: an int for both ends or a (before, after) pair.
        padding_mode : str
            See :class:`Geometry`.
        value : float
            The constant of mode ``"constant"``.

        Returns
        -------
        Geometry
            The same, spelled out an axis at a time.

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
        """Keep what concerns some axes; a chain gives each axis to the stage that runs along it.

        Parameters
        ----------
        axes : iterable of int
            Axes to keep.

        Returns
        -------
        Geometry
            Elsewhere stride and dilation 1, and no padding.

        Examples
        --------
        >>> from lowrank import Geometry
        >>> Geometry.of(2, stride=2, padding=1).only([0]).stride
        (2, 1)
        """
        keep = set(axes)

        def kept(values: Ints, neutral: int) -> Ints:
            return tuple(v if a in keep else neutral for a, v in enumerate(values))

        return replace(
            self,
            stride=kept(self.stride, 1),
            padding=tuple(p if a in keep else (0, 0) for a, p in enumerate(self.padding)),
            dilation=kept(self.dilation, 1),
            output_padding=kept(self.output_padding, 0),
        )

    def extent(self, kernel: Ints) -> Ints:
        """Input samples that a kernel spans.

        Parameters
        ----------
        kernel : tuple of int
            Taps an axis.

        Returns
        -------
        tuple of int
            ``dilation * (taps - 1) + 1``, an axis.

        Examples
        --------
        >>> from lowrank import Geometry
        >>> Geometry.of(2, dilation=(1, 4)).extent((3, 3))
        (3, 9)
        """
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, kernel))

    def output_size(self, size: Ints, kernel: Ints) -> Ints:
        """Spatial size of a convolution's output.

        Parameters
        ----------
        size : tuple of int
            Spatial size of the input, in samples.
        kernel : tuple of int
            Taps an axis.

        Returns
        -------
        tuple of int
            ``(size + before + after - extent) // stride + 1``, an axis.

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
            room = n + before + after - e
            if room < 0:
                raise ValueError(
                    f"kernel {kernel} with dilation {self.dilation} spans "
                    f"{self.extent(kernel)} samples, more than the padded input: "
                    f"{size} with padding {self.padding}"
                )
            out.append(room // s + 1)
        return tuple(out)

    def transposed_size(self, size: Ints, kernel: Ints) -> Ints:
        """Spatial size of the output of a transposed convolution, by PyTorch's rule.

        Parameters
        ----------
        size : tuple of int
            Spatial size of the input, in samples.
        kernel : tuple of int
            Taps an axis.

        Returns
        -------
        tuple of int
            ``(size - 1) * stride - before - after + extent + output_padding``, an axis.

        Raises
        ------
        ValueError
            If nothing is left of the output.

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
                f"padding {self.padding} leaves nothing of the output of a transposed "
                f"convolution of size {size} with kernel {kernel}"
            )
        return out


def _entries(name: str, value: Any, n: int) -> list[Any]:
    """`value` as `n` entries; one integer stands for all."""
    if hasattr(value, "__index__") and not getattr(value, "shape", ()):
        return [value] * n
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be an integer or {n} of them, got {value!r}")
    entries = list(value)
    if len(entries) != n:
        raise ValueError(f"{name} must have {n} entries, got {value!r}")
    return entries


def as_integers(name: str, value: Any, n: int) -> Ints:
    """`value` as `n` integers; one integer stands for all."""
    try:
        return tuple(operator.index(v) for v in _entries(name, value, n))
    except TypeError:
        raise TypeError(f"{name} must be an integer or {n} of them, got {value!r}") from None
