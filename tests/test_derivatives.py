"""Derivatives at a scale, structure tensors and eigenvalues against SciPy, NumPy and formulas."""

import itertools

import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given
from hypothesis import strategies as st

from lowrank import filters
from lowrank.filters import shared

MODES = ["reflect", "constant", "nearest", "mirror", "wrap"]
# Sums of some 100 products of order 1 along each axis, with a margin.
FLOAT64 = {"rtol": 0, "atol": 1e-13}
FLOAT32 = {"rtol": 0, "atol": 5e-6}
EPS = np.finfo(np.float64).eps
FUNCTIONS = [
    filters.gradient,
    filters.gradient_magnitude,
    filters.hessian,
    filters.gaussian_laplace,
    lambda image, sigma, **k: filters.structure_tensor(image, sigma, 1.5, **k),
    lambda image, sigma, **k: filters.gaussian_derivatives(image, sigma, [(1,) * 2], **k),
]
#: Below and above the number of samples from which on the engine runs chains.
SIZES = [(23, 31), (301, 251)]


def scipy_derivative(x, sigmas, orders, axes, **options):
    sigma, order = np.zeros(x.ndim), np.zeros(x.ndim, int)
    sigma[list(axes)], order[list(axes)] = sigmas, orders
    return ndi.gaussian_filter(np.asarray(x, float), sigma, order=tuple(order), **options)


def second_orders(n):
    return [
        tuple(np.bincount(pair, minlength=n))
        for pair in itertools.combinations_with_replacement(range(n), 2)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(400,), *SIZES, (20, 19, 21), (40, 45, 50), (9, 8, 9, 10)])
def test_gradient_and_hessian_match_scipy(rng, shape, mode):
    x, n = rng.standard_normal(shape), len(shape)
    sigmas, axes = np.linspace(1.0, 1.5, n), range(n)
    slopes = filters.gradient(x, sigmas, mode=mode)
    curvatures = filters.hessian(x, sigmas, mode=mode)
    assert len(slopes) == n
    assert len(curvatures) == n * (n + 1) // 2
    for y, orders in zip(slopes, np.eye(n, dtype=int)):
        np.testing.assert_allclose(
            y, scipy_derivative(x, sigmas, orders, axes, mode=mode), **FLOAT64
        )
    for y, orders in zip(curvatures, second_orders(n)):
        np.testing.assert_allclose(
            y, scipy_derivative(x, sigmas, orders, axes, mode=mode), **FLOAT64
        )


@given(
    ndim=st.integers(1, 4),
    mode=st.sampled_from(MODES),
    truncate=st.sampled_from([2.0, 4.0, 5.5]),
    single=st.booleans(),
    large=st.booleans(),
    draw=st.data(),
)
def test_any_derivatives_along_any_axes_match_scipy(ndim, mode, truncate, single, large, draw):
    rng = np.random.default_rng(0)
    shape = [draw.draw(st.integers(12, 16)) for _ in range(ndim)]
    if large:
        shape[-1] = 66_000 // int(np.prod(shape[:-1])) + 1
    axes = draw.draw(st.permutations(range(ndim)))[: draw.draw(st.integers(1, ndim))]
    n = len(axes)
    orders = draw.draw(st.lists(st.tuples(*[st.integers(0, 3)] * n), min_size=1, max_size=4))
    sigmas = draw.draw(st.lists(st.sampled_from([0.7, 1.0, 2.0]), min_size=n, max_size=n))
    x = rng.standard_normal(shape).astype(np.float32 if single else np.float64)
    signed = [a - ndim if draw.draw(st.booleans()) else a for a in axes]
    ours = filters.gaussian_derivatives(
        x, sigmas, orders, mode=mode, axes=signed, truncate=truncate
    )
    assert ours.shape == (len(orders), *shape)
    assert ours.dtype == x.dtype
    # Third derivatives at scale 0.7 have taps of up to 4; their products along four axes add up.
    for y, order in zip(ours, orders):
        theirs = scipy_derivative(x, sigmas, order, axes, mode=mode, truncate=truncate)
        eps = float(np.finfo(x.dtype).eps)
        assert np.abs(y - theirs).max() <= 100 * eps * 3.0 ** sum(order)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", ["gaussian_laplace", "gaussian_gradient_magnitude"])
def test_sums_of_derivatives_match_scipy(rng, shape, name):
    x = rng.standard_normal(shape)
    ours = {
        "gaussian_laplace": filters.gaussian_laplace,
        "gaussian_gradient_magnitude": filters.gradient_magnitude,
    }[name]
    np.testing.assert_allclose(ours(x, [1.0, 2.0]), getattr(ndi, name)(x, [1.0, 2.0]), **FLOAT64)


