"""Input patches of a convolution, one per output position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank import engine
from lowrank._typing import Array
from lowrank.core import reference
from lowrank.core.geometry import Geometry
from lowrank.factorization import Factorization


class Patches:
    """Input patches of every output position (im2col), for inputs of one spatial size."""

    def __init__(self, conv: Factorization, spatial: Sequence[int]) -> None:
        g = conv.geometry
        self.conv, self.kernel = conv, tuple(conv.stages[0].weight.shape[2:])
        if conv.transposed:
            # Zero-stuff the input; a plain pass with reversed taps then gives the same result.
            self.plain = Geometry.of(g.ndim, dilation=g.dilation)
            self.outs = conv.output_shape(spatial)[1:]
        else:
            self.plain = g
            self.outs = g.output_size(tuple(spatial), self.kernel)

    def windows(self, x: Array) -> Array:
        """Return a view of a batch, (batch, *outs, channels, *taps)."""
        g = self.conv.geometry
        if self.conv.transposed:
            x = self._zero_stuff(x)
        else:
            x = reference.pad(x, g.padding, g.padding_mode, np.full(self.conv.in_channels, g.value))
        axes = tuple(range(2, x.ndim))
        every = np.lib.stride_tricks.sliding_window_view(x, self.plain.extent(self.kernel), axes)
        steps = [slice(None, None, s) for s in (*self.plain.stride, *self.plain.dilation)]
        patches = every[:, :, *steps][(slice(None), slice(None), *(slice(n) for n in self.outs))]
        if self.conv.transposed:
            patches = np.flip(patches, tuple(range(patches.ndim - len(axes), patches.ndim)))
        return np.moveaxis(patches, 1, 1 + len(axes))

    def gather(self, windows: Array, at: Array) -> Array:
        """Return the patches of some output positions, (groups, samples, in * taps)."""
        positions = windows.shape[: 1 + len(self.outs)]
        where = np.unravel_index(engine.as_array_like(at, windows), positions)
        flat = windows[where].reshape(len(at), self.conv.groups, -1)
        return flat.swapaxes(0, 1).copy()

    def _zero_stuff(self, x: Array) -> Array:
        g = self.conv.geometry
        sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], g.stride)]
        wide = np.zeros((*x.shape[:2], *sizes), x.dtype)
        wide[(slice(None), slice(None), *(slice(None, None, s) for s in g.stride))] = x
        reach = [d * (k - 1) for d, k in zip(g.dilation, self.kernel)]
        for axis, (r, (before, _), out) in enumerate(zip(reach, g.padding, self.outs), start=2):
            # Output 0 sees as far back as the first tap, the last one after reversal.
            low = r - before
            high = out + r - low - wide.shape[axis]
            if low < 0:
                wide = np.take(wide, range(-low, wide.shape[axis]), axis)
                low, high = 0, out + r - wide.shape[axis]
            if high < 0:
                wide = np.take(wide, range(wide.shape[axis] + high), axis)
                high = 0
            wide = np.pad(wide, [(low, high) if a == axis else (0, 0) for a in range(wide.ndim)])
        return wide
