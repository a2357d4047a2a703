"""Channels-last kernels on every instruction set, against NumPy in float64."""

import itertools
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from scipy import special
from test_kernels import plain

import lowrank
from lowrank._kernels import _core, toom_cook
from lowrank._kernels.spec import ACTIVATIONS, KINDS, MODES, StageSpec
from lowrank.core.reference import apply_epilogue, run_stage
from lowrank.core.stage import Epilogue
from lowrank.engine import algorithms, convolutions, program, schedule
from lowrank.engine.algorithms import MAX_ERROR, predicted_error
from lowrank.engine.padding import padded_indices
from lowrank.engine.program import ProgramBuilder, Unsupported

every_kernel = pytest.mark.parametrize(
    ("isa", "dtype"), list(itertools.product(_core.ISAS, ("float32", "float64")))
)
ONES, ZEROS = (1, 1, 1), (0, 0, 0)
NUMBERS = range(1 + len(toom_cook.ALGORITHMS))  # of the algorithms; 0 is none
SHAPES = [(1, 1), *toom_cook.ALGORITHMS]  # their outputs and taps
# The predicted error is a root mean square, the largest of a few thousand errors is within 6 of
# them; the errors of few channels have no normal distribution.
FAST_FACTOR = 12


def guarded(shape, dtype):
    """Return an array of NaN, and the memory with a guard on either side of it."""
    n, guard = int(np.prod(shape)), 1024  # elements, more than any run of a kernel
    memory = np.full(n + 2 * guard, 7, dtype)
    out = memory[guard : guard + n]
    out[:] = np.nan
    return out.reshape(shape), memory


def call(made, inputs, threads=1):
    """Return the outputs of a program, after a run on NaN that must not matter."""
    n = len(inputs[0])
    shapes = [(n, *made.core.shapes[i]) for i in sorted(made.core.outputs)]
    outputs, memories = zip(*(guarded(s, made.core.dtype) for s in shapes))
    made([np.full_like(x, np.nan) for x in inputs], outputs, threads)
    made(inputs, outputs, threads)
    for memory in memories:
        assert (memory[:1024] == 7).all()
        assert (memory[-1024:] == 7).all()
    return outputs


def builder(isa, dtype, *shapes, numbers=None, algorithm="direct"):
    """Return a builder, which may have to use the algorithms `numbers`, and inputs of `shapes`."""
    made = ProgramBuilder(dtype, algorithm, isa)
    if numbers is not None:
        made._choose_algorithm = lambda *_: (numbers, 0.0)
    return made, *(made.input(s) for s in shapes)


def convolved(isa, s, x, other=None, alpha=0.0, numbers=None, algorithm="direct", group=1):
    """Return a convolution, with that of `other` for a residual, and the kinds of operations."""
    inputs = [x] if other is None else [x, other]
    shapes = [i.shape[1:] for i in inputs]
    b, *values = builder(isa, x.dtype, *shapes, numbers=numbers, algorithm=algorithm)
    residual = None if other is None else b.convolve(values[1], s._replace(activation="none"))
    b.output(b.convolve(values[0], s, residual, alpha))
    made = b.build(group)
    (out,) = call(made, inputs)
    return out, [op.kind for op in made.operations]


def stage(weight, padding=0, groups=1):
    """Return a stage without bias, padded alike along the axes of more than one tap."""
    around = tuple(padding if n > 1 else 0 for n in weight.shape[2:])
    return StageSpec(weight, 1, groups, 1, ONES, ONES, around, around)


def cast(s, dtype):
    """Return a stage in another type."""
    bias = None if s.bias is None else s.bias.astype(dtype)
    return s._replace(weight=np.ascontiguousarray(s.weight, dtype), bias=bias)


def activated(x, activation, alpha=0.0):
    """Return an activation in NumPy, in the type of x."""
    match activation:
        case "none":
            return x
        case "relu":
            return np.where(x < 0, 0, x)
        case "relu6":
            return np.where(x < 0, 0, np.where(x > 6, 6, x))
        case "clip":
            return np.where(x < 0, 0, np.where(x > alpha, alpha, x))
        case "leaky_relu":
            return np.where(x < 0, alpha * x, x)
        case "elu":
            return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)
        case "hard_swish":
            return x * np.clip(x / 6 + 0.5, 0, 1)
        case "hard_sigmoid":
            return np.clip(x / 6 + 0.5, 0, 1)
        case "sigmoid":
            return special.expit(x)
        case "silu":
            return x * special.expit(x)
        case "tanh":
            return np.tanh(x)
        case "gelu":
            return x * special.ndtr(x)
    raise AssertionError(activation)


def reference(s, x, other=None, alpha=0.0):
    """Return the same in float64, and the bound of rounding errors in the type of `x`."""
    eps, linear = np.finfo(x.dtype).eps, cast(s, np.float64)._replace(activation="none")
    y, magnitude, terms = plain([linear], x.astype(np.float64))
    if other is not None:
        more, size, _ = plain([linear], other.astype(np.float64))
        y, magnitude = y + more, magnitude + size
    # A sum of n products in precision u is off by at most n u times the sum of their magnitudes
    # (Higham, Accuracy and Stability of Numerical Algorithms, 2002, eq. 3.5): n eps covers the
    # result and a reference in float64.  Activations make differences no larger.
    return activated(y, s.activation, alpha), (terms + 1) * eps * magnitude


sizes = st.integers(1, 3)
channel_counts = st.one_of(st.integers(1, 20), st.sampled_from([31, 33, 64, 65, 80]))


