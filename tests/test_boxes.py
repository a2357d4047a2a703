"""Box filters: every instruction set and type against direct sums in float64."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage as ndi

from lowrank import filters, ndimage
from lowrank._kernels import _core
from lowrank.filters import boxes

MODES = {
    "constant": "constant", "symmetric": "reflect", "reflect": "mirror", "replicate": "nearest",
    "circular": "wrap",
}  # fmt: skip
#: (images, rows, columns, channels): whole vectors and remainders, lengths below the windows.
SHAPES = [
    (2, 5, 9, 1), (1, 33, 70, 1), (1, 40, 41, 3), (3, 20, 7, 2), (1, 1, 50, 1), (1, 50, 1, 1),
    (1, 70, 1100, 1), (1, 90, 1, 37),
]  # fmt: skip
#: Along rows and columns; windows along lines of up to 16 samples have a kernel of their own.
WINDOWS = [(3, 3), (1, 4), (6, 1), (7, 5), (15, 16), (2, 9), (31, 40), (1, 101), (64, 17), (5, 31)]


def direct(x, windows, border, cval=0.0):
    """Return the sums of windows (axis, size, before) in float64, and those of magnitudes."""
    total, size, fill = x.astype(float), np.abs(x.astype(float)), cval
    for axis, n, before in windows:
        if n > 1:
            options = {"mode": MODES[border], "origin": before - n // 2}
            total = ndi.correlate1d(total, np.ones(n), axis, cval=fill, **options)
            size = ndi.correlate1d(size, np.ones(n), axis, cval=abs(fill), **options)
            fill *= n
    return total, size


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("border", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_of_floats_err_by_no_more_than_direct_sums(rng, isa, dtype, border, shape):
    x = rng.standard_normal(shape).astype(dtype)
    for down, across in WINDOWS:
        if across > 1 and shape[3] >= _core.plane_limits(dtype, isa).lanes:
            continue
        b = int(rng.integers(down)), int(rng.integers(across))
        out, fill = np.full_like(x, np.nan), 0.7
        second = fill * 0.5 * down if down > 1 else fill
        _core.box(
            x, out, dtype, shape, (down, b[0], border, fill), (across, b[1], border, second),
            before=0.5, after=3.0, isa=isa,
        )  # fmt: skip
        total, size = direct(x, [(1, down, b[0]), (2, across, b[1])], border, fill)
        bound = (down + across + 2) * np.finfo(dtype).eps * 1.5 * (size + 1)
        assert (np.abs(out - 1.5 * total) <= bound).all(), (down, across)


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("border", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_means_of_integers_are_rounded_correctly(rng, isa, dtype, border, shape, monkeypatch):
    monkeypatch.setenv("LOWRANK_ISA", isa)
    x = rng.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)
    x[:, : shape[1] // 2] = x[:, : shape[1] // 2] % 2  # sums near halves
    mode = MODES[border]
    for down, across in WINDOWS:
        out = filters.correlate(x, filters.box([down, across]), mode=mode, cval=9, axes=(1, 2))
        windows = [(1, down, down // 2), (2, across, across // 2)]
        total, _ = direct(x, windows, border, 9.0)
        np.testing.assert_array_equal(out, np.rint(total / (down * across)), str((down, across)))


@pytest.mark.parametrize("area", range(2, 258))
def test_narrow_division_is_exact(area):
    multiplier, shift = boxes._narrow_division(area)
    n = np.arange(255 * area + 1)
    if multiplier:
        assert n[-1] + area // 2 < 1 << 16
        q = ((n + area // 2) * multiplier >> 16) >> shift
        tie = (q * area == n + area // 2) & (area % 2 == 0)
        np.testing.assert_array_equal(np.where(tie, q & ~1, q), np.rint(n / area))
    else:
        assert area >= 128  # below it the multiplier is proven to exist


@pytest.mark.parametrize("size", [3, 61, 127, 181, 201])
def test_wide_means_of_extreme_integers(size):
    x = np.zeros((250, 260), np.uint8)
    x[::2, 1::3] = 255
    expected = np.rint(
        direct(x, [(0, size, size // 2), (1, size, size // 2)], "symmetric")[0] / size**2
    )
    np.testing.assert_array_equal(filters.correlate(x, filters.box(size)), expected)
    y = x.astype(np.uint16) * 257
    expected = np.rint(
        direct(y, [(0, size, size // 2), (1, size, size // 2)], "symmetric")[0] / size**2
    )
    np.testing.assert_array_equal(filters.correlate(y, filters.box(size)), expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("size", [2, 5, 25, 101])
def test_sums_of_ones_are_exact(rng, dtype, size):
    x = rng.integers(0, 9, (64, 80)).astype(dtype)
    total, _ = direct(x, [(0, size, size // 2), (1, size, size // 2)], "symmetric")
    for kernel in (np.ones((size, size)), filters.OuterProduct([np.ones(size)] * 2)):
        out = filters.correlate(x, kernel)
        limit = np.iinfo(dtype).max if x.dtype.kind in "iu" else np.inf
        np.testing.assert_array_equal(out, np.minimum(total, limit))


@pytest.mark.parametrize("tap", [1 / 25, 0.3, 2.0, -1.0, -1 / 7, 1e-9])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_taps_may_have_any_value(rng, dtype, tap):
    x = rng.integers(0, 256, (40, 50)).astype(dtype)
    out = filters.correlate(x, np.full((31, 5), tap))
    total, _ = direct(x, [(0, 31, 15), (1, 5, 2)], "symmetric")
    if dtype == "float32":
        np.testing.assert_allclose(out, total * tap, rtol=40 * np.finfo(dtype).eps)
    else:
        limits = np.iinfo(dtype)
        expected = np.clip(total * tap, limits.min, limits.max)
        assert (np.abs(out - expected) <= 0.5 + 1e-5 * np.abs(expected)).all()


@pytest.mark.parametrize("shape", [(60, 70), (40, 50, 3), (20, 24, 28), (6, 30, 20, 2), (300,)])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", "int16", "float16"])
def test_filters_of_any_axes(rng, shape, dtype):
    x = (rng.random(shape) * 100).astype(dtype)
    for axes in {(0,), (len(shape) - 1,), (0, len(shape) - 1), tuple(range(min(3, len(shape))))}:
        axes = tuple(sorted({*axes}))
        for sizes in ([19] * len(axes), list(range(24, 24 + len(axes)))):
            origin = [-1] * len(axes)
            out = filters.correlate(x, filters.box(sizes), axes=axes, mode="mirror", origin=origin)
            windows = [(a, n, n // 2 - 1) for a, n in zip(axes, sizes)]
            expected = direct(x, windows, "reflect")[0] / math.prod(sizes)
            if x.dtype.kind in "iu":
                assert (np.abs(out - expected) <= 0.5 + 1e-4).all()
            else:
                eps = np.finfo(dtype).eps
                bound = 100 * (sum(sizes) * max(np.finfo(np.float32).eps, 0) + eps)
                assert (np.abs(out - expected) <= bound).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [13, 31])
def test_values_that_are_not_finite_stay_in_their_windows(rng, value, size):
    x = rng.random((120, 130)).astype(np.float32)
    x[60, 50] = value
    out = filters.correlate(x, filters.box(size))
    touched = np.zeros(x.shape, bool)
    half = size // 2
    touched[60 - half : 61 + half, 50 - half : 51 + half] = True
    if np.isnan(value):
        assert np.isnan(out[touched]).all()
    else:
        assert (out[touched] == value).all()
    assert np.isfinite(out[~touched]).all()


def test_large_samples_leave_no_errors_behind():
    x = np.ones((80, 90), np.float32)
    x[:40] = 1e30
    out = filters.correlate(x, filters.box(21))
    assert (out[51:] == 1).all()
    y = np.full((60, 60), 3e38, np.float32)
    with np.errstate(all="raise"):
        np.testing.assert_allclose(filters.correlate(y, filters.box(25)), 3e38, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_threads_and_views_change_no_bit(rng, dtype):
    x = (rng.random((300, 290, 3)) * 255).astype(dtype)
    one = filters.correlate(x, filters.box(33), threads=1)
    np.testing.assert_array_equal(filters.correlate(x, filters.box(33), threads=2), one)
    view = np.asfortranarray(x)
    out = np.empty((300, 3, 290), dtype).transpose(0, 2, 1)
    assert filters.correlate(view, filters.box(33), out=out) is out
    np.testing.assert_array_equal(out, one)
    filters.correlate(x, filters.box(33), out=x)
    np.testing.assert_array_equal(x, one)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_bands_of_rows_change_no_bit(rng, dtype):
    # Larger than L2: bands of rows, also on one thread.  Its first columns alone are one band.
    x = (rng.random((3000, 1500)) * 255).astype(dtype)
    window, none = (33, 16, "reflect", 0.0), (1, 0, "reflect", 0.0)
    found = []
    for image, threads in ((x, 1), (x, 2), (np.ascontiguousarray(x[:, :9]), 1)):
        out = np.empty_like(image)
        shape = (1, *image.shape, 1)
        _core.box(image, out, dtype, shape, window, none, divisor=33.0, threads=threads)
        found.append(out[:, :9])
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[2])


def test_uniform_filter_equals_scipy_with_its_own_border_values(rng):
    x = rng.random((90, 100))
    for mode in (("constant", "wrap"), "constant", ("nearest", "mirror")):
        ours = ndimage.uniform_filter(x, (31, 40), mode=mode, cval=2.5, origin=(3, -2))
        theirs = ndi.uniform_filter(x, (31, 40), mode=mode, cval=2.5, origin=(3, -2))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    line = rng.random((7, 400)).astype(np.float32)
    np.testing.assert_allclose(
        ndimage.uniform_filter1d(line, 101), ndi.uniform_filter1d(line, 101), rtol=1e-5
    )


def test_wrong_arguments_of_the_kernel_are_refused():
    x, out = np.ones((4, 5), np.float32), np.empty((4, 5), np.float32)
    window, none, shape = (3, 1, "reflect", 0.0), (1, 0, "reflect", 0.0), (1, 4, 5, 1)
    with pytest.raises(TypeError, match="dtype must be one of float32, float64, uint8, uint16"):
        _core.box(x, out, "int8", shape, window, none)
    with pytest.raises(TypeError, match="x must be a float64 array"):
        _core.box(x, out, "float64", shape, window, none)
    with pytest.raises(ValueError, match="must have 24 and 24 samples, got 20 and 20"):
        _core.box(x, out, "float32", (1, 4, 6, 1), window, none)
    with pytest.raises(ValueError, match="out must not overlap x"):
        _core.box(x, x, "float32", shape, window, none)
    with pytest.raises(ValueError, match="down or across must be wider than 1"):
        _core.box(x, out, "float32", shape, none, none)
    with pytest.raises(ValueError, match="down must have at least 1 sample"):
        _core.box(x, out, "float32", shape, (3, 3, "reflect", 0.0), none)
    with pytest.raises(ValueError, match="across must have one of the borders"):
        _core.box(x, out, "float32", shape, none, (3, 1, "mirror", 0.0))
    many = np.ones((4, 5 * 16), np.float32)
    with pytest.raises(ValueError, match="channels must be below"):
        _core.box(many, np.empty_like(many), "float32", (1, 4, 5, 16), none, window)


LIMITED = """
import resource
import numpy as np
from lowrank._kernels import _core
x = np.ones((1, {n}), "{dtype}")
out = np.empty_like(x)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), hard))
window, none = (20, 0, "circular", 0.0), (1, 0, "circular", 0.0)
try:
    _core.box(x, out, "{dtype}", (1, 1, {n}, 1), none, window, after=0.05, threads=1)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
_core.box(x, out, "{dtype}", (1, 1, {n}, 1), none, window, after=0.05, threads=1)
print((out == 1).all())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(("dtype", "n"), [("uint8", 1 << 22), ("float32", 1 << 20)])
def test_box_runs_after_it_lacked_memory(dtype, n):
    run = subprocess.run(
        [sys.executable, "-c", LIMITED.format(dtype=dtype, n=n)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert re.fullmatch(r"not enough memory to filter .* samples by a box\nTrue\n", run.stdout), run
