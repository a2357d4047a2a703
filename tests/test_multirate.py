"""Gaussians by resampling: the kernel on every instruction set, and the promised errors."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage as ndi

from lowrank import filters
from lowrank._kernels import _core
from lowrank.filters import multirate

MODES = {
    "constant": "constant", "symmetric": "reflect", "reflect": "mirror", "replicate": "nearest",
    "circular": "wrap",
}  # fmt: skip
PADDING = {
    "symmetric": "symmetric", "reflect": "reflect", "replicate": "edge", "circular": "wrap",
}  # fmt: skip


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("border", MODES)
@pytest.mark.parametrize("shape", [(1, 9, 1), (37, 50, 1), (5, 21, 3), (2, 30, 70), (1, 4, 1500)])
def test_resampling_equals_matrix_products(rng, isa, dtype, border, shape):
    images, n, inner = shape
    x = rng.standard_normal(shape).astype(dtype)
    before, taps, lists = 3, 7, 4
    starts = sorted(int(i) for i in rng.integers(0, n + 4, 13))
    kinds = [int(i) for i in rng.integers(0, lists, 13)]
    weights = rng.standard_normal((lists, taps)).astype(dtype)
    out = np.full((images, 13, inner), np.nan, dtype)
    _core.resample(x, out, dtype, shape, starts, kinds, weights, before, border, 0.7, isa=isa)
    behind = starts[-1] + taps - before - n
    widths = [(0, 0), (before, max(behind, 0)), (0, 0)]
    if border == "constant":
        padded = np.pad(x.astype(float), widths, constant_values=0.7)
    else:
        padded = np.pad(x.astype(float), widths, PADDING[border])
    for i, (start, kind) in enumerate(zip(starts, kinds)):
        w = weights[kind].astype(float)[:, None]
        rows = padded[:, start : start + taps]
        bound = (taps + 1) * np.finfo(dtype).eps * (np.abs(w) * np.abs(rows)).sum(1)
        assert (np.abs(out[:, i] - (w * rows).sum(1)) <= bound).all()


@pytest.mark.parametrize("sigma", [6.0, 7.3, 10.0, 20.0, 50.0, 100.0])
@pytest.mark.parametrize("truncate", [4.0, 6.0])
def test_promised_error_is_that_of_the_impulse_responses(sigma, truncate):
    taps = filters.gauss(sigma, ndim=1, truncate=truncate).factors[0]
    promised = multirate.kernel_error([taps])
    # At 4 sigma the taps that are cut off have 1.4e-4 of the norm.
    assert promised < (2e-4 if truncate == 4 else 2e-5)
    rate = multirate.fit(taps.tobytes()).rate
    n = 4 * len(taps)
    outputs = range(n // 2, n // 2 + rate)
    # Row i of the identity's filtered columns holds the taps of output i.
    responses = multirate.filter_gaussian(np.eye(n), [taps], [0], [0], "constant", 0.0)[outputs]
    errors = []
    for i, response in zip(outputs, responses):
        expected = np.zeros(n)
        expected[i - len(taps) // 2 : i + 1 + len(taps) // 2] = taps
        errors.append(np.linalg.norm(response - expected) / np.linalg.norm(taps))
    assert max(errors) == pytest.approx(promised, rel=1e-6)


@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("shape", [(50, 70), (300, 41), (80, 60, 3), (9, 200), (1, 70)])
@pytest.mark.parametrize("sigma", [6.0, 21.0, (8.0, 40.0)])
def test_every_border_is_that_of_the_kernel(rng, mode, shape, sigma):
    x = rng.random(shape)
    kernel = filters.gauss(sigma)
    origin = [2, -5]
    out = filters.correlate(x, kernel, method="multirate", mode=mode, cval=0.3, origin=origin)
    expected, size = x, np.maximum(np.abs(x), 0.3)
    for axis, (f, o) in enumerate(zip(kernel.factors, origin)):
        expected = ndi.correlate1d(expected, f, axis, mode=mode, cval=0.3, origin=o)
    # |error| <= norm of the taps' error * norm of the samples; the norm of all samples bounds that.
    norm = np.prod([np.linalg.norm(f) for f in kernel.factors])
    reach = np.prod([4 * len(f) for f in kernel.factors])
    bound = multirate.kernel_error(kernel.factors) * norm * np.sqrt(reach) * size.max()
    assert np.abs(out - expected).max() <= bound
    assert bound < 0.01
    flipped = filters.convolve(x, kernel, method="multirate", mode=mode, cval=0.3, origin=[-2, 5])
    np.testing.assert_array_equal(flipped, out)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float16", "float32", "float64"])
def test_constant_images_stay_constant(dtype):
    x = np.full((90, 100), 77, dtype)
    out = filters.correlate(x, filters.gauss(12.0), method="multirate")
    assert out.dtype == x.dtype
    np.testing.assert_allclose(out, 77, rtol=max(np.finfo(np.float32).eps * 8, 0))


def test_axes_threads_views_and_scaled_kernels(rng):
    x = rng.random((40, 300, 30))
    kernel = filters.gauss(9.0, ndim=1)
    expected = ndi.correlate1d(x, kernel.factors[0], 1)
    out = filters.correlate(x, kernel, axes=1, method="multirate")
    assert np.abs(out - expected).max() < 1e-4
    last = filters.correlate(x.transpose(0, 2, 1), kernel, axes=-1, method="multirate")
    np.testing.assert_allclose(last.transpose(0, 2, 1), out, rtol=1e-12)
    one = filters.correlate(x, filters.gauss(7.0, ndim=3), method="multirate", threads=1)
    two = filters.correlate(x, filters.gauss(7.0, ndim=3), method="multirate", threads=2)
    np.testing.assert_array_equal(one, two)
    scaled = filters.correlate(x, -3 * kernel.factors[0], axes=1, method="multirate")
    np.testing.assert_allclose(scaled, -3 * out, rtol=1e-12)
    plane = np.asarray(filters.gauss([8.0, 11.0]))
    given = filters.correlate(x, plane, axes=(0, 1), method="multirate")
    own = filters.correlate(x, filters.gauss([8.0, 11.0]), axes=(0, 1), method="multirate")
    np.testing.assert_allclose(given, own, rtol=1e-9)
    same = x.copy()
    assert filters.correlate(same, kernel, axes=1, method="multirate", out=same) is same
    np.testing.assert_array_equal(same, out)


def test_the_tolerance_admits_it(rng, monkeypatch):
    x, kernel = rng.random((300, 310)).astype(np.float32), filters.gauss(30.0)
    fast = filters.correlate(x, kernel, method="multirate")
    error = multirate.kernel_error(kernel.factors)
    np.testing.assert_array_equal(filters.correlate(x, kernel, tolerance=1.01 * error), fast)
    exact = filters.correlate(x, kernel)
    assert (filters.correlate(x, kernel, tolerance=0.99 * error) != fast).any()
    assert (exact != fast).any()
    x[5, 5] = np.nan  # the taps of the method reach further than those of the kernel
    assert np.isnan(filters.correlate(x, kernel, tolerance=0.01)).sum() < 126**2 + 1


def test_what_it_cannot_do_is_refused(rng):
    x = rng.random((60, 60))
    for kernel in (filters.gauss(5.0), filters.box(31), filters.sobel(), filters.disk(9)):
        with pytest.raises(ValueError, match="needs a Gaussian of sigma 6 or more"):
            filters.correlate(x, kernel, method="multirate")
    with pytest.raises(ValueError, match=r"tolerance must be at least 0\.000.* got 1e-06"):
        filters.correlate(x, filters.gauss(9.0), method="multirate", tolerance=1e-6)
    with pytest.raises(ValueError, match="method must be auto or separable if rank is given"):
        filters.correlate(x, filters.gauss(9.0), method="multirate", rank=1)
    with pytest.raises(ValueError, match="mode must be one of"):
        filters.correlate(x, filters.gauss(9.0), method="multirate", mode="odd")


def test_wrong_arguments_of_the_kernel_are_refused():
    x, out, w = np.ones((4, 5)), np.empty((2, 5)), np.ones((1, 3))
    shape = (1, 4, 5)
    with pytest.raises(ValueError, match="starts must be at least 0 and in ascending order"):
        _core.resample(x, out, "float64", shape, [1, 0], [0, 0], w, 0, "reflect")
    with pytest.raises(ValueError, match="lists must be 2 indices below 1"):
        _core.resample(x, out, "float64", shape, [0, 1], [0, 1], w, 0, "reflect")
    with pytest.raises(ValueError, match="must have 20 and 15 samples, got 20 and 10"):
        _core.resample(x, out, "float64", shape, [0, 1, 2], [0, 0, 0], w, 0, "reflect")
    with pytest.raises(TypeError, match="dtype must be float32 or float64"):
        _core.resample(x, out, "uint8", shape, [0, 1], [0, 0], w, 0, "reflect")
    with pytest.raises(ValueError, match="weights must have the shape"):
        _core.resample(x, out, "float64", shape, [0, 1], [0, 0], w[0], 0, "reflect")


LIMITED = """
import resource
import numpy as np
from lowrank._kernels import _core
x, out, taps = np.ones((1, 1 << 21)), np.empty((1, 2)), np.ones((1, 5))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), hard))
try:
    _core.resample(x, out, "float64", (1, 1 << 21, 1), [0, 1], [0, 0], taps, 0, "reflect")
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
_core.resample(x, out, "float64", (1, 1 << 21, 1), [0, 1], [0, 0], taps, 0, "reflect")
print((out == 5).all())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_resampling_runs_after_it_lacked_memory():
    run = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"not enough memory to resample .* samples\nTrue\n", run.stdout), run
