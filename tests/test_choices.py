"""Filters that choose for themselves: the options, their errors and bounds, and what is taken."""

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
    "turned": filters.gauss([3.0, 1.0], angle=0.5),
    "line": np.hanning(9),
    "ball": filters.ball(2),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tolerance", [None, 0.2])
def test_the_fastest_within_the_tolerance_is_taken(name, tolerance):
    kernel = KERNELS[name]
    plan = filters.plan_filter(kernel, (60,) * kernel.ndim, tolerance=tolerance)
    assert [o.seconds for o in plan.options] == sorted(o.seconds for o in plan.options)
    allowed = [o for o in plan.options if o.error <= plan.tolerance]
    assert plan.choice is allowed[0]
    assert {"direct", "fft"} <= {o.method for o in plan.options}
    exact = [o for o in plan.options if o.method != "separable"]
    assert all(o.error == o.grey == 0 for o in exact)
    for o in plan.options:
        # in float32: the kernel itself is rounded to it
        assert o.error == pytest.approx(
            o.chain.error(kernel[None, None].astype(np.float32)), abs=1e-9
        )


@pytest.mark.parametrize("name", KERNELS)
def test_every_option_gives_what_it_promises(rng, name):
    kernel = KERNELS[name]
    image = 255 * rng.random((40, 37, 30)[: kernel.ndim])
    expected = ndi.correlate(image, kernel)
    plan = filters.plan_filter(kernel, image.shape, tolerance=0.3, dtype=np.float64)
    assert len(plan.options) >= 2
    for o in plan.options:
        run = choose.runner(o, image.shape, np.float64, 2)
        found = run(image[None, None], np.empty((1, 1, *image.shape)))[0, 0]
        # beside the bound, rounding of sums of at most 343 products of up to 255 * max|k|
        rounding = 1e-11 * np.abs(kernel).max()
        assert np.abs(found - expected).max() <= o.grey + rounding


@given(seed=st.integers(0, 50), rank=st.integers(1, 3))
def test_the_bound_in_grey_levels_is_attained(seed, rank):
    kernel = np.random.default_rng(seed).standard_normal((5, 6))
    plan = filters.plan_filter(kernel, (9, 10), rank=rank, dtype=np.float64)
    (option,) = plan.options
    missed = option.chain.to_dense()[0, 0] - kernel
    reached = []
    for sign in (1, -1):
        # Black and white as what is missed wants it, where the filter's centre sees all of it.
        image = np.zeros((9, 10))
        image[2:7, 2:8] = 255 * (sign * missed > 0)
        run = choose.runner(option, image.shape, np.float64, 1)
        found = run(image[None, None])[0, 0]
        reached.append(abs(found - ndi.correlate(image, kernel))[4, 5])
    assert max(reached) == pytest.approx(option.grey)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinities_do_not_spread_by_themselves(rng, value):
    kernel = rng.standard_normal((41, 41))
    image = rng.random((300, 300)).astype(np.float32)
    assert filters.plan_filter(kernel, image.shape).choice.method == "fft"
    image[150, 150] = value
    with np.errstate(invalid="ignore"):
        found = filters.correlate(image, kernel)
    assert np.isfinite(found).sum() == image.size - kernel.size