@pytest.mark.parametrize("shape", SIZES)
def test_modes_may_differ_by_axis(rng, shape):
    x = rng.standard_normal(shape)
    for modes in itertools.product(MODES, repeat=2):
        for y, orders in zip(filters.hessian(x, 1.0, mode=modes), second_orders(2)):
            theirs = scipy_derivative(x, 1.0, orders, (0, 1), mode=modes)
            np.testing.assert_allclose(y, theirs, **FLOAT64)


@pytest.mark.parametrize("shape", SIZES)
def test_constant_border_is_an_image_of_that_value(rng, shape):
    x = rng.standard_normal(shape)
    padded = np.pad(x, 8, constant_values=3.0)
    ours = filters.hessian(x, 1.5, mode="constant", cval=3.0)
    inner = filters.hessian(padded, 1.5)[:, 8:-8, 8:-8]
    np.testing.assert_allclose(ours, inner, **FLOAT64)


@pytest.mark.parametrize("spacing", [1.0, 0.25, (0.5, 2.0)])
def test_derivatives_of_polynomials_are_exact_per_unit(spacing):
    hy, hx = np.broadcast_to(spacing, 2)
    y, x = np.ix_(hy * np.arange(60), hx * np.arange(70))
    image = 2 + 3 * y - 5 * x + 1.5 * y**2 - 2 * y * x + 0.5 * x**2
    sigma = [2 * hy, 2 * hx]
    options = {"spacing": spacing, "truncate": 10.0}
    # exp(-10**2 / 2) = 2e-22 is cut off; rounding of values of some 1e4, over h**2.
    at, tolerance = (slice(None), 30, 35), {"rtol": 0, "atol": 1e-8}
    yc, xc = 30 * hy, 35 * hx
    slopes = [3 + 3 * yc - 2 * xc, -5 - 2 * yc + xc]
    np.testing.assert_allclose(filters.gradient(image, sigma, **options)[at], slopes, **tolerance)
    np.testing.assert_allclose(
        filters.hessian(image, sigma, **options)[at], [3.0, -2.0, 1.0], **tolerance
    )
    laplacian = filters.gaussian_laplace(image, sigma, **options)[at[1:]]
    np.testing.assert_allclose(laplacian, 4.0, **tolerance)
    length = filters.gradient_magnitude(image, sigma, **options)[at[1:]]
    np.testing.assert_allclose(length, np.hypot(*slopes), **tolerance)


def test_sigma_is_in_the_unit_of_spacing(rng):
    x = rng.standard_normal((40, 50))
    for f, order in ((filters.gradient, 1), (filters.hessian, 2)):
        in_units = f(x, 3.0, spacing=2.0)
        np.testing.assert_allclose(in_units, f(x, 1.5) / 2.0**order, rtol=1e-12)


