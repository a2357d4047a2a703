"""GPU kernels: compiled for the CPU against the reference, and compiled by NVRTC."""

import ctypes
import math
import re
import shutil
import sysconfig
from pathlib import Path

import fake_cupy as cp
import numpy as np
import pytest

from lowrank import Geometry, Stage
from lowrank.core import reference
from lowrank.core.stage import Epilogue
from lowrank.engine import array_api

CODE = Path(array_api.__file__).with_name("cuda").joinpath("kernels.cu").read_text()

TYPES = ["float", "double", "f16", "bf16"]
KNOWN = [(t, 3, 1, 4) for t in TYPES] + [("float", 5, 1, 4), ("f16", 5, 2, 2), ("double", 7, 2, 2)]
GENERAL = [(t, 1) for t in TYPES] + [("float", 3)]
DENSE = [(t, 64, 64) for t in TYPES] + [("float", 16, 128), ("bf16", 16, 128), ("double", 32, 16)]
SEPARABLE = [(t, 64, 64) for t in TYPES] + [("float", 16, 32)]
KERNELS = [
    *(f"depthwise<{t}, {k}, {k}, {s}, {rows}>" for t, k, s, rows in KNOWN),
    *(f"depthwise<{t}, 0, 0, 0, {rows}>" for t, rows in GENERAL),
    *(f"dense<{t}, {o}, {p}>" for t, o, p in DENSE),
    *(f"separable<{t}, {o}, {p}>" for t, o, p in SEPARABLE),
    *(f"{name}<{t}>" for name in ("unroll", "epilogue", "filter") for t in TYPES),
]
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}

# Sums are in float32, in float64 for double.  The error of a sum of n products is at most about n
# unit roundoffs of the sum of their magnitudes (Higham, Accuracy and Stability of Numerical
# Algorithms, 2002, eq. 3.5); bias and activation add two.  Storing rounds once more, by half a unit
# of the storage type or half of its smallest number.  A factor of 2 covers second-order terms.
SUM = {"float": 2.0**-24, "double": 2.0**-53, "f16": 2.0**-24, "bf16": 2.0**-24}
UNIT = {"float": 0, "double": 0, "f16": 2.0**-11, "bf16": 2.0**-8}
SMALLEST = {"float": 0, "double": 0, "f16": 2.0**-25, "bf16": 2.0**-134}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Compile all kernels once."""
    if not shutil.which("g++"):
        pytest.skip("compiling the kernels for the CPU needs g++")
    cp.hooks.reset()
    cp.prepare(CODE, KERNELS, jobs=2)


def launch(name, blocks, *args, threads=256, shared=0, code=CODE):
    """Launch a kernel; ints become its parameters' types, and None a null pointer."""
    module = cp.RawModule(code=code, options=("-std=c++17",), name_expressions=(name,))
    kernel = module.get_function(name)
    if shared > 48 << 10:
        kernel.max_dynamic_shared_size_bytes = shared
    integer = {"vi": np.int32, "vl": np.int64}
    given = [np.intp(0) if a is None else a for a in args]
    for i, (a, kind) in enumerate(zip(given, kernel._kinds)):
        given[i] = integer[kind](a) if isinstance(a, int) else a
    kernel((blocks,), (threads,), tuple(given), shared_mem=shared)


# --- storage types -----------------------------------------------------------------------------


def narrowed(values, kind):
    """Round to the storage type: to nearest, halves to even; bfloat16 from float32, as uint16."""
    if kind != "bf16":
        with np.errstate(over="ignore"):
            return np.asarray(values).astype({"f16": "f2", "float": "f4", "double": "f8"}[kind])
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    down, rest = bits >> 16, bits & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (down % 2 == 1))
    return np.where(np.isnan(values), 0x7FFF, down + up).astype(np.uint16)


def widened(stored, kind):
    """Convert stored numbers to float64."""
    if kind == "bf16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return stored.astype(np.float64)


