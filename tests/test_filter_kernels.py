"""Standard kernels against scipy.ndimage and their definitions; ranks; `lowrank filter`."""

import itertools
import math
import re
import sys

import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given
from hypothesis import strategies as st

from lowrank import filters

# Sums of at most 2000 products of order 1 in float64: eps * 2000, with a margin.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
SIZES = st.floats(0.4, 3.0)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_kernels_match_scipy(rng, ndim):
    x = rng.standard_normal((17, 15, 16)[:ndim])
    for axis in range(-ndim, ndim):
        for ours, theirs in ((filters.sobel, ndi.sobel), (filters.prewitt, ndi.prewitt)):
            got = ndi.correlate(x, ours(axis, ndim=ndim))
            np.testing.assert_allclose(got, theirs(x, axis), **CLOSE)
    np.testing.assert_allclose(
        ndi.correlate(x, filters.laplacian(ndim=ndim)), ndi.laplace(x), **CLOSE
    )
    for size in (3, 4):
        got = ndi.correlate(x, filters.box(size, ndim=ndim))
        np.testing.assert_allclose(got, ndi.uniform_filter(x, size), **CLOSE)
    wide, narrow = ndi.gaussian_filter(x, 1.6), ndi.gaussian_filter(x, 1.0)
    np.testing.assert_allclose(
        ndi.correlate(x, filters.dog(1.0, ndim=ndim)), narrow - wide, **CLOSE
    )
    np.testing.assert_allclose(
        ndi.correlate(x, filters.unsharp(1.0, amount=0.7, ndim=ndim)),
        x + 0.7 * (x - narrow),
        **CLOSE,
    )


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    ("make", "smooth"), [(filters.sobel, 4), (filters.prewitt, 3), (filters.scharr, 16)]
)
def test_derivative_filters_respond_to_slopes_along_their_axis_only(make, smooth, ndim):
    ramps = np.indices((3,) * ndim).astype(float)
    for axis, along in itertools.product(range(ndim), repeat=2):
        kernel = make(axis, ndim=ndim)
        slope = 2 * smooth ** (ndim - 1) if axis == along else 0
        assert (kernel * ramps[along]).sum() == slope
        assert kernel.sum() == 0


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_laplacians_measure_the_curvature(ndim):
    off = np.indices((3,) * ndim) - 1
    for connectivity in range(1, ndim + 1):
        kernel = filters.laplacian(ndim=ndim, connectivity=connectivity)
        assert kernel.sum() == 0
        assert all((kernel * t).sum() == 0 for t in off)
        neighbours = (np.abs(off).sum(0) <= connectivity).sum()
        assert np.count_nonzero(kernel) == neighbours
        if connectivity in (1, ndim):
            scale = 1 if connectivity == 1 else 3 ** (ndim - 1)
            assert all((kernel * t**2).sum() == 2 * scale for t in off)