def test_taps_beyond_float32_keep_its_precision(rng):
    x = rng.random((40, 50), np.float32)
    with pytest.warns(RuntimeWarning, match="overflow"):
        tiny = filters.hessian(x, 1e-25, spacing=1e-25)  # taps of 1e50
    assert tiny.dtype == np.float32
    assert np.isinf(tiny).any()
    huge = filters.hessian(x, 1e30, spacing=1e30, dtype=np.float64)
    np.testing.assert_allclose(huge * 1e60, filters.hessian(x, 1.0, dtype=np.float64), rtol=1e-10)
    slopes = filters.gradient(x, 1e25, spacing=1e25)
    np.testing.assert_allclose(slopes * np.float32(1e25), filters.gradient(x, 1.0), **FLOAT32)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (bool, np.float32), (np.uint8, np.float32), (np.int16, np.float32),
        (np.float16, np.float32), (np.float32, np.float32), (np.int32, np.float64),
        (np.uint64, np.float64), (np.float64, np.float64), (">f4", np.float32), (">i4", np.float64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("f", FUNCTIONS)
def test_results_are_floating_point(rng, f, dtype, result):
    x = (rng.random((30, 40)) * 100).astype(dtype)
    y = f(x, 1.0)
    assert y.dtype == result
    np.testing.assert_allclose(y, f(x.astype(result), 1.0), rtol=0)
    for asked in (np.float32, np.float64):
        assert f(x, 1.0, dtype=asked).dtype == asked


def test_slopes_of_bytes_keep_their_sign():
    x = np.zeros((20, 40), np.uint8)
    x[:, 20:] = 200
    slope = filters.gradient(x[:, ::-1], 1.0)[1]
    assert slope.min() < -50
    assert slope.max() < 1e-4  # rounding of 200


@pytest.mark.parametrize("f", FUNCTIONS)
def test_views_and_sequences_are_images(rng, f):
    x = rng.random((60, 80))
    for view in (
        x[::2, ::-3],
        x.T,
        np.asfortranarray(x),
        x.tolist(),
        np.broadcast_to(x[0], x.shape),
    ):
        np.testing.assert_array_equal(f(view, 1.0), f(np.array(view), 1.0))


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_images_give_empty_results(f, shape):
    assert f(np.zeros(shape), 1.0).shape[-2:] == shape


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 2)])
def test_images_shorter_than_the_filter(rng, shape):
    x = rng.standard_normal(shape)
    for y, orders in zip(filters.hessian(x, 3.0), second_orders(2)):
        padded = np.pad(x, 15, "symmetric")
        theirs = scipy_derivative(padded, 3.0, orders, (0, 1))[15:-15, 15:-15]
        np.testing.assert_allclose(y, theirs, **FLOAT64)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinities_stay_under_the_taps(rng, shape, value):
    x = rng.standard_normal(shape)
    x[11, 15] = value
    reach = np.zeros(shape, bool)
    reach[7:16, 11:20] = True
    clean = filters.hessian(np.where(np.isfinite(x), x, 0), 1.0)
    y = filters.hessian(x, 1.0)
    np.testing.assert_allclose(y[:, ~reach], clean[:, ~reach], **FLOAT64)
    slope = filters.gradient(x, 1.0)[0]
    assert np.isfinite(slope[11]).all()  # the middle tap of a first derivative is 0
    assert not np.isfinite(slope[10, 15])


@pytest.mark.parametrize("f", FUNCTIONS)
def test_threads_do_not_change_bits(rng, f):
    x = rng.standard_normal((301, 251))
    np.testing.assert_array_equal(f(x, 1.0, threads=1), f(x, 1.0, threads=3))


def test_derivatives_do_not_touch_the_image(rng):
    x = rng.standard_normal((300, 300))
    x.flags.writeable = False
    for f in FUNCTIONS:
        f(x, 1.0)


@pytest.mark.parametrize("shape", [(30, 40), (301, 251), (12, 13, 14), (45, 46, 47)])
@pytest.mark.parametrize("mode", ["reflect", "constant", "wrap"])
def test_structure_tensor_is_the_smoothed_product_of_slopes(rng, shape, mode):
    x, n = rng.standard_normal(shape), len(shape)
    slopes = [
        scipy_derivative(x, 1.0, orders, range(n), mode=mode) for orders in np.eye(n, dtype=int)
    ]
    j = filters.structure_tensor(x, 1.0, 2.0, mode=mode)
    pairs = itertools.combinations_with_replacement(slopes, 2)
    for y, (a, b) in zip(j, pairs, strict=True):
        np.testing.assert_allclose(y, ndi.gaussian_filter(a * b, 2.0, mode=mode), **FLOAT64)


def test_structure_tensor_has_units(rng):
    x = rng.standard_normal((40, 50))
    ours = filters.structure_tensor(x, 0.5, 1.0, spacing=0.5)
    np.testing.assert_allclose(ours, 4 * filters.structure_tensor(x, 1.0, 2.0), rtol=1e-12)


def test_structure_tensor_is_positive_semidefinite(rng):
    j = filters.structure_tensor(rng.standard_normal((20, 21, 22)), 1.0, 2.0)
    assert filters.symmetric_eigenvalues(j).min() > 0


def symmetric_matrices(rng, kind, n, count=500):
    a = rng.standard_normal((count, n, n))
    if kind == "coinciding":
        q, d = np.linalg.qr(a)[0], np.ones(n)
        d[0] = 2
        a = q @ (d[:, None] * np.swapaxes(q, 1, 2))
    elif kind == "scaled":
        a *= 10.0 ** rng.integers(-30, 30, (count, 1, 1))
    elif kind == "graded":
        a *= 10.0 ** rng.integers(-8, 1, a.shape)
    elif kind == "integers":
        a = np.rint(a)
    elif kind == "diagonal":
        a *= np.eye(n)
    elif kind == "multiples of one":
        a = a[:, :1, :1] * np.eye(n)
    return (a + np.swapaxes(a, 1, 2)) / 2


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "kind",
    ["random", "coinciding", "scaled", "graded", "integers", "diagonal", "multiples of one"],
)
def test_eigenvalues_match_lapack(rng, n, kind, dtype):
    a = symmetric_matrices(rng, kind, n).astype(dtype).astype(np.float64)
    elements = a[:, *np.triu_indices(n)].T.astype(dtype)
    ours = filters.symmetric_eigenvalues(elements)
    assert ours.dtype == dtype
    assert ours.shape == (n, len(a))
    assert (np.diff(ours, axis=0) <= 0).all()
    # Backward errors of both: some roundings per rotation; then one rounding to the dtype.
    norms = np.linalg.norm(a, axis=(1, 2))
    limit = (20 * n * EPS + (0.6 * float(np.finfo(dtype).eps))) * norms
    assert (np.abs(ours - np.linalg.eigvalsh(a).T[::-1]).max(axis=0) <= limit).all()


