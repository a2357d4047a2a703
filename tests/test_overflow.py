"""Samples and taps near the largest and smallest numbers: as finite as direct sums."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

import lowrank as lr
from lowrank import filters
from lowrank._kernels.toom_cook import matrices, range_gain
from lowrank.core import chain_algebra
from lowrank.engine import fourier
from lowrank.filters import multirate

TYPES = [np.float32, np.float64]
SIZE = (12, 13)


def largest(dtype):
    return float(np.finfo(dtype).max)


def count_bad(x):
    return int(np.count_nonzero(~np.isfinite(x)))


def direct(x, w):
    """Return the direct sums of a convolution with padding 1, in the precision of `x`."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(x), len(w), *x.shape[2:]), x.dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for c, i, j in itertools.product(*map(range, w.shape[1:])):
            part = padded[:, None, c, i : i + x.shape[2], j : j + x.shape[3]]
            y += w[None, :, c, i, j, None, None] * part
    return y


def unbalanced(f, shift):
    """Return a chain with its first weight times 2^shift and its last one divided by it."""
    first, *rest, last = f.stages
    first = replace(first, weight=np.ldexp(first.weight, shift))
    last = replace(last, weight=np.ldexp(last.weight, -shift))
    return replace(f, stages=(first, *rest, last))


CHAINS = {
    "spatial_svd": lambda conv: lr.spatial_svd(conv, 5),
    "channel_svd": lambda conv: lr.channel_svd(conv, 5, "input"),
    "cp": lambda conv: lr.cp(conv, 6),
    "tucker": lambda conv: lr.tucker(conv, (5, 5)),
    "tensor_train": lambda conv: lr.tensor_train(conv, (5, 5, 5)),
    "kronecker": lambda conv: lr.kronecker(conv, 3, "2x2x3x3 first"),
}