def sums(values, kind):
    """Return an array of the type of the kernels' sums, or None for None."""
    if values is None:
        return None
    return cp.asarray(np.asarray(values).astype("f8" if kind == "double" else "f4"))


def integers(values):
    return None if values is None else cp.asarray(np.ascontiguousarray(values, dtype=np.int32))


def stored(rng, shape, kind):
    """Return random numbers in the storage type, and the same numbers in float64."""
    numbers = narrowed(rng.standard_normal(shape), kind)
    return cp.asarray(numbers), widened(numbers, kind)


def unwritten(shape, kind):
    return cp.empty(shape, {"float": "f4", "double": "f8", "f16": "f2", "bf16": "u2"}[kind])


def assert_close(found, exact, big, products, kind):
    found = widened(found.get(), kind).reshape(exact.shape)
    error = 2 * (products + 2) * SUM[kind] * big
    error += UNIT[kind] * (np.abs(exact) + error) + SMALLEST[kind]
    wrong = ~(np.abs(found - exact) <= error)  # NaN is wrong, too
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} are off"


def of_16_bits(bits, kind):
    return bits.astype(np.uint16).view("f2" if kind == "f16" else "u2")


def assert_numbers(found, expected, numbers):
    """Check equal bits, including signs of zero; elsewhere, any NaN."""
    assert np.array_equal(found.view("u2")[numbers], expected.view("u2")[numbers])
    assert np.isnan(widened(found[~numbers], "bf16" if found.dtype == "u2" else "f16")).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_all_16_bit_numbers_survive_loading_and_storing(kind):
    given = of_16_bits(np.arange(1 << 16), kind)
    y = cp.asarray(given)
    launch(f"epilogue<{kind}>", 7, y, None, 1, len(given), 1, 0)
    assert_numbers(y.get(), given, ~np.isnan(widened(given, kind)))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_sums_are_rounded_to_nearest_even_in_16_bit_types(kind):
    """Test every number, every midpoint, and their float32 neighbours."""
    infinity, beyond = (0x7C00, 2.0**16) if kind == "f16" else (0x7F80, 2.0**128)
    every = widened(of_16_bits(np.arange(infinity), kind), kind)
    middles = (every + np.append(every[1:], beyond)) / 2  # exact in float32
    values = np.concatenate([every, middles, [np.inf, np.nan]]).astype(np.float32)
    beside = [np.nextafter(values, np.float32(to)) for to in (-1, np.inf)]
    values = np.concatenate([values, *beside])
    values = np.concatenate([values, -values])
    y = cp.asarray(narrowed(np.full(len(values), -0.0), kind))  # -0 changes no sum
    launch(f"epilogue<{kind}>", 7, y, sums(values, kind), 1, len(values), 1, 0)
    assert_numbers(y.get(), narrowed(values, kind), ~np.isnan(values))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_epilogue_adds_bias_per_channel_and_applies_activation(kind, activation, rng):
    shape = 3, 5, 77
    y, values = stored(rng, shape, kind)
    bias = rng.standard_normal(5).astype(np.float32) * 5
    launch(f"epilogue<{kind}>", 2, y, sums(bias, kind), *shape, ACTIVATIONS[activation])
    exact = reference.apply_epilogue(values, Epilogue(bias.astype(np.float64), activation))
    assert_close(y, exact, np.abs(values) + np.abs(bias)[:, None], 0, kind)


# --- stages ------------------------------------------------------------------------------------


def random_stage(rng, kernel, *, ins, outs, dilation=None, stride=None, transposed=False):
    """Return a random stage with zero weights, `ins` and `outs` per group, and an input size."""
    ndim = len(kernel)
    mode = rng.choice(["zeros", "reflect", "replicate", "circular", "symmetric", "constant"])
    groups, left, right = (int(n) for n in rng.integers(1, 4, 3))
    geometry = Geometry.of(
        ndim,
        stride=rng.integers(1, 4, ndim).tolist() if stride is None else stride,
        dilation=rng.integers(1, 3, ndim).tolist() if dilation is None else dilation,
        padding=rng.integers(0, 2 if transposed else 4, (ndim, 2)).tolist(),
        padding_mode="zeros" if transposed else str(mode),
    )
    weight = np.zeros((groups * outs, ins, *kernel))
    channels = left * right * groups * ins
    shuffles = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if channels % (a * b) == 0]
    shuffle = shuffles[rng.integers(len(shuffles))]
    stage = Stage(weight, geometry, groups, left, right, shuffle, transposed)
    if transposed:
        return stage, tuple(rng.integers(3, 6, ndim).tolist())
    need = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, kernel)]
    return stage, tuple(int(n + rng.integers(4, 9)) for n in need)