@given(sigma=st.tuples(SIZES, SIZES), angle=st.floats(-4, 4))
def test_rotated_gaussian_has_the_rotated_covariance(sigma, angle):
    kernel = filters.gauss(np.add(sigma, 1.0), angle=angle, truncate=6.0)
    across, along = np.add(sigma, 1.0)
    ahead, beside = [math.sin(angle), math.cos(angle)], [math.cos(angle), -math.sin(angle)]
    covariance = along**2 * np.outer(ahead, ahead) + across**2 * np.outer(beside, beside)
    t = [np.arange(n) - n // 2 for n in kernel.shape]
    y, x = np.meshgrid(*t, indexing="ij")
    found = [[(kernel * a * b).sum() for b in (y, x)] for a in (y, x)]
    # sampled at more than one standard deviation per sample, truncated at six: both errors < 1e-6
    np.testing.assert_allclose(found, covariance, rtol=0, atol=1e-6 * along**2 * across**2)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(
        kernel, np.flip(kernel), rtol=1e-12
    )  # symmetric: does not shift the image


def test_gaussian_rotated_by_right_angles_is_separable():
    plain = filters.gauss([1.0, 3.0])
    for quarters, expected in enumerate([plain, plain.T, plain, plain.T]):
        rotated = filters.gauss([1.0, 3.0], angle=quarters * math.pi / 2)
        # rounding of the sine at a right angle, times the exponent at 4 standard deviations
        np.testing.assert_allclose(rotated, expected, rtol=1e-13)
        assert filters.rank(rotated) == 1
    np.testing.assert_array_equal(filters.gauss(2.0, angle=0.3), filters.gauss(2.0))


def test_singular_values_of_a_rotated_gaussian_follow_mehler():
    sigma, angle = (3.0, 6.0), 0.5
    c, s = math.cos(angle), math.sin(angle)
    a, b, d = (
        c * c / sigma[0] ** 2 + s * s / sigma[1] ** 2,
        c * s * (1 / sigma[1] ** 2 - 1 / sigma[0] ** 2),
        s * s / sigma[0] ** 2 + c * c / sigma[1] ** 2,
    )
    beta = abs(b) / math.sqrt(a * d)
    rho = (1 - math.sqrt(1 - beta**2)) / beta
    found = np.linalg.svd(filters.gauss(sigma, angle=angle, truncate=6.0), compute_uv=False)
    # the formula is for an infinite plane; truncation at 6 deviations removes less than 1e-6
    np.testing.assert_allclose(found[1:6] / found[:5], rho, rtol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "rank"),
    [
        (filters.gauss([1.0, 2.5]), 1),
        (filters.box([3, 4]), 1),
        (filters.prewitt(0), 1),
        (filters.scharr(), 1),
        (filters.motion(9), 1),
        (filters.laplacian(), 2),
        (filters.laplacian(connectivity=2), 2),
        (filters.log(1.5), 2),
        (filters.dog(1.5), 2),
        (filters.unsharp(1.5), 2),
        (filters.box(3, ndim=3), 1),
        (filters.scharr(1, ndim=3), 1),
        (filters.dog(1.0, ndim=3), 2),
        (filters.unsharp(1.0, ndim=3), 2),
        (filters.laplacian(ndim=3, connectivity=3), 2),
        (filters.gabor(2.0, 5.0, angle=0.7), 2),
        ([1.0, 2.0], 1),
        (np.zeros((3, 4)), 0),
    ],
)
def test_ranks_are_as_documented(kernel, rank):
    assert filters.rank(kernel) == rank


