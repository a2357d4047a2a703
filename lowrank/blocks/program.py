"""Blocks as programs: chains, activations, sums and concatenations in one parallel region."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank._kernels.spec import ACTIVATIONS
from lowrank._typing import Array, Ints
from lowrank.core import reference
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Epilogue
from lowrank.engine import INTEGERS, Algorithm, StepProfile
from lowrank.engine.channels_last import with_three_axes
from lowrank.engine.cpu import check_arrays
from lowrank.engine.description import OperationRow, operation_table
from lowrank.engine.network import (
    Primitive,
    describe_operation,
    emit,
    fuse,
    on_three,
    value_shape,
)
from lowrank.engine.program import Program, ProgramBuilder, Unsupported
from lowrank.factorization import Factorization

_POOLED = 3  # samples along each axis of the window of ShuffleNet's shortcut
_RUNS = 5
_ALPHA = {"leaky_relu": 0.01, "elu": 1.0}  # defaults of PyTorch


@dataclass(frozen=True, slots=True, eq=False)
class BlockPlan:
    """A block planned as one program for one input shape; safe to call from many threads.

    Attributes
    ----------
    program : Program
        Its operations.
    in_shape, out_shape : tuple of int
        (channels, *spatial) of one example.
    skip_shape : tuple of int or None
        That of the skip connection, the second input, if the block has one.
    dtype : numpy.dtype
        float32 or float64.
    threads : int
        Number of threads.
    """

    program: Program
    in_shape: Ints
    out_shape: Ints
    skip_shape: Ints | None
    dtype: Any
    threads: int

    def __call__(self, x: Array, out: Array | None = None, *, skip: Array | None = None) -> Array:
        """Run the block on `x`; `skip` is what a decoder step concatenates."""
        x, out, inputs = self._checked(x, out, skip)
        writes_out = out is not None and out.dtype == self.dtype and out.flags.aligned
        y = out if out is not None and writes_out else self._empty(x)
        self.program(inputs, [with_three_axes(y)], self.threads)
        if out is None or y is out:
            return y
        out[...] = reference.saturate(y, out.dtype) if out.dtype in INTEGERS else y
        return out

    def breakdown(
        self, x: Array, out: Array | None = None, *, skip: Array | None = None, repeat: int = _RUNS
    ) -> tuple[StepProfile, ...]:
        """Profile the operations of the median of `repeat` runs on `x`; see StepProfile."""
        (repeat,) = as_integers("repeat", repeat, 1)
        if repeat < 1:
            raise ValueError(f"repeat must be at least 1, got {repeat}")
        self(x, out, skip=skip)
        x, _, inputs = self._checked(x, out, skip)
        arrays = [*inputs, with_three_axes(self._empty(x))]
        runs = [self.program.core.profile(arrays, self.threads) for _ in range(repeat)]
        median = sorted(runs, key=sum)[repeat // 2]
        moved = len(x) * self.dtype.itemsize
        return tuple(
            StepProfile(op.name, op.kind, t, len(x) * op.macs, moved * op.samples_moved)
            for op, t in zip(self.program.operations, median)
        )

    def describe(self, x: Array | None = None, *, skip: Array | None = None) -> str:
        """Return a table of the operations; with `x`, also of the times of a run."""
        rows = [OperationRow(*describe_operation(op)) for op in self.program.operations]
        seconds = None if x is None else [s.seconds for s in self.breakdown(x, skip=skip)]
        table = operation_table(rows, seconds)
        return f"channels-last buffers, {self.dtype}, threads {self.threads}\n{table}"

    def _empty(self, x: Array) -> Array:
        return np.empty((len(x), *self.out_shape), self.dtype)

    def _checked(
        self, x: Array, out: Array | None, skip: Array | None
    ) -> tuple[Array, Array | None, list[Array]]:
        x, out = check_arrays(x, out, self.dtype, self.in_shape, self.out_shape)
        inputs = [x]
        if (skip is None) != (self.skip_shape is None):
            what = "this block has no skip connection" if skip is not None else "got None"
            raise ValueError(f"skip must be given for blocks that concatenate it, and only: {what}")
        if skip is not None and self.skip_shape is not None:
            skip, _ = check_arrays(skip, None, self.dtype, self.skip_shape, (), "skip")
            if len(skip) != len(x):
                raise ValueError(f"skip must have the batch of x, {len(x)}, got {len(skip)}")
            inputs.append(skip)
        return x, out, [with_three_axes(a.astype(self.dtype, copy=False)) for a in inputs]


def plan_block(
    parts: Sequence[Factorization | str],
    shape: Ints,
    dtype: Any,
    threads: int,
    algorithm: Algorithm,
) -> BlockPlan:
    """Plan a block for inputs of `shape`, (channels, *spatial).

    Raises
    ------
    ValueError
        If a word is unknown or needs weights, shapes do not fit, or a program has no operation for
        a part.
    """
    reader = _Reader(shape)
    for part in parts:
        if isinstance(part, str):
            for word in part.split(", "):
                reader.add_word(word)
        else:
            reader.add_chain(part)
    if reader.awaits_skip:
        raise ValueError("a chain must follow 'concatenate skip', which says how wide the skip is")
    builder = ProgramBuilder(dtype, algorithm)
    shapes = dict(reader.inputs)
    values = {name: builder.input(value_shape(s)) for name, s in shapes.items()}
    uses = Counter(name for p in reader.primitives for name in p.inputs)
    uses[reader.value] += 1
    try:
        for p in fuse(reader.primitives, uses):
            values[p.output] = emit(builder, p, values, shapes)
        builder.output(values[reader.value])
    except Unsupported as error:
        raise ValueError(f"parts must be what a program runs, got {error}") from error
    names = [*reader.inputs, "out"]
    return BlockPlan(
        builder.build(names=names), shape, reader.shape, reader.inputs.get("skip"),
        np.dtype(dtype), threads,
    )  # fmt: skip


class _Reader:
    """Primitives of the parts so far."""

    def __init__(self, shape: Ints) -> None:
        self.inputs: dict[str, Ints] = {"x": shape}
        self.primitives: list[Primitive] = []
        self.value, self.shape = "x", shape
        self.awaits_skip = False  # whose channels are those that the next chain has more

    def add_chain(self, f: Factorization) -> None:
        if self.awaits_skip:
            self._add_skip(f.in_channels - self.shape[0])
        if f.in_channels != self.shape[0]:
            raise ValueError(
                f"parts must fit: a chain of {f.in_channels} input channels gets {self.shape[0]}"
            )
        shape = f.output_shape(self.shape[1:])
        links = [(s, Epilogue()) for s in f.stages]
        links[-1] = f.stages[-1], Epilogue(f.bias)
        number = sum(p.kind == "convolve" for p in self.primitives)
        self._add("convolve", (self.value,), shape, f"chain {number}", links=tuple(links))

    def add_word(self, word: str) -> None:
        if word == "add input":
            if self.shape != self.inputs["x"]:
                raise ValueError(
                    f"'add input' needs an input of shape {self.shape}, got {self.inputs['x']}"
                )
            self._add("add", (self.value, "x"), self.shape)
        elif word == "concatenate pooled input":
            self._concatenate(self._pooled(), self.inputs["x"][0])
        elif word == "concatenate skip":
            self.awaits_skip = True
        elif word in ACTIVATIONS[1:-1]:  # "clip" needs a limit
            alpha = _ALPHA.get(word, 0.0)
            self._add("activate", (self.value,), self.shape, activation=word, alpha=alpha)
        else:
            why = " has no weights in the block" if word == "squeeze-excite" else " is unknown"
            raise ValueError(f"parts must be chains and words of a program: {word!r}{why}")

    def _add(
        self, kind: str, inputs: tuple[str, ...], shape: Ints, name: str = "", **fields: Any
    ) -> None:
        self.value, self.shape = name or f"{kind} {len(self.primitives)}", shape
        self.primitives.append(Primitive(kind, inputs, self.value, shape, **fields))

    def _pooled(self) -> str:
        """Add ShuffleNet's shortcut: means over windows, zeros around the input included."""
        channels, *size = self.inputs["x"]
        shape = (channels, *((n - 1) // 2 + 1 for n in size))
        ndim = len(size)
        options = {
            "kind": "mean pool", "size": on_three(shape[1:], 1),
            "taps": on_three((_POOLED,) * ndim, 1), "stride": on_three((2,) * ndim, 1),
            "before": on_three((1,) * ndim, 0), "count_padding": True,
        }  # fmt: skip
        self.primitives.append(Primitive("pool", ("x",), "pooled input", shape, options=options))
        if shape[1:] != self.shape[1:]:
            raise ValueError(
                f"'concatenate pooled input' needs samples of one size, got {self.shape[1:]} and "
                f"{shape[1:]}"
            )
        return "pooled input"

    def _add_skip(self, channels: int) -> None:
        if channels < 1:
            raise ValueError(
                f"'concatenate skip' leaves {channels} channels for the skip in the next chain"
            )
        self.inputs["skip"] = (channels, *self.shape[1:])
        self.awaits_skip = False
        self._concatenate("skip", channels)

    def _concatenate(self, other: str, channels: int) -> None:
        shape = (self.shape[0] + channels, *self.shape[1:])
        self._add("concatenate", (self.value, other), shape)