@st.composite
def problems(draw, numbers=None):
    """Draw a stage, an input, another or None, and a slope, in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if numbers is None:
        ndim = draw(sizes)
        kernel = [1] * (3 - ndim) + [draw(st.integers(1, 5)) for _ in range(ndim)]
        stride = [draw(sizes) for _ in range(3)]
    else:
        ndim = sum(n > 0 for n in numbers)
        kernel, stride = [SHAPES[n][1] for n in numbers], ONES
    outer, groups, inner = (draw(st.sampled_from([1, 1, 2, 3])) for _ in range(3))
    per_group = draw(st.integers(1, 8 if np.prod(kernel) > 30 else 20))
    outs = draw(channel_counts) if outer * groups * inner == 1 else draw(st.integers(1, 20))
    dilation = [draw(st.integers(1, 2)) for _ in range(3)]
    need = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    most = {1: (1, 1, 40), 2: (1, 9, 14), 3: (4, 5, 9)}[ndim]
    size, before, after = [], [], []
    for axis in range(3):
        out = draw(st.integers(1, most[axis]))
        samples = (out - 1) * stride[axis] + need[axis]
        before.append(draw(st.integers(-1, need[axis] - 1)))
        after.append(draw(st.integers(-1, need[axis] - 1)))
        size.append(samples - before[-1] - after[-1])
        if size[-1] < 1:
            size[-1], after[-1] = 1, samples - before[-1] - 1
    channels, made = outer * groups * per_group * inner, outer * groups * outs * inner
    s = StageSpec(
        rng.standard_normal((groups * outs, per_group, *kernel)), outer, groups, inner,
        tuple(stride), tuple(dilation), tuple(before), tuple(after),
        rng.permutation(channels).astype(np.int32) if draw(st.booleans()) else None,
        bias=rng.standard_normal(made) if draw(st.booleans()) else None,
        activation=draw(st.sampled_from(["none", "relu", "relu6", "leaky_relu"])),
    )  # fmt: skip
    x = rng.standard_normal((draw(st.integers(1, 3)), channels, *size))
    other = rng.standard_normal(x.shape) if draw(st.booleans()) else None
    return s, x, other, draw(st.sampled_from([0.0, 0.25]))


def in_type(problem, dtype):
    s, x, other, alpha = problem
    return cast(s, dtype), x.astype(dtype), None if other is None else other.astype(dtype), alpha


@every_kernel
@given(problem=problems(), group=st.integers(1, 3))
@settings(max_examples=120, deadline=None)
def test_direct_convolutions_match_numpy(isa, dtype, problem, group):
    problem = in_type(problem, dtype)
    actual, _ = convolved(isa, *problem, group=group)
    expected, bound = reference(*problem)
    assert actual.shape == expected.shape
    assert (np.abs(actual - expected) <= bound).all()


@every_kernel
@given(
    problem=problems(),
    groups=st.integers(16, 40),
    multiplier=sizes,
    copies=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
@settings(max_examples=80, deadline=None)
def test_depthwise_convolutions_match_numpy(isa, dtype, problem, groups, multiplier, copies):
    s, x, other, alpha = problem
    rng = np.random.default_rng(groups)
    channels = copies[0] * groups * copies[1]
    s = s._replace(
        weight=rng.standard_normal((groups * multiplier, 1, *s.kernel)), outer=copies[0],
        groups=groups, inner=copies[1],
        permutation=None if s.permutation is None else rng.permutation(channels).astype(np.int32),
        bias=None if s.bias is None else rng.standard_normal(channels * multiplier),
    )  # fmt: skip
    x = rng.standard_normal((len(x), channels, *x.shape[2:]))
    other = None if other is None else rng.standard_normal(x.shape)
    problem = in_type((s, x, other, alpha), dtype)
    actual, kinds = convolved(isa, *problem)
    expected, bound = reference(*problem)
    assert "depthwise" in kinds
    assert (np.abs(actual - expected) <= bound).all()


@every_kernel
@given(problem=problems(), outs=st.integers(1, algorithms.MAX_FEW_OUTPUTS))
@settings(max_examples=60, deadline=None)
def test_few_outputs_match_numpy(isa, dtype, problem, outs):
    s, x, other, alpha = problem
    outs = min(outs, _core.block_limits(dtype, isa).lanes)
    rng = np.random.default_rng(outs)
    s = s._replace(
        weight=rng.standard_normal((outs, x.shape[1], *s.kernel)), outer=1, groups=1, inner=1,
        bias=None if s.bias is None else rng.standard_normal(outs),
    )  # fmt: skip
    problem = in_type((s, x, other, alpha), dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "has_few_outputs", lambda *_: True)
        actual, kinds = convolved(isa, *problem, numbers=ZEROS, algorithm="auto")
    expected, bound = reference(*problem)
    assert "few outputs" in kinds or s.weight.shape[1] == 1
    assert (np.abs(actual - expected) <= bound).all()


@every_kernel
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_fast_algorithms_have_their_predicted_error(isa, dtype, data):
    numbers = data.draw(st.tuples(*[st.sampled_from(NUMBERS)] * 3).filter(any))
    s, x, other, alpha = in_type(data.draw(problems(numbers)), dtype)
    actual, kinds = convolved(isa, s, x, other, alpha, numbers)
    expected, bound = reference(s, x, other, alpha)
    assert "depthwise" in kinds or "winograd" in kinds
    predicted = predicted_error(numbers, s.weight.shape[1], dtype)
    power = np.sqrt(np.prod(s.weight.shape[1:]) * (1 if other is None else 2))
    assert (np.abs(actual - expected) <= FAST_FACTOR * predicted * power + bound).all()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_predicted_error_bounds_that_of_white_noise(rng, number, axes):
    outputs, taps = SHAPES[number]
    numbers = (0,) * (3 - axes) + (number,) * axes
    kernel, size = zip(*((taps, 2 * outputs + taps - 1) if n else (1, 1) for n in numbers))
    s = StageSpec(rng.standard_normal((16, 24, *kernel)), 1, 1, 1, ONES, ONES, ZEROS, ZEROS)
    s, x, _, _ = in_type((s, rng.standard_normal((1, 24, *size)), None, 0), np.float32)
    expected, _ = reference(s, x)
    actual, _ = convolved(None, s, x, numbers=numbers)
    error = np.sqrt(((actual - expected) ** 2).mean() / (expected**2).mean())
    predicted = predicted_error(numbers, 24, np.float32)
    assert predicted / 20 <= error <= predicted  # three axes share out some of their errors


@pytest.mark.parametrize("numbers", [ZEROS, (0, 2, 2)])
def test_blocks_of_terms_and_tiles_do_not_change_bits(rng, monkeypatch, numbers):
    s = StageSpec(
        rng.standard_normal((90, 40, 1, 3, 3)).astype("f4"), 1, 1, 1, ONES, ONES, (0, 1, 1),
        (0, 1, 1), bias=rng.standard_normal(90).astype("f4"), activation="relu",
    )  # fmt: skip
    x, other = rng.standard_normal((2, 2, 40, 1, 19, 23)).astype("f4")
    expected, _ = convolved(None, s, x, other, numbers=numbers)
    monkeypatch.setattr(convolutions, "L2_WEIGHTS", 0)
    monkeypatch.setattr(algorithms, "L2_TILES", 0)
    np.testing.assert_array_equal(convolved(None, s, x, other, numbers=numbers)[0], expected)


@st.composite
def layouts(draw, shape, dtype):
    """Draw an uninitialised array of some strides, and the memory that it is a part of."""
    order = draw(st.permutations(range(5)))
    step = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in range(5)]
    extra = [draw(st.sampled_from([0, 0, 1])) for _ in range(5)]
    memory = np.full([shape[a] * abs(step[a]) + extra[a] for a in order], 7, dtype)
    view = np.moveaxis(memory, range(5), order)
    cut = [slice(None, n * abs(p)) for n, p in zip(shape, step)]
    return view[tuple(cut)][tuple(slice(None, None, p) for p in step)], memory


@every_kernel
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_arrays_of_any_strides_are_packed_and_unpacked(isa, dtype, data):
    lanes = _core.block_limits(dtype, isa).lanes
    channels = lanes * data.draw(st.integers(0, 2)) + data.draw(st.integers(-1, 2))
    assume(channels > 0)
    size = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 2 * lanes)))
    shape = (data.draw(sizes), channels, *size)
    x, _ = data.draw(layouts(shape, dtype))
    out, memory = data.draw(layouts(shape, dtype))
    order = np.arange(channels)
    if data.draw(st.booleans()):
        order = np.random.default_rng(channels).permutation(order)
    x[:] = np.random.default_rng(0).standard_normal(shape)
    b, value = builder(isa, dtype, shape[1:])
    b.output(b.permute(value, order))
    b.build()([x], [out], 1)
    np.testing.assert_array_equal(out, x[:, order])
    out[:] = 7
    assert (memory == 7).all()  # nothing between the samples was written


def pooled(x, kind, size, taps, stride, before, dilation, count_padding):
    """Pool in float64; padding behind is as wide as that ahead. Return magnitudes, too."""
    out, magnitude = np.empty((2, *x.shape[:2], *size))
    for at in np.ndindex(*size):
        inside, count = [], 1
        for a, n in enumerate(x.shape[2:]):
            window = at[a] * stride[a] - before[a] + dilation[a] * np.arange(taps[a])
            inside.append(window[(window >= 0) & (window < n)])
            count *= (window < n + before[a]).sum() if count_padding else len(inside[-1])
        samples = x[(slice(None), slice(None), *np.ix_(*inside))].astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinities of both signs
            total = samples.sum((2, 3, 4)) / max(1, count)
        is_max = kind == "max pool"
        out[(..., *at)] = samples.max((2, 3, 4), initial=-np.inf) if is_max else total
        magnitude[(..., *at)] = 0 if is_max else np.abs(samples).sum((2, 3, 4)) / max(1, count)
    return out, magnitude


@every_kernel
@given(data=st.data(), kind=st.sampled_from(["max pool", "mean pool"]))
@settings(max_examples=100, deadline=None)
def test_pooling_matches_numpy(isa, dtype, data, kind):
    three = st.tuples(sizes, sizes, sizes)
    taps, stride, dilation = data.draw(three), data.draw(three), data.draw(three)
    reach = [(k - 1) * d for k, d in zip(taps, dilation)]
    before = [data.draw(st.integers(0, r)) for r in reach]
    x_size = [data.draw(st.integers(1, 9)) for _ in range(3)]
    # The last window starts ahead of the padding behind, perhaps behind the last whole one.
    size = [
        data.draw(st.integers(1, (n - 1 + b) // s + 1)) for n, b, s in zip(x_size, before, stride)
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = rng.standard_normal((2, data.draw(st.integers(1, 20)), *x_size)).astype(dtype)
    special_values = data.draw(st.sampled_from([[], [np.nan], [np.inf, -np.inf], [-np.inf]]))
    for value in special_values:
        x[rng.random(x.shape) < 0.1] = value
    count_padding = data.draw(st.booleans())
    b, value = builder(isa, dtype, x.shape[1:])
    b.output(b.pool(value, kind, tuple(size), taps, stride, tuple(before), dilation, count_padding))
    (actual,) = call(b.build(), [x])
    expected, magnitude = pooled(x, kind, size, taps, stride, before, dilation, count_padding)
    close(actual, expected, (np.prod(taps) + 2) * np.finfo(dtype).eps * magnitude)


def close(actual, expected, bound):
    """Check finite values within a bound, and that others are equal."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    assert (np.abs(actual[finite] - expected[finite]) <= bound[finite]).all()


