"""Correlation by transforms, against scipy.ndimage and the engine."""

import math
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import scipy.fft
import scipy.ndimage as ndi
from hypothesis import given
from hypothesis import strategies as st

from lowrank import filters
from lowrank.engine import fourier
from lowrank.filters import arguments

MODES = ["reflect", "constant", "nearest", "mirror", "wrap"]
CVAL = 1.5


def plan(
    kernel, spatial, dtype=np.float32, mode="reflect", cval=0.0, origins=0, threads=None, block=None
):
    """Plan a filter with the arguments of scipy.ndimage."""
    kernel, cval = arguments.as_kernel(kernel), arguments.as_real("cval", cval)
    shifts = arguments.as_origins(origins, kernel.shape)
    before = [n // 2 + o for n, o in zip(kernel.shape, shifts)]
    return fourier.plan(
        kernel, spatial, dtype, before, arguments.as_padding_mode(mode), cval, threads, block
    )


def error_bound(run, kernel, largest):
    """Return the documented bound on the norm of the rounding error."""
    block = [a.block for a in run.axes]
    points, count = math.prod(block), math.prod(a.count for a in run.axes)
    gain = np.abs(scipy.fft.fftn(kernel, block)).max()
    eps = np.finfo(run.dtype).eps
    return eps * math.log2(2 * points) * gain * largest * math.sqrt(count * points)


def check(run, found, expected, kernel, image):
    largest = max(np.abs(image).max(), CVAL)
    assert np.linalg.norm(found - expected) <= error_bound(run, kernel, largest)


@st.composite
def problems(draw, smaller=False):
    """(kernel, image, block, origins, dtype): images at least, or less, as large as the kernel."""
    taps = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    longer = st.integers(-5, 0) if smaller else st.integers(0, 12)
    spatial = [max(n + draw(longer), 1) for n in taps]
    block = tuple(n + draw(st.integers(0, 9)) for n in taps)
    origins = tuple(draw(st.integers(-(n // 2), (n - 1) // 2)) for n in taps)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kernel, image = rng.standard_normal(taps), rng.standard_normal(spatial).astype(dtype)
    return kernel, image, block, origins, dtype


@given(
    problem=problems(),
    mode=st.sampled_from(MODES),
    threads=st.integers(1, 3),
    group=st.sampled_from([1, 500, fourier.GROUP_POINTS]),
)
def test_results_match_scipy(problem, mode, threads, group):
    kernel, image, block, origins, dtype = problem
    run = plan(kernel, image.shape, dtype, mode, CVAL, origins, threads, block)
    # images as small as these would go in one group, and in one thread
    with mock.patch.multiple(fourier, GROUP_POINTS=group, MIN_PARALLEL_SAMPLES=0):
        found = run(image[None, None])
    assert found.dtype == dtype
    expected = ndi.correlate(image.astype(np.float64), kernel, mode=mode, cval=CVAL, origin=origins)
    check(run, found[0, 0], expected, kernel, image)


@given(problem=problems(smaller=True), mode=st.sampled_from(MODES))
def test_kernels_larger_than_the_image_match_direct_correlation(problem, mode):
    kernel, image, block, origins, dtype = problem
    expected = filters.correlate(
        image.astype(np.float64), kernel, mode=mode, cval=CVAL, origin=origins
    )
    for size in (block, None):
        run = plan(kernel, image.shape, dtype, mode, CVAL, origins, block=size)
        check(run, run(image[None, None])[0, 0], expected, kernel, image)


def test_every_candidate_block_matches_scipy(rng):
    kernel, image = filters.disk(6.2), rng.standard_normal((1, 1, 150, 97)).astype(np.float32)
    expected = ndi.correlate(image[0, 0].astype(np.float64), kernel)
    offered = fourier.blocks(kernel.shape, image.shape[2:])
    assert len(offered) > 4
    for block in offered:
        run = plan(kernel, image.shape[2:], block=block)
        check(run, run(image)[0, 0], expected, kernel, image)


def test_rounding_error_is_bounded_by_the_norm_of_the_block(rng):
    kernel = rng.standard_normal((9, 9))
    image = rng.standard_normal((64, 64)).astype(np.float32)
    image[:16, :16] *= 1e6
    run = plan(kernel, image.shape, block=(24, 24))
    error = run(image[None, None])[0, 0] - ndi.correlate(image.astype(float), kernel)
    # Blocks give 16 x 16 outputs: those from 32 on see nothing of the bright corner ...
    dark = error_bound(run, kernel, np.abs(image[16:, 16:]).max())
    assert np.linalg.norm(error[32:, 32:]) <= dark
    # ... and those from 20 on do not either, but their block does.
    assert (
        dark < np.linalg.norm(error[20:32, 20:32]) <= error_bound(run, kernel, np.abs(image).max())
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [None, (40, 50), (300, 300)])
def test_results_do_not_depend_on_the_number_of_threads(rng, dtype, block):
    image = rng.standard_normal((3, 1, 203, 244)).astype(dtype)
    assert image.size > fourier.MIN_PARALLEL_SAMPLES
    kernel = rng.standard_normal((31, 21))
    one, *others = (
        plan(kernel, image.shape[2:], dtype, threads=n, block=block)(image) for n in (1, 2, 3, 7)
    )
    for other in others:
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("batch", [0, 1, 2, 50])
@pytest.mark.parametrize("spatial", [(5,), (300,), (20, 30), (9, 10, 11)])
def test_batches_match_scipy_per_image(rng, batch, spatial):
    kernel = rng.standard_normal((3, 4, 2)[: len(spatial)])
    image = rng.standard_normal((batch, 1, *spatial))
    out = np.full((batch, 1, *spatial[:-1], 2 * spatial[-1]), np.nan)[..., ::2]
    run = plan(kernel, spatial, np.float64)
    assert run(image, out) is out
    for x, y in zip(image, out):
        # sums of at most 24 products of order 1, transforms of at most 2000 points
        np.testing.assert_allclose(y[0], ndi.correlate(x[0], kernel), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_integers_are_rounded_and_saturated(rng, dtype, mode):
    limits = np.iinfo(dtype)
    image = rng.integers(limits.min, limits.max, (1, 1, 40, 41), dtype, endpoint=True)
    kernel = filters.unsharp(2.0)
    run = plan(kernel, image.shape[2:], np.float64, mode, 7.5, block=(30, 32))
    found = run(image, np.empty_like(image))
    exact = ndi.correlate(image[0, 0].astype(float), kernel, mode=mode, cval=7.5)
    expected = np.clip(np.rint(exact), limits.min, limits.max)
    np.testing.assert_array_equal(found[0, 0], expected.astype(dtype))  # none lies at a half
    assert (found == limits.max).any()


def test_one_plan_runs_in_several_threads_at_once(rng):
    images = rng.standard_normal((8, 1, 1, 90, 95))
    run = plan(rng.standard_normal((11, 12)), (90, 95), np.float64, block=(50, 50))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, images))
    for image, y in zip(images, found):
        np.testing.assert_array_equal(y, run(image))


@given(problem=problems())
def test_work_counts_match_the_plan(problem):
    kernel, image, block, *_ = problem
    found = fourier.work(kernel.shape, image.shape, block)
    run = plan(kernel, image.shape, block=block)
    assert found.transforms == 2 * math.prod(a.count for a in run.axes)
    assert found.points == math.prod(block)
    assert found.groups == len(run._tasks(1))
    kept = math.prod(a.count * a.valid for a in run.axes)
    assert kept >= image.size  # blocks cover the image
    assert found.bytes > 4 * (image.size + found.transforms * found.points)
    assert fourier.work(kernel.shape, image.shape, block, np.float64).bytes == 2 * found.bytes


@given(taps=st.integers(1, 100), size=st.integers(1, 5000))
def test_candidate_blocks_range_from_the_image_to_the_kernel(taps, size):
    (whole,), *parts = fourier.blocks([taps], [size])
    assert whole >= size + taps - 1
    for (block,) in parts:
        assert taps <= block <= whole
        assert 2 * (block - taps + 1) > block - 1  # at least about half of a block is kept
        assert block == scipy.fft.next_fast_len(block, real=True)


def test_default_block_minimises_operations():
    def operations(block):
        transforms, points, *_ = fourier.work((31, 31), (500, 700), block)
        return transforms * points * math.log2(points)

    run = plan(np.ones((31, 31)), (500, 700))
    chosen = tuple(a.block for a in run.axes)
    assert operations(chosen) == min(map(operations, fourier.blocks((31, 31), (500, 700))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": np.ones((0, 3))}, "kernel"),
        ({"kernel": [[np.inf]]}, "NaN or infinite"),
        ({"spatial": (8,)}, "spatial"),
        ({"spatial": (8, 0)}, "spatial .*at least 1"),
        ({"mode": "mirrored"}, "'mirrored'"),
        ({"origins": 2}, "origin must be .*-1"),
        ({"threads": 0}, "threads must be between 1 and 2147483647"),
        ({"block": (2, 9)}, "block must be at least the kernel's"),
        ({"block": (9, 9, 9)}, "block"),
    ],
)
def test_plan_rejects_wrong_values(change, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"kernel": np.ones((3, 3)), "spatial": (8, 9), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": np.int32}, "dtype must be float32 or float64, got int32"),
        ({"cval": 1j}, "cval must be a real number"),
        ({"threads": 1.5}, "threads must be an integer"),
        ({"kernel": np.ones((3, 3)) * 1j}, "kernel must be real"),
    ],
)
def test_plan_rejects_wrong_types(change, message):
    with pytest.raises(TypeError, match=message):
        plan(**{"kernel": np.ones((3, 3)), "spatial": (8, 9), **change})


def test_run_rejects_arrays_that_do_not_match_the_plan():
    run = plan(np.ones((3, 3)), (8, 9))
    image = np.zeros((2, 1, 8, 9), np.float32)
    with pytest.raises(TypeError, match="x must be an array of float32"):
        run(image.astype(np.float64))
    with pytest.raises(TypeError, match=r"x must be .* got list"):
        run([1.0])
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 8, 9\)"):
        run(image[:, 0])
    with pytest.raises(ValueError, match="out must have shape"):
        run(image, image[:1].copy())
    with pytest.raises(TypeError, match="out must be an array"):
        run(image, image.astype(np.int64))
