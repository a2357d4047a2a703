"""GPU kernels: compiled for the CPU against the reference, and compiled by NVRTC."""

import importlib
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import fake_cupy as cp
import numpy as np
import pytest

from lowrank import Geometry, Stage
from lowrank.core import reference
from lowrank.core.stage import Epilogue
from lowrank.engine import array_api

sys.path.insert(0, str(Path(__file__).parents[1]))

from asv_benchmarks import gpu_gate

CODE = Path(array_api.__file__).with_name("cuda").joinpath("kernels.cu").read_text()

TYPES = ["float", "double", "f16", "bf16"]
KERNELS = [f"epilogue<{t}, 1>" for t in TYPES]
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}


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
    for i, (a, kind) in enumerate(zip(given, kernel.kinds)):
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
    launch(f"epilogue<{kind}, 1>", 256, y, len(given), None, 1, 0)
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
    launch(f"epilogue<{kind}, 1>", 1600, y, 1, sums(values, kind), len(values), 0)
    assert_numbers(y.get(), narrowed(values, kind), ~np.isnan(values))


# --- steps of plans ------------------------------------------------------------------------------

# Weights, inputs and biases are small integers, so that every sum is exact in every type: the only
# rounding is that of the result.
EXACT = {"float64": 2**53, "float32": 2**24, "float16": 2**11, "bfloat16": 2**8}  # integers up to
TENSOR_CORES = ["float16", "bfloat16", "float32"]
MODES = ["zeros", "reflect", "replicate", "circular", "symmetric"]


@pytest.fixture(scope="module")
def gpu(kernels):
    """Provide the module of plans, on the emulated CuPy."""
    with cp.installed():
        yield importlib.import_module("lowrank.engine.cuda.plan")


def small(rng, shape, most=1):
    return rng.integers(-most, most + 1, shape).astype(np.float64)


def as_dtype(name):
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def check(
    gpu, stages, size, rng, dtype="float32", kinds=None, interleaved=1, io=None, activations=None,
):  # fmt: skip
    """Run a chain in a plan, and compare with the reference; return the plan's steps.

    `io` are the types of input and output.
    """
    dtype = as_dtype(dtype)
    batch, last = int(rng.integers(1, 4)), stages[-1].out_channels
    reads, writes = map(np.dtype, io or (dtype, dtype))
    most = 9 if reads == np.uint8 else 1
    shape = stages[0].in_channels, *size
    x = small(rng, (batch, *shape, interleaved), most)
    x = np.abs(x) if reads == np.uint8 else x
    epilogues = []
    for k, s in enumerate(stages):
        names = activations or (*["none"] * (len(stages) - 1), str(rng.choice(list(ACTIVATIONS))))
        has_bias = names[k] != "none" or (k + 1 == len(stages) and rng.random() < 0.5)
        bias = small(rng, s.out_channels, 3) if has_bias else None
        epilogues.append(Epilogue(bias, names[k]))
    exact = np.moveaxis(x, -1, 0)
    exact = exact.reshape(-1, *shape)
    border = np.full(stages[0].in_channels, stages[0].geometry.value)
    for s, e in zip(stages, epilogues):
        assert np.abs(exact).max() <= EXACT[dtype.name]
        exact = reference.apply_epilogue(reference.run_stage(s, exact, border), e)
        border = None
    out = exact.shape[1:]
    exact = np.moveaxis(exact.reshape(interleaved, batch, *out), 0, -1)
    on_gpu = [replace(s, weight=cp.asarray(s.weight.astype(np.float32))) for s in stages]
    moved = [Epilogue(None if b is None else cp.asarray(b), a) for b, a in epilogues]
    run = gpu.plan(on_gpu, shape, dtype, moved, interleaved=interleaved)
    y = cp.empty((batch, *out[:-1], out[-1] * interleaved), writes)
    given = cp.asarray(x.reshape(batch, *shape[:-1], -1).astype(reads))
    assert run(given, y) is y
    exact = exact.reshape(y.shape)
    wanted = np.clip(exact, 0, 255) if writes == np.uint8 else exact
    np.testing.assert_array_equal(y.get(), wanted.astype(writes))
    names = [s.name for s in run.steps]
    assert kinds is None or names == kinds
    assert last == out[0]
    return run


