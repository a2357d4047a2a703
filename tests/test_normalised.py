"""Normalised filters: masks, NaN, weights and borders against direct sums."""

import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given
from hypothesis import strategies as st

from lowrank import filters

MODES = ["reflect", "constant", "nearest", "mirror", "wrap"]
KERNELS = {
    "gauss": filters.gauss(1.5),
    "box": filters.box(5),
    "ones": np.ones((3, 3)),
    "disk": filters.disk(3.0),
    "asymmetric": np.arange(20.0).reshape(4, 5),
}
#: Below and above the number of samples from which on the engine runs chains.
SIZES = [(23, 31), (301, 251)]


def direct(x, kernel, weights, mode="constant"):
    """Return means by SciPy's sums in float64; NaN where no sample has a weight."""
    kernel = np.asarray(kernel, float)
    values = np.where(weights > 0, x, 0) * weights
    total = ndi.correlate(weights.astype(float), kernel, mode=mode)
    # Only sums without any weight are 0: sums of numbers of one sign have no cancellation.
    with np.errstate(invalid="ignore"):
        return np.where(total > 0, ndi.correlate(values, kernel, mode=mode) / total, np.nan)


def random_image(rng, shape, hole=True):
    """Return samples with scattered missing ones and a hole, and which are valid."""
    x = rng.standard_normal(shape) + 5
    is_valid = rng.random(shape) > 0.3
    if hole:
        is_valid[5:18, 4:20] = False
    return x, is_valid


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SIZES)
def test_nan_masks_and_weights_match_direct_sums(rng, shape, mode, name):
    x, is_valid = random_image(rng, shape)
    kernel = KERNELS[name]
    theirs = direct(x, kernel, is_valid, mode)
    with_nan = np.where(is_valid, x, np.nan)
    for y in (
        filters.normalised_correlate(with_nan, kernel, mode=mode),
        filters.normalised_correlate(x, kernel, mask=~is_valid, mode=mode),
        filters.normalised_correlate(x, kernel, weights=is_valid, mode=mode),
        filters.normalised_correlate(x, kernel, weights=is_valid * 1e-30, mode=mode),
        filters.normalised_correlate(with_nan, kernel, weights=3, mask=~is_valid, mode=mode),
    ):
        np.testing.assert_allclose(y, theirs, rtol=1e-12)
    weights = is_valid * rng.random(shape)
    y = filters.normalised_correlate(with_nan, kernel, weights=weights, mode=mode)
    np.testing.assert_allclose(y, direct(x, kernel, weights, mode), rtol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SIZES)
def test_float32_is_accurate_at_the_edges_of_holes(rng, shape, name):
    x, is_valid = random_image(rng, shape)
    x = x.astype(np.float32)
    y = filters.normalised_correlate(x, KERNELS[name], mask=~is_valid)
    assert y.dtype == np.float32
    # Two sums of at most 81 terms of one sign, and a quotient.
    np.testing.assert_allclose(y, direct(x, KERNELS[name], is_valid), rtol=100 * 1.2e-7)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zeros_stay_zeros_and_holes_stay_empty(rng, name, dtype):
    x = (rng.random((400, 400)) * 1e6).astype(dtype)
    x[100:200] = 0
    x[200:300, 200:300] = np.nan
    y = filters.normalised_correlate(x, KERNELS[name], fill_value=-1)
    assert (y[110:190, :] == 0).all()
    assert (y[210:290, 210:290] == -1).all()
    far = np.ones(x.shape, bool)
    far[190:310, 190:310] = False
    assert (y[far] >= 0).all()


@pytest.mark.parametrize("shape", [(50,), (40, 50), (9, 10, 11), (5, 6, 7, 8), (70, 80, 3)])
def test_constants_stay_constants_up_to_the_border(rng, shape):
    axes = range(min(3, len(shape)))
    kernel = filters.gauss(1.0, ndim=len(axes))
    x = np.where(rng.random(shape) < 0.2, np.nan, 7.0)
    y = filters.normalised_correlate(x, kernel, axes=axes)
    np.testing.assert_allclose(y, 7.0, rtol=1e-14)


def test_border_is_renormalised():
    ramp = np.arange(5.0)
    y = filters.normalised_correlate(ramp, [1, 1, 1])
    np.testing.assert_allclose(y, [0.5, 1, 2, 3, 3.5])
    y = filters.normalised_correlate(ramp, [1, 1, 1], mode="nearest")
    np.testing.assert_allclose(y, [1 / 3, 1, 2, 3, 11 / 3])


