"""Choice of filter methods: their errors, bounds and predicted times."""

import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given
from hypothesis import strategies as st

import lowrank as lr
from lowrank import filters, perfmodel
from lowrank.filters import choose

KERNELS = {
    "gauss": filters.gauss(2.0),
    "log": filters.log(1.5),
    "disk": filters.disk(4),
    "noise": np.random.default_rng(0).standard_normal((7, 6)),
    "rotated": filters.gauss([3.0, 1.0], angle=0.5),
    "line": np.hanning(9),
    "ball": filters.ball(2),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tolerance", [None, 0.2])
def test_plan_chooses_the_fastest_method_within_the_tolerance(name, tolerance):
    kernel = KERNELS[name]
    shape = {1: (20_000,), 2: (150, 150), 3: (30, 30, 30)}[kernel.ndim]  # small ones run by MACs
    plan = filters.plan_filter(kernel, shape, tolerance=tolerance)
    assert [o.seconds for o in plan.methods] == sorted(o.seconds for o in plan.methods)
    allowed = [o for o in plan.methods if o.error <= plan.tolerance]
    assert plan.choice is allowed[0]
    assert {"direct", "fft"} <= {o.method for o in plan.methods}
    exact = [o for o in plan.methods if o.method != "separable"]
    assert all(o.error == o.grey == 0 for o in exact)
    for o in plan.methods:
        # the plan rounds the kernel to float32
        assert o.error == pytest.approx(
            o.chain.error(kernel[None, None].astype(np.float32)), abs=1e-9
        )


@pytest.mark.parametrize("name", KERNELS)
def test_every_method_is_within_its_bound(rng, name):
    kernel = KERNELS[name]
    image = 255 * rng.random((40, 37, 30)[: kernel.ndim])
    expected = ndi.correlate(image, kernel)
    plan = filters.plan_filter(kernel, image.shape, tolerance=0.3, dtype=np.float64)
    assert len(plan.methods) >= 2
    for o in plan.methods:
        run = choose.compile_method(o, image.shape, np.float64, 2)
        found = run(image[None, None], np.empty((1, 1, *image.shape)))[0, 0]
        # round-off of sums of at most 343 products of up to 255 * max|k|
        rounding = 1e-11 * np.abs(kernel).max()
        assert np.abs(found - expected).max() <= o.grey + rounding


@given(seed=st.integers(0, 50), rank=st.integers(1, 3))
def test_grey_bound_is_attained(seed, rank):
    kernel = np.random.default_rng(seed).standard_normal((5, 6))
    plan = filters.plan_filter(kernel, (9, 10), rank=rank, dtype=np.float64)
    (method,) = plan.methods
    error = method.chain.to_dense()[0, 0] - kernel
    reached = []
    for sign in (1, -1):
        # The worst case: 255 at the taps whose error has this sign.
        image = np.zeros((9, 10))
        image[2:7, 2:8] = 255 * (sign * error > 0)
        run = choose.compile_method(method, image.shape, np.float64, 1)
        found = run(image[None, None])[0, 0]
        reached.append(abs(found - ndi.correlate(image, kernel))[4, 5])
    assert max(reached) == pytest.approx(method.grey)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_with_nan_or_infinity_are_not_transformed(rng, value):
    kernel = rng.standard_normal((41, 41))
    image = rng.random((300, 300)).astype(np.float32)
    assert filters.plan_filter(kernel, image.shape).choice.method == "fft"
    image[150, 150] = value
    with np.errstate(invalid="ignore"):
        found = filters.correlate(image, kernel)
    assert np.isfinite(found).sum() == image.size - kernel.size


def test_interleaved_channels_are_priced_with_deinterleaving(rng):
    kernel = filters.gauss([3, 1], angle=0.5)
    k = np.ascontiguousarray(kernel, np.float32)
    conv = lr.dense(k[None, None], padding=[n // 2 for n in k.shape], padding_mode="symmetric")
    for channels in (3, 70):
        plans = [
            choose.choose_method(conv, (60, 50), 1e-5, channels=channels, interleaved=i)
            for i in (False, True)
        ]
        assert not any(o.interleaved for o in plans[0].methods)
        direct = [next(o for o in p.methods if o.method == "direct") for p in plans]
        seconds = choose.DEINTERLEAVE_SECONDS * channels * 60 * 50
        assert direct[1].seconds <= direct[0].seconds + seconds
        cube = rng.random((60, 50, channels)).astype(np.float32)
        expected = np.stack([ndi.correlate(cube[..., i], kernel) for i in range(channels)], -1)
        # 475 taps that sum to 1, of numbers up to 1 in float32
        np.testing.assert_allclose(filters.correlate(cube, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["direct", "separable", "fft"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("shape", [(50, 61), (50, 61, 3), (50, 61, 70)])
def test_all_methods_give_the_same_result(rng, method, dtype, shape):
    kernel = filters.disk(3.3)
    image = (200 * rng.random(shape)).astype(dtype)
    found = filters.correlate(image, kernel, method=method, mode="nearest")
    assert found.dtype == dtype
    assert found.shape == shape
    flat = image.astype(np.float64).reshape(50, 61, -1)
    planes = [ndi.correlate(flat[..., i], kernel, mode="nearest") for i in range(flat.shape[2])]
    expected = np.stack(planes, -1).reshape(shape)
    if np.issubdtype(dtype, np.integer):
        # a result close to a half may be rounded either way in float32
        assert np.abs(found - expected).max() <= 0.5 + 1e-3
    else:
        # float32: 37 products of up to 200/37, transforms of up to 10,000 points
        limit = 1e-3 if dtype == np.float32 else 1e-11
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def test_large_kernel_of_high_rank_chooses_fft():
    plan = filters.plan_filter(np.random.default_rng(0).standard_normal((61, 61)), (512, 512))
    assert plan.choice.method == "fft"
    assert all(b >= 61 for b in plan.choice.block)


def test_plan_prints_a_table():
    plan = filters.plan_filter(filters.disk(6), (256, 256), tolerance=0.1)
    head, columns, *rows = str(plan).splitlines()
    assert head.startswith("13x13 taps on 256x256, tolerance 0.1")
    assert columns.split()[:3] == ["method", "rank", "error"]
    assert len(rows) == len(plan.methods)
    assert sum(row.startswith("> ") for row in rows) == 1
    html = plan._repr_html_()
    assert html.count("<tr>") == len(rows) + 1
    assert "&gt; " in html


def test_frontier_is_an_html_table_in_notebooks():
    front = lr.frontier(lr.dense(np.ones((8, 8, 3, 3)), padding=1), (16, 16), ["spatial_svd", "cp"])
    html = front._repr_html_()
    assert html.count("<tr>") == len(front) + 1
    assert all(c.name in html for c in front)


def test_filter_image_rejects_other_than_pictures(rng):
    picture = rng.random((20, 30, 3)).astype(np.float32)
    found = lr.filter_image(picture, filters.gauss(1.0), mode="wrap")
    expected = filters.correlate(picture, filters.gauss(1.0), mode="wrap")
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=r"image must be \(height, width\)"):
        lr.filter_image(np.ones(5), filters.gauss(1.0))
    with pytest.raises(ValueError, match="kernel must have two axes"):
        lr.filter_image(picture, [1.0, 2.0, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance.*at least 0"),
        ({"tolerance": float("nan")}, "tolerance.*at least 0"),
        ({"tolerance": 1}, "tolerance must be at least 0 and below 1, got 1"),
        ({"method": "magic"}, "one of auto, direct, separable, fft, multirate, got 'magic'"),
        ({"method": "multirate"}, "auto, direct, separable or fft in a plan, got 'multirate'"),
        ({"shape": (8, 0)}, "shape must be at least 1"),
        ({"shape": (8,)}, "shape"),
        ({"mode": "mirrored"}, "mode must be one of"),
        ({"rank": 99}, "rank"),
        ({"rank": 1, "method": "fft"}, "method must be auto or separable"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"threads": -1}, "threads must be between 1 and 2147483647"),
    ],
)
def test_invalid_plan_arguments_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        filters.plan_filter(**{"kernel": filters.disk(3), "shape": (30, 30), **options})


def test_missing_separable_form_raises():
    noise = np.random.default_rng(0).standard_normal((3, 3))
    with pytest.raises(ValueError, match=r"no separable form .* fewer MACs .* rank .* has error"):
        filters.plan_filter(noise, (30, 30), tolerance=1e-5, method="separable")
    assert filters.plan_filter(noise, (30, 30), rank=3).choice.error < 1e-6


def test_rank_does_not_depend_on_scale():
    for scale in (1e-30, 1.0, 1e30):
        assert filters.rank(scale * filters.gauss(1.0)) == 1
        assert filters.rank(scale * np.random.default_rng(0).standard_normal((3, 3))) == 3
        plan = filters.plan_filter(scale * KERNELS["noise"], (50, 50), dtype=np.float64)
        exact = [o for o in plan.methods if o.error <= plan.tolerance and o.method == "separable"]
        assert all(max(o.rank) >= 6 for o in exact)


def test_predicted_time_of_transforms_grows_with_the_image():
    here = perfmodel.current()
    small, large = (here.predict_fft((9, 9), (n, n), (64, 64), 1).seconds for n in (128, 1024))
    assert 0 < small < large


@pytest.mark.parametrize("shape", [(5,), (1, 9), (9, 1), (2, 2), (1, 1), (1, 3, 1)])
@pytest.mark.parametrize("size", [12, 300])
def test_outer_products_of_any_shape_have_a_separable_form(shape, size):
    kernel = np.ones(shape)
    image = np.random.default_rng(0).random((size, *(20,) * (len(shape) - 1)))
    expected = ndi.correlate(image, kernel)
    found = filters.correlate(image, kernel, method="separable")
    np.testing.assert_allclose(found, expected, rtol=1e-13)
