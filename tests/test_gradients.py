"""Gradients of weights on the C engine, against sums in float64."""

import numpy as np
import pytest

from lowrank import Geometry, Stage
from lowrank._kernels import _core
from lowrank.engine.gradients import has_gradient_kernel, weight_gradient

#: Output and input channels, taps, stride, dilation, padding and size of the input.
CASES = {
    "1 axis": ((5, 3), (3,), (1,), (1,), ((1, 1),), (70,)),
    "columns": ((33, 17), (3, 1), (1, 1), (1, 1), ((1, 1), (0, 0)), (20, 19)),
    "rows": ((16, 64), (1, 3), (1, 1), (1, 1), ((0, 0), (1, 1)), (19, 20)),
    "stride and dilation": ((70, 4), (3, 3), (2, 1), (1, 2), ((1, 0), (0, 3)), (31, 9)),
    "narrow": ((9, 18), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)), (40, 3)),
    "pointwise": ((1, 1), (1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), (24, 24)),
    "unread rows": ((4, 5), (2, 2), (3, 3), (1, 1), ((0, 0), (0, 0)), (24, 25)),
    "padding beyond the taps": ((3, 2), (1, 1), (1, 1), (1, 1), ((2, 1), (0, 4)), (12, 13)),
    "3 axes": ((12, 7), (3, 1, 2), (1, 2, 1), (2, 1, 1), ((2, 1), (1, 0), (0, 1)), (6, 9, 10)),
}


def make_case(name, dtype, batch=3):
    """Return a stage, its input and a gradient of its output."""
    channels, taps, stride, dilation, padding, size = CASES[name]
    rng = np.random.default_rng(len(name))
    stage = Stage(np.ones((*channels, *taps), dtype), Geometry(stride, padding, dilation))
    out = stage.geometry.output_size(size, taps)
    x = rng.standard_normal((batch, channels[1], *size)).astype(dtype)
    return stage, x, rng.standard_normal((batch, channels[0], *out)).astype(dtype)


def sums(stage, x, grad):
    """Return the gradient of the weight in float64, tap by tap, and the sum of the magnitudes."""
    g = stage.geometry
    x = np.pad(x.astype(float), ((0, 0), (0, 0), *g.padding))
    found = np.empty((2, *stage.weight.shape))
    for tap in np.ndindex(*stage.kernel):
        place = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, s, n in zip(tap, g.dilation, g.stride, grad.shape[2:])
        )
        seen = x[(..., *place)]
        a, b = (v.reshape(*v.shape[:2], -1) for v in (grad.astype(float), seen))
        for i, pair in enumerate([(a, b), (abs(a), abs(b))]):
            found[(i, ..., *tap)] = np.einsum("nop,ncp->oc", *pair)
    return found


def run(stage, x, grad, threads=1):
    """Return the gradients of the weight and of the bias."""
    weight = np.full(stage.weight.shape, np.nan, x.dtype)
    bias = np.full(len(weight), np.nan, x.dtype)
    weight_gradient(stage, x, grad, weight, bias, threads)
    return weight, bias


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_sums_in_float64(name, dtype, isa, monkeypatch):
    monkeypatch.setenv("LOWRANK_ISA", isa)
    stage, x, grad = make_case(name, dtype)
    weight, bias = run(stage, x, grad)
    wanted, magnitude = sums(stage, x, grad)
    # Sums of 64 products are added up: no error exceeds a half of the number of additions.
    most = 64 + grad.size // 64
    eps = np.finfo(dtype).eps
    assert np.all(abs(weight - wanted) <= most / 2 * eps * magnitude)
    axes = (0, *range(2, grad.ndim))
    total = abs(grad).astype(float).sum(axes)
    assert np.all(abs(bias - grad.astype(float).sum(axes)) <= most / 2 * eps * total)


def test_results_depend_on_neither_threads_nor_strides():
    stage, x, grad = make_case("columns", "float32", batch=5)
    weight, bias = run(stage, x, grad)
    last = [np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, grad)]
    cropped = np.zeros((5, 17, 22, 25), np.float32)[:, :, 1:-1, 3:-3]
    cropped[:] = x
    for threads, (a, b) in [(2, (x, grad)), (1, last), (3, (cropped, last[1]))]:
        again, total = run(stage, a, b, threads)
        assert np.array_equal(weight, again)
        assert np.array_equal(bias, total)


def test_an_empty_batch_has_a_gradient_of_zeros():
    stage, x, grad = make_case("columns", "float32", batch=0)
    weight, bias = run(stage, x, grad)
    assert not weight.any()
    assert not bias.any()


def test_values_that_are_not_finite_stay_in_their_channels():
    stage, x, grad = make_case("rows", "float32")
    grad[0, 3, 2, 2] = np.inf
    x[1, 5, 3, 3] = np.nan
    weight, _ = run(stage, x, grad)
    assert not np.isfinite(weight[3]).any()
    assert np.isnan(weight[:, 5]).all()
    rest = np.delete(np.delete(weight, 3, 0), 5, 1)
    assert np.isfinite(rest).all()


def test_stages_that_the_kernel_does_not_suit():
    def has_kernel(shape, **replication):
        groups = replication.pop("groups", 1)
        return has_gradient_kernel(
            Stage(np.ones(shape, np.float32), Geometry.of(2), groups, **replication), 4096
        )

    assert has_kernel((64, 64, 3, 3))
    assert not has_kernel((64, 32, 3, 3), groups=2)
    assert not has_kernel((4, 4, 3, 3), outer=2)
    assert not has_kernel((4, 4, 3, 3), inner=2)
    assert not has_kernel((4, 4, 3, 3), shuffle=(2, 2))
    assert not has_kernel((512, 512, 3, 3))


def test_wrong_arrays_are_refused():
    stage, x, grad = make_case("rows", "float32")
    weight, bias = run(stage, x, grad)
    with pytest.raises(TypeError, match="grad must be a float32 array"):
        weight_gradient(stage, x, grad.astype(float), weight, bias, 1)
    with pytest.raises(ValueError, match="weight must have 3072 elements"):
        weight_gradient(stage, x, grad, weight[:1], bias, 1)
    with pytest.raises(ValueError, match="weight must not overlap x"):
        weight_gradient(stage, x, grad, x.reshape(-1)[: weight.size].reshape(weight.shape), bias, 1)
