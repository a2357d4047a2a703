"""Every combination of filter arguments against direct sums in double precision."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage as ndi

from lowrank import filters
from lowrank.filters import cpu
from lowrank.filters.request import plan_request

PAD_MODES = {
    "reflect": "symmetric", "mirror": "reflect", "nearest": "edge", "wrap": "wrap",
    "constant": "constant",
}  # fmt: skip
REAL = ["?", "u1", "i1", "u2", ">i2", "i4", "u8", "f2", "f4", "f8", ">f8"]
COMPLEX = ["c8", "c16", ">c16"]
#: Data types that are computed in float32 if the image and the result are of them.
SINGLE = {"?", "u1", "i1", "u2", "i2", "f2", "f4", "c8"}


def direct_sums(image, kernel, axes, modes, cval, origins, padding):
    """Correlate along `axes`: border samples by numpy.pad, then a sum over every window."""
    kind = complex if "c" in (image.dtype.kind, kernel.dtype.kind) else float
    x, last = np.moveaxis(image.astype(kind), axes, range(-len(axes), 0)), image.ndim - len(axes)
    for axis, (n, mode, origin) in enumerate(zip(kernel.shape, modes, origins), last):
        before = n // 2 + origin
        width = {"same": (before, n - 1 - before), "valid": (0, 0), "full": (n - 1, n - 1)}[padding]
        fill = {"constant_values": cval} if mode == "constant" else {}
        widths = [width if a == axis else (0, 0) for a in range(x.ndim)]
        x = np.pad(x, widths, PAD_MODES[mode], **fill)
    windows = sliding_window_view(x, kernel.shape, tuple(range(last, x.ndim)))
    taps = list(range(last + kernel.ndim, last + 2 * kernel.ndim))
    result = np.tensordot(windows, kernel.astype(kind), (taps, list(range(kernel.ndim))))
    return np.moveaxis(result, range(-len(axes), 0), axes)


def converted(values, dtype):
    """Convert as documented: integers and bool are rounded to nearest even and saturate."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.rint(values) >= 1
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return np.clip(np.rint(values), float(limits.min), float(limits.max))
    return values


def samples(rng, shape, dtype):
    """Return numbers that are exact in `dtype`, up to 100."""
    values = rng.integers(-100, 100, shape) / 4
    if np.dtype(dtype).kind == "c":
        return (values + 1j * rng.integers(-100, 100, shape)).astype(dtype)
    if np.dtype(dtype).kind in "iub":
        values = np.abs(np.rint(values)) % (2 if dtype == "?" else 100)
    return values.astype(dtype)


class Plane(np.ndarray):
    """A subclass."""


def array_for(kind, shape, dtype):
    """Return an array of some memory layout for a result."""
    if kind == "new":
        return None
    if kind == "strided":
        return np.empty([2 * n for n in shape], dtype)[tuple(slice(None, None, -2) for _ in shape)]
    if kind == "fortran":
        return np.empty(shape, dtype, "F")
    if kind == "misaligned":
        count = math.prod(shape)
        data = bytearray(count * np.dtype(dtype).itemsize + 1)
        return np.frombuffer(data, dtype, count, 1).reshape(shape)
    return np.empty(shape, dtype).view(Plane) if kind == "subclass" else np.empty(shape, dtype)


OUT_KINDS = ["new", "plain", "strided", "fortran", "misaligned", "subclass"]