def passes(rng, taps, groups, terms, mode, before):
    """Return a filter as 1-D passes, the last axis first; `before` are its border samples."""
    ndim, stages = len(taps), []
    axes = [a for a in reversed(range(ndim)) if taps[a] > 1]
    for k, axis in enumerate(axes):
        kernel, padding = [1] * ndim, [(0, 0)] * ndim
        kernel[axis] = taps[axis]
        padding[axis] = before[axis], taps[axis] - 1 - before[axis]
        is_last = k + 1 == len(axes)
        per_group = terms if k == 0 else 1
        shape = groups * (1 if is_last else terms), terms if is_last else 1, *kernel
        if k == 0:
            shape = groups * per_group, 1, *kernel
        weight = small(rng, shape)
        geometry = Geometry.of(ndim, padding=padding, padding_mode=mode)
        stages.append(
            Stage(weight, geometry, groups if k in (0, len(axes) - 1) else groups * terms)
        )
    return stages


# taps, terms, interleaved values, types of the computation, the input and the output
FILTERS = [
    ((3, 3), 1, 1, "float32", None), ((3, 3), 1, 1, "float32", ("u1", "u1")),
    ((3, 3), 1, 3, "float32", ("u1", "u1")), ((3, 3), 1, 4, "float32", ("u1", "f4")),
    ((5, 4), 2, 1, "float32", None), ((3, 5), 1, 2, "float32", None),
    ((3, 3), 3, 1, "float16", None), ((5, 3), 1, 1, "bfloat16", None),
    ((4, 3), 1, 1, "float64", None), ((15, 15), 1, 1, "float32", None),
    ((2, 3, 3), 1, 1, "float32", None), ((3, 1, 5), 1, 1, "float16", None),
    ((1, 3, 3), 2, 1, "float32", None), ((9, 9), 1, 1, "float32", ("f4", "u1")),
]  # fmt: skip