@every_kernel
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_normalization_matches_numpy(isa, dtype, data):
    shape = (2, data.draw(st.integers(1, 20)), *(data.draw(st.integers(1, 6)) for _ in range(3)))
    rng = np.random.default_rng(shape[1])
    x = (rng.standard_normal(shape) + data.draw(st.sampled_from([0, 100]))).astype(dtype)
    residual = rng.standard_normal(shape).astype(dtype)
    weight, shift = rng.standard_normal((2, shape[1], 1, 1, 1)).astype(dtype)
    epsilon = data.draw(st.sampled_from([1e-5, 0.5]))
    b, value, other = builder(isa, dtype, shape[1:], shape[1:])
    b.output(b.normalize(value, weight.ravel(), shift.ravel(), epsilon, other, "relu"))
    (actual,) = call(b.build(), [x, residual])
    axes, n, eps = (2, 3, 4), np.prod(shape[2:]), np.finfo(dtype).eps
    centred = x.astype(np.float64) - x.mean(axes, np.float64, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon)
    expected = np.maximum(weight / deviation * centred + shift + residual, 0)
    # The mean is off by n eps times the largest value, at most; the variance by the same relative
    # to itself, and by the square of the error of the mean; five roundings follow.
    off = n * eps * np.abs(x).max(axes, keepdims=True)
    bound = off + np.abs(centred) * ((n + 5) * eps + (off / deviation) ** 2)
    bound = np.abs(weight) / deviation * bound + 2 * eps * (np.abs(shift) + np.abs(residual))
    assert (np.abs(actual - expected) <= bound).all()


