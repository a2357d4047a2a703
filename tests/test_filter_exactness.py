"""Filters give what direct sums give, output by output."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage as ndi

from lowrank import filters
from lowrank.filters.factors import outer_factors, outer_product

BINOMIAL = np.array([1.0, 4.0, 6.0, 4.0, 1.0])
INTEGERS = {
    "ones": np.ones((3, 3)),
    "wide ones": np.ones((5, 7)),
    "sobel": filters.sobel(),
    "prewitt": filters.prewitt(0),
    "scharr": filters.scharr(),
    "binomial": np.outer(BINOMIAL, BINOMIAL),
    "sobel 3-D": filters.sobel(1, ndim=3),
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("size", [20, 90, 400])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_integer_kernels_give_integers(name, size, dtype):
    kernel = INTEGERS[name]
    if kernel.ndim == 3 and size > 90:
        pytest.skip("64 million samples")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 100, (size,) * kernel.ndim).astype(dtype)
    np.testing.assert_array_equal(filters.correlate(image, kernel), ndi.correlate(image, kernel))


@pytest.mark.parametrize("size", [30, 300])
def test_ones_are_counted_and_flat_images_have_no_edges(size):
    image = np.ones((size, size), np.float32)
    assert (filters.correlate(image, np.ones((3, 3))) == 9).all()
    assert (filters.correlate(image / 3, filters.sobel()) == 0).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_outer_products_are_found_and_others_are_not(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    taps = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    if data.draw(st.booleans()):
        lines = [rng.integers(-9, 10, n).astype(float) for n in taps]
    else:
        lines = [rng.standard_normal(n) for n in taps]
    kernel = outer_product(lines) * data.draw(st.sampled_from([1.0, 1 / 3, 2.0**-20, 1e30, 1e-30]))
    factors = outer_factors(kernel, 1e-14)
    assert factors is not None
    assert [len(f) for f in factors] == taps
    # Each factor is rounded once or twice; products of them once per axis.
    limit = 4 * len(taps) * np.finfo(float).eps * np.abs(kernel).max()
    np.testing.assert_allclose(outer_product(factors), kernel, rtol=0, atol=limit)
    if min(taps[:2], default=1) > 1 and len(taps) > 1 and kernel.any():
        kernel[(0,) * len(taps)] += np.abs(kernel).max()
        assert outer_factors(kernel, 1e-6) is None


def window_sums(image, kernel):
    """Return direct sums and the sums of the magnitudes of their terms."""
    return ndi.correlate(image, kernel), ndi.correlate(np.abs(image), np.abs(kernel))


KERNELS = {
    "disk": filters.disk(9.5),
    "large disk": filters.disk(20),
    "log": filters.log(3.0),
    "gauss": filters.gauss(4.0),
    "gabor": filters.gabor(4.0, 9.0, angle=0.5),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_output_is_as_accurate_as_a_direct_sum(name, dtype):
    """Dark regions beside bright ones stay as accurate as if they were alone."""
    kernel, rng = KERNELS[name], np.random.default_rng(0)
    image = rng.random((260, 240))
    image[:, :120] *= 1e-6
    image[200:] = 0
    direct, magnitude = window_sums(image.astype(dtype).astype(float), kernel)
    found = filters.correlate(image.astype(dtype), kernel)
    # A sum of n terms rounds n times; the kernel itself is rounded to the dtype.
    bound = 2 * kernel.size * np.finfo(dtype).eps * magnitude
    assert (np.abs(found - direct) <= bound).all()
    if kernel.min() >= 0:
        assert found.min() >= 0


def test_normalised_convolution_around_a_hole():
    """Zeros stay zeros, so that the quotient is 0 / 0 in the hole alone."""
    mask = np.ones((500, 480))
    mask[100:320, 90:310] = 0
    values = np.random.default_rng(0).random(mask.shape) * mask
    for kernel in (filters.gauss(9.0), filters.disk(15), filters.box(21)):
        weights, sums = (filters.correlate(a, kernel) for a in (mask, values))
        hole = ndi.correlate(mask, np.asarray(kernel)) == 0
        assert hole.any()
        assert (weights[hole] == 0).all()
        assert (sums[hole] == 0).all()
        assert (weights[~hole] > 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("name", ["sobel", "disk", "log", "row with a gap", "gauss"])
def test_nan_and_infinities_reach_what_direct_sums_reach(name, size, value):
    kernel = {
        "sobel": filters.sobel(), "disk": filters.disk(9.5), "log": filters.log(3.0),
        "row with a gap": np.array([[1.0, 0.0, 0.0, 2.0]]), "gauss": filters.gauss(2.0),
    }[name]  # fmt: skip
    image = np.ones((size, size), np.float32)
    image[size // 2, size // 3] = value
    expected = ndi.correlate(image.astype(float), kernel)
    found = filters.correlate(image, kernel)
    for test in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(test(found), test(expected))


@pytest.mark.parametrize("cval", [np.nan, np.inf, 1e30])
def test_border_values_that_are_not_small(cval):
    image = np.random.default_rng(0).random((60, 70))
    for kernel, size in itertools.product((filters.sobel(), filters.gauss(1.0)), (60, 20)):
        part = image[:size]
        found = filters.correlate(part, kernel, mode="constant", cval=cval)
        expected = ndi.correlate(part, np.asarray(kernel), mode="constant", cval=cval)
        # Differences of huge border values leave the rounding of their size.
        size = ndi.correlate(part, np.abs(kernel), mode="constant", cval=abs(cval))
        with np.errstate(invalid="ignore"):
            close = np.abs(found - expected) <= 1e-14 * size
        assert (close | (found == expected) | (np.isnan(found) & np.isnan(expected))).all()


def test_kernels_in_single_precision_keep_their_rank_on_images_in_double():
    image = np.random.default_rng(0).random((300, 300))
    kernel = np.asarray(filters.gauss(3.0)).astype(np.float32)
    plan = filters.plan_filter(kernel, image.shape, dtype=np.float64)
    assert plan.choice.method == "separable"
    expected = ndi.correlate(image, kernel.astype(float))
    np.testing.assert_allclose(filters.correlate(image, kernel), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [40, 300])
def test_kernels_beyond_single_precision(size):
    image = np.full((size, size), 1e-3, np.float32)
    for scale in (1e39, 1e-44):
        found = filters.correlate(image, scale * np.ones((3, 3)))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.float32(9e-3 * scale), rtol=1e-6)


@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e44, 1e-44, 1e200, 1e-200])
def test_factors_that_cancel_in_the_product_do_not_overflow(size, scale):
    image = 1e10 * np.random.default_rng(0).random((size, size), np.float32)
    line = np.array([1.0, 2.0, 1.0])
    expected = filters.correlate(image, filters.OuterProduct([line, line]))
    found = filters.separable_correlate(image, [line * scale, line / scale])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("name", ["ones", "disk", "sobel"])
def test_large_images_raise_no_floating_point_errors(size, name):
    kernel = {"ones": np.ones((3, 3)), "disk": filters.disk(9.5), "sobel": filters.sobel()}[name]
    image = np.full((size, size), 1e36, np.float32)
    with np.errstate(all="raise"):
        found = filters.correlate(image, kernel)
    np.testing.assert_allclose(found, np.float32(1e36 * kernel.sum()), rtol=1e-6, atol=1e30)


def test_other_byte_orders_of_image_and_out():
    image = np.random.default_rng(0).random((30, 40))
    expected = filters.correlate(image, filters.sobel())
    for order, out_order in itertools.product("<>", "<>"):
        out = np.empty(image.shape, f"{out_order}f8")
        assert filters.correlate(image.astype(f"{order}f8"), filters.sobel(), out=out) is out
        np.testing.assert_array_equal(out, expected)


def test_arguments_that_are_refused():
    image = np.ones((9, 9))
    with pytest.raises(TypeError, match="kernel must be a plain array, got a masked array"):
        filters.correlate(image, np.ma.masked_less(np.ones((3, 3)), 0))
    with pytest.raises(ValueError, match="axes must be 2 axes, as the kernel has, got 0"):
        filters.correlate(image, np.ones((3, 3)), axes=0)
    with pytest.raises(TypeError, match="convolve"):
        filters.correlate(image, np.ones((3, 3)), convolve="yes")
    with pytest.raises(ValueError, match="axes must be given for a kernel with one axis"):
        filters.correlate(image, np.ones(3))
    with pytest.raises(ValueError, match="give channel_axis=0"):
        filters.filter_image(np.ones((3, 40, 50)), np.ones((3, 3)))
    with pytest.raises(AttributeError, match="did you mean 'gauss'"):
        _ = filters.gaussian
    assert not hasattr(filters, "nothing_like_it")


def test_colours_of_a_picture_may_be_the_first_axis():
    picture = np.random.default_rng(0).random((3, 40, 50))
    found = filters.filter_image(picture, filters.disk(2), channel_axis=0)
    expected = filters.filter_image(picture.transpose(1, 2, 0), filters.disk(2))
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("taps", [41, 81, 151])
def test_factors_that_are_as_long_as_their_axis(taps):
    volume = np.random.default_rng(0).random((60, 64, 70))
    expected = volume
    for axis in range(3):
        expected = ndi.correlate1d(expected, np.full(taps, 1 / taps), axis)
    found = filters.correlate(volume, filters.box(taps, ndim=3))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