@pytest.mark.parametrize("shape", SIZES)
def test_modes_may_differ_by_axis(rng, shape):
    x, is_valid = random_image(rng, shape, hole=False)
    kernel = filters.gauss(1.0)
    y = filters.normalised_correlate(x, kernel, mask=~is_valid, mode=["wrap", "constant"])
    padded, valid = (np.pad(a, ((9, 9), (0, 0)), mode="wrap") for a in (x, is_valid))
    np.testing.assert_allclose(y, direct(padded, kernel, valid)[9:-9], rtol=1e-12)


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    mode=st.sampled_from(["reflect", "constant", "nearest"]),
    single=st.booleans(),
    draw=st.data(),
)
def test_means_lie_between_the_samples(shape, mode, single, draw):
    rng = np.random.default_rng(draw.draw(st.integers(0, 99)))
    taps = [draw.draw(st.integers(1, n)) for n in shape]
    kernel = rng.random(taps) * (rng.random(taps) < 0.7)
    kernel.flat[0] = 1
    x = rng.standard_normal(shape).astype(np.float32 if single else np.float64)
    x[rng.random(shape) < 0.5] = np.nan
    y = filters.normalised_correlate(x, kernel, mode=mode)
    assert y.shape == x.shape
    if np.isnan(x).all():
        assert np.isnan(y).all()
        return
    margin = 1000 * float(np.finfo(x.dtype).eps) * np.nanmax(np.abs(x))
    is_there = ~np.isnan(y)
    assert (y[is_there] >= np.nanmin(x) - margin).all()
    assert (y[is_there] <= np.nanmax(x) + margin).all()


def test_scale_of_kernel_and_weights_does_not_matter(rng):
    x, is_valid = random_image(rng, (40, 50))
    for kernel in (filters.gauss(1.0), filters.disk(2.0), np.ones((3, 3))):
        y = filters.normalised_correlate(x, kernel, mask=~is_valid)
        for scale in (1e-30, 3.0, 1e30):
            scaled = filters.normalised_correlate(x, kernel * scale, weights=is_valid * scale)
            np.testing.assert_allclose(scaled, y, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_means_of_large_and_small_samples_neither_overflow_nor_vanish(dtype):
    limits = np.finfo(dtype)
    for size in (float(limits.max) / 2, float(limits.tiny) * 1e9):
        x = np.full((40, 40), size, dtype)
        x[10:20, 10:20] = np.nan
        with np.errstate(all="raise"):
            y = filters.normalised_correlate(x, np.ones((5, 5)))
        np.testing.assert_allclose(y[~np.isnan(y)] / dtype(size), 1, rtol=1e-6)


def test_infinities_are_samples():
    x = np.array([1.0, 1.0, np.inf, 1.0, 1.0, 1.0, -np.inf, 1.0])
    y = filters.normalised_correlate(x, [1, 1, 1])
    assert y.tolist() == [1, np.inf, np.inf, np.inf, 1, -np.inf, -np.inf, -np.inf]
    masked = filters.normalised_correlate(x, [1, 1, 1], mask=np.isinf(x))
    assert masked.tolist() == [1] * 8


@pytest.mark.parametrize("shape", SIZES)
def test_masked_arrays_give_masked_arrays(rng, shape):
    x, is_valid = random_image(rng, shape)
    given = np.ma.MaskedArray(x, ~is_valid)
    y = filters.normalised_correlate(given, filters.box(3))
    theirs = direct(x, filters.box(3), is_valid)
    assert isinstance(y, np.ma.MaskedArray)
    np.testing.assert_array_equal(y.mask, np.isnan(theirs))
    np.testing.assert_allclose(y.compressed(), theirs[~np.isnan(theirs)], rtol=1e-12)
    assert np.isnan(y.data[y.mask]).all()
    extra = np.zeros(shape, bool)
    extra[:2] = True
    both = filters.normalised_correlate(given, filters.box(3), mask=extra)
    np.testing.assert_array_equal(both.mask, np.isnan(direct(x, filters.box(3), is_valid & ~extra)))


def test_masked_arrays_without_a_mask_and_their_garbage(rng):
    x = rng.standard_normal((20, 30))
    plain = filters.normalised_correlate(x, filters.box(3))
    y = filters.normalised_correlate(np.ma.MaskedArray(x), filters.box(3))
    assert not np.ma.getmaskarray(y).any()
    np.testing.assert_array_equal(y.data, plain)
    garbage = np.where(rng.random(x.shape) < 0.2, np.inf, x)
    masked = np.ma.masked_invalid(garbage)
    y = filters.normalised_correlate(masked, filters.gauss(1.0))
    assert np.isfinite(y.data).all()


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(bool, np.float32), (np.uint8, np.float32), (np.int64, np.float64), (np.float16, np.float32)],
)
def test_integers_and_bool_give_floating_point_means(rng, dtype, result):
    x = (rng.random((30, 40)) * 2).astype(dtype)
    mask = rng.random(x.shape) < 0.3
    y = filters.normalised_correlate(x, filters.box(3), mask=mask)
    assert y.dtype == result
    np.testing.assert_allclose(y, direct(x.astype(float), filters.box(3), ~mask), rtol=1e-6)
    assert filters.normalised_correlate(x, filters.box(3), dtype=np.float64).dtype == np.float64


