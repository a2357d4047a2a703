"""The compiled engine: chains planned once, run many times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.cost import chain_shapes
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import INTEGERS, Step

try:
    from lowrank._kernels import _core
except ImportError as missing:
    raise ImportError(
        "lowrank's compiled engine is not there. In a checkout, build it with "
        "'python setup.py build_ext --inplace' or 'pip install -e .'; a folder named lowrank in "
        "the current directory hides an installed one"
    ) from missing

from lowrank.engine.lowering import Part, lowered

BATCHES = 8  # that a plan keeps segments for


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A part of a chain, and the engine's plan of it."""

    core: _core.Plan
    part: Part


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A chain planned for one input shape and precision; safe from many threads.

    Where the engine has an axis to spare, the examples of a batch go along it, so that weights
    that are in the cache serve several of them: a batch has segments of its own, made when it
    first comes and kept.
    """

    planned: dict[int, tuple[Segment, ...]]  # by batch
    make: Callable[[int], tuple[Segment, ...]]
    in_shape: Ints
    out_shape: Ints
    dtype: Any
    threads: int

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Those of a single example."""
        return self._segments(1)

    def _segments(self, batch: int) -> tuple[Segment, ...]:
        batch = max(batch, 1)
        if not any(s.part.spare for s in self.planned[1]):  # then only this matters of a batch
            batch = 1 if batch < self.threads else self.threads
        found = self.planned.get(batch)
        if found is None:
            found = self.make(batch)
            if len(self.planned) >= BATCHES:  # the oldest goes, but never that of one example
                self.planned.pop(next(n for n in list(self.planned) if n > 1), None)
            self.planned[batch] = found
        return found

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run the plan on `x`, (batch, channels, *spatial); see Factorization.compile."""
        x, out = self._checked(x, out)
        segments = self._segments(len(x))
        last = len(segments) - 1
        for i, segment in enumerate(segments):
            direct = out is not None and out.flags.aligned and segment.part.after is None
            x = self._run(segment, x, out if i == last and direct else None)
        if out is None or x is out:
            return x
        out[...] = reference.saturate(x, out.dtype) if out.dtype in INTEGERS else x
        return out

    def breakdown(self, x: Array, out: Array | None = None, *, repeat: int = 5) -> tuple[Step, ...]:
        """Where the time of a run on `x` goes; see Step."""
        (repeat,) = as_integers("repeat", repeat, 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        out = self(x, out)
        runs = [self._timed(x, out) for _ in range(repeat)]
        runs.sort(key=lambda steps: sum(s.seconds for s in steps))
        return tuple(runs[len(runs) // 2])

    def _timed(self, x: Array, out: Array) -> list[Step]:
        x, _ = self._checked(x, out)
        found = []
        segments = self._segments(len(x))
        for i, segment in enumerate(segments):
            target = out if i == len(segments) - 1 and segment.part.after is None else None
            start = time.perf_counter()
            clocked: list[Any] = []
            x = self._run(segment, x, target, clocked)
            whole = time.perf_counter() - start
            took, team, steps = clocked[0]
            rest = took
            for stage, name, seconds, macs, moved in steps:
                seconds /= team
                rest -= seconds
                if name != "deliver":
                    found.append(Step(segment.part.names[stage], name, seconds, macs, moved))
                elif moved:
                    found.append(Step("run", name, seconds, macs, moved))
            found.append(Step("run", "rest", rest, 0, 0))
            if segment.part.before is not None or segment.part.after is not None:
                found.append(Step("run", "prepare", whole - took, 0, 0))
        return found

    def _checked(self, x: Array, out: Array | None) -> tuple[Array, Array | None]:
        if not isinstance(x, np.ndarray) or (x.dtype != self.dtype and x.dtype not in INTEGERS):
            raise TypeError(
                f"this plan takes {self.dtype} arrays, or 8- or 16-bit integers, got "
                f"{getattr(x, 'dtype', None) or type(x).__qualname__}"
            )
        if x.shape[1:] != self.in_shape:
            raise ValueError(f"this plan takes (batch, {self.in_shape}), got {x.shape}")
        if not x.flags.aligned:
            x = x.copy()
        if out is None:
            return x, out
        if not isinstance(out, np.ndarray):
            raise TypeError(f"out must be a NumPy array, got {type(out).__qualname__}")
        shape = (len(x), *self.out_shape)
        if out.shape != shape or (out.dtype != self.dtype and out.dtype not in INTEGERS):
            raise ValueError(
                f"out must be {self.dtype}, or 8- or 16-bit integers, of shape {shape}, got "
                f"{out.dtype} of {out.shape}"
            )
        if not out.flags.writeable:
            raise ValueError("out is read-only")
        return x, out

    def _run(
        self, segment: Segment, x: Array, out: Array | None, clocked: list[Any] | None = None
    ) -> Array:
        if segment.part.before is not None:
            x = segment.part.before(x.astype(self.dtype, copy=False))
        if out is None:
            out = np.empty((len(x), segment.core.out_shape[0], *segment.part.size_out), self.dtype)
        if segment.part.batched:
            x, y = x.swapaxes(0, 1), out.swapaxes(0, 1)
            x, y = (a.reshape(1, len(a), *size) for a, size in (
                (x, segment.part.shape[1:]), (y, segment.part.out_shape[1:])
            ))  # fmt: skip
        else:
            x = x.reshape(*x.shape[:2], *segment.part.shape[1:])
            y = out.reshape(*out.shape[:2], *segment.part.out_shape[1:])
        if clocked is None:
            segment.core(x, y, self.threads)
        else:
            clocked.append(segment.core.breakdown(x, y, self.threads))
        return out if segment.part.after is None else segment.part.after(out)


def plan(
    stages: Sequence[Stage],
    shape: Ints,
    dtype: Any,
    epilogues: Sequence[Epilogue],
    threads: int | None = None,
    interleaved: int = 1,
) -> Plan:
    """Lower `stages` for inputs of `shape` = (channels, *spatial) and let the engine plan them."""
    threads = threads or _core.max_threads()
    links = list(zip(stages, epilogues))

    def make(batch: int) -> tuple[Segment, ...]:
        parts = lowered(links, shape, dtype, threads, interleaved, batch)
        return tuple(_segment(part, dtype) for part in parts)

    ends = shape, chain_shapes(stages, shape)[-1]
    (*a, wide_in), (*b, wide_out) = ends
    in_shape, out_shape = (*a, wide_in * interleaved), (*b, wide_out * interleaved)
    return Plan({1: make(1)}, make, in_shape, out_shape, np.dtype(dtype), threads)


def _segment(part: Part, dtype: Any) -> Segment:
    """Let the engine plan `part`: weights packed."""
    specs = [s._replace(weight=np.ascontiguousarray(s.weight, dtype=dtype)) for s in part.specs]
    core = _core.Plan(
        specs,
        part.shape,
        dtype=np.dtype(dtype).name,
        border=part.border,
        fill=part.fill,
        tile=part.tile,
        parts=part.parts,
        seconds=part.seconds,
    )
    return Segment(core, part)