@pytest.mark.parametrize(("taps", "terms", "interleaved", "dtype", "io"), FILTERS)
def test_filters_match_the_reference(taps, terms, interleaved, dtype, io, gpu, rng):
    # Rows of 72 threads: some warps have no border, and take the other branch.
    itemsize = max(np.dtype(t).itemsize for t in io or (dtype if dtype[0] == "f" else "f2",))
    wide = 72 * 16 // itemsize // interleaved
    long = (33, wide) if len(taps) == 2 else (3, 33, wide)
    odd = (17, 23) if len(taps) == 2 else (5, 7, 9)
    for size, groups in ((long, 1), (odd, 2), (long, 2), (odd, 1)):
        mode = str(rng.choice(MODES))
        before = [n // 2 for n in taps] if size is long else [int(rng.integers(n)) for n in taps]
        stages = passes(rng, taps, groups, terms, mode, before)
        check(gpu, stages, size, rng, dtype, ["filter"], interleaved, io)


def test_long_filters_run_pass_by_pass(gpu, rng):
    for terms, kinds in ((1, ["depthwise", "depthwise"]), (2, None)):
        check(gpu, passes(rng, (5, 40), 1, terms, "reflect", (2, 20)), (9, 50), rng, kinds=kinds)


def depthwise_stage(rng, channels, kernel, stride, per=1, dilation=1, outer=1, mode=None):
    ndim = len(kernel)
    padding = [tuple(int(n) for n in rng.integers(0, k, 2)) for k in kernel]
    geometry = Geometry.of(
        ndim, stride=stride, dilation=dilation, padding=padding,
        padding_mode=mode or str(rng.choice(MODES)),
    )  # fmt: skip
    return Stage(small(rng, (channels * per, 1, *kernel)), geometry, channels, outer)


# kernel, stride, dilation, outputs per channel, type
DEPTHWISE = [
    ((3, 3), 1, 1, 1, "float32"), ((3, 3), 2, 1, 2, "float32"), ((5, 5), 2, 1, 1, "float16"),
    ((3, 3), 1, 1, 1, "bfloat16"), ((7, 7), 1, 1, 1, "float64"), ((5,), 1, 1, 1, "float32"),
    ((3, 3), 1, 2, 2, "float32"), ((2, 3, 3), 1, 1, 1, "float16"),
    ((3, 3), (2, 1), 1, 1, "bfloat16"), ((3, 2, 3), 2, 1, 1, "float64"),
    ((3, 3), 3, 1, 1, "float32"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "stride", "dilation", "per", "dtype"), DEPTHWISE)
def test_depthwise_stages_match_the_reference(kernel, stride, dilation, per, dtype, gpu, rng):
    for size, channels in (((6, 20, 64), 3), ((7, 15, 13), 2), ((5, 40, 576), 1)):
        stage = depthwise_stage(rng, channels, kernel, stride, per, dilation, outer=channels)
        check(gpu, [stage], size[3 - len(kernel) :], rng, dtype, ["depthwise"])


@pytest.mark.parametrize(
    ("kernel", "dtype", "reads"),
    [((8, 8), "float32", "f4"), ((6, 10), "float32", "f4"), ((7, 7), "float16", "f2"),
     ((3, 3), "float32", "u1"), ((3, 3), "float64", "f8")],
)  # fmt: skip
def test_vectors_are_aligned_at_stride_3(kernel, dtype, reads, gpu, rng):
    """Threads of 1, 2, 4 and 8 columns begin 3, 6, 12 and 24 samples apart."""
    geometry = Geometry.of(2, stride=3, padding=[(1, 1), (1, kernel[1] - 2)])
    stage = Stage(small(rng, (1, 1, *kernel)), geometry)
    check(gpu, [stage], (40, 1536), rng, dtype, ["depthwise"], io=(reads, dtype))


def test_bytes_are_read_and_written_by_depthwise_stages(gpu, rng):
    for interleaved in (1, 2, 3):
        stage = depthwise_stage(rng, 1, (3, 3), 1)
        check(gpu, [stage], (33, 40), rng, "float32", ["depthwise"], interleaved, ("u1", "u1"))


def pointwise(rng, ins, outs, ndim=2, **options):
    return Stage(small(rng, (outs, ins, *[1] * ndim)), Geometry.of(ndim), **options)


@pytest.mark.parametrize(
    ("kernel", "stride", "per", "dtype"),
    [((3, 3), 1, 1, "float32"), ((3, 3), 2, 1, "float64"), ((3, 3), 1, 3, "float32"),
     ((5, 5), 1, 1, "float32"), ((3,), 2, 1, "float64")],
)  # fmt: skip
def test_depthwise_stages_run_between_products_channels_last(kernel, stride, per, dtype, gpu, rng):
    for ins, channels, outs in ((5, 8, 3), (6, 6, 9)):
        chain = [
            pointwise(rng, ins, channels, len(kernel)),
            depthwise_stage(rng, channels, kernel, stride, per),
            pointwise(rng, channels * per, outs, len(kernel)),
        ]
        kinds = ["channels last", "matrix product", "depthwise, channels last", "matrix product"]
        size = (19, 22)[-len(kernel) :]
        check(gpu, chain, size, rng, dtype, [*kinds, "channels first"])


def test_passes_between_products_stay_channels_last(gpu, monkeypatch, rng):
    chain = [
        pointwise(rng, 4, 8),
        *passes(rng, (3, 3), 8, 1, "zeros", (1, 1)),
        pointwise(rng, 8, 4),
    ]
    kinds = ["channels last", "matrix product", *["depthwise, channels last"] * 2, "matrix product"]
    check(gpu, chain, (9, 11), rng, kinds=[*kinds, "channels first"])
    monkeypatch.setenv("CUPY_TF32", "1")
    kinds = [*kinds[:3], "depthwise + pointwise", "channels first"]
    check(gpu, chain, (9, 11), rng, kinds=kinds)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_convolutions_are_products_of_unrolled_samples(dtype, gpu, monkeypatch, rng):
    for part in (1 << 28, 1 << 13) * 4:  # bytes: all of them, or a few rows at a time
        monkeypatch.setattr("lowrank.engine.cuda.gemm.MAX_UNROLLED", part)
        ndim, groups, outer = (int(n) for n in rng.integers(1, 4, 3))
        ins, outs = int(rng.choice([2, 3, 8])), int(rng.choice([1, 3, 8]))
        kernel = rng.integers(1, 4, ndim).tolist()
        geometry = Geometry.of(
            ndim, stride=rng.integers(1, 4, ndim).tolist(),
            dilation=rng.integers(1, 3, ndim).tolist(),
            padding=rng.integers(0, 3, (ndim, 2)).tolist(), padding_mode=str(rng.choice(MODES)),
        )  # fmt: skip
        stage = Stage(small(rng, (groups * outs, ins, *kernel)), geometry, groups, outer)
        size = tuple(int(n) for n in rng.integers(6, 10, ndim))
        found = check(gpu, [stage], size, rng, dtype)
        assert "matrix product" in [s.name for s in found.steps]


@pytest.mark.parametrize("dtype", TENSOR_CORES)
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 1), ((3, 3), 2), ((5, 5), 2)])
def test_depthwise_and_pointwise_stages_are_fused(dtype, kernel, stride, gpu, monkeypatch, rng):
    monkeypatch.setenv("CUPY_TF32", "1")
    if dtype == "float32" and stride > 1 and kernel[0] > 3:
        stride = 1
    for channels, per, outs, size in (
        (16, 1, 40, (17, 33)),
        (12, 1, 8, (8, 16)),
        (3, 2, 36, (9, 7)),
    ):
        depthwise = depthwise_stage(rng, channels, kernel, stride, per)
        chain = [depthwise, pointwise(rng, channels * per, outs)]
        names = [str(rng.choice(list(ACTIVATIONS))) for _ in chain]
        kinds = ["channels last", "depthwise + pointwise", "channels first"]
        check(gpu, chain, size, rng, dtype, kinds, activations=names)