@every_kernel
@given(data=st.data(), mode=st.sampled_from(["copy", "add", "multiply"]))
@settings(max_examples=80, deadline=None)
def test_elementwise_operations_match_numpy(isa, dtype, data, mode):
    size = data.draw(st.tuples(sizes, st.integers(1, 4), st.integers(1, 20)))
    channels = data.draw(st.integers(1, 20))
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((2, channels, *size)).astype(dtype)
    source, index = x, []
    alpha = data.draw(st.sampled_from([0.0, 0.25]))
    for axis, n in enumerate(size, start=2):
        index.append(None)
        if data.draw(st.booleans()):
            index[-1] = rng.integers(-1, n, data.draw(st.integers(1, 20))).astype(np.int32)
            outside = np.full_like(source.take([0], axis), alpha)
            source = np.concatenate([source, outside], axis).take(index[-1], axis)
    shape = source.shape[1:] if data.draw(st.booleans()) else (channels, 1, 1, 1)
    other = rng.standard_normal((2, *shape)).astype(dtype)
    activation = data.draw(st.sampled_from(["none", "relu", "leaky_relu"]))
    inputs = [x] if mode == "copy" else [x, other]
    b, *values = builder(isa, dtype, *(i.shape[1:] for i in inputs))
    b.output(
        b.combine(
            *values, mode=mode, activation=activation, alpha=alpha, index=tuple(index),
            size=source.shape[2:],
        )
    )  # fmt: skip
    (actual,) = call(b.build(), inputs)
    expected = {"copy": source, "add": source + other, "multiply": source * other}[mode]
    np.testing.assert_array_equal(actual, activated(expected, activation, x.dtype.type(alpha)))


