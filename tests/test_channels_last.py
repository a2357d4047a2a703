"""Channels-last kernels on every instruction set, against NumPy in float64."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special
from test_kernels import plain

from lowrank._kernels import _core, toom_cook
from lowrank._kernels.spec import ACTIVATIONS, StageSpec
from lowrank.engine import algorithms, convolutions, program
from lowrank.engine.algorithms import MAX_ERROR, predicted_error
from lowrank.engine.program import ProgramBuilder

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
@settings(max_examples=30, deadline=None)
def test_softmax_matches_numpy(isa, dtype, data):
    shape = (2, data.draw(st.integers(1, 40)), *(data.draw(st.integers(1, 5)) for _ in range(3)))
    x = np.random.default_rng(shape[1]).standard_normal(shape).astype(dtype)
    x = (x * data.draw(st.sampled_from([1, 30, 1e30]))).astype(dtype)
    b, value = builder(isa, dtype, shape[1:])
    b.output(b.softmax(value))
    (actual,) = call(b.build(), [x])
    powers = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    expected = powers / powers.sum(1, keepdims=True)
    # x - max is rounded once, which exp amplifies by its size; exp itself is good to 2 units; sums
    # of positive numbers and the quotient add n + 1 roundings.
    size = np.minimum(np.abs(x.astype(np.float64) - x.max(1, keepdims=True)), 100)
    bound = np.finfo(dtype).eps * ((size + 4) * expected + (shape[1] + 104) * expected)
    assert (np.abs(actual - expected) <= bound + np.exp(-87)).all()  # the least power in float32


def test_nan_spreads_over_the_channels_of_its_sample():
    x = np.zeros((1, 20, 1, 1, 3), np.float32)
    x[0, 7, 0, 0, 1] = np.nan
    b, value = builder(_core.default_isa(), np.float32, x.shape[1:])
    b.output(b.softmax(value))
    (actual,) = call(b.build(), [x])
    assert np.isnan(actual[..., 1]).all()
    np.testing.assert_allclose(actual[..., ::2], 0.05, rtol=1e-6)


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