@given(
    shape=st.lists(st.integers(3, 7), min_size=2, max_size=3),
    terms=st.integers(1, 3),
    scale=st.sampled_from([1e-150, 1e-4, 1.0, 1e150]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_rank_counts_terms_at_any_scale(shape, terms, scale, dtype):
    if dtype == np.float32:
        scale = math.copysign(min(max(scale, 1e-30), 1e30), scale)
    rng = np.random.default_rng(0)
    lines = [np.linalg.qr(rng.standard_normal((n, n)))[0][:terms] for n in shape]
    kernel = sum(
        np.multiply.outer(np.multiply.outer(*t[:2]), t[2]) if len(t) == 3 else np.outer(*t)
        for t in zip(*lines)
    )
    assert filters.rank((kernel * scale).astype(dtype)) == terms


def test_rank_tolerance_is_relative():
    small = np.diag([1.0, 0.2]) * 1e-4
    assert filters.rank(small.astype(np.float32)) == 2
    assert filters.rank(small, tolerance=0.3) == 1
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        filters.rank(small, tolerance=-1.0)


def test_ball_is_a_symmetric_disk_in_3d():
    for radius in (0.5, 1.0, 2.3, 4.0):
        ball, disk = filters.ball(radius), filters.disk(radius)
        middle = ball[len(ball) // 2]
        np.testing.assert_array_equal(middle > 0, disk > 0)
        assert ball.sum() == pytest.approx(1)
        for axes in itertools.permutations(range(3)):
            np.testing.assert_array_equal(ball, ball.transpose(axes))
    # the samples of a large ball approximate its volume
    inside = np.count_nonzero(filters.ball(20.5))
    assert inside == pytest.approx(4 / 3 * math.pi * 20.5**3, rel=0.01)


def test_motion_kernel_is_as_large_as_its_line():
    assert filters.motion(9).shape == (1, 9)
    assert filters.motion(9, angle=math.pi / 2).shape == (9, 1)
    assert filters.motion(9, angle=-math.pi).shape == (1, 9)
    np.testing.assert_array_equal(filters.motion(1), [[1.0]])
    for length, angle in itertools.product((1, 2, 5, 8), np.linspace(-3, 3, 7)):
        kernel = filters.motion(length, angle=angle)
        assert all(n % 2 for n in kernel.shape)
        assert all(kernel.any(axis)[[0, -1]].all() for axis in (0, 1))  # no empty border
        np.testing.assert_allclose(kernel, np.flip(kernel), atol=1e-15)
        assert kernel.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: filters.gauss(0), "sigma must be above 0, got 0"),
        (lambda: filters.gauss([1.0, math.nan]), "sigma must be above 0, got nan"),
        (lambda: filters.gauss(1.0, ndim=0), "ndim must be at least 1, got 0"),
        (lambda: filters.gauss(1.0, truncate=0), "truncate must be above 0"),
        (lambda: filters.gauss(1.0, ndim=3, angle=0.1), "angle.* over 3"),
        (lambda: filters.gauss([1.0, 2.0], angle=math.inf), "angle must be finite"),
        (lambda: filters.box(0), "size must be at least 1, got 0"),
        (lambda: filters.box([]), "size must be at least 1"),
        (lambda: filters.sobel(2), "axis.*-2.*1, got 2"),
        (lambda: filters.prewitt(-4, ndim=3), "axis.*-3.*2, got -4"),
        (lambda: filters.laplacian(connectivity=3), "connectivity.*1.*2, got 3"),
        (lambda: filters.log(-1.0), "sigma must be above 0"),
        (lambda: filters.dog(1.0, ratio=1.0), "ratio must be above 1, got 1.0"),
        (lambda: filters.unsharp(1.0, amount=0), "amount must be above 0"),
        (lambda: filters.gabor(1.0, 0), "wavelength must be above 0"),
        (lambda: filters.ball(-1), "radius must be above 0, got -1"),
        (lambda: filters.motion(0), "length must be above 0"),
        (lambda: filters.motion(3, angle=math.nan), "angle must be finite, got nan"),
    ],
)
def test_invalid_parameters_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: filters.box(2.5), "size must be an integer"),
        (lambda: filters.sobel(0.5), "axis must be an integer"),
        (lambda: filters.log([1.0, 2.0]), "sigma must be a single number"),
    ],
)
def test_parameters_of_wrong_type_are_rejected(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, rng):
    """Run ``lowrank filter`` on a volume: (exit code, result or None, stderr)."""
    cli = pytest.importorskip("lowrank.cli")
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", rng.standard_normal((11, 12, 13)))

    def run(*words):
        line = ["lowrank", "filter", "v.npy", "--out", "out.npy", "--kernel", *words]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        found = np.load("out.npy") if ended.value.code == 0 else None
        return ended.value.code, found, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ("gauss --sigma 1,2 --angle 30", filters.gauss([1.0, 2.0], angle=math.pi / 6)),
        ("gauss --sigma 1,0.5,2", filters.gauss([1.0, 0.5, 2.0])),
        ("box --size 3,4", filters.box([3, 4])),
        ("scharr --axis 0 --ndim 3", filters.scharr(0, ndim=3)),
        ("prewitt --ndim 1", filters.prewitt(ndim=1)),
        ("laplacian --connectivity 2", filters.laplacian(connectivity=2)),
        ("dog --sigma 1 --ratio 2", filters.dog(1.0, ratio=2.0)),
        ("unsharp --sigma 1 --amount 0.5", filters.unsharp(1.0, amount=0.5)),
        ("disk --radius 2 --ndim 3", filters.ball(2.0)),
    ],
)
def test_command_options_reach_the_kernel(command, words, kernel):
    code, found, _ = command(*words.split())
    assert code == 0
    axes = range(np.ndim(kernel))
    expected = filters.correlate(np.load("v.npy"), kernel, axes=axes)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gauss --sigma 1,b", "--sigma must be one number.*'1,b'"),
        ("gauss --sigma 1,-2", "--sigma must be above 0"),
        ("log --sigma 1,2", "--sigma must be a single number"),
        ("gauss --ndim 3 --angle 5", "--angle must be"),
        ("box --size 0", "--size must be at least 1"),
        ("box --size 2.5", "--size must be"),
        ("scharr --axis 5", "--axis.*-2.*1, got 5"),
        ("laplacian --connectivity 0", "--connectivity.*1.*2"),
        ("laplacian --ndim 0", "--ndim must be at least 1"),
        ("dog --ratio 0.5", "--ratio must be above 1"),
        ("unsharp --amount 0", "--amount must be above 0"),
        ("motion --ndim 3", "--ndim must be 2 for motion, got 3"),
    ],
)
def test_command_errors_name_the_option(command, words, message):
    code, _, err = command(*words.split())
    assert code == 2
    assert re.search(message, err), err
