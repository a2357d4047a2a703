"""Dask arrays have the bits of the whole array in memory; frontiers work in other processes.

Outer products have the accuracy only: over whole images, samples of equal taps are added first.
"""

import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank
from lowrank import filters
from lowrank.core.geometry import PADDING_MODES
from lowrank.families import FAMILIES, NotApplicable

da = pytest.importorskip("dask.array")
dask = pytest.importorskip("dask")

from lowrank import engine  # noqa: E402
from lowrank.engine import dask as chunked  # noqa: E402

DTYPES = ("float32", "float64", "uint8", "int16", "uint16", "int32", "float16")


@pytest.fixture(autouse=True)
def _synchronous_scheduler():
    with dask.config.set(scheduler="synchronous"):
        yield


@st.composite
def chunkings(draw, shape):
    """Draw chunks of any sizes along each axis."""
    cuts = [draw(st.sets(st.integers(1, max(n - 1, 1)), max_size=5)) for n in shape]
    edges = [[0, *sorted(c for c in cut if c < n), n] for cut, n in zip(cuts, shape)]
    return tuple(tuple(int(d) for d in np.diff(e)) for e in edges)


@st.composite
def convolutions(draw, transposed=False):
    """Draw a dense convolution and an input."""
    n = draw(st.integers(1, 3))
    each = st.lists(st.integers(1, 3), min_size=n, max_size=n)
    taps = draw(st.lists(st.sampled_from((1, 2, 3, 5)), min_size=n, max_size=n))
    groups, wide, out = draw(st.sampled_from(((1, 3, 4), (1, 1, 1), (2, 4, 2), (4, 4, 8))))
    shape = (wide, out // groups, *taps) if transposed else (out, wide // groups, *taps)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(("float32", "float64")))
    stride = draw(each)
    conv = lowrank.dense(
        rng.standard_normal(shape).astype(dtype),
        rng.standard_normal(out).astype(dtype),
        stride=stride,
        padding=[draw(st.tuples(*[st.integers(0, 3)] * 2)) for _ in range(n)],
        dilation=draw(each),
        groups=groups,
        padding_mode="zeros" if transposed else draw(st.sampled_from(PADDING_MODES)),
        value=0.3,
        transposed=transposed,
        output_padding=[draw(st.integers(0, s - 1)) for s in stride] if transposed else 0,
    )
    sizes = (13, (90, 40, 24)[n - 1])
    spatial = draw(st.lists(st.integers(*sizes), min_size=n, max_size=n))
    x = rng.standard_normal((draw(st.integers(1, 3)), wide, *spatial)).astype(dtype)
    return conv, x


def assert_same_bits(f, x, chunks):
    """Compare `f` on `x` in chunks with `f` on `x`; return the number of spatial output chunks."""
    y = f(da.from_array(x, chunks=chunks))
    whole = f(x)
    assert y.shape == whole.shape
    assert y.dtype == whole.dtype
    np.testing.assert_array_equal(y.compute(), whole, strict=True)
    return int(np.prod(y.numblocks[2:]))


@settings(max_examples=50)
@given(st.data())
def test_convolution_has_the_bits_of_the_whole_array(data):
    conv, x = data.draw(convolutions())
    assert_same_bits(conv, x, data.draw(chunkings(x.shape)))


@settings(max_examples=40)
@given(st.data())
def test_transposed_convolution_has_the_bits_of_the_whole_array(data):
    conv, x = data.draw(convolutions(transposed=True))
    assert_same_bits(conv, x, data.draw(chunkings(x.shape)))


@settings(max_examples=40)
@given(st.data(), st.sampled_from(sorted(FAMILIES)), st.booleans())
def test_chains_of_every_family_have_the_bits_of_the_whole_array(data, family, transposed):
    conv, x = data.draw(convolutions(transposed=transposed))
    try:
        f = getattr(lowrank, family)(conv, rank=1)
    except (NotApplicable, ValueError, TypeError):
        return  # no variant for this convolution, or several ranks
    assert_same_bits(f, x, data.draw(chunkings(x.shape)))


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_output_has_the_chunks_of_the_input(rng, mode, stride):
    """The tests above would also pass with a single chunk."""
    conv = lowrank.dense(
        rng.standard_normal((4, 2, 5, 3)), stride=stride, padding=2, padding_mode=mode, value=0.3
    )
    x = rng.standard_normal((2, 2, 50, 41))
    for f in (conv, lowrank.spatial_svd(conv, rank=2), lowrank.cp(conv, rank=2)):
        assert assert_same_bits(f, x, (1, 1, 10, (20, 21))) == 10


def test_stages_that_are_all_padded_run_in_chunks(rng):
    same = lowrank.Geometry.of(2, padding=1)
    down = lowrank.Geometry.of(2, stride=2, padding=1, dilation=2)
    first = lowrank.Stage(rng.standard_normal((4, 2, 3, 3)), same)
    second = lowrank.Stage(rng.standard_normal((3, 4, 3, 3)), down)
    up = lowrank.Stage(rng.standard_normal((3, 2, 4, 4)), down, transposed=True)
    x = rng.standard_normal((1, 2, 60, 70))
    assert assert_same_bits(lowrank.chain([first, second]), x, (1, 2, 13, 20)) > 4
    assert assert_same_bits(lowrank.chain([first, second, up]), x, (1, 2, 13, 20)) > 4


def test_axis_with_two_replicated_borders_is_one_chunk(rng):
    twice = lowrank.Geometry.of(1, padding=1, padding_mode="replicate")
    f = lowrank.chain([lowrank.Stage(rng.standard_normal((1, 1, 3)), twice)] * 2)
    assert assert_same_bits(f, rng.standard_normal((1, 1, 60)), (1, 1, 20)) == 1


def test_thin_chunks_are_merged_to_the_size_of_the_halo(rng):
    conv = lowrank.dense(rng.standard_normal((1, 1, 9, 3)), padding=(4, 1))
    x = rng.standard_normal((1, 1, 200, 40))
    y = conv(da.from_array(x, chunks=(1, 1, 1, 40)))
    assert min(y.chunks[2]) >= 4
    assert len(y.chunks[2]) > 20
    np.testing.assert_array_equal(y.compute(), conv(x))


def test_nan_and_infinity_spread_as_in_the_whole_array(rng):
    conv = lowrank.dense(rng.standard_normal((2, 2, 3)), stride=2, transposed=True)
    x = rng.standard_normal((1, 2, 50))
    x[0, :, ::7] = np.nan
    x[0, :, 3::11] = np.inf
    assert_same_bits(conv, x, (1, 2, 9))


def assert_same_filter(lazy, whole, image, kernel):
    """Compare bits; for outer products the rounding of n taps and n sums, twice."""
    result = lazy.compute()
    assert result.dtype == whole.dtype
    if filters.rank(kernel) > 1:
        np.testing.assert_array_equal(result, whole, strict=True)
        return
    work = np.result_type(image, np.float32) if image.dtype.kind == "f" else np.dtype(np.float32)
    size = float(np.abs(kernel).sum()) * max(float(np.abs(image.astype(float)).max()), 2.5)
    bound = 4 * sum(kernel.shape) * np.finfo(work).eps * size
    step = 1 if whole.dtype.kind in "iu" else 0  # between two integers
    # Integers that saturate differ by no more.
    assert np.abs(result.astype(float) - whole.astype(float)).max() <= bound + step


@settings(max_examples=60)
@given(st.data())
def test_filter_has_the_bits_of_the_whole_image(data):
    n = data.draw(st.integers(1, 3))
    axes = data.draw(st.permutations(range(data.draw(st.integers(n, min(n + 2, 4))))))
    sizes = st.integers(9, (0, 90, 40, 20, 14)[len(axes)])
    shape = data.draw(st.tuples(*[sizes] * len(axes)))
    dtype = data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    image = (rng.random(shape) * 200).astype(dtype)
    taps = data.draw(st.lists(st.sampled_from((1, 2, 3, 5)), min_size=n, max_size=n))
    arguments = {
        "mode": data.draw(st.sampled_from(list(filters.MODES))),
        "cval": 2.5,
        "origin": [data.draw(st.integers(-(t // 2), (t - 1) // 2)) for t in taps],
        "axes": tuple(axes[:n]) if n == 1 < len(axes) or data.draw(st.booleans()) else None,
        **data.draw(st.sampled_from(({"rank": 1}, {"method": "direct"}, {"tolerance": 0.5}))),
    }
    kernel = rng.standard_normal(taps)
    if "rank" in arguments and sum(t > 1 for t in taps) < 2:
        kernel = np.ones(taps)
    cut = da.from_array(image, chunks=data.draw(chunkings(shape)))
    run = data.draw(st.sampled_from((filters.correlate, filters.convolve)))
    lazy = run(cut, kernel, **arguments)
    assert lazy.shape == shape
    assert lazy.dtype == image.dtype
    assert_same_filter(lazy, run(image, kernel, **arguments), image, kernel)


@pytest.mark.parametrize("kernel", ["gauss", "log", "dog", "unsharp", "sobel", "scharr", "prewitt"])
def test_classical_filters_have_the_bits_of_the_whole_image(kernel, rng):
    make = getattr(filters, kernel)
    scale = () if kernel in ("sobel", "scharr", "prewitt") else (1.0,)
    for image, ndim in ((rng.random((70, 80, 3)), 2), (rng.random((40, 50, 60), np.float32), 3)):
        k = make(*scale, ndim=ndim)
        lazy = filters.correlate(da.from_array(image, chunks=25), k)
        assert lazy.npartitions > 4
        assert_same_filter(lazy, filters.correlate(image, k), image, k)


def test_colour_image_is_filtered_as_the_whole_image(rng):
    image = rng.integers(0, 256, (150, 170, 3), dtype=np.uint8)
    lazy = filters.filter_image(da.from_array(image, chunks=(60, 70, 3)), filters.gauss(2.0))
    assert_same_filter(
        lazy, filters.filter_image(image, filters.gauss(2.0)), image, filters.gauss(2.0)
    )


def test_transforms_are_not_used(rng):
    image, disk = 0.5 + rng.random((300, 300)), filters.disk(20.5)
    plan = filters.plan_filter(disk, image.shape, dtype=np.float64)
    assert plan.choice.method == "fft"
    other = next(o for o in plan.methods if not o.spread and o.error <= plan.tolerance)
    lazy = filters.correlate(da.from_array(image, chunks=100), disk)
    whole = filters.correlate(image, disk, method=other.method)
    np.testing.assert_array_equal(lazy.compute(), whole)
    with pytest.raises(ValueError, match="method must be auto, direct or separable"):
        filters.correlate(da.from_array(image), disk, method="fft")
    with pytest.raises(ValueError, match="multirate for images that are no NumPy"):
        filters.correlate(da.from_array(image), filters.gauss(9.0), method="multirate")


def test_method_is_chosen_once_for_the_size_of_the_image(rng, monkeypatch):
    planned = []
    real = filters.request.FilterRequest.plan
    monkeypatch.setattr(
        filters.request.FilterRequest,
        "plan",
        lambda self: planned.append(self.spatial) or real(self),
    )
    lazy = filters.correlate(da.from_array(rng.random((90, 100)), chunks=30), filters.log(1.5))
    lazy.compute()
    assert planned == [(90, 100)]


def test_empty_image_gives_an_empty_image():
    lazy = filters.correlate(da.zeros((0, 30)), filters.sobel())
    assert lazy.compute().shape == (0, 30)


def test_impossible_arguments_are_refused(rng):
    conv = lowrank.dense(np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="x must be"):
        conv(da.ones((2, 30)))
    with pytest.raises(TypeError, match="float32 or float64"):
        conv(da.ones((1, 2, 30), dtype=int))
    with pytest.raises(ValueError, match="x must have 2 channels"):
        conv(da.ones((1, 3, 30)))
    with pytest.raises(TypeError, match="out must be None"):
        conv(da.ones((1, 2, 30)), np.empty((1, 1, 28)))
    with pytest.raises(TypeError, match="out must be None"):
        filters.correlate(da.ones((30, 30)), filters.sobel(), out=np.empty((30, 30)))
    unknown = da.ones((30, 30), chunks=10)
    with pytest.raises(ValueError, match="compute_chunk_sizes"):
        filters.correlate(unknown[unknown[:, 0] > 0], filters.sobel())
    masked = da.ma.masked_equal(da.ones((30, 30)), 0)
    with pytest.raises(TypeError, match="Dask array of NumPy arrays, got Array of MaskedArray"):
        filters.correlate(masked, filters.sobel())
    with pytest.raises(TypeError, match="must be a NumPy or CuPy array"):
        conv(dask.delayed(np.ones((1, 2, 30))))


def test_half_precision_is_computed_in_float32(rng):
    x = rng.standard_normal((1, 2, 60)).astype(np.float16)
    assert_same_bits(lowrank.dense(np.ones((1, 2, 3), np.float32)), x, (1, 2, 20))


def test_chunks_of_a_pool_run_on_one_thread_each(rng, monkeypatch):
    seen = []
    real = engine.plan

    def plan(stages, shape, dtype, epilogues, threads, **options):
        seen.append((threading.current_thread() is threading.main_thread(), threads))
        return real(stages, shape, dtype, epilogues, threads, **options)

    monkeypatch.setattr(engine, "plan", plan)
    x = rng.standard_normal((1, 2, 60))
    whole = lowrank.dense(np.ones((1, 2, 3)))(x)
    for scheduler, call in (("synchronous", (True, None)), ("threads", (False, 1))):
        conv = lowrank.dense(np.ones((1, 2, 3)))  # not in the cache of plans
        seen.clear()
        y = conv(da.from_array(x, chunks=(1, 2, 20))).compute(scheduler=scheduler, num_workers=2)
        assert set(seen) == {call}
        np.testing.assert_array_equal(y, whole)
        seen.clear()
        lazy = chunked.run(conv, da.from_array(x, chunks=(1, 2, 20)), threads=3)
        lazy.compute(scheduler=scheduler, num_workers=2)
        assert {threads for _, threads in seen} == {3}


def test_equal_chains_have_equal_task_names(rng):
    """Dask merges tasks of equal names, and caches of results are keyed by them."""
    x = da.ones((1, 2, 60), chunks=20)
    w = rng.standard_normal((1, 2, 3))
    assert lowrank.dense(w)(x).name == lowrank.dense(w)(x).name
    assert lowrank.dense(w)(x).name != lowrank.dense(2 * w)(x).name


def test_dask_is_not_imported_before_its_first_array():
    code = """
import sys, numpy as np, lowrank
from lowrank import filters
lowrank.dense(np.ones((1, 1, 3)))(np.ones((1, 1, 9)))
filters.correlate(np.ones((9, 9)), filters.sobel())
import lowrank.engine.dask, lowrank.filters.dask
assert not [m for m in sys.modules if m.split(".")[0] == "dask"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_zarr_store_is_filtered_into_another(rng, tmp_path):
    zarr = pytest.importorskip("zarr")
    volume = rng.random((40, 50, 60), np.float32)
    source = zarr.open(str(tmp_path / "in.zarr"), mode="w", shape=volume.shape, chunks=(16, 16, 16),
                       dtype=volume.dtype)  # fmt: skip
    source[...] = volume
    kernels = filters.gauss(1.0, ndim=3), filters.log(1.0, ndim=3)
    lazy = da.stack([filters.correlate(da.from_zarr(source), k) for k in kernels])
    target = zarr.open(str(tmp_path / "out.zarr"), mode="w", shape=lazy.shape,
                       chunks=(1, 16, 16, 16), dtype=lazy.dtype)  # fmt: skip
    da.store(lazy.rechunk((1, 16, 16, 16)), target, lock=False)
    np.testing.assert_array_equal(target[...], [filters.correlate(volume, k) for k in kernels])
    # Zarr's dtypes spell the native byte order out, which makes another buffer of an array.
    f = lowrank.dense(np.ones((1, 1, 3, 3, 3), np.float32))
    np.testing.assert_array_equal(f(source[...][None, None]), f(volume[None, None]))
    np.testing.assert_array_equal(
        filters.correlate(source[...], kernels[0]), filters.correlate(volume, kernels[0])
    )


@pytest.fixture(scope="module")
def conv_and_front():
    w = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    conv = lowrank.dense(w, np.zeros(8), padding=1)
    return conv, lowrank.frontier(conv, (12, 12), ("spatial_svd", "tucker"), axis="macs")


def test_frontier_and_chains_pickle(conv_and_front):
    conv, front = conv_and_front
    f = front[1].build()
    for chain in (conv, f):
        copy = pickle.loads(pickle.dumps(chain))
        assert repr(copy) == repr(chain)
        np.testing.assert_array_equal(copy.to_dense(), chain.to_dense())
    copy = pickle.loads(pickle.dumps(front))
    assert str(copy) == str(front)
    assert [c.error for c in copy] == [c.error for c in front]
    candidate = pickle.loads(pickle.dumps(front[1]))
    np.testing.assert_array_equal(candidate.build().to_dense(), f.to_dense())


def approximate_and_run(conv, budget):
    f = lowrank.approximate(conv, (12, 12), families=("spatial_svd", "tucker"), macs=budget)
    return f, f(np.ones((1, 4, 12, 12), np.float32))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # by the multiprocessing backend
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_approximate_in_other_processes_has_the_same_bits(conv_and_front, backend):
    joblib = pytest.importorskip("joblib")
    conv, _ = conv_and_front
    conv(np.ones((1, 4, 12, 12), np.float32))  # the engine has run before the fork
    budgets = [0.5, 0.8]
    inner = {"inner_max_num_threads": 1} if backend == "loky" else {}
    with joblib.parallel_config(backend=backend, n_jobs=2, **inner):
        results = joblib.Parallel()(joblib.delayed(approximate_and_run)(conv, b) for b in budgets)
    for budget, (f, y) in zip(budgets, results):
        here, expected = approximate_and_run(conv, budget)
        np.testing.assert_array_equal(f.to_dense(), here.to_dense())
        np.testing.assert_array_equal(y, expected)