@pytest.mark.parametrize("dtype", TENSOR_CORES)
def test_pointwise_depthwise_and_pointwise_stages_are_fused(dtype, gpu, monkeypatch, rng):
    monkeypatch.setenv("CUPY_TF32", "1")
    for ins, middle, outs, size in ((24, 16, 40, (17, 20)), (8, 8, 4, (5, 33))):
        chain = [
            pointwise(rng, ins, middle), depthwise_stage(rng, middle, (3, 3), 1),
            pointwise(rng, middle, outs),
        ]  # fmt: skip
        names = [str(rng.choice(list(ACTIVATIONS))) for _ in chain]
        kinds = ["channels last", "pointwise + depthwise + pointwise", "channels first"]
        check(gpu, chain, size, rng, dtype, kinds, activations=names)


def test_fused_products_round_to_tf32(gpu, monkeypatch):
    """The tensor cores drop 13 bits: without rounding, 1 + 3/4 ulp would become 1."""
    monkeypatch.setenv("CUPY_TF32", "1")
    ulp = 2.0**-10
    weights = np.ones((4, 1, 1, 1), np.float32), np.eye(4, dtype=np.float32)[:, :, None, None]
    stages = [Stage(cp.asarray(w), Geometry.of(2), n) for w, n in zip(weights, (4, 1))]
    run = gpu.plan(stages, (4, 1, 2), np.dtype(np.float32), [Epilogue()] * 2)
    x = np.tile(np.array([1 + 0.75 * ulp, 1 + 0.25 * ulp], np.float32), (1, 4, 1, 1))
    assert (run(cp.asarray(x)).get() == np.array([1 + ulp, 1], np.float32)).all()


