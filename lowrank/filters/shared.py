"""Outer products that are computed together: passes with the same factors run once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank import engine
from lowrank._kernels._core import Passes
from lowrank._typing import Array, Ints, PaddingMode
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Epilogue, Stage

KEPT = 64  # latest banks that are kept compiled
LIGHT_SAMPLES = 1 << 16  # of images that a plan would take longer than the passes
ENGINE_AXES = 3
MIN_ROW = 16  # samples of the last axis: vectors of the engine lie along it
ITEMSIZE = 8  # bytes per tap

Factors = tuple[bytes, ...]  # float64 taps of an outer product, one entry per filtered axis
Tree = dict[bytes, Any]  # children by factor; at the last axis lists of outputs


class Border(NamedTuple):
    """Samples beyond the ends of the filtered axes."""

    modes: tuple[PaddingMode, ...]  # one per axis
    value: float  # of mode "constant"


def correlate_shared(
    x: Array,
    kernels: Sequence[Factors],
    axes: Ints,
    border: Border,
    threads: int | None,
    out: Array,
) -> None:
    """Filter an image by several outer products.

    Factors that outer products have in common along their first axes are computed once: a tree of
    passes.  Large images run on chains of the engine with several output channels, which keep
    intermediate results in the cache; others pass by pass, as do images that contain NaN or
    infinities if taps are zero, since passes skip those.

    Parameters
    ----------
    x : ndarray
        C-contiguous, float32 or float64.
    kernels : sequence of tuple of bytes
        Factors of each outer product.
    axes : tuple of int
        Axis of each factor.
    border : Border
        Modes and value of the border.
    threads : int or None
        Number of threads.
    out : ndarray, shape (kernels, \\*x.shape)
        Results, C-contiguous, of the dtype of `x`.
    """
    if not out.size:
        return
    # Factors that differ least come first, so that passes are shared near the root.
    order = sorted(range(len(axes)), key=lambda a: len({k[a] for k in kernels}))
    sorted_kernels = tuple(tuple(k[a] for a in order) for k in kernels)
    modes = tuple(border.modes[a] for a in order)
    along = tuple(axes[a] for a in order)
    has_zeros = not all(np.frombuffer(f).all() for k in kernels for f in k)
    # Tiles would consist of halo where a factor is longer than its axis.
    is_long = any(
        len(k[i]) > ITEMSIZE * x.shape[a] for i, a in enumerate(along) for k in sorted_kernels
    )
    border = Border(modes, border.value)
    if not is_long and fits_engine(x, along) and not (has_zeros and not is_finite(x)):
        x = as_batch(x)
        spatial = x.shape[2:]
        along = tuple(a - len(out.shape[1:]) + len(spatial) for a in along)
        chains = _compile_chains(sorted_kernels, along, spatial, x.dtype.str, border, threads)
        _run_chains(chains, x, out.reshape(len(out), len(x), *spatial))
    else:
        _run_tree(as_tree(sorted_kernels), x, out, along, border)


def fits_engine(x: Array, axes: Ints) -> bool:
    """Return whether plans of the engine take an image, and are faster than passes."""
    is_large = x.size > LIGHT_SAMPLES and x.shape[-1] >= MIN_ROW
    return is_large and min(axes) >= x.ndim - ENGINE_AXES


def as_batch(x: Array) -> Array:
    """Return an image as (batch, 1, ...), of at most three axes besides."""
    return x.reshape(-1, 1, *x.shape[max(0, x.ndim - ENGINE_AXES) :])


def is_finite(x: Array) -> bool:
    """Return whether no sample is NaN or infinite; a sum of large samples would overflow."""
    return math.isfinite(float(x.min())) and math.isfinite(float(x.max()))


def as_tree(kernels: Sequence[Factors]) -> Tree:
    """Return the outputs of each outer product at the leaves of a tree of factors."""
    tree: Tree = {}
    for number, (*inner, last) in enumerate(kernels):
        node = tree
        for factor in inner:
            node = node.setdefault(factor, {})
        node.setdefault(last, []).append(number)
    return tree


def _run_tree(tree: Tree, x: Array, out: Array, axes: Ints, border: Border) -> None:
    """Filter pass by pass, depth first: one intermediate result per axis at a time."""
    (axis, *inner), (mode, *modes) = axes, border.modes
    y = np.empty_like(x) if inner else x
    for factor, below in tree.items():
        run, total = _pass(factor, x.dtype.name)
        for target in [y] if inner else [out[number] for number in below]:
            run(x, target, [axis], [_before(factor)], mode, border.value)
        if inner:
            _run_tree(below, y, out, tuple(inner), Border(tuple(modes), border.value * total))


@functools.lru_cache(4 * KEPT)
def _pass(factor: bytes, dtype: str) -> tuple[Passes, float]:
    """Return a pass, and its response to a constant of 1."""
    taps = np.frombuffer(factor)
    return Passes([taps], dtype), float(taps.sum())


def _before(factor: bytes) -> int:
    """Return the number of taps ahead of the output."""
    return len(factor) // ITEMSIZE // 2


class _Chain(NamedTuple):
    """Compiled passes with several outputs."""

    run: engine.Runner
    outputs: Ints


def _run_chains(chains: Sequence[_Chain], x: Array, out: Array) -> None:
    """Filter (batch, 1, ...) into (outputs, batch, ...)."""
    for chain in chains:
        start, count = chain.outputs[0], len(chain.outputs)
        if chain.outputs == tuple(range(start, start + count)):
            chain.run(x, out[start : start + count].swapaxes(0, 1))
        else:
            y = np.empty((len(x), count, *x.shape[2:]), x.dtype)
            chain.run(x, y)
            out[list(chain.outputs)] = y.swapaxes(0, 1)


class _Forest(NamedTuple):
    """Trees of one form: all nodes of a level have as many children, and factors as long."""

    levels: tuple[Factors, ...]
    outputs: Ints

    @property
    def form(self) -> tuple[Ints, ...]:
        """Number and length of the factors at each level."""
        return tuple((len(factors), len(factors[0])) for factors in self.levels)


def _forests(tree: Tree, depth: int) -> list[_Forest]:
    """Split a tree into forests of one form."""
    found: dict[tuple[Ints, ...], _Forest] = {}
    for factor, below in tree.items():
        if depth > 1:
            some = [_Forest(((factor,), *f.levels), f.outputs) for f in _forests(below, depth - 1)]
        else:
            some = [_Forest(((factor,),), (number,)) for number in below]
        for forest in some:
            form = forest.form
            if form in found:
                levels = zip(found[form].levels, forest.levels)
                forest = _Forest(
                    tuple(a + b for a, b in levels), found[form].outputs + forest.outputs
                )
            found[form] = forest
    return list(found.values())


@functools.lru_cache(KEPT)
def _compile_chains(
    kernels: tuple[Factors, ...],
    axes: Ints,
    spatial: Ints,
    dtype: str,
    border: Border,
    threads: int | None,
) -> tuple[_Chain, ...]:
    """Compile one chain per forest: one stage per axis."""
    chains = []
    for forest in _forests(as_tree(kernels), len(axes)):
        stages, parents = [], 1
        for axis, mode, factors in zip(axes, border.modes, forest.levels):
            lines = np.array([np.frombuffer(f) for f in factors], dtype)
            stages.append(_stage(lines, parents, axis, len(spatial), mode, border.value))
            parents = len(factors)
        epilogues = [Epilogue()] * len(stages)
        run = engine.plan(stages, (1, *spatial), np.dtype(dtype), epilogues, threads)
        chains.append(_Chain(run, forest.outputs))
    return tuple(chains)


def _stage(
    lines: Array, groups: int, axis: int, ndim: int, mode: PaddingMode, value: float
) -> Stage:
    """Return the stage that filters each of `groups` channels by as many lines along an axis."""
    shape, padding = [len(lines), 1] + [1] * ndim, [(0, 0)] * ndim
    taps = shape[2 + axis] = lines.shape[1]
    padding[axis] = (taps // 2, taps - 1 - taps // 2)
    geometry = Geometry.of(ndim, padding=padding, padding_mode=mode, value=value)
    return Stage(lines.reshape(shape), geometry, groups=groups)
