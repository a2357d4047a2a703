"""Banks of filters against filters one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank import filters

FLOAT64 = {"rtol": 0, "atol": 1e-12}  # sums of at most 700 products of order 1
#: Below and above the number of samples from which on the engine runs chains.
SIZES = [(40, 50), (301, 251)]
GABORS = [filters.gabor(1.5, 4.0, angle=a) for a in (0.0, 0.3, 0.9, 1.5)]
MIXED = [
    *GABORS, filters.sobel(), filters.gauss(1.0), filters.gauss(2.0), filters.disk(2.0),
    np.zeros((3, 3)), np.ones((1, 1)), np.arange(12.0).reshape(3, 4) ** 2, filters.gauss(1.0),
]  # fmt: skip


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("mode", ["reflect", "constant", "wrap", ["nearest", "constant"]])
def test_bank_is_its_kernels_one_by_one(rng, shape, mode):
    x = rng.standard_normal(shape)
    y = filters.correlate_bank(x, MIXED, mode=mode, cval=2.0)
    assert y.shape == (len(MIXED), *shape)
    for result, kernel in zip(y, MIXED):
        theirs = filters.correlate(x, kernel, mode=mode, cval=2.0)
        np.testing.assert_allclose(result, theirs, **FLOAT64)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((300, 300), (1, 0)), ((20, 30, 200), (2, 1)), ((20, 30, 200), (0, 2)),
        ((2, 3, 20, 30, 50), (2, 4)), ((2, 70, 20, 30), (0, 1)), ((300, 300, 3), None),
    ],
)  # fmt: skip
def test_banks_run_along_any_axes(rng, shape, axes):
    x = rng.standard_normal(shape)
    y = filters.correlate_bank(x, MIXED, axes=axes)
    for result, kernel in zip(y, MIXED):
        np.testing.assert_allclose(result, filters.correlate(x, kernel, axes=axes), **FLOAT64)


@given(
    ndim=st.integers(1, 4),
    large=st.booleans(),
    mode=st.sampled_from(["reflect", "constant", "nearest", "mirror", "wrap"]),
    draw=st.data(),
)
def test_banks_of_any_kernels(ndim, large, mode, draw):
    rng = np.random.default_rng(0)
    shape = [draw.draw(st.integers(5, 8)) for _ in range(ndim)]
    if large:
        shape[-1] = 66_000 // int(np.prod(shape[:-1])) + 1
    vectors = [rng.standard_normal(n) for n in (1, 2, 3, 3, 5)]
    kernels = []
    for _ in range(draw.draw(st.integers(1, 6))):
        picked = draw.draw(st.lists(st.integers(0, 4), min_size=ndim, max_size=ndim))
        if draw.draw(st.booleans()):
            kernels.append(filters.OuterProduct([vectors[i] for i in picked]))
        else:
            kernels.append(rng.standard_normal([len(vectors[i]) for i in picked]))
    x = rng.standard_normal(shape)
    y = filters.correlate_bank(x, kernels, mode=mode, cval=0.5, axes=range(ndim))
    for result, kernel in zip(y, kernels):
        theirs = filters.correlate(x, kernel, mode=mode, cval=0.5, axes=range(ndim))
        np.testing.assert_allclose(result, theirs, **FLOAT64)


@pytest.mark.parametrize("shape", SIZES)
def test_complex_banks_are_conjugated_like_single_filters(rng, shape):
    x = rng.standard_normal(shape).astype(np.float32)
    bank = [g + 1j * filters.gabor(1.5, 4.0, phase=1.0) for g in GABORS] + [filters.sobel()]
    y = filters.correlate_bank(x, bank)
    assert y.dtype == np.complex64
    for result, kernel in zip(y, bank):
        np.testing.assert_allclose(result, filters.correlate(x, kernel), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_zero_taps_do_not_spread_nan(rng, shape, value):
    x = rng.standard_normal(shape)
    x[20, 21] = value
    ring = np.zeros((5, 5))
    ring[0, 0] = ring[4, 3] = 1
    bank = [ring, ring.T, filters.sobel(), filters.sobel(0)]
    for result, kernel in zip(filters.correlate_bank(x, bank), bank):
        bad = np.argwhere(~np.isfinite(result)) - [20, 21]
        middle = np.array(np.shape(kernel)) // 2
        assert sorted(map(tuple, middle - np.argwhere(kernel))) == sorted(map(tuple, bad))


@pytest.mark.parametrize(
    ("dtype", "result"),
    [(bool, np.float32), (np.uint8, np.float32), (np.int64, np.float64), (np.float16, np.float32)],
)
def test_results_are_floating_point(rng, dtype, result):
    x = (rng.random((40, 50)) * 200).astype(dtype)
    y = filters.correlate_bank(x, MIXED)
    assert y.dtype == result
    np.testing.assert_allclose(y, filters.correlate_bank(x.astype(result), MIXED))
    assert filters.correlate_bank(x, MIXED, dtype=np.float64).dtype == np.float64


def test_tolerance_admits_other_kernels(rng):
    x = rng.standard_normal((301, 251))
    rotated = filters.gauss([1.0, 4.0], angle=0.5)
    exact, near = (filters.correlate_bank(x, [rotated], tolerance=t)[0] for t in (None, 0.1))
    np.testing.assert_allclose(exact, filters.correlate(x, rotated, method="direct"), **FLOAT64)
    difference = np.abs(near - exact).max()
    assert 1e-9 < difference < 0.1


def test_dask_arrays_are_lazy(rng):
    da = pytest.importorskip("dask.array")
    x = rng.standard_normal((60, 70))
    y = filters.correlate_bank(da.from_array(x, chunks=25), MIXED)
    assert isinstance(y, da.Array)
    assert y.shape == (len(MIXED), 60, 70)
    np.testing.assert_allclose(y.compute(), filters.correlate_bank(x, MIXED), **FLOAT64)


def test_empty_images_give_empty_results():
    assert filters.correlate_bank(np.zeros((0, 5)), MIXED).shape == (len(MIXED), 0, 5)


def test_threads_do_not_change_bits(rng):
    x = rng.standard_normal((301, 251))
    one, three = (filters.correlate_bank(x, MIXED, threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": []}, r"kernels must not be empty"),
        ({"kernels": [np.ones(3), np.ones((3, 3))]}, r"kernels must have the same number of axes"),
        ({"kernels": [np.ones(3)]}, r"axes must be given for a kernel with one axis"),
        ({"kernels": [np.ones((3, 3, 3))]}, r"kernel must have at most the image's 2 axes"),
        ({"kernels": [[[np.nan]]]}, r"kernel must be finite"),
        ({"kernels": [np.ones((0, 3))]}, r"kernel must have axes, none of them empty"),
        ({"kernels": ["x"]}, r"kernel must be"),
        ({"image": np.zeros((9, 9), complex)}, r"image must be floating-point, integers or bool"),
        ({"image": np.ma.zeros((9, 9))}, r"image must be a plain array, got a masked array"),
        ({"dtype": np.complex64}, r"dtype must be float32 or float64, got complex64"),
        ({"mode": ["reflect"]}, r"mode must be one name, or one per axis, 2, got 1"),
        ({"tolerance": -1}, r"tolerance must be at least 0"),
        ({"mode": "constant", "cval": np.inf}, r"cval must be finite"),
        ({"threads": -1}, r"threads must be between 1 and 2147483647"),
        ({"axes": (0, 0)}, r"axes must be different"),
    ],
)
def test_wrong_arguments_get_one_sentence(options, message):
    options = {"image": np.zeros((20, 20)), "kernels": [np.ones((3, 3))], **options}
    with pytest.raises((ValueError, TypeError), match=message):
        filters.correlate_bank(options.pop("image"), options.pop("kernels"), **options)
