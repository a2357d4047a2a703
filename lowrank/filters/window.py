"""Where a filter runs: axes, shifts, borders and size of the result."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from lowrank._typing import Array, Ints, PaddingMode, Pads
from lowrank.core.geometry import as_integers
from lowrank.factorization import Factorization, dense
from lowrank.filters import arguments

Padding = Literal["same", "valid", "full"]
PADDINGS: tuple[str, ...] = get_args(Padding)
Borders = tuple[PaddingMode, ...]
KEPT = 256  # latest windows


class Window(NamedTuple):
    """Axes, shifts, borders and output size of a filter on images with some number of axes.

    Attributes
    ----------
    along : tuple of int
        Axes of the image, one per axis of the kernel, as the next four.
    taps : tuple of int
        Number of taps.
    before : tuple of int
        Taps ahead of an output's own position.
    borders : tuple of str
        Padding modes.
    pads : tuple of (int, int)
        Number of border samples before and after the image.
    border : str
        Padding mode of the first axis with more than one tap.
    has_one_border : bool
        Whether it is that of all others.
    is_same : bool
        Whether results have the size of the image.
    padding : str
        One of `PADDINGS`.
    """

    along: Ints
    taps: Ints
    before: Ints
    borders: Borders
    pads: Pads
    border: PaddingMode
    has_one_border: bool
    is_same: bool
    padding: str

    @property
    def origins(self) -> Ints:
        """Shift along each axis of the kernel, as in scipy.ndimage."""
        return tuple(b - n // 2 for b, n in zip(self.before, self.taps))

    @classmethod
    def of(
        cls, along: Ints, taps: Ints, before: Ints, borders: Borders, padding: str = "same"
    ) -> Window:
        """Return a window with the border samples of one of `PADDINGS`."""
        if padding == "same":
            pads = tuple((b, n - 1 - b) for b, n in zip(before, taps))
        else:
            pads = tuple((n - 1, n - 1) if padding == "full" else (0, 0) for n in taps)
        used = [b for b, n in zip(borders, taps) if n > 1] or borders
        is_same = padding == "same" or max(taps) == 1
        return cls(
            along, taps, before, borders, pads, used[0], len(set(used)) == 1, is_same, padding
        )

    def inside(self, padding: str = "same") -> Window:
        """Return the window on an image that holds its border samples.

        Results are its first outputs, or with "valid" all of them.  Others read samples of the
        image, not a constant that might be smaller.
        """
        n = len(self.taps)
        borders: Borders = tuple("replicate" for _ in range(n))
        return Window.of(self.along, self.taps, (0,) * n, borders, padding)

    def only(self, axes: Sequence[int]) -> Window:
        """Return the window along some axes of the kernel."""
        along, taps, before = (
            tuple(field[a] for a in axes) for field in (self.along, self.taps, self.before)
        )
        borders = tuple(self.borders[a] for a in axes)
        return Window.of(along, taps, before, borders, self.padding)

    def padded_shape(self, shape: Ints) -> Ints:
        """Return the shape of an image with its border samples."""
        sizes = list(shape)
        for axis, pad in zip(self.along, self.pads):
            sizes[axis] += sum(pad)
        return tuple(sizes)

    def output_shape(self, shape: Ints) -> Ints:
        """Return the shape of the result of an image."""
        if self.is_same:
            return shape
        sizes = list(shape)
        for axis, n, pad in zip(self.along, self.taps, self.pads):
            least = n if self.padding == "valid" else 1
            if shape[axis] < least:
                raise ValueError(
                    f"image must have at least {least} samples along axis {axis} for "
                    f"padding={self.padding!r}, got {shape[axis]}"
                )
            sizes[axis] += sum(pad) - n + 1
        return tuple(sizes)


def as_window(
    taps: Ints, ndim: int, axes: Any, origin: Any, mode: Any, padding: Any, flip: bool = False
) -> Window:
    """Check where a filter runs; of a flipped kernel if asked for.  Kept for the latest calls."""
    if axes is not None and type(axes) is not int:
        is_many = np.ndim(axes) > 0
        axes = as_integers("axes", axes, len(axes) if is_many else 1)
        axes = axes if is_many else axes[0]
    if type(origin) is not int:
        origin = as_integers("origin", origin, len(taps))
    if isinstance(mode, list | tuple | np.ndarray):
        if len(mode) != len(taps):
            raise ValueError(
                f"mode must be one border mode, or {len(taps)}, one per axis of the kernel, got "
                f"{mode}"
            )
        borders = tuple(map(arguments.as_padding_mode, mode))
    else:
        borders = (arguments.as_padding_mode(mode),) * len(taps)
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    return _keep_window(taps, ndim, axes, origin, borders, padding, flip)


@functools.lru_cache(KEPT)
def _keep_window(
    taps: Ints, ndim: int, axes: Any, origin: Any, borders: Borders, padding: str, flip: bool
) -> Window:
    along = arguments.as_axes(axes, ndim, len(taps))
    origins = arguments.as_origins(origin, taps)
    if flip:
        origins = tuple(-o - (n % 2 == 0) for o, n in zip(origins, taps))
    before = tuple(n // 2 + o for n, o in zip(taps, origins))
    return Window.of(along, taps, before, borders, padding)


def as_convolution(kernel: Array, window: Window, cval: float) -> Factorization:
    """Return the filter as a dense one-channel convolution."""
    return dense(kernel[None, None], padding=window.pads, padding_mode=window.border, value=cval)
