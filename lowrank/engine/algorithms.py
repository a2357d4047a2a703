"""Choice of fast (Toom-Cook) algorithms for convolutions: predicted errors and counts."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from lowrank._kernels import _core, toom_cook
from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array, Ints
from lowrank.engine.buffers import ONES, ZEROS, Value
from lowrank.engine.costs import Counts, default_cost, product_counts, weight_vectors
from lowrank.engine.operations import JOINED_ROW, ROW, rows_join

MAX_ERROR = 1e-4  # predicted, relative, of a fast algorithm in float32
L2_TILES = 0.35  # of the L2 cache for the transformed inputs of a block of tiles
MAX_TILE_BLOCKS = 8  # blocks of pixels in a block of tiles
MAX_FEW_OUTPUTS = 4  # outputs of LR_FEW_OUTPUTS in program.h


def algorithm_shape(number: int) -> tuple[int, int]:
    """Return the outputs and taps of an algorithm; 1 and 1 for none."""
    return toom_cook.ALGORITHMS[number - 1] if number else (1, 1)


def product_count(algorithm: Ints) -> int:
    """Return the number of products per tile, input channel and output channel."""
    return math.prod(m + r - 1 for m, r in map(algorithm_shape, algorithm))


def tile_counts(algorithm: Ints, dilation: Ints, size: Ints) -> Three:
    """Return the number of tiles along each axis; each phase of a dilation has its own."""
    counts = []
    for number, d, n in zip(algorithm, dilation, size):
        outputs, _ = algorithm_shape(number)
        # Tile i has phase i % d; the last round may have tiles that start beyond the output.
        per_phase = math.ceil(math.ceil(n / d) / outputs)
        counts.append(min(n, d) * per_phase if number else n)
    a, b, c = counts
    return a, b, c


def transform_weight(weight: Array, algorithm: Ints) -> Array:
    """Return G g along all axes, (rows, in, positions), computed in float64."""
    transformed = weight.astype(np.float64)
    for axis, number in enumerate(algorithm, start=2):
        if number:
            product = np.tensordot(transformed, _weight_matrix(number), (axis, 1))
            transformed = np.moveaxis(product, -1, axis)
    return transformed.reshape(*weight.shape[:2], -1)


@functools.cache
def _weight_matrix(number: int) -> Array:
    """Return the matrix G of an algorithm in float64."""
    return np.array(toom_cook.matrices(*algorithm_shape(number)).g, np.float64)


def predicted_error(algorithm: Ints, channels: int, dtype: Any) -> float:
    """Predict the relative RMS error of a fast algorithm, for white inputs and weights.

    Every product carries the rounding of its two transforms (two roundings per axis each), and a
    sum over n channels adds sqrt(n / 6) roundings; the algorithm amplifies both.
    """
    gain, axes = 1.0, 0
    for number in algorithm:
        if number:
            gain *= toom_cook.error_gain(*algorithm_shape(number))
            axes += 1
    unit = np.finfo(dtype).eps / 2
    return float(unit * gain * math.sqrt(channels / 6 + 4 * axes))


def choose_algorithm(
    spec: StageSpec, value: Value, result: Value, limits: _core.BlockLimits, dtype: Any
) -> tuple[Ints, float]:
    """Return the number of the cheapest algorithm along each axis, and its predicted error."""
    itemsize = np.dtype(dtype).itemsize
    best, best_error = ZEROS, 0.0
    least = default_cost(direct_counts(spec, value, result, limits, itemsize))
    for candidate in candidates(spec):
        error = predicted_error(candidate, spec.weight.shape[1], dtype)
        if error > MAX_ERROR:
            continue
        cost = default_cost(fast_counts(candidate, spec, value, result, limits, itemsize))
        if cost < least:
            best, best_error, least = candidate, error, cost
    return best, best_error


def candidates(spec: StageSpec) -> list[Three]:
    """Return the fast algorithms of a stage: the same number of outputs along all axes."""
    if spec.stride != ONES or not any(k > 1 for k in spec.kernel):
        return []
    found = []
    for outputs in sorted({m for m, _ in toom_cook.ALGORITHMS}):
        pairs = [(outputs, taps) for taps in spec.kernel if taps > 1]
        if set(pairs) <= set(toom_cook.ALGORITHMS):
            a, b, c = (
                0 if taps == 1 else 1 + toom_cook.ALGORITHMS.index((outputs, taps))
                for taps in spec.kernel
            )
            found.append((a, b, c))
    return found


def direct_counts(
    spec: StageSpec, value: Value, result: Value, limits: _core.BlockLimits, itemsize: int
) -> Counts:
    """Count direct sums of one example."""
    terms, rows = math.prod(spec.weight.shape[1:]), result.size
    pixels = math.prod(rows) if rows_join(value, result, spec) else rows[2]
    parts = math.ceil(pixels / (ROW if pixels == rows[2] else JOINED_ROW))
    count = math.prod(rows) / pixels * parts
    length = math.ceil(pixels / parts)
    products = product_counts("product", spec, count, length, terms, itemsize, limits)
    return products | {"weight": weight_vectors(spec, spec.weight.size, limits.lanes)}


def fast_counts(
    algorithm: Ints,
    spec: StageSpec,
    value: Value,
    result: Value,
    limits: _core.BlockLimits,
    itemsize: int,
) -> Counts:
    """Count a fast algorithm on one example."""
    outs, channels = spec.weight.shape[:2]
    positions, axes = product_count(algorithm), sum(n > 0 for n in algorithm)
    tiles = math.prod(tile_counts(algorithm, spec.dilation, result.size))
    block = tile_block(algorithm, value, limits, itemsize)
    blocks = math.ceil(tiles / block)
    rows, pixels = positions * blocks, math.ceil(tiles / blocks)
    return product_counts("fast product", spec, rows, pixels, channels, itemsize, limits) | {
        "transform": axes * positions * tiles * (value.width + result.width) / limits.lanes,
        "weight": blocks * weight_vectors(spec, positions * outs * channels, limits.lanes),
    }


def few_outputs_counts(
    spec: StageSpec, value: Value, result: Value, limits: _core.BlockLimits
) -> Counts:
    """Count kernels for few outputs, whose lanes hold input channels."""
    samples = math.prod(result.size) * len(spec.weight)
    terms = math.prod(spec.kernel) * math.ceil(value.width / limits.lanes)
    return {"few output term": samples * terms, "lane sum": samples, "weight": terms}


def has_few_outputs(
    spec: StageSpec, value: Value, result: Value, limits: _core.BlockLimits, itemsize: int
) -> bool:
    """Return whether lanes should hold input channels, since outputs would fill few."""
    is_plain = spec.outer * spec.groups * spec.inner == 1
    if not is_plain or len(spec.weight) > min(MAX_FEW_OUTPUTS, limits.lanes):
        return False
    few = few_outputs_counts(spec, value, result, limits)
    direct = direct_counts(spec, value, result, limits, itemsize)
    return default_cost(few) < default_cost(direct)


def tile_block(algorithm: Ints, value: Value, limits: _core.BlockLimits, itemsize: int) -> int:
    """Return the tiles of a block: whole blocks of pixels.

    Their inputs stay in L2, if half a block's do; else they come from L3, but serve weights that do
    so as well: many channels need many tiles per pass over the weights.
    """
    most = limits.pixels[-1]
    fitting = L2_TILES * _core.caches()[1]
    fitting /= product_count(algorithm) * value.width * itemsize
    if fitting < MAX_TILE_BLOCKS // 2 * most:
        fitting = MAX_TILE_BLOCKS * most
    return max(most, int(min(fitting, MAX_TILE_BLOCKS * most)) // most * most)
