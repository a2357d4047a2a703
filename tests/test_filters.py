"""Filters against scipy.ndimage."""

import itertools

import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given
from hypothesis import strategies as st

import lowrank as lr
from lowrank import filters

MODES = ["reflect", "constant", "nearest", "mirror", "wrap"]
# Sums of at most 400 products of order 1: rounding of eps * 400, with a margin.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


@given(
    taps=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    mode=st.sampled_from(MODES),
    convolve=st.booleans(),
    draw=st.data(),
)
def test_correlate_matches_scipy(taps, mode, convolve, draw):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(taps)
    # scipy's mirror and wrap need an input at least as long as the border
    x = rng.standard_normal(tuple(n + draw.draw(st.integers(0, 6)) for n in taps))
    origin = [draw.draw(st.integers(-(n // 2), (n - 1) // 2)) for n in taps]
    theirs = (ndi.convolve if convolve else ndi.correlate)(
        x, kernel, mode=mode, cval=1.5, origin=origin
    )
    run = filters.convolve if convolve else filters.correlate
    ours = run(x, kernel, mode=mode, cval=1.5, origin=origin)
    np.testing.assert_allclose(ours, theirs, **FLOAT64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gauss", "sobel", "log", "gabor", "disk", "motion"])
def test_standard_filters_match_scipy_in_every_mode(rng, mode, name):
    kernel = {
        "gauss": filters.gauss(1.5),
        "sobel": filters.sobel(),
        "log": filters.log(1.2),
        "gabor": filters.gabor(2.0, 5.0, angle=0.6),
        "disk": filters.disk(4.0),
        "motion": filters.motion(9, angle=0.4),
    }[name]
    x = rng.standard_normal((30, 33))
    np.testing.assert_allclose(
        filters.correlate(x, kernel, mode=mode), ndi.correlate(x, kernel, mode=mode), **FLOAT64
    )


def test_standard_kernels_match_scipy_filters(rng):
    x = rng.standard_normal((40, 41))
    options = {"mode": "reflect"}
    np.testing.assert_allclose(
        filters.correlate(x, filters.gauss(2.0)), ndi.gaussian_filter(x, 2.0), **FLOAT64
    )
    for axis in (0, 1):
        np.testing.assert_allclose(
            filters.correlate(x, filters.sobel(axis)), ndi.sobel(x, axis, **options), **FLOAT64
        )
    v = rng.standard_normal((12, 13, 14))
    np.testing.assert_allclose(
        filters.correlate(v, filters.gauss([1.0, 2.0, 0.7], ndim=3)),
        ndi.gaussian_filter(v, [1.0, 2.0, 0.7]),
        **FLOAT64,
    )
    np.testing.assert_allclose(
        filters.correlate(v, filters.sobel(1, ndim=3)), ndi.sobel(v, 1), **FLOAT64
    )


@pytest.mark.parametrize(
    ("kernel", "rank"),
    [
        (filters.gauss(2.0), 1),
        (filters.sobel(), 1),
        (filters.log(2.0), 2),
        (filters.gabor(3.0, 6.0), 1),
        (filters.gabor(3.0, 6.0, angle=0.5), 2),
        (filters.dog(2.0), 2),
        (filters.unsharp(2.0), 2),
    ],
)
def test_separate_finds_the_rank_of_standard_filters(kernel, rank):
    assert filters.separate(kernel).rank == (rank,)


def test_kernels_have_the_documented_sum():
    assert filters.gauss(1.7).sum() == pytest.approx(1)
    assert filters.disk(6.3).sum() == pytest.approx(1)
    for angle in (0, 0.3, 1.2, 2.5):
        assert filters.motion(11, angle=angle).sum() == pytest.approx(1)
        kernel = filters.motion(11, angle=angle)
        np.testing.assert_allclose(kernel, np.flip(kernel))  # symmetric: does not shift the image
    assert filters.log(2.0).sum() == pytest.approx(0, abs=1e-15)
    np.testing.assert_array_equal(filters.disk(3), filters.disk(3).T)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32])
def test_integers_round_to_even_and_saturate(rng, dtype):
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -40_000), min(limits.max, 70_000)
    x = rng.integers(low, high, (20, 21), dtype=dtype, endpoint=True)
    kernel = np.array([[0.0, 0.5, 0.0], [0.5, 0.5, 0.5], [0.0, 0.5, 0.0]])
    exact = ndi.correlate(x.astype(np.float64), kernel)
    expected = np.clip(np.rint(exact), limits.min, limits.max).astype(dtype)
    got = filters.correlate(x, kernel)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)
    assert (got == limits.max).any() or dtype == np.int32


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_64_bit_integers_saturate(dtype):
    limits = np.iinfo(dtype)
    ends = np.array([[limits.min // 2, limits.max // 2]] * 2, dtype)
    kernel = [[4.0]]
    expected = [[limits.min if dtype == np.int64 else 0, limits.max]] * 2
    np.testing.assert_array_equal(filters.correlate(ends, kernel), np.array(expected, dtype))


def test_float16_is_computed_in_float32(rng):
    x = rng.standard_normal((20, 21)).astype(np.float16)
    got = filters.correlate(x, filters.gauss(1.0))
    expected = ndi.gaussian_filter(x.astype(np.float32), 1.0)
    np.testing.assert_array_equal(got, expected.astype(np.float16))


def test_float32_is_computed_in_float32(rng):
    x = rng.standard_normal((20, 21)).astype(np.float32)
    got = filters.correlate(x, filters.disk(3.0))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, ndi.correlate(x, filters.disk(3.0)), **FLOAT32)


def test_kernel_runs_along_the_given_axes(rng):
    colours = rng.standard_normal((12, 13, 3))
    got = filters.correlate(colours, filters.gauss(1.0))
    for c in range(3):
        np.testing.assert_allclose(
            got[..., c], ndi.gaussian_filter(colours[..., c], 1.0), **FLOAT64
        )
    stack = rng.standard_normal((5, 12, 13))
    for axes in ((1, 2), (-2, -1), (0, 2), (2, 1)):
        kernel = rng.standard_normal((3, 4))
        got = filters.correlate(stack, kernel, axes=axes)
        moved = np.moveaxis(stack, axes, (-2, -1))
        planes = [ndi.correlate(p, kernel) for p in moved]
        np.testing.assert_allclose(np.moveaxis(got, axes, (-2, -1)), planes, **FLOAT64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("numbers", [2, 3, 70])
def test_interleaved_channels_match_single_channels(rng, mode, dtype, numbers):
    image = (rng.random((17, 23, numbers)) * 200).astype(dtype)
    for kernel in (filters.gauss(0.8), np.array([[1.0, -2.0, 0.5, 0.25]]), rng.random((4, 3))):
        got = filters.correlate(image, kernel, mode=mode, cval=3.0)
        assert got.dtype == dtype
        alone = [
            filters.correlate(np.ascontiguousarray(image[..., c]), kernel, mode=mode, cval=3.0)
            for c in range(numbers)
        ]
        np.testing.assert_array_equal(got, np.stack(alone, -1))
        plane = ndi.correlate(image[..., 1].astype(float), kernel, mode=mode, cval=3.0)
        limits = (0, np.iinfo(dtype).max) if np.dtype(dtype).kind == "u" else (None, None)
        expected = np.clip(plane, *limits)
        tolerance = 0.5001 if np.dtype(dtype).kind == "u" else 1e-3  # sums of up to 2000
        np.testing.assert_allclose(got[..., 1], expected, rtol=0, atol=tolerance)


def test_1d_kernel_runs_along_a_given_axis_only(rng):
    image = rng.standard_normal((20, 5, 30))
    expected = ndi.correlate1d(image, [1.0, 2.0, 4.0], axis=0, mode="mirror")
    got = filters.correlate(image, [1.0, 2.0, 4.0], mode="mirror", axes=0)
    np.testing.assert_allclose(got, expected, **FLOAT64)


def test_cube_filter_separates_space_and_spectrum(rng):
    # a spatial filter times a spectral one: 2-D + 1-D is cheaper than any sum of three passes
    space = filters.disk(2.0)
    spectrum = np.array([1.0, 2.0, 4.0, 2.0, 1.0])
    kernel = np.multiply.outer(space, spectrum)
    cube = rng.standard_normal((15, 16, 20))
    f = filters.separate(kernel, tolerance=1e-9, shape=cube.shape)
    assert f.error(kernel[None, None]) < 1e-9
    assert f.cost(cube.shape).macs < lr.dense(kernel[None, None]).params * cube.size / 2
    np.testing.assert_allclose(
        filters.correlate(cube, kernel), ndi.correlate(cube, kernel), **FLOAT64
    )


def test_rank_gives_the_best_filter_of_that_rank(rng):
    kernel = filters.disk(5.5)
    s = np.linalg.svd(kernel, compute_uv=False)
    for rank in (1, 2, 4):
        f = filters.separate(kernel, rank=rank)
        best = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
        assert f.error(kernel[None, None]) == pytest.approx(best, abs=1e-7)
        x = rng.standard_normal((30, 31))
        np.testing.assert_allclose(
            filters.correlate(x, kernel, rank=rank),
            ndi.correlate(x, f.to_dense()[0, 0]),
            **FLOAT64,
        )


def test_tolerance_reduces_macs():
    kernel = filters.disk(7.5)
    exact, close = filters.separate(kernel), filters.separate(kernel, tolerance=0.1)
    assert close.error(kernel[None, None]) <= 0.1
    assert close.cost((64, 64)).macs < exact.cost((64, 64)).macs


def test_out_and_unusual_memory_layouts(rng):
    x = rng.standard_normal((20, 21))
    kernel = filters.gauss(1.0)
    expected = filters.correlate(x, kernel)
    out = np.empty_like(x)
    assert filters.correlate(x, kernel, out=out) is out
    np.testing.assert_array_equal(out, expected)
    for odd in (np.asfortranarray(x), x[::-1][::-1], x.astype(">f8"), x.T.copy().T):
        np.testing.assert_array_equal(filters.correlate(odd, kernel), expected)
    twice = np.repeat(x, 2, 1)[:, ::2]
    np.testing.assert_array_equal(filters.correlate(twice, kernel), expected)
    assert filters.correlate(np.empty((0, 5)), [[1.0, 2.0]]).shape == (0, 5)


def test_series_match_scipy(rng):
    x = rng.standard_normal(50)
    for mode, origin in itertools.product(MODES, (-1, 0, 1)):
        np.testing.assert_allclose(
            filters.correlate(x, [1.0, 2.0, 4.0], mode=mode, origin=origin),
            ndi.correlate1d(x, [1.0, 2.0, 4.0], mode=mode, origin=origin),
            **FLOAT64,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "mirrored"}, "'mirrored'"),
        ({"origin": 2}, "origin"),
        ({"origin": (0, 0, 0)}, "origin"),
        ({"axes": (0, 0)}, "axes"),
        ({"axes": (0,)}, "axes"),
        ({"axes": (0, 5)}, "axes"),
        ({"rank": 0}, "rank"),
        ({"rank": 9}, "rank"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"kernel": np.ones((2, 2, 2))}, "axes"),
        ({"kernel": np.ones((0, 3))}, "kernel"),
        ({"kernel": np.ones((2, 2, 2, 2))}, "kernel"),
        ({"kernel": [[np.nan]]}, "NaN"),
        ({"out": np.empty((2, 2))}, "out"),
    ],
)
def test_invalid_arguments_are_rejected(change, message):
    options = {"kernel": np.ones((3, 3)), **change}
    with pytest.raises(ValueError, match=message):
        filters.correlate(np.ones((8, 9)), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 1.5}, "rank must be an integer"),
        ({"cval": 1j}, "cval must be a real number"),
        ({"tolerance": "a"}, "tolerance must be a real number"),
        ({"threads": 0.5}, "threads must be an integer"),
    ],
)
def test_arguments_of_wrong_type_are_rejected(rng, change, message):
    image = rng.standard_normal((9, 9))
    filters.correlate(image, filters.sobel(), rank=1)
    with pytest.raises(TypeError, match=message):
        filters.correlate(image, filters.sobel(), **{"rank": 1, **change})


