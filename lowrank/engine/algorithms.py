"""Choice of fast (Toom-Cook) algorithms for convolutions: predicted errors and costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lowrank._kernels import toom_cook
from lowrank._kernels.spec import StageSpec, Three
from lowrank._typing import Array, Ints
from lowrank.engine.buffers import ONES, ZEROS, Value

MAX_ERROR = 1e-4  # predicted, relative, of a fast algorithm in float32
# Costs in FMAs of a vector, from measurements on AVX-512:
TRANSFORM_COST = 2.0  # per vector of transformed inputs or outputs
TRANSFORM_AXIS_COST = 3.0  # the same for each axis of the algorithm
WEIGHT_COST = 4.0  # per vector of transformed weights, which are read from memory


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
            g = np.array(toom_cook.matrices(*algorithm_shape(number)).g, np.float64)
            transformed = np.moveaxis(np.tensordot(transformed, g, (axis, 1)), -1, axis)
    return transformed.reshape(*weight.shape[:2], -1)


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
    spec: StageSpec, value: Value, result: Value, lanes: int, dtype: Any
) -> tuple[Ints, float]:
    """Return the number of the cheapest algorithm along each axis, and its predicted error."""
    best, best_error, least = ZEROS, 0.0, direct_cost(spec, result, lanes)
    for candidate in candidates(spec):
        error = predicted_error(candidate, spec.weight.shape[1], dtype)
        if error > MAX_ERROR:
            continue
        cost = fast_cost(candidate, spec, value, result, lanes)
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


def direct_cost(spec: StageSpec, result: Value, lanes: int) -> float:
    """Estimate the time of a direct convolution of one example, in FMAs of a vector."""
    terms = math.prod(spec.weight.shape[1:])
    return float(math.prod(result.size) * _output_vectors(spec, lanes) * terms)


def fast_cost(algorithm: Ints, spec: StageSpec, value: Value, result: Value, lanes: int) -> float:
    """Estimate the time of a fast convolution of one example, in FMAs of a vector."""
    rows, channels = spec.weight.shape[:2]
    positions = product_count(algorithm)
    tiles = math.prod(tile_counts(algorithm, spec.dilation, result.size))
    axes = sum(n > 0 for n in algorithm)
    products = positions * tiles * _output_vectors(spec, lanes) * channels
    transformed = positions * tiles * (value.width + result.width) / lanes
    weights = positions * rows * channels / lanes
    transforms = (TRANSFORM_COST + TRANSFORM_AXIS_COST * axes) * transformed
    return float(products + transforms + WEIGHT_COST * weights)


def _output_vectors(spec: StageSpec, lanes: int) -> int:
    """Return the vectors of output channels of a sample; each group has its own."""
    groups = spec.outer * spec.groups * spec.inner
    return groups * math.ceil(len(spec.weight) // spec.groups / lanes)