def weighted(stage, rng, kind):
    """Return the stage with random weights, rounded to `kind`, and these packed for a kernel."""
    weight = widened(narrowed(rng.standard_normal(stage.weight.shape), kind), kind)
    stage = Stage(
        weight, stage.geometry, stage.groups, stage.outer, stage.inner, stage.shuffle,
        stage.transposed,
    )  # fmt: skip
    packed = np.ascontiguousarray(array_api.weight_matrices(stage))
    return stage, cp.asarray(narrowed(packed, kind))


def three(sizes, fill=1):
    return (fill,) * (3 - len(sizes)) + tuple(int(n) for n in sizes)


def tables(stage, size, out=None):
    """Return the input index of each padded position, or of each output's taps, for three axes."""
    found = [np.zeros((1, 1) if out else 1, np.int32)] * (3 - len(size))
    for axis, n in enumerate(size):
        more = (n, out[axis]) if out else (n,)
        found.append(
            (array_api.tap_indices if out else array_api.padded_indices)(stage, axis, *more)
        )
    return [integers(t) for t in found]


def source_permutation(stage):
    plain = stage.transposed or stage.shuffle == (1, 1)
    return None if plain else integers(stage.channel_permutation())


def border_values(stage, rng, kind):
    """Return random border values per channel, or None for zeros."""
    if stage.geometry.padding_mode != "constant":
        return None
    return widened(narrowed(rng.standard_normal(stage.in_channels), kind), kind)


def reference_chain(stages, x, epilogues, outside):
    """Return the chain's output in float64, that of all magnitudes, and the products per sum."""
    big, products = np.abs(x), 0
    around = None if outside is None else np.abs(outside)
    for stage, epilogue in zip(stages, epilogues):
        x = reference.apply_epilogue(reference.run_stage(stage, x, outside), epilogue)
        positive = Stage(
            np.abs(stage.weight), stage.geometry, stage.groups, stage.outer, stage.inner,
            stage.shuffle, stage.transposed,
        )  # fmt: skip
        big = reference.run_stage(positive, big, around)
        if epilogue.bias is not None:
            big = big + np.abs(epilogue.bias).reshape(-1, *(1,) * (x.ndim - 2))
        rows, columns = stage.weight.shape[:2]
        ins = rows // stage.groups if stage.transposed else columns
        products += ins * math.prod(stage.kernel)
        outside = around = None  # only the first stage has border values
    return x, big, products


def random_epilogue(rng, channels):
    """Return an activation, and a bias that float32 represents, or none."""
    bias = rng.standard_normal(channels).astype(np.float32).astype(np.float64)
    return Epilogue(bias if rng.random() < 0.7 else None, str(rng.choice(list(ACTIVATIONS))))


def check_depthwise(name, stage, size, rng, kind):
    stage, weight = weighted(stage, rng, kind)
    out = stage.output_shape((stage.in_channels, *size))
    epilogue = random_epilogue(rng, out[0])
    batch = int(rng.integers(1, 4))
    x, values = stored(rng, (batch, stage.in_channels, *size), kind)
    y = unwritten((batch, *out), kind)
    outside, g = border_values(stage, rng, kind), stage.geometry
    launch(
        name, int(rng.integers(1, 5)),
        x, weight, sums(epilogue.bias, kind), y, source_permutation(stage), sums(outside, kind),
        *tables(stage, size), batch, stage.outer, stage.groups, stage.inner, weight.shape[1],
        *three(size), *three(out[1:]), *three(stage.kernel), *three(g.stride), *three(g.dilation),
        ACTIVATIONS[epilogue.activation], threads=int(rng.choice([32, 96, 256])),
    )  # fmt: skip
    assert_close(y, *reference_chain([stage], values, [epilogue], outside), kind)