@pytest.mark.filterwarnings("ignore:.*has not converged")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("family", CHAINS)
@pytest.mark.parametrize("shift", [0, 30, -30, 90])
def test_chains_overflow_no_earlier_than_their_kernel(rng, family, dtype, shift):
    conv = lr.dense(rng.standard_normal((8, 8, 3, 3)).astype(dtype) / 64, padding=1)
    f = unbalanced(CHAINS[family](conv), shift)
    w = f.to_dense()
    # The absolute taps of an output add up to 0.9 or so: direct sums stay finite.
    share = 0.3 / max(1.0, float(np.abs(w).reshape(8, -1).sum(1).max()))
    x = (rng.uniform(-1, 1, (1, 8, *SIZE)) * largest(dtype) * share).astype(dtype)
    assert count_bad(direct(x, w)) == 0
    assert count_bad(f.compile(SIZE, dtype, threads=1, algorithm="direct")(x)) == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_small_samples_do_not_vanish_in_chains(rng, dtype):
    conv = lr.dense(rng.standard_normal((8, 8, 3, 3)).astype(dtype), padding=1)
    f = unbalanced(lr.spatial_svd(conv, 5), -60)
    x = (rng.uniform(1, 2, (1, 8, *SIZE)) * float(np.finfo(dtype).tiny)).astype(dtype)
    y = f.compile(SIZE, dtype, threads=1)(x)
    assert np.count_nonzero(y == 0) <= np.count_nonzero(direct(x, f.to_dense()) == 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_levelled_stages_have_the_same_bits(rng, transposed):
    weight = rng.standard_normal((6, 4, 3, 3)).astype(np.float32)
    conv = lr.dense(weight, padding=1, stride=2, groups=2, transposed=transposed)
    f = unbalanced(lr.spatial_svd(conv, 3), 9)
    stages = chain_algebra.levelled(f.stages)
    assert any((a.weight != b.weight).any() for a, b in zip(stages, f.stages))
    gains = [chain_algebra._gain(s) for s in stages[:-1]]
    assert all(0.25 <= g <= 1 + chain_algebra.ROUNDING for g in gains)
    x = rng.standard_normal((2, f.in_channels, *SIZE)).astype(np.float32)
    np.testing.assert_array_equal(replace(f, stages=stages)(x), f(x))


def test_the_gain_of_a_transposed_stage_is_that_of_its_matrix(rng):
    conv = lr.dense(rng.standard_normal((6, 4, 3)), groups=2, transposed=True)
    # Ones at every input that overlaps: all outputs far from borders add up all taps.
    x = np.ones((1, 6, 9))
    whole = replace(conv, stages=(replace(conv.stages[0], weight=abs(conv.stages[0].weight)),))
    assert chain_algebra._gain(conv.stages[0]) == pytest.approx(float(whole(x).max()))


def test_stages_whose_last_weight_would_overflow_are_kept():
    f = lr.spatial_svd(lr.dense(np.ones((2, 2, 3, 3), np.float32)), 1)
    first, last = f.stages
    first = replace(first, weight=first.weight * np.float32(1e30))
    last = replace(last, weight=last.weight * np.float32(1e30))
    assert chain_algebra.levelled((first, last)) == (first, last)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("channels", [16, 64])
def test_fast_algorithms_are_finite_up_to_their_gain(rng, dtype, channels):
    weight = rng.standard_normal((channels, channels, 3, 3)).astype(dtype)
    conv = lr.dense(weight / 3, padding=1)
    run = conv.compile((24, 24), dtype, threads=1)
    fast = run.fast_algorithms(0)
    if not fast:
        pytest.skip("direct sums are faster here")
    gain = max(math.prod(range_gain(m, 3) for m in outputs if m > 1) for outputs, _ in fast)
    total = max(1.0, float(np.abs(conv.to_dense()).reshape(channels, -1).sum(1).max()))
    x = rng.choice([-1, 1], (2, channels, 24, 24)) * (0.99 * largest(dtype) / (gain * total))
    assert count_bad(run(x.astype(dtype))) == 0


@pytest.mark.parametrize(("outputs", "taps"), [(2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (2, 7)])
def test_no_value_of_an_algorithm_exceeds_its_gain(rng, outputs, taps):
    a, g, b = (np.array(m, float) for m in matrices(outputs, taps))
    for _ in range(50):
        tap = rng.standard_normal(taps)
        tap /= np.abs(tap).sum()
        inputs = b @ rng.choice([-1.0, 1.0], outputs + taps - 1)
        products = (g @ tap) * inputs
        largest_sum = np.abs(a * products).sum(1).max()  # of any order of additions
        largest_value = max(np.abs(inputs).max(), np.abs(products).max(), largest_sum)
        assert largest_value <= range_gain(outputs, taps)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("magnitude", [0.9, 1e-2, 1e-5])
def test_transforms_overflow_no_earlier_than_direct_sums(rng, dtype, magnitude):
    kernel = np.ones((15, 15)) / 225
    image = (rng.uniform(0.5, 1, (70, 80)) * largest(dtype) * magnitude).astype(dtype)
    y = fourier.plan(kernel, image.shape, dtype, mode="replicate", threads=1)(image[None, None])
    wanted = fourier.plan(kernel, image.shape, np.float64, mode="replicate", threads=1)
    unit = 2.0 ** (np.finfo(dtype).maxexp - 1)
    assert count_bad(y) == 0
    np.testing.assert_allclose(y / unit, wanted(image[None, None] / np.float64(unit)), rtol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("power", [-100, 100])
def test_transforms_of_large_and_small_taps(rng, dtype, power):
    kernel = rng.standard_normal((15, 15))
    image = rng.standard_normal((70, 80)).astype(dtype)
    y, plain = (
        fourier.plan(k, image.shape, dtype, threads=1)(image[None, None])
        for k in (np.ldexp(kernel, power), kernel)
    )
    np.testing.assert_array_equal(y, np.ldexp(plain, power))


def test_a_border_value_that_overflows_transforms(rng):
    kernel, image = np.ones((9, 9)) / 81, np.zeros((40, 40), np.float32)
    value = 0.9 * largest(np.float32)
    run = fourier.plan(kernel, image.shape, np.float32, mode="constant", value=value)
    assert count_bad(run(image[None, None])) == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("shift", [0, 40, -40])
def test_outer_products_overflow_no_earlier_than_direct_sums(rng, dtype, ndim, shift):
    line = np.array([1.0, 2.0, 3.0, 2.0, 1.0])  # its sums are 9: the first pass would overflow
    factors = [np.ldexp(line, shift), *[line / 9] * (ndim - 2), np.ldexp(line / 81, -shift)]
    image = (rng.uniform(0.5, 1, (20,) * ndim) * 0.9 * largest(dtype)).astype(dtype)
    for size in (20, 90):  # by passes alone, and by a plan
        tiled = np.tile(image, [1] * (ndim - 1) + [-(-size // 20)])
        assert count_bad(filters.separable_correlate(tiled, factors)) == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("magnitude", [0.9, 1e-2])
@pytest.mark.parametrize("method", ["auto", "direct", "separable"])
def test_filters_overflow_no_earlier_than_direct_sums(rng, dtype, magnitude, method):
    image = (rng.uniform(0.5, 1, (60, 70)) * magnitude * largest(dtype)).astype(dtype)
    for kernel in (np.ones((21, 21)) / 441, filters.disk(9.5)):
        kernel = np.asarray(kernel, dtype)
        y = filters.correlate(image, kernel / max(1.0, kernel.sum()), method=method)
        assert count_bad(y) == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_gaussians_at_a_lower_rate_overflow_no_earlier_than_direct_sums(rng, dtype):
    taps = np.exp(-0.5 * (np.arange(-60, 61) / 20) ** 2)
    taps /= taps.sum()
    image = (rng.uniform(0.5, 1, (150, 160)) * 0.9 * largest(dtype)).astype(dtype)
    y = multirate.filter_gaussian(image, (taps, taps), (0, 1), (0, 0), "symmetric", 0.0, 1)
    assert count_bad(y) == 0


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_errors_and_bounds_of_large_and_small_kernels_are_finite(rng, dtype, scale):
    weight = (rng.standard_normal((6, 5, 3, 3)) * scale).astype(dtype)
    conv = lr.dense(weight, padding=1)
    f = lr.spatial_svd(conv, 3)
    c = lr.certificate(conv, f)
    plain = lr.dense((weight / scale).astype(dtype), padding=1)
    assert c.error == pytest.approx(lr.certificate(plain, lr.spatial_svd(plain, 3)).error, rel=1e-4)