def test_eigenvalues_keep_the_shape_and_nan(rng):
    h = filters.hessian(rng.standard_normal((5, 6, 7)), 1.0)
    assert filters.symmetric_eigenvalues(h).shape == (3, 5, 6, 7)
    assert filters.symmetric_eigenvalues(list(h)).shape == (3, 5, 6, 7)
    assert filters.symmetric_eigenvalues(np.zeros((6, 0))).shape == (3, 0)
    assert filters.symmetric_eigenvalues([0, 1, 0]).tolist() == [1.0, -1.0]
    for dtype in (np.float32, np.float64):
        h = h.astype(dtype)
        h[0, 2, 3, 4] = np.nan
        y = filters.symmetric_eigenvalues(h)
        assert np.isnan(y).any(axis=0).sum() == 1
        assert np.isnan(y[:, 2, 3, 4]).all()


@pytest.mark.parametrize("shape", [(60, 70), (24, 25, 26)])
@pytest.mark.parametrize("f", FUNCTIONS[:5])
def test_dask_arrays_are_lazy(rng, f, shape):
    da = pytest.importorskip("dask.array")
    x = rng.standard_normal(shape)
    y = f(da.from_array(x, chunks=20), 1.0)
    assert isinstance(y, da.Array)
    np.testing.assert_allclose(y.compute(), f(x, 1.0), **FLOAT64)
    assert f(da.from_array(x.astype(np.uint8), chunks=20), 1.0).dtype == np.float32


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": -1.0}, r"sigma must be above 0, got -1.0"),
        ({"sigma": 0}, r"sigma must be above 0, got 0"),
        ({"sigma": np.nan}, r"sigma must be above 0, got nan"),
        ({"sigma": np.inf}, r"sigma must be above 0, got inf"),
        ({"sigma": [1.0, 2.0, 3.0]}, r"sigma must be one number, or one per axis, 2, got 3"),
        ({"sigma": [1.0, 0.1]}, r"sigma must be at least 0.125 with truncate 4 and spacing 1"),
        ({"sigma": 1e9}, r"sigma must be at most 2.62e\+05 with truncate 4 and spacing 1"),
        ({"spacing": 0.0}, r"spacing must be above 0, got 0.0"),
        ({"spacing": [1.0]}, r"spacing must be one number, or one per axis, 2, got 1"),
        ({"spacing": np.nan}, r"spacing must be above 0"),
        ({"spacing": 1e3}, r"must be at least 125 with truncate 4 and spacing 1000"),
        ({"truncate": 0.0}, r"truncate must be above 0"),
        ({"truncate": [1, 2]}, r"truncate must be one number"),
        ({"axes": [0, 0]}, r"axes must be different and between -2 and 1"),
        ({"axes": [0, 2]}, r"axes must be different and between -2 and 1"),
        ({"axes": [0, 1, -1]}, r"axes must be at most 2"),
        ({"axes": []}, r"axes must name at least one axis"),
        ({"mode": "zero"}, r"mode must be one of"),
        ({"mode": ["reflect"]}, r"mode must be one name, or one per axis, 2, got 1"),
        ({"mode": 3}, r"mode must be one of"),
        ({"mode": "constant", "cval": np.nan}, r"cval must be finite"),
        ({"threads": 0}, r"threads must be between 1 and 2147483647, got 0"),
        ({"image": np.float64(3)}, r"image must have at least one axis"),
    ],
)
def test_wrong_values_get_one_sentence(f, options, message):
    options = {"image": np.zeros((20, 20)), "sigma": 1.0, **options}
    with pytest.raises(ValueError, match=message):
        f(options.pop("image"), options.pop("sigma"), **options)


