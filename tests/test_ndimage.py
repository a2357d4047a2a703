"""lowrank.ndimage returns what scipy.ndimage returns."""

import inspect
import threading
import warnings

import numpy as np
import pytest
from scipy import ndimage as scipy_ndimage

import lowrank
from lowrank import filters, ndimage
from lowrank.ndimage import arguments

RNG = np.random.default_rng(0)
SCIPY = arguments.SCIPY
MODES = ["reflect", "mirror", "nearest", "wrap", "constant", "grid-wrap"]
INTEGERS = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]
WEIGHTS = RNG.standard_normal((3, 4))
#: Arguments of every function after the input: an array with two axes.
CALLS = {
    "correlate1d": [{"weights": [1, -2, 3.5, 0], "axis": 0, "origin": 1}, {"weights": [0.3, 0.7]}],
    "convolve1d": [{"weights": [1, -2, 3.5, 0], "axis": 0, "origin": -2}, {"weights": [0.3, 0.7]}],
    "correlate": [{"weights": WEIGHTS, "origin": (1, -2)}, {"weights": [1, 2, 1], "axes": 0}],
    "convolve": [{"weights": WEIGHTS, "origin": (1, 0)}, {"weights": [[1, 0, -2]], "axes": (1, 0)}],
    "gaussian_filter1d": [{"sigma": 2}, {"sigma": 1.3, "axis": 0, "order": 3, "truncate": 3}],
    "gaussian_filter": [
        {"sigma": 3.3}, {"sigma": (2, 0)}, {"sigma": 0}, {"sigma": 1, "order": (0, 1), "radius": 2},
        {"sigma": (1, 2), "axes": (1, 0), "mode": ["wrap", "nearest"], "radius": (3, 5)},
    ],
    "gaussian_laplace": [{"sigma": 1.5}, {"sigma": (1, 2), "truncate": 3}, {"sigma": 2, "axes": 0}],
    "gaussian_gradient_magnitude": [{"sigma": 1.5}, {"sigma": (1, 2), "mode": ["wrap", "reflect"]}],
    "laplace": [{}, {"axes": (1,)}, {"mode": ["wrap", "nearest"]}],
    "sobel": [{}, {"axis": 0, "mode": ["mirror", "constant"], "cval": 2}],
    "prewitt": [{}, {"axis": 0, "mode": ["mirror", "constant"], "cval": 2}],
    "uniform_filter1d": [{"size": 5}, {"size": 4, "axis": 0, "origin": -2}, {"size": 50}],
    "uniform_filter": [{}, {"size": (50, 2), "origin": (-3, 0)}, {"size": 29, "axes": (0,)}],
}  # fmt: skip
CASES = [(name, kwargs) for name, some in CALLS.items() for kwargs in some]


def both(name, x, **kwargs):
    return getattr(ndimage, name)(x, **kwargs), SCIPY[name](x, **kwargs)


def assert_equal(ours, theirs, scale, **taps):
    """Compare dtypes and values, bit by bit for integers, else within rounding.

    A sum of n products errs by at most n eps times the sum of their magnitudes; no kernel here has
    more than 60 taps per axis, or taps whose magnitudes sum up to more than 40.
    """
    assert type(ours) is type(theirs)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if ours.dtype.kind == "b":
        ours, theirs = ours.view(np.uint8), theirs.view(np.uint8)
    if ours.dtype.kind in "iu":
        np.testing.assert_array_equal(ours, theirs)
    else:
        bound = 60 * np.finfo(ours.dtype).eps * 40 * scale
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def image(dtype, shape=(33, 41)):
    x = RNG.standard_normal(shape) * 50
    dtype = np.dtype(dtype)
    if dtype.kind == "c":
        return (x + 1j * RNG.standard_normal(shape)).astype(dtype)
    return np.abs(x).astype(dtype) if dtype.kind in "ub" else x.astype(dtype)