@every_kernel
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_concatenated_values_feed_later_operations(isa, dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    kinds = st.sampled_from(["input", "convolution", "depthwise", "permutation"])
    parts = data.draw(st.lists(st.tuples(kinds, st.integers(1, 20)), min_size=1, max_size=4))
    inputs = [rng.standard_normal((2, c, 1, 5, 7)).astype(dtype) for _, c in parts]
    b, *values = builder(isa, dtype, *(x.shape[1:] for x in inputs))
    arrays, stages, results = [], [], []
    for (kind, c), x, value in zip(parts, inputs, values):
        if kind == "permutation":
            order = rng.permutation(c)
            value, x = b.permute(value, order), x[:, order]
        elif kind != "input":
            shape = (c, c, 1, 1, 1) if kind == "convolution" else (c, 1, 1, 1, 1)
            s = stage(rng.standard_normal(shape).astype(dtype), groups=c // shape[1])
            value, x = b.convolve(value, s), convolved(isa, s, x)[0]
        arrays.append((x, value))
        if data.draw(st.booleans()):  # a halo before the value moves
            stages.append((stage(rng.standard_normal((3, c, 1, 3, 3)).astype(dtype), 1), x))
            results.append(b.convolve(value, stages[-1][0]))
    order = data.draw(st.permutations(range(len(parts)))) + data.draw(st.sampled_from([[], [0]]))
    expected = np.concatenate([arrays[i][0] for i in order], 1)
    whole = b.concatenate([arrays[i][1] for i in order])
    s = stage(rng.standard_normal((5, expected.shape[1], 1, 3, 3)).astype(dtype), 1)
    for value in (whole, b.convolve(whole, s), *results):
        b.output(value)
    actual, *outputs = call(b.build(), inputs)
    np.testing.assert_array_equal(actual, expected)
    for out, (each, x) in zip(outputs, [(s, expected), *stages], strict=True):
        y, bound = reference(each, x)
        assert (np.abs(out - y) <= bound).all()


class Network:
    """Operations that `data` draws, each a function of a builder and values, by their numbers."""

    def __init__(self, data, rng, shape):
        self.draw, self.rng = data.draw, rng
        self.shapes, self.operations = [shape], []
        for _ in range(self.draw(st.integers(2, 9))):
            self.add()

    def add(self):
        recent = len(self.shapes) - 1
        i = self.draw(st.sampled_from([recent, recent, *range(recent)]))
        c, *size = self.shapes[i]
        alike = [j for j, s in enumerate(self.shapes) if list(s[1:]) == size]
        kinds = "convolution depthwise residual pool add scale upsample concatenate permutation"
        kind = self.draw(
            st.sampled_from([*kinds.split(), "pad", "transposed", "activation", "normalize"])
        )
        operands = [i]
        if kind in ("convolution", "depthwise", "residual"):
            stride, c_out = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 20))
            if kind == "residual":
                operands.append(self.draw(st.sampled_from(alike)))
                stride, c_out = 1, self.shapes[operands[1]][0]
            kernel = (1, *self.draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 5)])))
            pads = tuple(k // 2 for k in kernel)
            shape = (c, 1, *kernel) if kind == "depthwise" else (c_out, c, *kernel)
            weight = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            s = StageSpec(
                weight, 1, c if kind == "depthwise" else 1, 1, (1, stride, stride), ONES, pads,
                pads, bias=self.rng.standard_normal(shape[0]), activation="leaky_relu",
            )  # fmt: skip
            size = [(n - 1) // k + 1 for n, k in zip(size, s.stride)]
            c = shape[0]

            def apply(b, value, *residual):
                return b.convolve(value, cast(s, b.dtype), *residual, alpha=0.25)
        elif kind == "pool":
            before, n = (0, 1, 1), [size[0], *((m + 1) // 2 for m in size[1:])]
            pool = self.draw(st.sampled_from(["max pool", "mean pool"]))
            size = n

            def apply(b, value):
                return b.pool(value, pool, tuple(n), (1, 3, 3), (1, 2, 2), before)
        elif kind == "normalize":
            weight, shift = self.rng.standard_normal((2, c))

            def apply(b, value):
                return b.normalize(value, weight, shift, 1e-3)
        elif kind == "scale":

            def apply(b, value):
                mean = b.pool(value, "mean pool", ONES, value.size, ONES, ZEROS)
                return b.combine(value, mean, "multiply")
        elif kind == "upsample":
            index = np.arange(2 * size[1], dtype=np.int32) // 2
            size = [size[0], 2 * size[1], size[2]]

            def apply(b, value):
                return b.combine(value, index=(None, index, None), size=tuple(size))
        elif kind in ("add", "concatenate"):
            same = [j for j in alike if self.shapes[j][0] == c]
            operands.append(self.draw(st.sampled_from(same if kind == "add" else alike)))
            if kind == "concatenate":
                c += self.shapes[operands[1]][0]

            def apply(b, *values):
                return b.combine(*values, "add") if kind == "add" else b.concatenate(values)
        elif kind == "permutation":
            permutation = self.rng.permutation(c)

            def apply(b, value):
                return b.permute(value, permutation)
        elif kind == "pad":
            index = padded_indices(size[2], 1, 2, "replicate", 1)
            size = [*size[:2], size[2] + 3]

            def apply(b, value):
                return b.pad(value, (0, 0, 1), (0, 0, 2), (None, None, index))
        elif kind == "transposed":
            weight = self.rng.standard_normal((c, 6, 1, 2, 3))
            geometry = lowrank.Geometry.of(3, stride=(1, 2, 1), padding=(0, 0, 1))
            link = (lowrank.Stage(weight, geometry, transposed=True), Epilogue())
            c, size = 6, [size[0], 2 * size[1], size[2]]

            def apply(b, value):
                return b.chain(value, [link])
        else:

            def apply(b, value):
                return b.combine(value, activation="hard_swish")

        self.operations.append((apply, operands))
        self.shapes.append((c, *size))


def choose_where_possible(s, value, result):
    """Return F(4 x 4, 3 x 3) where it is an algorithm, and its error."""
    return ((0, 2, 2) if s.kernel == (1, 3, 3) and s.stride == ONES else ZEROS), 0.0


@every_kernel
@given(data=st.data(), batch=st.integers(1, 4), threads=sizes, group=sizes)
@settings(max_examples=60, deadline=None)
def test_networks_equal_their_operations(isa, dtype, data, batch, threads, group):
    shape = (data.draw(st.integers(1, 20)), 1, data.draw(st.integers(1, 12)), 13)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    network = Network(data, rng, shape)
    arrays = [rng.standard_normal((batch, *shape)).astype(dtype)]
    choice = data.draw(st.sampled_from([lambda *_: (ZEROS, 0.0), choose_where_possible]))
    for apply, operands in network.operations:
        inputs = [arrays[i] for i in operands]
        b, *values = builder(isa, dtype, *(x.shape[1:] for x in inputs))
        b._choose_algorithm = choice
        b.output(apply(b, *values))
        arrays += call(b.build(), inputs)
    assert [x.shape[1:] for x in arrays] == network.shapes
    chosen = data.draw(st.sets(st.sampled_from(range(1, len(arrays)))))
    chosen = sorted(chosen | {len(arrays) - 1})
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):  # as if the caches were too small for whole buffers
            patch.setattr(schedule, "BAND_BYTES", 2000 / _core.caches()[1])
            patch.setattr(schedule, "BAND_WEIGHTS", np.inf)
        b, *values = builder(isa, dtype, shape)
        b._choose_algorithm = choice
        for apply, operands in network.operations:
            values.append(apply(b, *(values[i] for i in operands)))
        for i in chosen:
            b.output(values[i])
        made = b.build(group)
    for i, out in zip(chosen, call(made, arrays[:1], threads), strict=True):
        np.testing.assert_array_equal(out, arrays[i])


@st.composite
def links(draw, ndim, channels):
    """Draw a stage of a chain for some input channels, and its epilogue."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    transposed = draw(st.booleans())
    kernel, dilation = ([draw(sizes) for _ in range(ndim)] for _ in range(2))
    stride = [draw(st.integers(1, 4)) for _ in range(ndim)]
    most = [(k - 1) * d for k, d in zip(kernel, dilation)]
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "circular"]))
    padding = [(draw(st.integers(0, min(2, m))), draw(st.integers(0, min(2, m)))) for m in most]
    groups, c_out = draw(st.sampled_from([1, 1, channels])), draw(st.integers(1, 9))
    copies = [c for c in (1, 2) if channels // groups % c == 0]
    outer = draw(st.sampled_from(copies))
    c_in = channels // groups // outer
    rows, columns = (c_in, c_out) if transposed else (c_out, c_in)
    weight = rng.standard_normal((groups * rows, columns, *kernel))
    a = draw(st.sampled_from([n for n in (1, 2, 3) if channels % n == 0]))
    geometry = lowrank.Geometry.of(
        ndim, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    )
    made = lowrank.Stage(
        weight, geometry, groups, outer, shuffle=(1, 1) if transposed else (a, channels // a),
        transposed=transposed,
    )  # fmt: skip
    bias = rng.standard_normal(made.out_channels) if draw(st.booleans()) else None
    return made, Epilogue(bias, draw(st.sampled_from(["none", "relu6"])))


@every_kernel
@given(data=st.data(), ndim=sizes)
@settings(max_examples=80, deadline=None)
def test_chains_match_their_reference(isa, dtype, data, ndim):
    shape = [data.draw(st.integers(1, 12)), *(data.draw(st.integers(7, 9)) for _ in range(ndim))]
    rng = np.random.default_rng(shape[0])
    x = rng.standard_normal((2, *shape)).astype(dtype)
    expected, magnitude, terms, chain = x.astype(np.float64), np.abs(x), 1, []
    for _ in range(data.draw(st.integers(1, 2))):
        each, epilogue = data.draw(links(ndim, expected.shape[1]))
        chain.append((each, epilogue))
        try:
            assume(np.prod(each.output_shape(expected.shape[1:])) < 50_000)
        except ValueError:  # a kernel that does not fit
            reject()
        expected = run_stage(each, expected)
        magnitude = run_stage(replace(each, weight=np.abs(each.weight)), magnitude)
        linear = expected = apply_epilogue(expected, Epilogue(epilogue.bias))
        if epilogue.bias is not None:
            magnitude = apply_epilogue(magnitude, Epilogue(np.abs(epilogue.bias)))
        expected = activated(linear, epilogue.activation)
        terms += each.weight.size // each.groups + 2
    free = (1,) * (3 - ndim)
    inputs = [x.reshape(2, shape[0], *free, *shape[1:])]
    if data.draw(st.booleans()):
        residual = rng.standard_normal(expected.shape).astype(dtype)
        expected = activated(linear + residual, epilogue.activation)
        magnitude = magnitude + np.abs(residual)
        inputs.append(residual.reshape(2, expected.shape[1], *free, *expected.shape[2:]))
    b, *values = builder(isa, dtype, *(i.shape[1:] for i in inputs))
    b.output(b.chain(values[0], chain, *values[1:]))
    (actual,) = call(b.build(), inputs)
    bound = terms * np.finfo(dtype).eps * magnitude
    assert (np.abs(actual.reshape(expected.shape) - expected) <= bound).all()


def extremes(dtype):
    """Return values of all sizes and both signs, infinities and NaN."""
    sizes = np.concatenate([np.geomspace(1e-30, 1e30, 61), np.linspace(0, 100, 2001)])
    values = [*sizes, *-sizes, np.finfo(dtype).max, np.finfo(dtype).min, np.inf, -np.inf, np.nan]
    return np.array(values, dtype).reshape(1, 1, 1, 1, -1)


@every_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_numpy(isa, dtype, activation):
    x = extremes(dtype)
    b, value = builder(isa, dtype, x.shape[1:])
    b.output(b.combine(value, activation=activation, alpha=0.25))
    # A product with 1 is exact: the same values reach the activation of a convolution.
    one = stage(np.ones((1, 1, 1, 1, 1), dtype))._replace(activation=activation)
    b.output(b.convolve(value, one, alpha=0.25))
    actual, after_convolution = call(b.build(), [x])
    np.testing.assert_array_equal(after_convolution, actual)
    # 1 / (1 + exp(-x)) takes 2 ulp of the exponential and 1 for each operation; hard_sigmoid, elu,
    # hard_swish and gelu add terms of 1 or of x, which may cancel.  The others round at most once.
    eps = np.finfo(dtype).eps
    with np.errstate(all="ignore"):  # infinities, and numbers too small for the type
        expected = activated(x.astype(np.float64), activation, 0.25)
        bound = 4 * eps * np.abs(x.astype(np.float64))
        if activation in ("sigmoid", "silu", "tanh"):
            bound = 4 * eps * np.abs(expected)
            bound += 1e-36 if dtype == "float32" else 0  # whose exponential stops at exp(88)
        elif activation in ("hard_sigmoid", "elu"):
            bound = np.full_like(expected, 2 * eps)
        elif activation not in ("hard_swish", "gelu"):
            bound = np.zeros_like(expected)
    close(actual.astype(np.float64), expected, bound)


def tail(b, value, rng):
    """Return a network after `value`: fast, direct and depthwise stages, and a mean."""
    dtype, (c, *_) = b.dtype, value.shape
    first = b.convolve(value, cast(stage(rng.standard_normal((40, c, 1, 3, 3)), 1), dtype))
    each = b.convolve(first, cast(stage(rng.standard_normal((40, 1, 1, 3, 3)), 1, 40), dtype))
    both = b.combine(first, each, "add", "relu")
    wide = b.convolve(both, cast(stage(rng.standard_normal((200, 40, 1, 1, 1))), dtype))
    return wide, b.pool(wide, "mean pool", ONES, wide.size, ONES, ZEROS)


@every_kernel
def test_bits_do_not_depend_on_threads_or_position(isa, dtype, rng):
    x = rng.standard_normal((6, 3, 1, 9, 11)).astype(dtype)
    alone = None
    for group in (1, 2):
        b, value = builder(isa, dtype, x.shape[1:])
        b._choose_algorithm = choose_where_possible
        for result in tail(b, value, np.random.default_rng(0)):
            b.output(result)
        made = b.build(group)
        if alone is None:
            each = [call(made, [x[i : i + 1]]) for i in range(len(x))]
            alone = [np.concatenate(results) for results in zip(*each)]
        # Single threads take images where there are as many; later calls share memory of earlier.
        for batch, threads in itertools.product((6, 1, 4, 2, 5, 3), (1, 2, 4, 3)):
            for out, expected in zip(call(made, [x[:batch]], threads), alone, strict=True):
                np.testing.assert_array_equal(out, expected[:batch])


def test_bits_do_not_depend_on_more_threads_than_cores():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "threads_or_position"],
        env=os.environ | {"OMP_NUM_THREADS": "4"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def test_python_threads_share_a_program(rng):
    xs = rng.standard_normal((4, 3, 5, 1, 9, 11)).astype("f4")
    b, value = builder(None, "float32", xs.shape[2:], algorithm="auto")
    b.output(tail(b, value, rng)[0])
    made = b.build()
    expected = [call(made, [x]) for x in xs]
    outs = [np.empty_like(e[0]) for e in expected]

    def work(x, out):
        for _ in range(20):
            made([x], [out], 2)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(xs, outs)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for out, (e,) in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, e)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_stay_within_their_tile(rng, number, value):
    outputs, taps = SHAPES[number]
    numbers, kernel = ((0, number, number), (1, taps, taps)) if number else (ZEROS, ONES)
    s = stage(rng.standard_normal((20, 17, *kernel)).astype("f4"), taps // 2)
    x = rng.standard_normal((1, 17, 1, 20, 22)).astype("f4")
    x[0, 4, 0, 9, 12] = value
    (actual,), expected = convolved(None, s, x, numbers=numbers)[0], ~np.isfinite(plain([s], x)[0])
    inside = np.ones(expected.shape[3:], bool)
    for axis, at in enumerate((9, 12)):
        first = np.arange(inside.shape[axis]) // outputs * outputs - taps // 2
        covers = (first <= at) & (at < first + outputs + taps - 1)
        inside &= covers[:, None] if axis == 0 else covers
    assert (~np.isfinite(actual) >= expected[0]).all()
    assert np.isfinite(actual[..., ~inside]).all()


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("number", NUMBERS[1:])
def test_fast_algorithms_do_not_overflow(rng, number, axes):
    # The transforms multiply by at most 1.5e6 in all, for F(2, 7) along three axes: results up to
    # 1e30 leave room for them in float32.
    outputs, taps = SHAPES[number]
    numbers = (0,) * (3 - axes) + (number,) * axes
    kernel, size = zip(*((taps, outputs + taps - 1) if n else (1, 1) for n in numbers))
    s = stage((rng.standard_normal((8, 64, *kernel)) / (64 * taps**axes) ** 0.5).astype("f4"))
    x = rng.choice([-1e30, 1e30], (20, 64, *size)).astype("f4")
    assert np.isfinite(convolved(None, s, x, numbers=numbers)[0]).all()


@pytest.fixture
def small(rng):
    """A program of a stage of 3x3, and its input and output."""
    b, value = builder(None, "float32", (4, 1, 5, 6))
    b.output(b.convolve(value, stage(rng.standard_normal((3, 4, 1, 3, 3)).astype("f4"), 1)))
    return (
        b.build(),
        rng.standard_normal((2, 4, 1, 5, 6)).astype("f4"),
        np.empty((2, 3, 1, 5, 6), "f4"),
    )


def unaligned(shape):
    return np.frombuffer(bytearray(4 * int(np.prod(shape)) + 1), "f4", offset=1).reshape(shape)


@pytest.mark.parametrize(
    ("inputs", "outputs", "error", "message"),
    [
        ([np.zeros((2, 4, 1, 5, 6))], None, TypeError, "array 0 must be a float32 array in native"),
        ([np.zeros((2, 4, 1, 5, 6), ">f4")], None, TypeError, "array 0 must be a float32 array in"),
        (None, [np.zeros((2, 3, 1, 5, 6), "f8")], TypeError, "array 1 must be a float32 array"),
        ([np.zeros((2, 3, 1, 5, 6), "f4")], None, ValueError, r"array 0 must have shape \(batch"),
        ([np.zeros((4, 1, 5, 6), "f4")], None, ValueError, "array 0 must have shape"),
        (None, [np.zeros((1, 3, 1, 5, 6), "f4")], ValueError, r"array 1.*got \(1, 3, 1, 5, 6\)"),
        ([], None, ValueError, "arrays must be 2, at most 16, got 1"),
        ([unaligned((2, 4, 1, 5, 6))], None, ValueError, "array 0 must be aligned to 4 bytes"),
    ],
)
def test_errors_name_the_array(small, inputs, outputs, error, message):
    made, x, out = small
    with pytest.raises(error, match=message):
        made([x] if inputs is None else inputs, [out] if outputs is None else outputs, 1)


def test_errors_name_the_array_as_its_caller_does(small):
    b, value = builder(None, "float32", (4, 1, 5, 6))
    b.output(value)
    _, x, _ = small
    split = np.lib.stride_tricks.as_strided(x, (*x.shape[:4], 2), (*x.strides[:4], 6))
    with pytest.raises(ValueError, match=r"picture must have shape \(batch"):
        b.build(names=("picture", "result"))([split], [x], 1)
    b, value = builder(None, "float32", (4, 1, 5, 2))
    b.output(value)
    with pytest.raises(ValueError, match="strides of picture must be multiples of 4 bytes"):
        b.build(names=("picture", "result"))([split], [np.empty(split.shape, "f4")], 1)


def test_builder_rejects_bad_arguments(rng):
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got int32"):
        ProgramBuilder("int32")
    with pytest.raises(ValueError, match="isa must be one of"):
        ProgramBuilder("float32", isa="mmx")
    b, value, other = builder(None, "float32", (4, 1, 5, 6), (4, 1, 5, 7))
    with pytest.raises(ValueError, match=r"operand of shape \(4, 1, 5, 7\) does not fit a result"):
        b.combine(value, other, "add")
    with pytest.raises(ValueError, match=r"operand of shape \(4, 1, 5, 7\) does not fit a result"):
        b.convolve(value, stage(np.ones((4, 4, 1, 1, 1), "f4")), other)
    weight = rng.standard_normal((4, 4, 3))
    ones = lowrank.Geometry.of(1, padding=1, padding_mode="constant", value=1.0)
    with pytest.raises(Unsupported, match="padding with a constant other than zero"):
        b.chain(value, [(lowrank.Stage(weight, ones), Epilogue())])
    shuffled = lowrank.Stage(weight, lowrank.Geometry.of(1), shuffle=(2, 2), transposed=True)
    with pytest.raises(Unsupported, match="a transposed convolution with a channel shuffle"):
        b.chain(value, [(shuffled, Epilogue())])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fast_algorithms_are_chosen_within_the_error_limit(rng, dtype):
    s = cast(stage(rng.standard_normal((64, 64, 1, 3, 3)), 1), dtype)
    for algorithm in ("auto", "direct"):
        b, value = builder(None, dtype, (64, 1, 40, 40), algorithm=algorithm)
        b.output(b.convolve(value, s))
        _, op, _ = b.build().operations
        assert op.kind == ("dense" if algorithm == "direct" else "winograd")
        assert op.error == predicted_error(op.algorithm, 64, dtype) * (op.kind != "dense")
        assert op.error <= MAX_ERROR


def test_rejects_an_output_that_is_read_only_or_overlaps(rng):
    memory = rng.standard_normal((3, 4, 1, 5, 6)).astype("f4")
    b, value = builder(None, "float32", (4, 1, 5, 6))
    b.output(value)
    b.output(b.combine(value, activation="relu"))
    made, (x, y, z) = b.build(), memory[:, None]
    for outputs in ([x, y], [y, x], [y, y], [y[..., ::-1], y]):
        with pytest.raises(ValueError, match=r"array \d must not overlap array \d"):
            made([x], outputs, 1)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        made([x], [y, z], 1)
    x.flags.writeable = False
    y.flags.writeable = True
    made([x], [y, z], 1)
    np.testing.assert_array_equal(y, x)


def test_empty_batch_gives_an_empty_result(small):
    made, x, out = small
    made([x[:0]], [out[:0]], 2)
    (expected,) = call(made, [x])
    made([x], [out], 2)
    np.testing.assert_array_equal(out, expected)


def test_profile_gives_the_seconds_of_every_operation(small):
    made, x, out = small
    (expected,) = call(made, [x])
    out[:] = 0
    seconds = made.core.profile([x, out], 1)
    assert len(seconds) == len(made.operations)
    assert min(seconds) > 0
    assert sum(seconds) < 1
    np.testing.assert_array_equal(out, expected)


def test_more_arrays_than_a_call_takes_are_an_error():
    b, value = builder(None, "float32", (1, 1, 1, 2))
    for _ in range(16):
        b.output(value)
    x = np.zeros((1, 1, 1, 1, 2), "f4")
    with pytest.raises(ValueError, match="at most 16, got 17"):
        b.build()([x], [x.copy() for _ in range(16)], 1)


@pytest.mark.parametrize("log_samples", [55, 58])  # 2^64 bytes are 0 of a 64-bit size
def test_too_large_buffers_are_a_memory_error(monkeypatch, log_samples):
    monkeypatch.setattr(schedule, "BAND_WEIGHTS", -1)  # no table of bands, which are too many
    shape = (1, 1, 1, 1, 1 << log_samples)  # samples that nobody has, of arrays that repeat one
    b, value = builder("avx512" if "avx512" in _core.ISAS else None, "float32", shape[1:])
    b.output(value)
    x = np.broadcast_to(np.float32(0), shape)
    out = np.lib.stride_tricks.as_strided(np.zeros(1, "f4"), shape, (0,) * 5)
    with pytest.raises(MemoryError, match=r"not enough memory for [1-9]\d+ bytes of buffers"):
        b.build()([x], [out], 1)


LIMITED = """
import resource
import numpy as np
from lowrank.engine.program import ProgramBuilder
b = ProgramBuilder("float32")
b.output(b.input((1, 1, 1500, 1500)))
made = b.build()  # of 8 to 16 times the bytes of its input
x, out = np.ones((2, 1, 1, 1, 1500, 1500), "f4")
pages = int(open("/proc/self/statm").read().split()[0])
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), hard))
try:
    made([x], [out], 1)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