@pytest.mark.parametrize("f", FUNCTIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.zeros((9, 9), complex)}, r"image must be floating-point, integers or bool"),
        ({"image": np.zeros((9, 9), "O")}, r"image must be floating-point, integers or bool"),
        ({"image": np.ma.zeros((9, 9))}, r"image must be a plain array, got a masked array"),
        ({"sigma": "wide"}, r"sigma must be a real number, got 'wide'"),
        ({"sigma": None}, r"sigma must be a real number, got None"),
        ({"dtype": np.int32}, r"dtype must be float32 or float64, got int32"),
        ({"dtype": "half"}, r"dtype must be float32 or float64, got float16"),
        ({"dtype": "wide"}, r"dtype must be float32 or float64, got 'wide'"),
        ({"axes": 0.5}, r"axes must be an integer"),
        ({"cval": "x"}, r"cval must be a real number"),
        ({"threads": 1.5}, r"threads must be an integer"),
    ],
)
def test_wrong_types_get_one_sentence(f, options, message):
    options = {"image": np.zeros((20, 20)), "sigma": 1.0, **options}
    with pytest.raises(TypeError, match=message):
        f(options.pop("image"), options.pop("sigma"), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: filters.gaussian_derivatives(x, 1, []), "orders must not be empty"),
        (lambda x: filters.gaussian_derivatives(x, 1, None), "orders must be a sequence, got None"),
        (lambda x: filters.gaussian_derivatives(x, 1, (0, 1)), "orders must be sequences"),
        (lambda x: filters.gaussian_derivatives(x, 1, [(0, -1)]), "orders must not be negative"),
        (lambda x: filters.gaussian_derivatives(x, 1, [(0, 1, 1)]), "orders must have 2 entries"),
        (lambda x: filters.structure_tensor(x, 1, 0), "rho must be above 0, got 0"),
        (lambda x: filters.structure_tensor(x, 1, 0.1), "rho must be at least 0.125"),
        (lambda x: filters.structure_tensor(x, 1, [1]), "rho must be one number, or one per axis"),
        (lambda x: filters.symmetric_eigenvalues(np.zeros((5, 2))), "elements must number 1, 3, 6"),
        (lambda x: filters.symmetric_eigenvalues(3.0), "elements must number 1, 3, 6"),
        (lambda x: filters.symmetric_eigenvalues([]), "elements must number 1, 3, 6"),
    ],
)
def test_arguments_of_single_functions(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(np.zeros((20, 20)))


def test_eigenvalues_of_complex_or_lazy_matrices_are_refused():
    with pytest.raises(TypeError, match="elements must be real"):
        filters.symmetric_eigenvalues(np.zeros(3, complex))
    da = pytest.importorskip("dask.array")
    with pytest.raises(TypeError, match="got a Dask array: use its map_blocks"):
        filters.symmetric_eigenvalues(da.zeros((3, 4)))


def test_labelled_arrays_give_plain_ones(rng):
    xarray = pytest.importorskip("xarray")
    x = rng.random((20, 30))
    for f in FUNCTIONS:
        y = f(xarray.DataArray(x), 1.0)
        assert type(y) is np.ndarray
        np.testing.assert_array_equal(y, f(x, 1.0))


class FileArray:
    """Array of a file, which a conversion would read."""

    shape, dtype = (20, 20), np.dtype(float)

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("the file was read")


def test_arrays_of_files_are_not_read():
    x = np.zeros((20, 20))
    calls = [lambda f=f: f(FileArray(), 1.0) for f in FUNCTIONS]
    calls += [
        lambda: filters.symmetric_eigenvalues(FileArray()),
        lambda: filters.correlate_bank(FileArray(), [np.ones((3, 3))]),
        lambda: filters.correlate_bank(x, [FileArray()]),
        lambda: filters.normalised_correlate(FileArray(), np.ones((3, 3))),
        lambda: filters.normalised_correlate(x, np.ones((3, 3)), mask=FileArray()),
        lambda: filters.normalised_correlate(x, np.ones((3, 3)), weights=FileArray()),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"must be an array in memory.*numpy.asarray"):
            call()


def test_passes_that_derivatives_share_run_once():
    orders = second_orders(3)
    kernels = [tuple(bytes([o]) * 8 for o in order) for order in orders]
    tree = shared.as_tree(kernels)
    below = [node for child in tree.values() for node in child.values()]
    assert (len(tree), len(below), sum(map(len, below))) == (3, 6, 6)


def test_a_border_value_that_is_not_used_need_not_be_finite(rng):
    x = rng.random((20, 30))
    expected = filters.hessian(x, 1.0, mode="nearest")
    np.testing.assert_array_equal(filters.hessian(x, 1.0, mode="nearest", cval=np.nan), expected)