def bound_of(image, kernel, window, result, dtype, method):
    """Bound the rounding errors of sums of products, in the documented precision."""
    names = {np.dtype(d).newbyteorder("=").str[1:] for d in (image.dtype, dtype)}
    names = {"?" if n == "b1" else n for n in names}
    eps = np.finfo(np.float32 if names <= SINGLE else np.float64).eps
    size = direct_sums(np.abs(image), np.abs(kernel), *window)
    # Each product and sum rounds once; parts of complex numbers are summed.
    bound = 4 * (kernel.size + 1) * eps * size
    if method == "fft":  # of blocks of at most 64 points per axis, in proportion to the largest
        bound = bound + 4 * eps * 18 * np.abs(kernel).sum() * np.sqrt(image.size) * size.max()
    if np.dtype(dtype).kind in "fc":
        info = np.finfo(dtype)
        bound = bound + 2 * info.eps * np.abs(result) + info.smallest_subnormal
    return bound


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_all_arguments_together(data):
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    ndim = draw(st.integers(1, 4))
    taps = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=ndim)))
    axes = tuple(draw(st.permutations(range(ndim)))[: len(taps)])
    padding = draw(st.sampled_from(["same", "same", "valid", "full"]))
    shape = [draw(st.integers(1, 7)) for _ in range(ndim)]
    for a, n in zip(axes, taps):
        shape[a] = max(shape[a], n)
    image = samples(rng, shape, draw(st.sampled_from(REAL + COMPLEX)))
    kind = draw(st.sampled_from(["dense", "zeros", "array", "factors", "complex"]))
    kernel = rng.standard_normal(taps)
    if kind == "zeros":
        kernel *= rng.random(taps) < 0.5
    if kind == "complex":
        kernel = kernel + 1j * rng.standard_normal(taps)
    given_kernel = kernel
    if kind in ("array", "factors"):
        given_kernel = filters.OuterProduct([rng.standard_normal(n) for n in taps])
        kernel = np.asarray(given_kernel)
        given_kernel = kernel if kind == "array" else given_kernel
    modes = [draw(st.sampled_from(list(PAD_MODES)))] * len(taps)
    if draw(st.booleans()):
        modes = [draw(st.sampled_from(list(PAD_MODES))) for _ in taps]
    cval = draw(st.sampled_from([0, 2.5, -300.0]))
    if image.dtype.kind == "c":
        cval += 1.5j
    origins = [draw(st.integers(-(n // 2), (n - 1) // 2)) for n in taps]
    is_complex = "c" in (image.dtype.kind, kernel.dtype.kind)
    dtype = draw(st.sampled_from([None, *COMPLEX, *([] if is_complex else REAL)]))
    options = {
        "mode": modes if len(set(modes)) > 1 else modes[0], "cval": cval, "origin": origins,
        "axes": axes, "padding": padding,
    }  # fmt: skip
    run, flips = filters.correlate, draw(st.booleans())
    # A convolution is the correlation with the flipped kernel.
    oracle, shifts = kernel.conj(), origins
    if flips:
        run, oracle = filters.convolve, np.flip(kernel)
        shifts = [-o - (n % 2 == 0) for o, n in zip(origins, taps)]
    window = (axes, modes, cval, shifts, padding)
    expected = direct_sums(image, oracle, *window)
    methods = ["direct"] if len(taps) > 3 else ["direct", "fft"]
    methods += ["separable"] * (kind in ("array", "factors"))
    method = draw(st.sampled_from(["auto", "auto", *methods]))
    default = np.dtype(image.dtype)
    if is_complex:
        default = np.promote_types(default.newbyteorder("="), "c8")
    result_dtype = default if dtype is None else np.dtype(dtype)
    out = array_for(draw(st.sampled_from(OUT_KINDS)), expected.shape, result_dtype)
    is_light = draw(st.booleans())
    before = image.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "LIGHT_SAMPLES", 10**6 if is_light else 0)
        found = run(image, given_kernel, dtype=dtype, out=out, method=method, **options)
    np.testing.assert_array_equal(image, before)
    assert found.dtype == result_dtype
    assert found.shape == expected.shape
    assert out is None or found is out
    magnitudes = (axes, modes, abs(cval), shifts, padding)
    bound = bound_of(image, oracle, magnitudes, expected, result_dtype, method)
    wide = np.asarray(found).astype(complex if result_dtype.kind == "c" else float)
    if result_dtype.kind in "iub":
        low, high = (converted(expected + d, result_dtype) for d in (-bound, bound))
        assert ((low <= wide) & (wide <= high)).all()
    else:
        with np.errstate(over="ignore"):
            assert (np.abs(wide - expected) <= bound).all()


@pytest.mark.parametrize("method", ["auto", "direct", "separable", "fft"])
@pytest.mark.parametrize("padding", ["same", "valid", "full"])
@pytest.mark.parametrize("modes", [("reflect",) * 2, ("wrap", "constant"), ("mirror", "nearest")])
@pytest.mark.parametrize("size", [40, 300])
def test_every_method_has_every_border_and_size(method, padding, modes, size):
    kernel, rng = filters.disk(4.5), np.random.default_rng(0)
    image = 0.5 + rng.random((size, size - 7))
    options = {"mode": modes, "cval": 2.0, "padding": padding}
    found = filters.correlate(image, kernel, method=method, **options)
    expected = direct_sums(image, kernel, (0, 1), modes, 2.0, (0, 0), padding)
    # 81 taps that sum to 1, or a transform of at most 2^17 points
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    approximate = filters.correlate(image, kernel, rank=2, **options)
    chain = filters.separate(kernel, rank=2).to_dense()[0, 0]
    expected = direct_sums(image, chain, (0, 1), modes, 2.0, (0, 0), padding)
    np.testing.assert_allclose(approximate, expected, rtol=1e-12)


@pytest.mark.parametrize("mode", list(PAD_MODES))
def test_full_and_valid_are_parts_of_one_another(mode):
    image = np.random.default_rng(0).random((30, 31))
    kernel = filters.gauss([1.0, 2.0], angle=0.3)
    full, same, valid = (
        filters.correlate(image, kernel, mode=mode, padding=p) for p in ("full", "same", "valid")
    )
    (h, w), (a, b) = kernel.shape, (n // 2 for n in kernel.shape)
    np.testing.assert_allclose(full[a : a + 30, b : b + 31], same, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(same[a : 30 - a, b : 31 - b], valid, rtol=1e-13, atol=1e-13)
    assert full.shape == (30 + h - 1, 31 + w - 1)


def test_sobel_of_a_photograph_keeps_its_sign():
    image = np.array([[9, 0, 0, 255]] * 3, np.uint8)
    assert filters.correlate(image, filters.sobel()).min() == 0
    for dtype in (np.int16, np.int32, np.float32, np.float64):
        found = filters.correlate(image, filters.sobel(), dtype=dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found[1], [-36, -36, 1020, 1020])
    assert filters.filter_image(image, filters.sobel(), dtype="f4").min() == -36


def test_bool_images_are_rounded_and_counted():
    mask = np.random.default_rng(0).random((30, 40)) < 0.4
    majority = filters.correlate(mask, filters.box(3))
    assert majority.dtype == bool
    counts = ndi.correlate(mask.astype(int), np.ones((3, 3), int))
    np.testing.assert_array_equal(majority, counts >= 5)
    np.testing.assert_array_equal(filters.correlate(mask, np.ones((3, 3)), dtype=int), counts)
    eroded = filters.correlate(mask, np.ones((3, 3)), mode="constant", dtype=int) == 9
    np.testing.assert_array_equal(eroded, ndi.binary_erosion(mask, np.ones((3, 3))))


@pytest.mark.parametrize("flip", [False, True])
def test_complex_filters_match_scipy(flip):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((20, 30)) + 1j * rng.standard_normal((20, 30))
    kernel = rng.standard_normal((3, 4)) + 1j * rng.standard_normal((3, 4))
    ours, theirs = (getattr(m, "convolve" if flip else "correlate") for m in (filters, ndi))
    for x, k in ((image, kernel), (image, kernel.real), (image.real, kernel)):
        for mode in ("reflect", "constant"):
            options = {"mode": mode, "cval": 1 - 2j if x.dtype.kind == "c" else 1.5}
            np.testing.assert_allclose(ours(x, k, **options), theirs(x, k, **options), rtol=1e-12)
    single = ours(image.astype(np.complex64), kernel)
    assert single.dtype == np.complex64


def test_nan_of_one_part_stays_in_it():
    image = np.ones((9, 9), complex)
    image[4, 4] = complex(np.nan, 1)
    found = filters.correlate(image, np.ones((3, 3)))
    assert np.isnan(found.real).sum() == 9
    assert (found.imag == ndi.correlate(image.imag, np.ones((3, 3)))).all()


@pytest.mark.parametrize("taps", [(3, 2, 1, 4), (2, 3, 2, 3, 2), (1, 1, 3, 1, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("is_outer", [False, True])
def test_kernels_of_many_axes_match_scipy(taps, is_outer):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal(taps)
    if is_outer:
        kernel = filters.OuterProduct([rng.standard_normal(n) for n in taps])
    image = rng.random([n + 2 for n in taps])
    for mode in PAD_MODES:
        found = filters.correlate(image, kernel, mode=mode, cval=0.7)
        expected = ndi.correlate(image, np.asarray(kernel), mode=mode, cval=0.7)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    counted = filters.correlate(np.full(image.shape, 200, np.uint8), np.ones(taps))
    assert (counted == (200 if math.prod(taps) == 1 else 255)).all()
    direct = filters.correlate(image, kernel, method="direct")
    np.testing.assert_allclose(
        direct, ndi.correlate(image, np.asarray(kernel)), rtol=1e-12, atol=1e-12
    )
    if not is_outer and sum(n > 1 for n in taps) > 3:
        with pytest.raises(ValueError, match="rank must be None for a kernel with more than 3"):
            filters.correlate(image, kernel, rank=2)


def test_axes_of_one_tap_do_not_count():
    rng = np.random.default_rng(0)
    image, kernel = rng.random((4, 5, 30, 31)), rng.random((9, 9))
    found = filters.correlate(image, kernel[None, None], rank=2, mode="wrap")
    expected = filters.correlate(image, kernel, rank=2, mode="wrap", axes=(2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("kernel", [filters.disk(20), filters.disk(9.5), filters.log(3.0)])
@pytest.mark.parametrize("dtype", ["?", "u1", "u2", "i4", "f4"])
@pytest.mark.parametrize("result", ["f4", "f8", "c16"])
def test_zeros_of_integer_images_stay_zeros(kernel, dtype, result):
    image = np.zeros((300, 310), dtype)
    image[:100, :100] = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 100, (100, 100))
    found = filters.correlate(image, kernel, dtype=result)
    reached = ndi.correlate(image.astype(float), np.abs(kernel)) > 0
    assert (found[~reached] == 0).all()
    if kernel.min() >= 0:
        assert found.real.min() >= 0


def test_nine_factors_and_more():
    image = np.random.default_rng(0).random((2,) * 10)
    factors = [[1.0, k] for k in range(10)]
    found = filters.separable_correlate(image, factors, mode="wrap")
    expected = image
    for axis, f in enumerate(factors):
        expected = ndi.correlate1d(expected, f, axis, mode="wrap")
    np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("size", [40, 300])
@pytest.mark.parametrize("dtype", ["u1", "f4", "f8", "c8"])
@pytest.mark.parametrize("name", ["sobel", "ones", "log", "disk", "noise"])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"origin": 1}, {"axes": (2, 0)}, {"mode": ("wrap", "mirror")}, {"padding": "full"},
        {"padding": "valid", "axes": (1, 2)}, {"tolerance": 0.1}, {"method": "direct"},
    ],
)  # fmt: skip
def test_plans_tell_what_runs(size, dtype, name, options, monkeypatch):
    kernel = {
        "sobel": filters.sobel(), "ones": np.ones((3, 3)), "log": filters.log(1.2),
        "disk": filters.disk(9.5), "noise": np.random.default_rng(0).random((41, 41)),
    }[name]  # fmt: skip
    ran = []
    compile_request, run_outer = cpu.compile_request, cpu.run_outer
    monkeypatch.setattr(
        cpu, "compile_request",
        lambda r, e: ran.append(plan_request(r)[e].name) or compile_request(r, e),
    )  # fmt: skip
    monkeypatch.setattr(cpu, "run_outer", lambda *args: ran.append("separable") or run_outer(*args))
    shape = (size, size + 1, 2) if "axes" not in options else (size // 5, 50, 41 + size // 5)
    image = (100 + np.random.default_rng(0).random(shape)).astype(dtype)
    plan = filters.plan_filter(kernel, shape, dtype=image.dtype, **options)
    filters.correlate(image, kernel, **options)
    if ran[0] == "separable":
        assert plan.choice.method == "separable"
        assert plan.choice.rank == (1,)
    else:
        assert {plan.choice.name} == set(ran)


def test_separable_correlate_is_correlate_with_an_outer_product():
    image = np.random.default_rng(0).random((30, 40, 3))
    factors = [1, 2, 1], [1.0, 0.0, -1.0]
    options = {"mode": ("wrap", "nearest"), "padding": "full", "dtype": np.float32}
    found = filters.separable_correlate(image, factors, **options)
    expected = filters.correlate(image, np.outer(*factors), **options)
    np.testing.assert_array_equal(found, expected)
    empty = [([], ValueError), (None, TypeError), ("ab", TypeError)]
    for wrong, error in (
        ([1, 2, 1], ValueError), ([[1j]], TypeError), ([[np.nan]], ValueError), *empty
    ):  # fmt: skip
        with pytest.raises(error, match="factors must be"):
            filters.separable_correlate(image, wrong)


def test_memory_maps_are_filtered_in_place(tmp_path):
    image = np.random.default_rng(0).random((300, 310), np.float32)
    source = np.memmap(tmp_path / "in", np.float32, "w+", shape=image.shape)
    source[...] = image
    target = np.memmap(tmp_path / "out", ">f8", "w+", shape=image.shape)
    for kernel in (filters.gauss(2.0), filters.disk(4.0)):
        expected = filters.correlate(image, kernel, dtype=float)
        assert filters.correlate(source, kernel, out=target) is target
        target.flush()
        np.testing.assert_array_equal(
            np.fromfile(tmp_path / "out", ">f8").reshape(image.shape), expected
        )
        assert type(filters.correlate(source, kernel)) is np.ndarray
        in_place = image.copy()
        filters.correlate(in_place, kernel, out=in_place)
        np.testing.assert_array_equal(in_place, filters.correlate(image, kernel))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (5, 6, 0)])
@pytest.mark.parametrize("dtype", ["?", "u1", "f8", "c8"])
def test_empty_images(shape, dtype):
    image = np.empty(shape, dtype)
    for kernel in (np.ones((2, 3)), filters.sobel(), filters.disk(2), [[1j]]):
        found = filters.correlate(image, kernel, dtype="c16")
        assert (found.shape, found.dtype) == (shape, np.complex128)
    if 0 not in shape[:2]:
        for padding, size in (("valid", (4, 4, 0)), ("full", (6, 8, 0))):
            assert filters.correlate(image, np.ones((2, 3)), padding=padding).shape == size
    else:
        for padding in ("valid", "full"):
            with pytest.raises(ValueError, match=r"image must have at least \d samples along axis"):
                filters.correlate(image, np.ones((2, 3)), padding=padding)


def test_integers_beyond_double_precision_are_rounded_as_by_scipy():
    image = np.array([2**53 + 1, 2**62 + 1, -(2**53) - 1] * 5, np.int64)
    np.testing.assert_array_equal(
        filters.correlate(image, [0.0, 1.0, 0.0]), ndi.correlate1d(image, [0.0, 1.0, 0.0])
    )


@pytest.mark.parametrize("size", [30, 300])
@pytest.mark.parametrize("cval", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("kernel", ["sobel", "disk", "noise"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "u1"])
def test_border_values_reach_only_the_border(size, cval, kernel, dtype):
    rng = np.random.default_rng(0)
    taps = {"sobel": filters.sobel(), "disk": filters.disk(9.5), "noise": rng.random((31, 31))}
    taps = np.asarray(taps[kernel])
    image = (rng.random((size, size)) * 100).astype(dtype)
    found = filters.correlate(image, taps, mode="constant", cval=cval, dtype="f8")
    expected = ndi.correlate(image, taps, np.float64, mode="constant", cval=cval)
    size = ndi.correlate(image, np.abs(taps), np.float64, mode="constant", cval=abs(cval))
    with np.errstate(invalid="ignore"):
        close = np.abs(found - expected) <= 2 * taps.size * np.finfo(float).eps * size
    assert (close | (found == expected) | (np.isnan(found) & np.isnan(expected))).all()


@pytest.mark.parametrize("method", ["auto", "direct", "separable", "fft"])
@pytest.mark.parametrize("shape", [(7,), (1, 9), (9, 1), (2, 2), (5, 5)])
@pytest.mark.parametrize("size", [30, 300])
def test_no_floating_point_errors_are_raised(method, shape, size):
    image = np.full((size, 20)[: len(shape)], 1e36, np.float32)
    tails = np.exp(-(np.arange(math.prod(shape)) ** 2.0)).reshape(shape)  # below float32
    for kernel in (np.ones(shape), tails, np.full(shape, 1e39)):
        if method == "separable" and kernel is tails and min(shape) > 1:
            continue  # of full rank
        with np.errstate(all="raise"):
            found = filters.correlate(image, kernel, method=method)
            filters.correlate(image, kernel, dtype=np.uint8, method=method)
            filters.correlate(image, kernel, dtype=np.float16, method=method)
        expected = 1e36 * kernel.sum()
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(found, np.float32(expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": ("reflect",)}, ValueError, "mode must be one border mode, or 2, one per axis"),
        ({"mode": ("reflect", "symmetric")}, ValueError, "mode must be one of .* 'symmetric'"),
        ({"mode": None}, ValueError, "mode must be one of"),
        ({"mode": {"wrap", "nearest"}}, ValueError, "mode must be one of"),
        ({"mode": b"wrap"}, ValueError, "mode must be one of"),
        ({"mode": ["reflect", ["wrap"]]}, ValueError, "mode must be one of"),
        ({"padding": "Same"}, ValueError, "padding must be one of same, valid, full, got 'Same'"),
        ({"padding": 1}, ValueError, "padding must be one of same, valid, full, got 1"),
        ({"kernel": np.ones((3, 12)), "padding": "valid"}, ValueError,
         "image must have at least 12 samples along axis 1 for padding='valid', got 9"),
        ({"cval": 1j}, TypeError, "cval must be a real number"),
        ({"cval": "1"}, TypeError, "cval must be a real number"),
        ({"dtype": "float33"}, TypeError, "dtype must be a data type, got 'float33'"),
        ({"dtype": object}, TypeError, "dtype must be"),
        ({"dtype": "f4", "out": np.empty((8, 9))}, TypeError, "dtype must be that of out"),
        ({"out": np.empty((9, 8))}, ValueError, r"out must have the shape of the result, \(8, 9\)"),
        ({"out": np.empty((8, 9)), "padding": "full"}, ValueError, r"result, \(10, 11\), got"),
        ({"out": np.empty((8, 9), object)}, TypeError, "out must be"),
        ({"out": [[0.0] * 9] * 8}, TypeError, "out must be a ndarray, got list"),
        ({"out": np.ma.masked_all((8, 9))}, TypeError, "out must be a ndarray, got MaskedArray"),
        ({"out": np.broadcast_to(0.0, (8, 9))}, ValueError, "out must be writeable"),
        ({"kernel": np.ones((3, 3), complex), "out": np.empty((8, 9))}, TypeError,
         "out must be complex for a complex image or kernel, got float64"),
        ({"kernel": np.ones((3, 3), complex), "dtype": float}, TypeError, "dtype must be complex"),
        ({"kernel": np.ones((3, 3), complex), "rank": 1}, ValueError, "rank must be None"),
        ({"kernel": np.ma.masked_less(np.ones((3, 3)), 0)}, TypeError, "kernel must be a plain"),
        ({"kernel": 3.0}, ValueError, "kernel must have axes"),
        ({"kernel": "sobel"}, TypeError, "kernel must be an array in memory, got builtins.str"),
        ({"kernel": np.ones(3), "axes": None}, ValueError, "axes must be given for a kernel with"),
        ({"axes": 0}, ValueError, "axes must be 2 axes, as the kernel has, got 0"),
        ({"axes": "xy"}, TypeError, "axes must be"),
        ({"axes": (0.0, 1.0)}, TypeError, "axes must be"),
        ({"origin": (0, 0.5)}, TypeError, "origin must be an integer"),
        ({"origin": 2}, ValueError, "origin must be between -1 and 1 for 3 taps, got 2"),
        ({"threads": 0}, ValueError, "threads must be between 1 and 2147483647, got 0"),
        ({"method": "magic"}, ValueError, "method must be one of"),
        ({"method": ["fft"]}, ValueError, "method must be one of"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_outer", [False, True])
def test_wrong_arguments_get_one_sentence(change, error, message, is_outer):
    options = {"kernel": np.ones((3, 3)), "axes": (0, 1), **change}
    if is_outer and "kernel" not in change:
        options["kernel"] = filters.sobel()
    with pytest.raises(error, match=message):
        filters.correlate(np.ones((8, 9)), **options)


def test_images_without_axes_are_refused():
    with pytest.raises(ValueError, match="kernel must have at most the image's 0 axes, got 1"):
        filters.correlate(3.0, [1.0])


def test_sequences_and_buffers_are_images():
    expected = filters.correlate(np.arange(12.0).reshape(3, 4), np.ones((3, 3)))
    rows = np.arange(12.0).reshape(3, 4).tolist()
    array = np.array(rows)
    for image in (rows, tuple(rows), memoryview(array), array.view(Plane)):
        found = filters.correlate(image, np.ones((3, 3)))
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "image must be an array in memory, .* got builtins.NoneType"),
        ("photo.png", TypeError, "image must be an array in memory, .* got builtins.str"),
        ({"a": 1}, TypeError, "image must be an array in memory, .* got builtins.dict"),
        ([[1, 2], [3]], ValueError, "image must be a regular array"),
        ([["a", "b"]], TypeError, "image must be bool, integers"),
    ],
)
def test_what_is_no_image(image, error, message):
    for run in (filters.correlate, filters.filter_image):
        with pytest.raises(error, match=message):
            run(image, np.ones((1, 3)))


class Stored:
    """An array that is read when NumPy asks for it, as those of files."""

    shape, dtype, ndim = (8, 9), np.dtype(float), 2

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("the array was read")


def test_stored_arrays_are_never_read(tmp_path):
    for run in (filters.correlate, filters.convolve, filters.filter_image):
        with pytest.raises(TypeError, match="image must be an array in memory, a Dask array or an"):
            run(Stored(), np.ones((3, 3)))
    with pytest.raises(TypeError, match=r"kernel must be an array in memory, got .*Stored"):
        filters.correlate(np.ones((8, 9)), Stored())
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        stored = file.create_dataset("image", data=np.ones((8, 9)))
        with pytest.raises(TypeError, match=r"h5py.Dataset: .* dask.array.from_array\(image\)"):
            filters.correlate(stored, np.ones((3, 3)))
    zarr = pytest.importorskip("zarr")
    stored = zarr.open(str(tmp_path / "a.zarr"), mode="w", shape=(8, 9), dtype="f8")
    with pytest.raises(TypeError, match=r"zarr.Array: .* dask.array.from_zarr\(image\) makes it"):
        filters.correlate(stored, np.ones((3, 3)))


@pytest.fixture
def labelled():
    xarray = pytest.importorskip("xarray")
    values = np.random.default_rng(0).random((20, 30, 4))
    return xarray.DataArray(
        values, dims=("y", "x", "band"), name="scene", attrs={"units": "K"},
        coords={"y": np.arange(20) * 0.5, "x": np.arange(30), "row": ("y", np.arange(20))},
    )  # fmt: skip


def test_data_arrays_keep_their_names(labelled):
    kernel = filters.gauss([1.0, 2.0], angle=0.2)
    expected = filters.correlate(labelled.values, kernel, mode="wrap")
    found = filters.correlate(labelled, kernel, mode="wrap", axes=("y", "x"))
    np.testing.assert_array_equal(found.values, expected)
    assert (found.dims, found.name, found.attrs) == (labelled.dims, "scene", {"units": "K"})
    assert set(found.coords) == {"y", "x", "row"}
    bands = filters.correlate(labelled, [1.0, 2.0], axes="band", dtype="f4")
    expected = filters.correlate(labelled.values, [1.0, 2.0], axes=2, dtype="f4")
    np.testing.assert_array_equal(bands.values, expected)
    with pytest.raises(ValueError, match="axes must be of y, x, band, got 'z'"):
        filters.correlate(labelled, [1.0, 2.0], axes="z")
    with pytest.raises(TypeError, match="out must be None for a DataArray"):
        filters.correlate(labelled, kernel, out=np.empty(labelled.shape))


def test_coordinates_of_valid_and_full_results(labelled):
    kernel = np.ones((4, 3))
    valid = filters.correlate(labelled, kernel, padding="valid", origin=(1, 0))
    np.testing.assert_array_equal(valid.y, labelled.y[3:])
    np.testing.assert_array_equal(valid.row, np.arange(3, 20))
    np.testing.assert_array_equal(valid.x, labelled.x[1:-1])
    full = filters.correlate(labelled, kernel[:, :1], padding="full")
    assert (full.sizes["y"], set(full.coords)) == (23, {"x"})


def test_lazy_data_arrays_stay_lazy(labelled, tmp_path):
    pytest.importorskip("dask.array")
    kernel = filters.disk(3.0)
    for padding in ("same", "valid", "full"):
        lazy = filters.correlate(labelled.chunk(y=7, x=8), kernel, padding=padding)
        assert lazy.chunks is not None
        whole = filters.correlate(labelled, kernel, padding=padding, method="direct")
        np.testing.assert_allclose(lazy.compute(), whole, rtol=1e-13)
    labelled.to_netcdf(tmp_path / "scene.nc", engine="scipy")
    import xarray

    with xarray.open_dataarray(tmp_path / "scene.nc", engine="scipy") as stored:
        with pytest.raises(TypeError, match="image must be in memory or of Dask, got an xarray"):
            filters.correlate(stored, kernel)
        found = filters.correlate(stored.chunk(y=7), kernel)
        np.testing.assert_allclose(found, filters.correlate(labelled, kernel), rtol=1e-13)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_dask_arrays_take_the_same_arguments(data):
    da = pytest.importorskip("dask.array")
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    image = samples(rng, (30, 25, 4), draw(st.sampled_from(["?", "u1", "i4", "f4", "f8", "c8"])))
    kernel = draw(st.sampled_from([filters.gauss(1.0), rng.random((4, 3)), rng.random((3, 2, 2))]))
    options = {
        "mode": [draw(st.sampled_from(list(PAD_MODES))) for _ in range(kernel.ndim)], "cval": 1.5,
        "padding": draw(st.sampled_from(["same", "valid", "full"])),
        "dtype": draw(st.sampled_from([None, "c16"] if image.dtype.kind == "c" else
                                      [None, "?", "u1", "i4", "f4", "f8", "c8"])),
    }  # fmt: skip
    lazy = filters.correlate(da.from_array(image, chunks=(9, 10, 2)), kernel, **options)
    whole = filters.correlate(image, kernel, method="auto", **options)
    assert (lazy.shape, lazy.dtype) == (whole.shape, whole.dtype)
    found = lazy.compute()
    if filters.rank(kernel) > 1:
        np.testing.assert_array_equal(found, whole, strict=True)
        return
    # Passes over whole images add samples of equal taps first, and chains know the response to a
    # constant border: n products and sums along each axis round in another order.
    single = np.result_type(image.dtype, whole.dtype, "f4").name in ("float32", "complex64")
    eps = np.finfo("f4" if single else "f8").eps
    bound = 4 * sum(kernel.shape) * eps * max(np.abs(image).max(), 1.5) * np.abs(kernel).sum()
    step = 1 if whole.dtype.kind in "iub" else 0
    kind = complex if whole.dtype.kind == "c" else float
    assert np.abs(found.astype(kind) - whole.astype(kind)).max() <= bound + step