out[:] = 0
made([x], [out], 1)
print((out == 1).all())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_program_runs_after_it_lacked_memory():
    run = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"not enough memory for \d+ bytes of buffers .*\nTrue\n", run.stdout), run


def test_distances_beyond_32_bits(rng, tmp_path):
    far = (1 << 31) + 5  # elements between images and between channels, of a file of holes
    memory = np.memmap(tmp_path / "holes", "f4", "w+", shape=(8 * far,))
    x, out = (
        np.lib.stride_tricks.as_strided(memory[at:], (2, 2, 1, 1, 9), (8 * far, 4 * far, 4, 4, 4))
        for at in (0, 4 * far)
    )
    x[:] = rng.standard_normal(x.shape)
    b, value = builder(None, "float32", x.shape[1:])
    b.output(value)
    b.build()([x], [out], 2)
    np.testing.assert_array_equal(out, x)


def test_kinds_and_modes_are_numbered_as_in_c():
    text = (Path(_core.__file__).parent / "program.h").read_text()
    enums = re.findall(
        r"enum \{(.*?)\}", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL), re.DOTALL
    )
    kinds, modes = ([n.strip()[3:].lower().replace("_", " ") for n in e.split(",")] for e in enums)
    assert kinds == [*KINDS, "kinds"]
    assert modes == [*MODES]
