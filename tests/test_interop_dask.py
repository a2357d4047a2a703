"""Dask arrays give the bits of the whole array in memory; what is swept pickles."""

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

from lowrank.engine import dask as chunked  # noqa: E402

DTYPES = ("float32", "float64", "uint8", "int16", "uint16", "int32", "float16")


@pytest.fixture(autouse=True)
def _in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@st.composite
def chunkings(draw, shape):
    """A lot of chunks of any sizes along each axis."""
    cuts = [draw(st.sets(st.integers(1, max(n - 1, 1)), max_size=5)) for n in shape]
    edges = [[0, *sorted(c for c in cut if c < n), n] for cut, n in zip(cuts, shape)]
    return tuple(tuple(int(d) for d in np.diff(e)) for e in edges)


@st.composite
def convolutions(draw, transposed=False):
    """A dense convolution, and the shape of an input of it."""
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


def cut_somewhere(f, x, chunks):
    """Run `f` on `x` in these chunks, compare, and say into how many the result is cut."""
    y = f(da.from_array(x, chunks=chunks))
    whole = f(x)
    assert y.shape == whole.shape
    assert y.dtype == whole.dtype
    np.testing.assert_array_equal(y.compute(), whole, strict=True)
    return int(np.prod(y.numblocks[2:]))


@settings(max_examples=50)
@given(st.data())
def test_a_convolution_gives_the_bits_of_the_whole_array(data):
    conv, x = data.draw(convolutions())
    cut_somewhere(conv, x, data.draw(chunkings(x.shape)))


@settings(max_examples=40)
@given(st.data())
def test_a_transposed_one_does(data):
    conv, x = data.draw(convolutions(transposed=True))
    cut_somewhere(conv, x, data.draw(chunkings(x.shape)))


@settings(max_examples=40)
@given(st.data(), st.sampled_from(sorted(FAMILIES)), st.booleans())
def test_chains_of_every_family_do(data, family, transposed):
    conv, x = data.draw(convolutions(transposed=transposed))
    try:
        f = getattr(lowrank, family)(conv, rank=1)
    except (NotApplicable, ValueError, TypeError):
        return  # has no form here, or ranks of several numbers
    cut_somewhere(f, x, data.draw(chunkings(x.shape)))


@pytest.mark.parametrize("mode", PADDING_MODES)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_result_is_cut_where_the_input_is(rng, mode, stride):
    """No fallback to one chunk behind the tests above."""
    conv = lowrank.dense(
        rng.standard_normal((4, 2, 5, 3)), stride=stride, padding=2, padding_mode=mode, value=0.3
    )
    x = rng.standard_normal((2, 2, 50, 41))
    for f in (conv, lowrank.spatial_svd(conv, rank=2), lowrank.cp(conv, rank=2)):
        assert cut_somewhere(f, x, (1, 1, 10, (20, 21))) == 10


def test_layers_of_a_network_with_borders_of_their_own_are_cut(rng):
    same = lowrank.Geometry.of(2, padding=1)
    down = lowrank.Geometry.of(2, stride=2, padding=1, dilation=2)
    first = lowrank.Stage(rng.standard_normal((4, 2, 3, 3)), same)
    second = lowrank.Stage(rng.standard_normal((3, 4, 3, 3)), down)
    up = lowrank.Stage(rng.standard_normal((3, 2, 4, 4)), down, transposed=True)
    x = rng.standard_normal((1, 2, 60, 70))
    assert cut_somewhere(lowrank.chain([first, second]), x, (1, 2, 13, 20)) > 4
    assert cut_somewhere(lowrank.chain([first, second, up]), x, (1, 2, 13, 20)) > 4


def test_an_axis_with_two_borders_is_one_chunk(rng):
    twice = lowrank.Geometry.of(1, padding=1, padding_mode="replicate")
    f = lowrank.chain([lowrank.Stage(rng.standard_normal((1, 1, 3)), twice)] * 2)
    assert cut_somewhere(f, rng.standard_normal((1, 1, 60)), (1, 1, 20)) == 1


def test_thin_slices_are_joined_until_they_hold_what_an_output_sees(rng):
    conv = lowrank.dense(rng.standard_normal((1, 1, 9, 3)), padding=(4, 1))
    x = rng.standard_normal((1, 1, 200, 40))
    y = conv(da.from_array(x, chunks=(1, 1, 1, 40)))
    assert min(y.chunks[2]) >= 4
    assert len(y.chunks[2]) > 20
    np.testing.assert_array_equal(y.compute(), conv(x))