@pytest.fixture(autouse=True)
def _warnings_of_casts():
    """Ignore SciPy's warnings about roots of negative integers, which it raises as we do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def test_every_function_has_the_parameters_of_scipy():
    assert set(CALLS) == set(arguments.NAMES)
    for name in CALLS:
        ours, theirs = (
            inspect.signature(f).parameters for f in (getattr(ndimage, name), SCIPY[name])
        )
        assert [n for n in ours if n in theirs] == list(theirs)
        for parameter in theirs.values():
            assert ours[parameter.name].default == parameter.default
            assert ours[parameter.name].kind == parameter.kind


@pytest.mark.parametrize(("name", "kwargs"), CASES)
@pytest.mark.parametrize("dtype", ["f4", "f8", "c8", "c16", ">f8", *INTEGERS])
def test_results_are_those_of_scipy(name, kwargs, dtype):
    x = image(dtype)
    ours, theirs = both(name, x, **kwargs)
    # NumPy's sums of bool arrays depend on the alignment where bytes are neither 0 nor 1.
    if dtype != "?" or "laplace" not in name:
        assert_equal(ours, theirs, np.abs(x.astype(np.complex128)).max())


@pytest.mark.parametrize(("name", "kwargs"), CASES)
@pytest.mark.parametrize("mode", MODES)
def test_borders_are_those_of_scipy(name, kwargs, mode):
    x = image("f8", (7, 5))  # windows reach beyond the opposite border
    assert_equal(*both(name, x, **{"cval": -2.5, **kwargs, "mode": mode}), np.abs(x).max())


@pytest.mark.parametrize(("name", "kwargs"), CASES)
@pytest.mark.parametrize("dtype", ["f4", "f8", "u1", "i4", "u4"])
def test_outputs_are_those_of_scipy(name, kwargs, dtype):
    x = image("f8")
    for kind in (dtype, np.dtype(dtype), np.dtype(dtype).type, np.dtype(dtype).name):
        assert_equal(*both(name, x, output=kind, **kwargs), np.abs(x).max())
    ours, theirs = (np.zeros((2, *x.shape[::-1]), dtype)[1].T for _ in range(2))
    assert getattr(ndimage, name)(x, output=ours, **kwargs) is ours
    SCIPY[name](x, output=theirs, **kwargs)
    assert_equal(ours, theirs, np.abs(x).max())


@pytest.mark.parametrize("name", ["gaussian_filter", "uniform_filter", "sobel", "correlate"])
def test_input_may_be_the_output(name):
    x, y = image("f4"), None
    y = x.copy()
    kwargs = CALLS[name][0]
    getattr(ndimage, name)(x, output=x, **kwargs)
    assert_equal(x, SCIPY[name](y, **kwargs), np.abs(y).max())


@pytest.mark.parametrize("shape", [(50,), (1,), (9, 1, 8), (5, 4, 6, 3), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize("name", ["gaussian_filter", "uniform_filter", "laplace", "prewitt"])
def test_any_number_of_axes(name, shape):
    kwargs = {"sigma": 1} if name.startswith("gauss") else {}
    x = image("f4", shape)
    assert_equal(*both(name, x, **kwargs), np.abs(x).max())


def test_nine_axes_are_left_to_scipy():
    x = image("f8", (2,) * 9)
    np.testing.assert_array_equal(*both("gaussian_filter", x, sigma=1))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(("mode", "cval"), [("reflect", 0), ("constant", 0), ("constant", 2.0)])
@pytest.mark.parametrize("shape", [(400, 400), (60, 50, 60), (300, 200, 3)])
def test_large_arrays(dtype, mode, cval, shape):
    x = image(dtype, shape)
    for name, kwargs in [
        ("gaussian_filter", {"sigma": 2.5}),
        ("gaussian_filter", {"sigma": 2, "order": 1, "axes": (1, 0)}),
        ("uniform_filter", {"size": 7, "origin": 2}),
        ("uniform_filter1d", {"size": 41, "axis": 0}),
        ("uniform_filter", {"size": 97, "axes": (1,)}),
        ("correlate1d", {"weights": RNG.random(9), "axis": 0}),
        ("convolve", {"weights": RNG.random((5, 4)), "axes": (1, 0)}),
    ]:
        assert_equal(*both(name, x, mode=mode, cval=cval, **kwargs), np.abs(x).max())


@pytest.mark.parametrize("value", [1, 10, 255])
@pytest.mark.parametrize("sigma", [0.5, 1, 2, 3.3, 4.1])
def test_flat_integers_are_truncated_like_scipy(value, sigma):
    x = np.full((20, 30), value, np.uint8)
    x[5:9, 7:20] = 3
    np.testing.assert_array_equal(*both("gaussian_filter", x, sigma=sigma))


def test_large_integers():
    x = RNG.integers(-(2**62), 2**62, (20, 30))
    np.testing.assert_array_equal(*both("correlate1d", x, weights=[1, 2, 3]))
    np.testing.assert_array_equal(*both("correlate", x, weights=[[1, 2, 3]]))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(("name", "kwargs"), CASES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_spread_as_in_scipy(name, kwargs, value, dtype):
    x = image(dtype)
    x[10, 12] = value
    ours, theirs = both(name, x, **kwargs)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))


def test_means_of_whole_numbers_are_exact():
    x = np.full((40, 50), 3.0, np.float32)
    for size in (3, 7, 41, 101):
        assert (ndimage.uniform_filter(x, size) == 3).all()


def test_means_of_large_samples_do_not_overflow():
    x = np.full((40, 50), 1.5 * 2.0**127, np.float32)
    with np.errstate(all="raise"):
        for size in (31, 41, 101):
            assert (ndimage.uniform_filter(x, size) == x).all()


def test_masks_are_dropped():
    x = np.ma.masked_greater(image("f8"), 10)
    assert_equal(*both("gaussian_filter", x, sigma=1), np.abs(x.data).max())


INVALID = [
    ("gaussian_filter", {"sigma": (1, 2, 3)}),
    ("gaussian_filter", {"sigma": 1, "order": -1}),
    ("gaussian_filter", {"sigma": 1, "radius": -1}),
    ("gaussian_filter", {"sigma": 1, "mode": "none"}),
    ("gaussian_filter", {"sigma": 1, "axes": (0, 0)}),
    ("gaussian_filter", {"sigma": 1, "axes": (2,)}),
    ("gaussian_filter", {"sigma": 1, "axes": (1.5,)}),
    ("gaussian_filter1d", {"sigma": 0}),
    ("gaussian_filter1d", {"sigma": "wide"}),
    ("uniform_filter1d", {"size": 0}),
    ("uniform_filter1d", {"size": 3, "origin": 2}),
    ("sobel", {"axis": 2}),
    ("laplace", {"output": np.zeros(3)}),
    ("laplace", {"output": "U5"}),
    ("laplace", {"output": "complex128"}),
    ("correlate1d", {"weights": []}),
    ("correlate1d", {"weights": [[1]]}),
    ("correlate1d", {"weights": [1, 2], "origin": 1}),
    ("correlate1d", {"weights": [1, 2], "cval": 1j, "mode": "constant"}),
    ("correlate", {"weights": [1, 2]}),
    ("correlate", {"weights": [[1, 2]], "mode": ["wrap", "wrap"]}),
    ("convolve", {"weights": [[1, 2]], "origin": (1, 0)}),
]


@pytest.mark.parametrize(("name", "kwargs"), INVALID)
def test_errors_are_those_of_scipy(name, kwargs):
    x = image("f8")
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        SCIPY[name](x, **kwargs)
    with pytest.raises(type(theirs.value)) as ours:
        getattr(ndimage, name)(x, **kwargs)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", ["f2", "g", "O", "U3"])
def test_dtypes_that_scipy_refuses_are_refused(dtype):
    x = np.ones((3, 3)).astype(dtype)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        ndimage.gaussian_filter(x, 1)


def test_outputs_that_cannot_be_written_are_refused():
    x = image("f4")
    y = x.copy()
    y.flags.writeable = False
    for name in ("gaussian_filter", "correlate"):
        with pytest.raises(ValueError, match=r"read-only|writeable"):
            getattr(ndimage, name)(x, output=y, **CALLS[name][0])


def test_empty_arrays():
    for shape in [(0,), (3, 0), ()]:
        x = np.ones(shape)
        np.testing.assert_array_equal(*both("gaussian_filter", x, sigma=1))


def test_complex_weights_are_left_to_scipy():
    x = image("c16")
    for name in ("correlate", "convolve"):
        np.testing.assert_array_equal(*both(name, x, weights=np.array([[1, 2j], [3, 4]])))


def is_patched():
    return {getattr(scipy_ndimage, n) is getattr(ndimage, n) for n in arguments.NAMES}


def test_patched_replaces_and_restores():
    assert is_patched() == {False}
    with lowrank.ndimage.patched():
        with lowrank.ndimage.patched():
            assert is_patched() == {True}
        assert is_patched() == {True}
        x = RNG.integers(0, 9, (30, 30))  # SciPy itself filters some of the lines
        np.testing.assert_array_equal(
            scipy_ndimage.gaussian_filter(x, 2.0), SCIPY["gaussian_filter"](x, 2.0)
        )
        with pytest.raises(RuntimeError, match="boundary mode"):
            scipy_ndimage.sobel(x, mode="none")
    assert is_patched() == {False}
    with pytest.raises(KeyError), lowrank.ndimage.patched():
        raise KeyError
    assert is_patched() == {False}


def test_filters_may_call_the_patched_scipy():
    x = image("f8", (300, 300))
    x[7, 9] = np.nan
    weights = [[0, 1, 2], [1, 3, 0], [2, 0, 1]]
    theirs = SCIPY["correlate"](x, weights)
    with ndimage.patched():
        for ours in (filters.correlate(x, weights), scipy_ndimage.correlate(x, weights)):
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))


def test_the_last_thread_restores():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with ndimage.patched():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with ndimage.patched():
        thread.start()
        entered.wait()
    assert is_patched() == {True}
    leave.set()
    thread.join()
    assert is_patched() == {False}
