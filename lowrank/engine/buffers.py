"""Values of a program, and the buffers of the arena that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array, Ints

ONES, ZEROS = (1, 1, 1), (0, 0, 0)
VECTOR_OVERHANG = 64  # elements behind a buffer that the last block's padding may write
ARENA_ALIGNMENT = 16  # elements: a cache line in float32


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple that is at least `n`."""
    return -(-n // multiple) * multiple


class View(NamedTuple):
    """Samples as an operation finds them: lr_view in program.h."""

    offset: int
    image: int
    pitch: Ints


@dataclass(eq=False)
class Buffer:
    """Memory of one or more values: samples with a halo."""

    size: Three
    width: int  # channels, padding included
    before: list[int] = field(default_factory=lambda: [0, 0, 0])
    after: list[int] = field(default_factory=lambda: [0, 0, 0])
    gap: int = 0  # elements between samples, so that neighbours share no set of the L1 cache
    offset: int = 0  # in the arena

    @property
    def pitch(self) -> Three:
        """Elements between samples along each axis."""
        _, h, w = (b + n + a for b, n, a in zip(self.before, self.size, self.after))
        sample = self.width + self.gap
        return h * w * sample, w * sample, sample

    @property
    def elements(self) -> int:
        """Elements of one image."""
        d = self.before[0] + self.size[0] + self.after[0]
        return d * self.pitch[0] + VECTOR_OVERHANG

    @property
    def key(self) -> object:
        """Buffers of the same key can share memory: their halos are in the same places."""
        return self.size, self.width, self.gap, tuple(self.before), tuple(self.after)


@dataclass(eq=False)
class Value:
    """A value of a program: (channels, d, h, w) of each example.

    Attributes
    ----------
    shape : tuple of int
        (channels, d, h, w).
    position : ndarray of int
        Place of each channel in a sample of its buffer, counted from `start`.
    width : int
        Channels of a sample, padding included.
    buffer : Buffer
        Memory that holds the value.
    start : int
        Place of the value's channels in a sample of the buffer.
    first, step : tuple of int
        Sample of the buffer that is sample 0, and distance of samples, along each axis.
    has_alias : bool
        Whether another value is in the same memory.
    """

    shape: Ints
    position: Array
    width: int
    buffer: Buffer
    start: int = 0
    first: Ints = ZEROS
    step: Ints = ONES
    has_alias: bool = False

    @property
    def size(self) -> Three:
        """Samples along each axis."""
        _, d, h, w = self.shape
        return d, h, w

    @property
    def samples(self) -> int:
        """Elements of one example, padded channels included."""
        return math.prod(self.size) * self.width

    def vectors(self, lanes: int) -> float:
        """Return the number of vectors of all samples."""
        return self.samples / lanes

    def view(self, spec: StageSpec | None = None, broadcast: bool = False) -> View:
        """Return the place of the samples, or of the first tap of each output of a stage."""
        buffer = self.buffer
        halo, stride = buffer.before, ONES
        if spec is not None:
            halo = [h - b for h, b in zip(halo, spec.before)]
            stride = spec.stride
        pitches = list(zip(buffer.pitch, halo, self.first, self.step, stride))
        origin = buffer.offset + self.start + sum((h + f) * p for p, h, f, _, _ in pitches)
        steps = ZEROS if broadcast else tuple(p * n * s for p, _, _, n, s in pitches)
        return View(origin, buffer.elements, steps)

    def tap_pitch(self, dilation: Three) -> Three:
        """Return the elements between the taps of a kernel along each axis."""
        a, b, c = (p * d for p, d in zip(self.buffer.pitch, dilation))
        return a, b, c

    def every(self, first: Ints, step: Ints, size: Ints) -> Value:
        """Return every step-th sample, as a value in the same memory."""
        return replace(self, shape=(self.shape[0], *size), first=first, step=step)

    def move_to_every(self, result: Value, first: Ints, step: Ints) -> None:
        """Make the operation of this value write every step-th sample of `result`."""
        self.buffer, self.first, self.step = result.buffer, first, step


def place_buffers(turns: Sequence[Sequence[Buffer]], images: int) -> int:
    """Set the offsets of buffers in an arena, in which those without further use are reused.

    Parameters
    ----------
    turns : sequence of sequence of Buffer
        Buffers that are in use at the same time, in the order in which operations run.
    images : int
        Number of images that each buffer holds.

    Returns
    -------
    int
        Elements of the arena.
    """
    first: dict[Buffer, int] = {}
    last: dict[Buffer, int] = {}
    for turn, buffers in enumerate(turns):
        for buffer in buffers:
            first.setdefault(buffer, turn)
            last[buffer] = turn
    arena = 0
    free: dict[object, list[int]] = {}
    for turn in range(len(turns)):
        for buffer in (b for b, start in first.items() if start == turn):
            unused = free.get(buffer.key)
            if unused:
                buffer.offset = unused.pop()
                continue
            buffer.offset = arena
            arena += round_up(images * buffer.elements, ARENA_ALIGNMENT)
        for buffer in (b for b, end in last.items() if end == turn):
            free.setdefault(buffer.key, []).append(buffer.offset)
    return arena