@pytest.mark.parametrize(("kind", "rows"), GENERAL)
def test_general_depthwise_kernel_matches_the_reference(kind, rows, rng):
    for _ in range(12):
        kernel = rng.integers(1, 5, rng.integers(1, 4)).tolist()
        stage, size = random_stage(rng, kernel, ins=1, outs=int(rng.integers(1, 4)))
        check_depthwise(f"depthwise<{kind}, 0, 0, 0, {rows}>", stage, size, rng, kind)


@pytest.mark.parametrize(("kind", "taps", "stride", "rows"), KNOWN)
def test_specialised_depthwise_kernels_match_the_reference(kind, taps, stride, rows, rng):
    for ndim in (2, 2, 2, 2, 3, 3):
        deep = rng.integers(1, 4, ndim - 2).tolist()
        strides = [*deep, stride, int(rng.integers(1, 4))]
        stage, size = random_stage(
            rng, [*deep, taps, taps], ins=1, outs=int(rng.integers(1, 4)),
            stride=strides, dilation=[*deep, 1, int(rng.integers(1, 3))],
        )  # fmt: skip
        name = f"depthwise<{kind}, {taps}, {taps}, {stride}, {rows}>"
        check_depthwise(name, stage, size, rng, kind)


def dense_problem(rng, kind, transposed=False):
    kernel = rng.integers(1, 4, rng.integers(1, 4)).tolist()
    ins, outs = int(rng.integers(1, 6)), int(rng.choice([1, 3, 16, 21, 70]))
    if transposed:
        ins, outs = outs, ins
    stage, size = random_stage(rng, kernel, ins=ins, outs=outs, transposed=transposed)
    stage, weight = weighted(stage, rng, kind)
    batch = int(rng.integers(1, 3))
    x, values = stored(rng, (batch, stage.in_channels, *size), kind)
    out = stage.output_shape((stage.in_channels, *size))
    grid = np.indices((weight.shape[2], *three(stage.kernel))).reshape(4, -1).T
    terms = grid * [1, *three(out[1:])]
    return stage, weight, size, x, values, out, terms


