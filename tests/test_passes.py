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
    with pytest.raises(TypeError, match="x must be a float32 array"):
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