def test_planes_that_lie_together_are_priced_as_they_are_run(rng):
    kernel = filters.gauss([3, 1], angle=0.5)
    k = np.ascontiguousarray(kernel, np.float32)
    conv = lr.dense(k[None, None], padding=[n // 2 for n in k.shape], padding_mode="symmetric")
    for planes in (3, 70):
        plans = [
            choose.plan_of(conv, (60, 50), 1e-5, planes=planes, together=t) for t in (False, True)
        ]
        assert not any(o.woven for o in plans[0].options)
        direct = [next(o for o in p.options if o.method == "direct") for p in plans]
        apart = choose.MOVE * planes * 60 * 50
        assert direct[1].seconds <= direct[0].seconds + apart
        cube = rng.random((60, 50, planes)).astype(np.float32)
        expected = np.stack([ndi.correlate(cube[..., i], kernel) for i in range(planes)], -1)
        # 475 taps that sum to 1, of numbers up to 1 in float32
        np.testing.assert_allclose(filters.correlate(cube, kernel), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["direct", "separable", "fft"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("shape", [(50, 61), (50, 61, 3), (50, 61, 70)])
def test_every_method_gives_the_same(rng, method, dtype, shape):
    kernel = filters.disk(3.3)
    image = (200 * rng.random(shape)).astype(dtype)
    found = filters.correlate(image, kernel, method=method, mode="nearest")
    assert found.dtype == dtype
    assert found.shape == shape
    flat = image.astype(np.float64).reshape(50, 61, -1)
    planes = [ndi.correlate(flat[..., i], kernel, mode="nearest") for i in range(flat.shape[2])]
    expected = np.stack(planes, -1).reshape(shape)
    if np.issubdtype(dtype, np.integer):
        # a result that lies halfway may go either way after rounding in float32
        assert np.abs(found - expected).max() <= 0.5 + 1e-3
    else:
        # float32: 37 products of up to 200/37, transforms of up to 10,000 points
        limit = 1e-3 if dtype == np.float32 else 1e-11
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


def test_a_large_kernel_of_high_rank_goes_by_transforms():
    plan = filters.plan_filter(np.random.default_rng(0).standard_normal((61, 61)), (512, 512))
    assert plan.choice.method == "fft"
    assert all(b >= 61 for b in plan.choice.block)


def test_a_plan_prints_itself_as_a_table():
    plan = filters.plan_filter(filters.disk(6), (256, 256), tolerance=0.1)
    head, columns, *rows = str(plan).splitlines()
    assert head.startswith("13x13 taps on 256x256, tolerance 0.1")
    assert columns.split()[:3] == ["way", "rank", "error"]
    assert len(rows) == len(plan.options)
    assert sum(row.startswith("> ") for row in rows) == 1
    html = plan._repr_html_()
    assert html.count("<tr>") == len(rows) + 1
    assert "&gt; " in html


def test_a_frontier_is_a_table_in_notebooks_too():
    front = lr.frontier(lr.dense(np.ones((8, 8, 3, 3)), padding=1), (16, 16), ["spatial_svd", "cp"])
    html = front._repr_html_()
    assert html.count("<tr>") == len(front) + 1
    assert all(c.name in html for c in front)


def test_filter_image_takes_pictures_alone(rng):
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
        ({"tolerance": -0.1}, "tolerance must be a number, at least 0"),
        ({"tolerance": float("nan")}, "tolerance must be a number, at least 0"),
        ({"method": "magic"}, "method must be one of auto, direct, separable, fft, got 'magic'"),
        ({"shape": (8, 0)}, "shape must be at least 1"),
        ({"shape": (8,)}, "shape"),
        ({"mode": "mirrored"}, "mode must be one of"),
        ({"rank": 99}, "rank"),
        ({"rank": 1, "method": "fft"}, "rank asks for a separable form"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"threads": -1}, "threads must be at least 1"),
    ],
)
def test_plans_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        filters.plan_filter(**{"kernel": filters.disk(3), "shape": (30, 30), **options})


def test_no_separable_form_is_said_so():
    noise = np.random.default_rng(0).standard_normal((3, 3))
    with pytest.raises(ValueError, match=r"no separable form .* fewer multiply-adds .* that of"):
        filters.plan_filter(noise, (30, 30), tolerance=1e-5, method="separable")
    assert filters.plan_filter(noise, (30, 30), rank=3).choice.error < 1e-6
    with pytest.raises(ValueError, match="no separable form"):
        filters.correlate(np.ones(9), np.hanning(5), method="separable")


def test_separability_is_relative():
    for scale in (1e-30, 1.0, 1e30):
        assert filters.rank(scale * filters.gauss(1.0)) == 1
        assert filters.rank(scale * np.random.default_rng(0).standard_normal((3, 3))) == 3
        plan = filters.plan_filter(scale * KERNELS["noise"], (50, 50), dtype=np.float64)
        ways = [o for o in plan.options if o.error <= plan.tolerance and o.method == "separable"]
        assert all(max(o.rank) >= 6 for o in ways)


def test_transforms_have_predictions_of_their_own():
    here = perfmodel.current()
    small, large = (here.of_transforms((9, 9), (n, n), (64, 64), 1).seconds for n in (128, 1024))
    assert 0 < small < large