def check_dense(kind, rows, places, rng, transposed):
    stage, weight, size, x, values, out, terms = dense_problem(rng, kind, transposed)
    groups, outs, ins, _ = weight.shape
    # Terms may be in any order that the weights share.
    order = rng.permutation(len(terms))
    weight = weight.reshape(groups, outs, -1)[:, :, integers(order)]
    target = None
    if transposed and stage.shuffle != (1, 1):
        target = integers(stage.channel_permutation())
    epilogue, outside = random_epilogue(rng, out[0]), border_values(stage, rng, kind)
    y = unwritten((len(x), *out), kind)
    blocks = -(-outs // rows) * stage.outer * groups * stage.inner
    blocks *= -(-len(x) * math.prod(out[1:]) // places)
    launch(
        f"dense<{kind}, {rows}, {places}>", blocks,
        x, weight, sums(epilogue.bias, kind), y, source_permutation(stage), target,
        sums(outside, kind), integers(terms[order]),
        *tables(stage, size, out[1:]), len(x), stage.outer, groups, stage.inner, ins, outs,
        len(terms), *three(size), *three(out[1:]), ACTIVATIONS[epilogue.activation],
    )  # fmt: skip
    assert_close(y, *reference_chain([stage], values, [epilogue], outside), kind)


@pytest.mark.parametrize(("kind", "rows", "places"), DENSE)
def test_dense_kernel_matches_the_reference(kind, rows, places, rng):
    for _ in range(5):
        check_dense(kind, rows, places, rng, transposed=False)


@pytest.mark.parametrize(("kind", "rows", "places"), DENSE)
def test_dense_kernel_runs_transposed_stages(kind, rows, places, rng):
    for _ in range(3):
        check_dense(kind, rows, places, rng, transposed=True)


@pytest.mark.parametrize("kind", TYPES)
def test_unrolled_input_times_weights_equals_the_stage(kind, rng):
    for transposed in (False, False, False, True):
        stage, weight, size, x, values, out, terms = dense_problem(rng, kind, transposed)
        groups, outs, ins, _ = weight.shape
        outside = border_values(stage, rng, kind)
        y = unwritten(
            (len(x), stage.outer, groups, len(terms), stage.inner * math.prod(out[1:])), kind
        )
        launch(
            f"unroll<{kind}>", 3,
            x, y, source_permutation(stage), sums(outside, kind), integers(terms),
            *tables(stage, size, out[1:]), len(x), stage.outer * groups, ins, stage.inner,
            len(terms), *three(size), *three(out[1:]), threads=64,
        )  # fmt: skip
        w = widened(weight.get(), kind).reshape(groups, outs, len(terms))
        found = np.matmul(w, widened(y.get(), kind)).reshape(len(x), *out)
        if transposed:
            found = found[:, np.argsort(stage.channel_permutation())]
        exact, big, products = reference_chain([stage], values, [Epilogue()], outside)
        assert (np.abs(found - exact) <= products * 2.0**-52 * big).all()


@pytest.mark.parametrize(("kind", "rows", "places"), SEPARABLE)
def test_fused_separable_kernel_matches_the_reference(kind, rows, places, rng):
    for _ in range(4):
        kernel = rng.integers(1, 4, rng.integers(1, 4)).tolist()
        ndim, per, outs = len(kernel), int(rng.integers(1, 4)), int(rng.choice([1, 18, 70]))
        first, size = random_stage(rng, kernel, ins=1, outs=per)
        groups = first.in_channels  # without copies
        first = Stage(
            np.zeros((groups * per, 1, *kernel)), first.geometry, groups, shuffle=first.shuffle
        )
        first, taps = weighted(first, rng, kind)
        second = Stage(np.zeros((outs, groups * per, *(1,) * ndim)), Geometry.of(ndim))
        second, weight = weighted(second, rng, kind)
        batch = int(rng.integers(1, 3))
        x, values = stored(rng, (batch, groups, *size), kind)
        middle = first.output_shape((groups, *size))
        epilogues = random_epilogue(rng, middle[0]), random_epilogue(rng, outs)
        outside = border_values(first, rng, kind)
        y = unwritten((batch, outs, *middle[1:]), kind)
        blocks = -(-batch * math.prod(middle[1:]) // places) * -(-outs // rows)
        g = first.geometry
        launch(
            f"separable<{kind}, {rows}, {places}>", blocks,
            x, taps, sums(epilogues[0].bias, kind), ACTIVATIONS[epilogues[0].activation], weight,
            sums(epilogues[1].bias, kind), y, source_permutation(first),
            sums(outside, kind), *tables(first, size), batch, groups, per,
            outs, *three(size), *three(middle[1:]), *three(kernel), *three(g.stride),
            *three(g.dilation), ACTIVATIONS[epilogues[1].activation],
        )  # fmt: skip
        assert_close(y, *reference_chain([first, second], values, epilogues, outside), kind)


# --- separable filters -------------------------------------------------------------------------


def filter_bytes(kernel, tile, itemsize):
    """Return the shared memory of a tile, as documented in kernels.cu."""
    (kd, kh, kw), (td, th, tw) = kernel, tile
    numbers = (td + kd) * (th + kh) * (tw + kw + 1)
    numbers += (td + kd) * (th + kh) * (tw + 1) + (td + kd) * th * tw + td * th * tw
    return (numbers + kd + kh + kw) * itemsize


def filter_problem(rng, kind, ndim):
    """Return a sum of separable terms as a stage, that of all magnitudes, a size, and the taps."""
    kernel = rng.integers(1, 8, ndim).tolist()
    stage, size = random_stage(rng, kernel, ins=1, outs=1, stride=1, dilation=1)
    terms = int(rng.integers(1, 4))
    taps = [
        widened(narrowed(rng.standard_normal((stage.groups, terms, n)), kind), kind) for n in kernel
    ]
    copies = stage.groups, stage.outer, stage.inner, stage.shuffle
    mode = stage.geometry.padding_mode
    mode = "zeros" if mode == "constant" else mode  # this kernel has no border values
    geometry = Geometry.of(ndim, padding=stage.geometry.padding, padding_mode=mode)
    product = ",".join("gr" + a for a in "xyz"[:ndim]) + "->g" + "xyz"[:ndim]
    stages = [
        Stage(np.einsum(product, *factors)[:, None], geometry, *copies)
        for factors in (taps, [np.abs(t) for t in taps])
    ]
    return *stages, size, taps


def launch_filter(stage, size, taps, x, y, epilogue, tile, rng, kind):
    """Launch a filter with taps padded by zeros and tables extended accordingly."""
    terms = taps[0].shape[1]
    padded = [-(-t.shape[2] // 4) * 4 for t in taps]
    kernel = (0, *padded) if len(size) == 2 else tuple(padded)
    padded_taps = [np.pad(t, [(0, 0), (0, 0), (0, n - t.shape[2])]) for t, n in zip(taps, padded)]
    out = three(y.shape[2:])
    pos = [
        np.pad(t.get(), (0, max(0, n + max(k, 1) - 1 - len(t))), constant_values=-1)
        for t, n, k in zip(tables(stage, size), out, kernel)
    ]
    shared = filter_bytes(kernel, tile, 8 if kind == "double" else 4)
    launch(
        f"filter<{kind}>", int(rng.integers(1, 9)),
        x, cp.asarray(narrowed(np.concatenate(padded_taps, axis=2), kind)),
        sums(epilogue.bias, kind), y, source_permutation(stage), *map(integers, pos),
        len(x), stage.outer, stage.groups, stage.inner, terms, *three(size),
        *out, *kernel, *tile, ACTIVATIONS[epilogue.activation], shared=shared,
    )  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tile", [(1, 4, 8), (1, 16, 16), (4, 4, 16), (8, 8, 4)])
def test_filter_kernel_sums_separable_terms(kind, tile, rng):
    for _ in range(3):
        stage, positive, size, taps = filter_problem(rng, kind, 2 if tile[0] == 1 else 3)
        channels = stage.in_channels
        epilogue = random_epilogue(rng, channels)
        batch = int(rng.integers(1, 3))
        x, values = stored(rng, (batch, channels, *size), kind)
        y = unwritten((batch, *stage.output_shape((channels, *size))), kind)
        launch_filter(stage, size, taps, x, y, epilogue, tile, rng, kind)
        exact = reference.apply_epilogue(reference.run_stage(stage, values), epilogue)
        big = reference.run_stage(positive, np.abs(values))
        if epilogue.bias is not None:
            big = big + np.abs(epilogue.bias).reshape(-1, *(1,) * len(size))
        # Every pass rounds its sums.
        products = sum(t.shape[2] for t in taps) + taps[0].shape[1]
        assert_close(y, exact, big, products, kind)


# --- checks of the emulated GPU ----------------------------------------------------------------

BAD = """
#include LR_SHIM
template <class T> __global__ void uneven(T *y)
{
    if (threadIdx.x < 20) __syncthreads();
    y[threadIdx.x] = 1;
}
template <class T> __global__ void outside(T *y, int n) { y[n] = 1; }
template <class T> __global__ void overflow(int *y, int n) { y[0] = n + 1; }
template <class T> __global__ void unwritten(T *y)
{
    LR_SHARED(T);
    __shared__ T own[32];
    const unsigned t = threadIdx.x;
    if (t != 3) shared[t] = 1, own[t] = 1;
    __syncthreads();
    y[t] = shared[t] + own[t];
}
/* Neighbours swap numbers without waiting for each other. */
template <class T> __global__ void hasty(T *y)
{
    LR_SHARED(T);
    const unsigned t = threadIdx.x;
    shared[t] = t;
    y[t] = shared[(t + 1) % blockDim.x];
}
template <class T> __global__ void beside(int n) { LR_SHARED(T); shared[n] = 1; }
"""


def bad(name, *args, threads=32, shared=0):
    launch(f"{name}<float>", 1, *args, threads=threads, shared=shared, code=BAD)


def test_divergent_barrier_is_an_error():
    with pytest.raises(AssertionError, match="20 of 32 threads of block 0 wait at a barrier"):
        bad("uneven", cp.zeros(32, np.float32))
    bad("uneven", cp.zeros(20, np.float32), threads=20)


def test_access_past_an_array_is_an_error():
    y = cp.zeros(5, np.float32)
    bad("outside", y, 4)
    with pytest.raises(AssertionError, match="outside of memory"):
        bad("outside", y, 5)
    assert y.get().tolist() == [0, 0, 0, 0, 1]


def test_write_beside_shared_memory_is_an_error():
    beside = re.compile("write beside the shared memory|access outside of memory")
    for place in (-1, 12, 13):
        with pytest.raises(AssertionError, match=beside):
            bad("beside", place, shared=48)
    for place in (12, 13):  # within the alignment to 16 bytes
        with pytest.raises(AssertionError, match=beside):
            bad("beside", place, shared=47)
    bad("beside", 11, shared=48)


def test_undefined_behaviour_is_an_error():
    with pytest.raises(AssertionError, match="undefined behaviour"):
        bad("overflow", cp.zeros(1, np.int32), 2**31 - 1)


def test_shared_memory_is_nan_at_the_start_of_every_block():
    y = cp.zeros(32, np.float32)
    for _ in range(2):
        bad("unwritten", y, shared=128)
        assert np.flatnonzero(np.isnan(y.get())).tolist() == [3]


def test_missing_barrier_changes_results():
    y = cp.zeros(32, np.float32)
    bad("hasty", y, shared=128)
    assert np.isnan(y.get()).any()


def test_arguments_of_wrong_types_are_errors():
    y = cp.zeros(5, np.float32)
    for args, why in [
        ((y,), "takes 2 arguments"),
        ((y, np.int64(1)), "got int64"),
        ((y, 1.5), "got <class 'float'>"),
        ((y.astype(np.float64), 1), "array of float64"),
        ((y.get(), 1), "numpy.ndarray"),
    ]:
        with pytest.raises((AssertionError, ValueError), match=why):
            bad("outside", *args)
    with pytest.raises(cp.CUDADriverError):
        bad("unwritten", y, shared=200 << 10)


# --- NVRTC -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvrtc():
    """Load NVRTC from the wheel nvidia-cuda-nvrtc."""
    site = Path(sysconfig.get_path("purelib"), "nvidia")
    found = [p for p in site.rglob("libnvrtc.so.*") if re.fullmatch(r"[\d.]+", p.name[12:])]
    if not found:
        pytest.skip("nvidia-cuda-nvrtc is not installed: pip install nvidia-cuda-nvrtc")
    return ctypes.CDLL(str(found[0]))


def compile_with(nvrtc, names, options):
    """Return the status and the log of a compilation."""
    program = ctypes.c_void_p()
    code = CODE.encode()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), code, b"kernels.cu", 0, None, None)
    for name in names:
        assert not nvrtc.nvrtcAddNameExpression(program, name.encode())
    given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return status, log.value.decode()


@pytest.mark.full
@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_nvrtc_compiles_every_kernel_without_messages(nvrtc, architecture):
    names = [n for n in KERNELS if re.search(r", 3, 3, 1, 4|, 64, 64|<\w+>", n)]
    assert len(names) == 6 * len(TYPES)
    options = [f"--gpu-architecture=compute_{architecture}", "--std=c++17"]
    status, log = compile_with(nvrtc, names, options)
    assert (status, log) == (0, "")
