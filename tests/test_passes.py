"""Separable filters without a plan: every instruction set against SciPy."""

import numpy as np
import pytest
from scipy import ndimage as ndi

from lowrank._kernels import _core

MODES = {
    "constant": "constant", "symmetric": "reflect", "reflect": "mirror", "replicate": "nearest",
    "circular": "wrap",
}  # fmt: skip
SHAPES = [(1,), (7,), (40,), (5, 9), (33, 70), (3, 1), (6, 50, 3), (9, 20, 33), (2, 3, 4, 5)]


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("border", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_passes_equal_scipy(rng, isa, dtype, border, shape):
    x = rng.standard_normal(shape).astype(dtype)
    factors = [rng.standard_normal(int(rng.integers(1, 12))) for _ in shape]
    factors[0][rng.integers(len(factors[0]))] = 0
    out = np.full_like(x, np.nan)
    before = [int(rng.integers(len(f))) for f in factors]
    _core.Passes(factors, dtype, isa)(x, out, range(x.ndim), before, border, 0.7)
    expected, fill, size = x.astype(float), 0.7, np.abs(x.astype(float))
    for axis, (f, b) in enumerate(zip(factors, before)):
        options = {"mode": MODES[border], "origin": b - len(f) // 2}
        expected = ndi.correlate1d(expected, f, axis, cval=fill, **options)
        size = ndi.correlate1d(size, np.abs(f), axis, cval=abs(fill), **options)
        fill *= f.sum()
    # One rounding per tap and axis, each of the size of the sum of magnitudes.
    bound = sum(map(len, factors)) * np.finfo(dtype).eps * (size + 1)
    assert (np.abs(out - expected) <= bound).all()


def test_every_pass_may_have_its_border(rng):
    x, out = rng.standard_normal((20, 30)), np.empty((20, 30))
    factors = [rng.standard_normal(5), rng.standard_normal(3)]
    run = _core.Passes(factors, "float64")
    run(x, out, (0, 1), (2, 1), ("constant", "circular"), (2.0, 0.0))
    expected = ndi.correlate1d(x, factors[0], 0, mode="constant", cval=2.0)
    expected = ndi.correlate1d(expected, factors[1], 1, mode="wrap")
    np.testing.assert_allclose(out, expected, rtol=1e-13, atol=1e-13)


def test_taps_of_zero_are_not_read():
    x = np.full((3, 40), np.nan)
    x[:, ::2] = 1.0
    out = np.empty_like(x)
    _core.Passes([np.array([2.0, 0.0, 1.0])], "float64")(x, out, (1,), (1,), "circular")
    assert (out[:, 1::2] == 3).all()
    assert np.isnan(out[:, ::2]).all()


def test_wrong_arrays_are_refused():
    run = _core.Passes([np.ones(3)], "float32")
    x, out = np.ones((4, 5), np.float32), np.empty((4, 5), np.float32)
    with pytest.raises(TypeError, match="x must be a float32 array in native byte order, or of"):
        run(x.astype(float), out, (0,), (1,), "reflect")
    with pytest.raises(ValueError, match="out must be C-contiguous"):
        run(x, np.empty((5, 4), np.float32).T, (0,), (1,), "reflect")
    with pytest.raises(ValueError, match="out must have the shape of x"):
        run(x, out[:3], (0,), (1,), "reflect")
    with pytest.raises(ValueError, match="out must not overlap x"):
        run(x, x, (0,), (1,), "reflect")
    with pytest.raises(ValueError, match="axes must be between 0 and 1, got 2"):
        run(x, out, (2,), (1,), "reflect")
    with pytest.raises(ValueError, match="before must be below the number of taps"):
        run(x, out, (0,), (3,), "reflect")
    with pytest.raises(ValueError, match="1 entries"):
        run(x, out, (0, 1), (1, 1), "reflect")
    with pytest.raises(TypeError, match="float64 arrays with one axis"):
        _core.Passes([np.ones((2, 2))], "float32")
    with pytest.raises(ValueError, match="factors must number 1 to 8"):
        _core.Passes([], "float32")


def images(rng, shape, dtype):
    """Return random samples: integers over their whole range."""
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def vector(rng, taps, parity):
    """Return a filter whose sums stay within the range of its samples."""
    half = rng.uniform(0.1, 1, (taps + 1) // 2)
    line = np.concatenate([half, parity * half[: taps // 2][::-1]])
    if parity == 0:
        line = rng.uniform(-1, 1, taps)
    if parity < 0 and taps % 2 and taps > 1:
        line[taps // 2] = 0
    return line / np.abs(line).sum()


IMAGES = [
    # shape, axes, taps
    ((40, 37), (0, 1), (3, 3)), ((17, 300), (0, 1), (5, 7)), ((64, 64), (0, 1), (1, 15)),
    ((33, 2100), (0, 1), (3, 5)), ((50, 41, 3), (0, 1), (3, 3)), ((50, 41, 3), (0, 1), (9, 21)),
    ((21, 65, 4), (0, 1), (4, 6)), ((2, 35, 50), (1, 2), (31, 31)),
    ((3, 30, 20, 2), (1, 2), (2, 90)), ((70, 35), (1,), (11,)), ((40, 5, 9), (0,), (6,)),
    ((35, 64), (1,), (40,)), ((20, 24, 30), (0, 1, 2), (7, 3, 17)),
    ((18, 600, 3), (0, 1), (3, 41)), ((48, 48), (1, 0), (9, 5)), ((33, 70, 3), (0, 1), (15, 15)),
    ((35, 16), (1,), (2,)), ((16, 17), (0, 1), (3, 3)),
]  # fmt: skip


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("parity", [1, -1, 0])
@pytest.mark.parametrize(("shape", "axes", "taps"), IMAGES)
def test_images_equal_scipy(rng, isa, dtype, parity, shape, axes, taps):
    x = images(rng, shape, dtype)
    factors = [vector(rng, n, parity) for n in taps]
    work = "float64" if np.dtype(dtype).itemsize in (2, 8) else "float32"
    run = _core.Passes(factors, work, isa)
    for border in MODES:
        out, fill = np.full_like(x, 99), float(rng.integers(5))
        before = [int(rng.integers(n)) if border == "constant" else n // 2 for n in taps]
        run(x, out, axes, before, border, fill, threads=2)
        assert run.takes_integers(shape, axes)
        expected, at = x.astype(float), fill
        for axis, f, b in zip(axes, factors, before):
            options = {"mode": MODES[border], "origin": b - len(f) // 2}
            expected = ndi.correlate1d(expected, f, axis, cval=at, **options)
            at *= f.sum()
        # Each sum of n taps, whose magnitudes add to 1, has at most n + 1 roundings.
        size = max(float(np.abs(x.astype(float)).max()), abs(fill))
        bound = (sum(taps) + len(taps)) * np.finfo(work).eps * size
        if np.dtype(dtype).kind == "f":
            np.testing.assert_allclose(out, expected, rtol=0, atol=bound)
        else:
            limits = np.iinfo(dtype)
            expected = np.clip(expected, limits.min, limits.max)
            assert (np.abs(out - expected) <= 0.5 + bound).all()


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
def test_images_of_integers_round_to_even_and_saturate(rng, isa, dtype):
    x = images(rng, (40, 50), dtype)
    work = "float64" if np.dtype(dtype).itemsize == 2 else "float32"
    limits = np.iinfo(dtype)
    for line in ([0.25, 0.5, 0.25], [1.0, 2.0, 1.0], [2.0**20] * 3, [-1.0, 0.0, 1.0]):
        f = np.array(line)
        out = np.empty_like(x)
        _core.Passes([f, f], work, isa)(x, out, (0, 1), (1, 1), "reflect")
        exact = ndi.correlate1d(
            ndi.correlate1d(x.astype(float), f, 0, mode="mirror"), f, 1, mode="mirror"
        )
        assert (out == np.clip(np.rint(exact), limits.min, limits.max)).all()


@pytest.mark.parametrize("isa", _core.ISAS)
def test_large_images_are_streamed_and_do_not_depend_on_threads(rng, isa):
    x = rng.standard_normal((1030, 2048)).astype(np.float32)
    x = np.tile(x, (5, 1))  # its result exceeds the caches
    line = vector(rng, 5, 1)
    run = _core.Passes([line, line], "float32", isa)
    one, two = np.empty_like(x), np.empty_like(x)
    run(x, one, (0, 1), (2, 2), "reflect", threads=1)
    run(x, two, (0, 1), (2, 2), "reflect", threads=2)
    assert (one == two).all()
    some = slice(2000, 2100)
    expected = ndi.correlate1d(
        ndi.correlate1d(x.astype(float), line, 0, mode="mirror"), line, 1, mode="mirror"
    )
    np.testing.assert_allclose(one[some], expected[some], atol=1e-5)


@pytest.mark.parametrize("isa", _core.ISAS)
def test_images_with_nan_and_large_samples_are_filtered_as_by_lines(isa):
    x = np.ones((40, 40), np.float32)
    x[20, 20], x[5, 30] = np.nan, np.inf
    out = np.empty_like(x)
    sobel = [np.array([1.0, 2.0, 1.0]), np.array([-1.0, 0.0, 1.0])]
    _core.Passes(sobel, "float32", isa)(x, out, (0, 1), (1, 1), "symmetric")
    assert np.isnan(out).sum() == 6  # taps of zero do not spread it
    assert np.isinf(out).sum() == 6
    assert (out[10:18] == 0).all()
    x[...] = 3e38
    half = [np.array([0.25, 0.5, 0.25])] * 2
    _core.Passes(half, "float32", isa)(x, out, (0, 1), (1, 1), "symmetric")
    assert (out == np.float32(3e38)).all()  # the sum of two samples overflows


def test_arrays_that_are_no_images_hold_no_integers():
    run = _core.Passes([np.ones(3)], "float32")
    x = np.ones((3, 5), np.uint8)  # fewer rows than a vector of any instruction set
    assert not run.takes_integers(x.shape, (1,))
    with pytest.raises(TypeError, match="arrays of this shape must be float32"):
        run(x, np.empty_like(x), (1,), (1,), "reflect")


@pytest.mark.parametrize("n", [4, 8, 16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_of_one_vector_may_have_any_alignment(rng, dtype, n):
    for offset in range(16):
        x = rng.random(35 * n + 16).astype(dtype)[offset:][: 35 * n].reshape(35, n)
        out = np.empty_like(x)
        _core.Passes([np.array([0.75, 0.25])], dtype)(x, out, [1], [1], "symmetric")
        expected = ndi.correlate1d(x, [0.75, 0.25], 1)
        np.testing.assert_allclose(out, expected, rtol=4 * np.finfo(dtype).eps)