def test_fused_products_keep_infinities_and_nan(gpu, monkeypatch):
    """A GPU computes NaN as 0x7fffffff, which rounding by an addition would turn into -0."""
    monkeypatch.setenv("CUPY_TF32", "1")
    weights = np.ones((8, 8, 1, 1)), np.ones((8, 1, 1, 1)), np.ones((4, 8, 1, 1))
    for first in (0, 1):
        part = [w.astype(np.float32) for w in weights[first:]]
        stages = [Stage(cp.asarray(w), Geometry.of(2), 8 // w.shape[1]) for w in part]
        run = gpu.plan(stages, (8, 1, 3), np.dtype(np.float32), [Epilogue()] * len(stages))
        assert "depthwise + pointwise" in run.steps[1].name
        x = np.ones((1, 8, 1, 3), np.float32)
        x.view(np.uint32)[0, 3, 0] = 0x7FFFFFFF, 0x7F800000, 0x3F800000  # NaN, infinity, 1
        wanted = np.array([np.nan, np.inf, 64 if first == 0 else 8], np.float32)
        np.testing.assert_array_equal(run(cp.asarray(x)).get(), np.tile(wanted, (1, 4, 1, 1)))


def test_stages_without_a_kernel_run_in_array_code(gpu, rng):
    transposed = Stage(
        small(rng, (4, 3, 3, 3)), Geometry.of(2, stride=2, padding=1), transposed=True
    )
    inner = Stage(small(rng, (6, 2, 3, 3)), Geometry.of(2), groups=2, inner=2)
    shuffled = Stage(small(rng, (6, 3, 1, 1)), Geometry.of(2), groups=2, shuffle=(2, 3))
    for stage in (transposed, inner, shuffled):
        check(gpu, [stage], (7, 8), rng, "float32", ["array code"])
    bordered = Stage(
        small(rng, (3, 1, 3, 3)), Geometry.of(2, padding=1, padding_mode="constant", value=2.0), 3
    )
    check(gpu, [bordered], (7, 8), rng, "float32", ["array code"])


def test_only_one_filter_runs_on_interleaved_values(gpu, rng):
    with pytest.raises(ValueError, match="interleaved must be 1 for this chain"):
        check(gpu, [pointwise(rng, 2, 2)], (7, 8), rng, interleaved=3)


def test_inputs_may_begin_anywhere(gpu, rng):
    """Vectors are loaded only where they are aligned."""
    stages = passes(rng, (3, 3), 1, 1, "reflect", (1, 1))
    on_gpu = [replace(s, weight=cp.asarray(s.weight)) for s in stages]
    run = gpu.plan(on_gpu, (1, 33, 64), np.dtype(np.float32), [Epilogue()] * 2)
    held = cp.asarray(small(rng, 33 * 64 + 3).astype(np.float32))
    x = held[3:].reshape(1, 1, 33, 64)
    wanted = reference.run_chain(stages, x.get().astype(np.float64))
    np.testing.assert_array_equal(run(x).get(), wanted)


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
    y = cp.zeros(4, np.float32)  # arrays are aligned to 16 bytes: these fill them
    bad("outside", y, 3)
    with pytest.raises(AssertionError, match="outside of memory"):
        bad("outside", y, 4)
    assert y.get().tolist() == [0, 0, 0, 1]


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
        ((y, 1.5), "got float64"),
        ((y.astype(np.float64), 1), "array of float64"),
        ((y.get(), 1), "numpy.ndarray"),
    ]:
        with pytest.raises((AssertionError, ValueError), match=why):
            bad("outside", *args)
    with pytest.raises(cp.CUDADriverError):
        bad("unwritten", y, shared=200 << 10)


# --- machine code ------------------------------------------------------------------------------

#: One kernel of every template and every way through it, other than those that the gate measures.
OTHERS = [
    "planes<double, double, 15, 15, 1, 1, 2, 1, 1>", "planes<f16, f16, 5, 5, 2, 1, 8, 6, 0>",
    "planes<bf16, bf16, 5, 3, 1, 1, 8, 6, 1>", "planes<float, float, 7, 7, 1, 1, 2, 1, 0>",
    "planes<u8, float, 3, 3, 1, 4, 4, 0, 2>", "planes<double, double, 3, 3, 2, 1, 2, 1, 0>",
    "planes<float, float, 3, 3, 3, 1, 4, -1, 0>", "planes<float, f16, 3, 1, 1, 1, 4, 0, 1>",
    "planes<double, double, 11, 11, 1, 1, 2, -1, 0>",
    "planes<double, double, 32, 32, 1, 1, 1, -1, 1>",
    "depthwise_last<double, 5, 5, 1, 8, 1>", "depthwise_last<float, 7, 7, 2, 4, 1>",
    "fused<f16, 5, 5, 1, 8, 16, 2, 1>", "fused<float, 5, 5, 2, 8, 16, 2, 0>",
    "fused<bf16, 3, 3, 2, 8, 16, 1, 0>", "fused<float, 3, 3, 2, 8, 16, 4, 1>",
    *(f"{name}<{t}>" for name in ("depthwise_any", "transpose") for t in TYPES),
    *(f"{name}<{t}, {n}>" for name in ("unroll", "epilogue") for t, n in zip(TYPES, (4, 2, 8, 1))),
]  # fmt: skip


@pytest.fixture(scope="module")
def tools():
    """Find NVRTC and nvdisasm."""
    try:
        return gpu_gate.find_tools()
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_kernels_are_within_their_limits(tools):
    for row, found in gpu_gate.measure():
        assert not found.excesses(row), row.title


def test_exceeded_limits_are_named(tools):
    """Test that the count depends on the code: limits below it are exceeded."""
    row = gpu_gate.TABLE[0]._replace(limit=9.0, registers=8)
    ((row, found),) = gpu_gate.measure([row])
    # 3 x 3 taps as a row and a column are 6 products, of which a few more rows are computed.
    assert 6 < found.per_output < row.limit + 80
    assert [what.split(maxsplit=1)[1] for what in found.excesses(row)] == [
        "instructions per output", "registers"
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="must have 5 loops, got 2"):
        list(gpu_gate.measure([row._replace(trips=(1,) * 5)]))


@pytest.mark.full
def test_no_kernel_spills_registers(tools):
    options = [f"--gpu-architecture={gpu_gate.ARCHITECTURE}", "--std=c++17", "--ptxas-options=-v"]
    status, log, names, _ = gpu_gate.compile_kernels(tools[0], OTHERS, options)
    assert status == 0, log
    spilled = re.findall(r"(\d+) bytes spill stores", log)
    assert spilled == ["0"] * len(names), log


@pytest.mark.full
@pytest.mark.parametrize("architecture", [75, 80, 120])  # the code asks whether it is below 80
def test_nvrtc_compiles_every_kernel_without_messages(tools, architecture):
    names = [row.name for row in gpu_gate.TABLE] + OTHERS
    if architecture < 80:  # tensor cores of other shapes: such kernels are not planned there
        names = [n for n in names if not n.startswith("fused")]
    options = [f"--gpu-architecture=compute_{architecture}", "--std=c++17"]
    status, log, *_ = gpu_gate.compile_kernels(tools[0], names, options)
    assert (status, log) == (0, "")