def test_weights_and_masks_broadcast(rng):
    x = rng.standard_normal((20, 30, 3))
    row = rng.random(30)[:, None]
    y = filters.normalised_correlate(x, filters.box(3), weights=row)
    full = filters.normalised_correlate(x, filters.box(3), weights=np.broadcast_to(row, x.shape))
    np.testing.assert_array_equal(y, full)


def test_arguments_are_left_alone(rng):
    x, is_valid = random_image(rng, (30, 40))
    x[~is_valid] = np.nan
    before = x.copy()
    for a in (x, is_valid):
        a.flags.writeable = False
    filters.normalised_correlate(x, filters.gauss(1.0), weights=is_valid, mask=~is_valid)
    np.testing.assert_array_equal(x, before)


def test_threads_do_not_change_bits(rng):
    x, is_valid = random_image(rng, (301, 251))
    one, three = (
        filters.normalised_correlate(x, filters.gauss(2.0), mask=~is_valid, threads=n)
        for n in (1, 3)
    )
    np.testing.assert_array_equal(one, three)


def test_empty_images_give_empty_results():
    assert filters.normalised_correlate(np.zeros((0, 5)), np.ones((3, 3))).shape == (0, 5)
    masked = filters.normalised_correlate(np.ma.zeros((5, 0)), np.ones((3, 3)))
    assert masked.shape == (5, 0)


def test_dask_arrays_are_lazy(rng):
    da = pytest.importorskip("dask.array")
    x, is_valid = random_image(rng, (60, 70))
    with_nan = np.where(is_valid, x, np.nan)
    theirs = direct(x, filters.gauss(1.0), is_valid)
    lazy = da.from_array(with_nan, chunks=25)
    for options in ({}, {"mask": ~is_valid}, {"mask": da.from_array(~is_valid, chunks=30)}):
        y = filters.normalised_correlate(lazy, filters.gauss(1.0), **options)
        assert isinstance(y, da.Array)
        np.testing.assert_allclose(y.compute(), theirs, rtol=1e-12)
    with pytest.raises(TypeError, match="weights must be a NumPy array, got a Dask array"):
        filters.normalised_correlate(lazy, np.ones((3, 3)), weights=lazy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": [[1, -1]]}, r"kernel must not have negative taps, got -1"),
        ({"kernel": filters.sobel()}, r"kernel must not have negative taps, got -2"),
        ({"kernel": np.zeros((3, 3))}, r"kernel must have a tap above 0, got zeros"),
        ({"kernel": [[np.nan]]}, r"kernel must be finite"),
        ({"kernel": [1, 2, 1]}, r"axes must be given for a kernel with one axis"),
        ({"kernel": np.ones((3, 3, 3))}, r"kernel must have at most the image's 2 axes"),
        ({"weights": -np.ones((20, 20))}, r"weights must be finite and at least 0, got -1 to -1"),
        ({"weights": np.nan}, r"weights must be finite and at least 0, got nan to nan"),
        ({"weights": np.inf}, r"weights must be finite and at least 0, got inf to inf"),
        ({"weights": np.ones(3)}, r"weights must have the shape of the image, \(20, 20\)"),
        ({"weights": np.ones(3, complex)}, r"weights must be real"),
        ({"mask": np.zeros((20, 20))}, r"mask must be bool, True where samples are missing"),
        ({"mask": np.zeros((3, 20), bool)}, r"mask must have the shape of the image, \(20, 20\)"),
        ({"fill_value": "none"}, r"fill_value must be a real number"),
        ({"image": np.zeros((20, 20), complex)}, r"image must be floating-point, integers or bool"),
        ({"dtype": np.uint8}, r"dtype must be float32 or float64, got uint8"),
        ({"mode": "renormalise"}, r"mode must be one of"),
        ({"threads": 0}, r"threads must be between 1 and 2147483647"),
        ({"axes": (0, 0)}, r"axes must be different"),
    ],
)
def test_wrong_arguments_get_one_sentence(options, message):
    options = {"image": np.zeros((20, 20)), "kernel": np.ones((3, 3)), **options}
    with pytest.raises((ValueError, TypeError), match=message):
        filters.normalised_correlate(options.pop("image"), options.pop("kernel"), **options)