def test_nan_and_infinities_stay_where_they_are(rng):
    conv = lowrank.dense(rng.standard_normal((2, 2, 3)), stride=2, transposed=True)
    x = rng.standard_normal((1, 2, 50))
    x[0, :, ::7] = np.nan
    x[0, :, 3::11] = np.inf
    cut_somewhere(conv, x, (1, 2, 9))


@settings(max_examples=60)
@given(st.data())
def test_a_filter_gives_the_bits_of_the_whole_image(data):
    n = data.draw(st.integers(1, 3))
    axes = data.draw(st.permutations(range(data.draw(st.integers(n, min(n + 2, 4))))))
    sizes = st.integers(9, (0, 90, 40, 20, 14)[len(axes)])
    shape = data.draw(st.tuples(*[sizes] * len(axes)))
    dtype = data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    image = (rng.random(shape) * 200).astype(dtype)
    taps = data.draw(st.lists(st.sampled_from((1, 2, 3, 5)), min_size=n, max_size=n))
    asked = {
        "mode": data.draw(st.sampled_from(list(filters.MODES))),
        "cval": 2.5,
        "origin": [data.draw(st.integers(-(t // 2), (t - 1) // 2)) for t in taps],
        "axes": data.draw(st.sampled_from((None, tuple(axes[:n])))),
        "convolve": data.draw(st.booleans()),
        **data.draw(st.sampled_from(({"rank": 1}, {"method": "direct"}, {"tolerance": 0.5}))),
    }
    kernel = rng.standard_normal(taps)
    if "rank" in asked and sum(t > 1 for t in taps) < 2:
        kernel = np.ones(taps)
    cut = da.from_array(image, chunks=data.draw(chunkings(shape)))
    lazy = filters.correlate(cut, kernel, **asked)
    assert lazy.shape == shape
    assert lazy.dtype == image.dtype
    np.testing.assert_array_equal(
        lazy.compute(), filters.correlate(image, kernel, **asked), strict=True
    )


@pytest.mark.parametrize("kernel", ["gauss", "log", "dog", "unsharp", "sobel", "scharr", "prewitt"])
def test_classical_filters_of_pictures_and_volumes_do(kernel, rng):
    make = getattr(filters, kernel)
    given = () if kernel in ("sobel", "scharr", "prewitt") else (1.0,)
    for image, ndim in ((rng.random((70, 80, 3)), 2), (rng.random((40, 50, 60), np.float32), 3)):
        k = make(*given, ndim=ndim)
        lazy = filters.correlate(da.from_array(image, chunks=25), k)
        assert lazy.npartitions > 4
        np.testing.assert_array_equal(lazy.compute(), filters.correlate(image, k))


def test_pictures_with_colours_do(rng):
    image = rng.integers(0, 256, (150, 170, 3), dtype=np.uint8)
    lazy = filters.filter_image(da.from_array(image, chunks=(60, 70, 3)), filters.gauss(2.0))
    np.testing.assert_array_equal(lazy.compute(), filters.filter_image(image, filters.gauss(2.0)))


def test_transforms_are_not_taken(rng):
    image, disk = rng.random((300, 300)), filters.disk(20.5)
    plan = filters.plan_filter(disk, image.shape, dtype=np.float64)
    assert plan.choice.method == "fft"
    other = next(o for o in plan.options if o.method != "fft" and o.error <= plan.tolerance)
    lazy = filters.correlate(da.from_array(image, chunks=100), disk)
    whole = filters.correlate(image, disk, method=other.method)
    np.testing.assert_array_equal(lazy.compute(), whole)
    with pytest.raises(ValueError, match="method must be auto, direct or separable"):
        filters.correlate(da.from_array(image), disk, method="fft")


def test_the_way_is_that_of_the_whole_image(rng, monkeypatch):
    """A chunk is small; the choice is made, once, for the size of the image."""
    asked = []
    real = filters.run.Request.plan
    monkeypatch.setattr(
        filters.run.Request, "plan", lambda self: asked.append(self.spatial) or real(self)
    )
    lazy = filters.correlate(da.from_array(rng.random((90, 100)), chunks=30), filters.log(1.5))
    lazy.compute()
    assert asked == [(90, 100)]


def test_empty_images_stay_empty():
    lazy = filters.correlate(da.zeros((0, 30)), filters.sobel())
    assert lazy.compute().shape == (0, 30)


def test_mistakes_are_named(rng):
    conv = lowrank.dense(np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match="x must be"):
        conv(da.ones((2, 30)))
    with pytest.raises(TypeError, match="float32 or float64"):
        conv(da.ones((1, 2, 30), dtype=int))
    with pytest.raises(ValueError, match="input_shape must be"):
        conv(da.ones((1, 3, 30)))
    with pytest.raises(TypeError, match="out must not be given"):
        conv(da.ones((1, 2, 30)), np.empty((1, 1, 28)))
    with pytest.raises(TypeError, match="out must not be given"):
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
    cut_somewhere(lowrank.dense(np.ones((1, 2, 3), np.float32)), x, (1, 2, 20))


def test_chunks_of_a_pool_run_on_one_thread_each(rng, monkeypatch):
    seen = []
    real = lowrank.Factorization.compile

    def compile_(self, shape, dtype=None, threads=None):
        seen.append((threading.current_thread() is threading.main_thread(), threads))
        return real(self, shape, dtype, threads)

    monkeypatch.setattr(lowrank.Factorization, "compile", compile_)
    x = rng.standard_normal((1, 2, 60))
    whole = lowrank.dense(np.ones((1, 2, 3)))(x)
    for scheduler, team in (("synchronous", (True, None)), ("threads", (False, 1))):
        conv = lowrank.dense(np.ones((1, 2, 3)))  # planned anew
        seen.clear()
        y = conv(da.from_array(x, chunks=(1, 2, 20))).compute(scheduler=scheduler, num_workers=2)
        assert set(seen) == {team}
        np.testing.assert_array_equal(y, whole)
        seen.clear()
        lazy = chunked.run(conv, da.from_array(x, chunks=(1, 2, 20)), threads=3)
        lazy.compute(scheduler=scheduler, num_workers=2)
        assert {threads for _, threads in seen} == {3}


def test_the_same_work_has_the_same_name(rng):
    """So that Dask shares it, and caches of results find it."""
    x = da.ones((1, 2, 60), chunks=20)
    w = rng.standard_normal((1, 2, 3))
    assert lowrank.dense(w)(x).name == lowrank.dense(w)(x).name
    assert lowrank.dense(w)(x).name != lowrank.dense(2 * w)(x).name


def test_nothing_of_dask_is_imported_before_its_array_comes():
    code = """
import sys, numpy as np, lowrank
from lowrank import filters
lowrank.dense(np.ones((1, 1, 3)))(np.ones((1, 1, 9)))
filters.correlate(np.ones((9, 9)), filters.sobel())
import lowrank.engine.dask
assert not [m for m in sys.modules if m.split(".")[0] == "dask"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_zarr_store_is_filtered_into_another(rng, tmp_path):
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
def swept():
    w = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    conv = lowrank.dense(w, np.zeros(8), padding=1)
    return conv, lowrank.frontier(conv, (12, 12), ("spatial_svd", "tucker"), axis="macs")


def test_what_is_swept_pickles(swept):
    conv, front = swept
    f = front[1].build()
    for thing in (conv, f):
        again = pickle.loads(pickle.dumps(thing))
        assert repr(again) == repr(thing)
        np.testing.assert_array_equal(again.to_dense(), thing.to_dense())
    again = pickle.loads(pickle.dumps(front))
    assert str(again) == str(front)
    assert [c.error for c in again] == [c.error for c in front]
    candidate = pickle.loads(pickle.dumps(front[1]))
    np.testing.assert_array_equal(candidate.build().to_dense(), f.to_dense())


def built(conv, budget):
    """What a worker of a sweep does: choose, fit and run."""
    f = lowrank.approximate(conv, (12, 12), families=("spatial_svd", "tucker"), macs=budget)
    return f, f(np.ones((1, 4, 12, 12), np.float32))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # "multiprocessing" is to fork
@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_a_sweep_in_other_processes_gives_what_this_one_does(swept, backend):
    joblib = pytest.importorskip("joblib")
    conv, _ = swept
    conv(np.ones((1, 4, 12, 12), np.float32))  # the engine has run here before a fork
    budgets = [0.5, 0.8]
    inner = {"inner_max_num_threads": 1} if backend == "loky" else {}
    with joblib.parallel_config(backend=backend, n_jobs=2, **inner):
        found = joblib.Parallel()(joblib.delayed(built)(conv, b) for b in budgets)
    for budget, (f, y) in zip(budgets, found):
        here, expected = built(conv, budget)
        np.testing.assert_array_equal(f.to_dense(), here.to_dense())
        np.testing.assert_array_equal(y, expected)