def test_masked_array_is_rejected():
    with pytest.raises(TypeError, match="image must be a plain array"):
        filters.correlate(np.ma.masked_less(np.ones((9, 9)), 0), filters.sobel())


def test_misaligned_images(rng):
    image = rng.standard_normal((10, 10))
    odd = np.frombuffer(bytearray(801), np.float64, 100, 1).reshape(10, 10)
    odd[...] = image
    expected = ndi.correlate(image, filters.sobel())
    assert not odd.flags.aligned
    np.testing.assert_allclose(filters.correlate(odd, filters.sobel()), expected, **FLOAT64)


@pytest.mark.parametrize("dtype", [object, "datetime64[s]", "U3", np.longdouble, "f4,f4"])
def test_unsupported_dtypes_are_rejected(dtype):
    for method in ("auto", "direct"):
        with pytest.raises(TypeError, match="image must be"):
            filters.correlate(np.zeros((8, 9), dtype), np.ones((3, 3)), method=method)
        with pytest.raises(TypeError, match="dtype must be"):
            filters.correlate(np.zeros((8, 9)), np.ones((3, 3)), method=method, dtype=dtype)
    with pytest.raises(TypeError, match="kernel must be"):
        filters.correlate(np.ones((8, 9)), np.zeros((3, 3), dtype))


def test_rank_and_tolerance_exclude_each_other():
    with pytest.raises(TypeError, match="rank or tolerance"):
        filters.correlate(np.ones((8, 9)), np.ones((3, 3)), rank=1, tolerance=0.1)
