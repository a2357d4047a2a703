"""Certificates: lower bounds, sensitivities, predicted rounding errors and output bounds."""

import functools
import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank as lr
from lowrank.certify import certificate, output_bound, rounding
from lowrank.core import chain_algebra, reference
from lowrank.families import FAMILIES, applicable
from lowrank.interop.weights import layers
from lowrank.metric import Moments

# A certificate describes a given chain, which need not have converged.
pytestmark = pytest.mark.filterwarnings("ignore:.*has not converged")

# Rounding of sums of a few thousand products in float64, in different orders.
TIGHT = 1e-10
# The root of a difference of squares loses half of the digits.
ROOT = 5e-7
MODES = ["zeros", "constant", "reflect", "replicate", "symmetric", "circular"]


def random(*shape, seed=0, **options):
    return lr.dense(np.random.default_rng(seed).standard_normal(shape), **options)


def run(f, x):
    return reference.run_chain(f.stages, x)


CONVS = {
    "2-D": random(6, 8, 3, 3, padding=1),
    "strided": random(6, 4, 2, 5, stride=(2, 1), dilation=(1, 2), padding=(1, (3, 2))),
    "3-D": random(4, 6, 3, 2, 3, stride=(1, 2, 1)),
    "1-D": random(6, 8, 5, stride=2),
    "grouped": random(8, 4, 3, 3, groups=2, padding=1),
    "one out": random(1, 8, 5, 5, padding=2),
    "one volume filter": random(1, 1, 3, 5, 3),
    "volume filters": random(4, 1, 3, 3, 3, groups=2),
    "transposed": random(6, 8, 3, 3, stride=2, padding=1, transposed=True),
    "transposed, grouped": random(8, 4, 3, 3, stride=2, groups=2, transposed=True),
}


#: (convolution, family, variant) of all applicable families; every ninth Kronecker variant.
LABELS = [
    pytest.param(kind, name, variant, id=f"{kind}, {name} {variant}".strip())
    for kind, conv in CONVS.items()
    for name, variants in applicable(conv).items()
    for variant in (variants[::9] if name == "kronecker" else variants)
]
ALL = pytest.mark.parametrize(("kind", "name", "variant"), LABELS)


@functools.cache
def fitted(kind, name, variant):
    """Return a convolution and a chain for it: the third point of its sweep, or the last."""
    conv = CONVS[kind]
    *_, point = itertools.islice(FAMILIES[name].sweep(conv, variant), 3)
    f = replace(conv, stages=point.build(), family=name, variant=variant, rank=point.rank)
    return conv, f


def one_weight(stages, k, index):
    """Return the chain whose kernel is the derivative with respect to one weight."""
    unit = np.zeros(stages[k].weight.shape)
    unit[index] = 1
    return [*stages[:k], replace(stages[k], weight=unit), *stages[k + 1 :]]


@ALL
def test_jacobian_norms_match_the_composed_kernel(kind, name, variant):
    _, f = fitted(kind, name, variant)
    squares = chain_algebra.jacobian_norms(
        f.stages, *chain_algebra.partial_kernels(f.stages, f.groups), f.groups
    )
    rng = np.random.default_rng(0)
    for k, stage in enumerate(f.stages):
        for _ in range(6):
            index = tuple(rng.integers(n) for n in stage.weight.shape)
            kernel = chain_algebra.compose(one_weight(f.stages, k, index), f.groups)
            assert squares[k][index[:2]] == pytest.approx(np.square(kernel).sum(), rel=TIGHT)


def test_jacobian_norms_of_stages_with_overlapping_taps(rng):
    # strides, dilation, ties on either side and a shuffle: every weight of every stage
    plain, wide = lr.Geometry.of(2, stride=2), lr.Geometry.of(2, dilation=(1, 2))
    stages = [
        lr.Stage(rng.standard_normal((4, 3, 3, 3)), plain),
        lr.Stage(rng.standard_normal((2, 2, 3, 2)), wide, outer=2, shuffle=(2, 2)),
        lr.Stage(rng.standard_normal((5, 2, 3, 2)), wide, inner=2),
    ]
    for chain in (stages, [s.adjoint() for s in reversed(stages)]):
        squares = chain_algebra.jacobian_norms(chain, *chain_algebra.partial_kernels(chain))
        for k, stage in enumerate(chain):
            for index in np.ndindex(stage.weight.shape):
                kernel = chain_algebra.compose(one_weight(chain, k, index))
                assert squares[k][index[:2]] == pytest.approx(np.square(kernel).sum(), rel=TIGHT)


@ALL
def test_partial_kernels_end_in_the_whole_kernel(kind, name, variant):
    _, f = fitted(kind, name, variant)
    before, after = chain_algebra.partial_kernels(f.stages, f.groups)
    kernel = chain_algebra.compose(f.stages, f.groups)
    np.testing.assert_allclose(before[-1], kernel, atol=TIGHT)
    last = after[0].reshape(f.groups, -1, *after[0].shape[1:]).swapaxes(1, 2)
    np.testing.assert_allclose(last.reshape(kernel.shape), kernel, atol=TIGHT)


def test_partial_kernels_reject_mixed_plain_and_transposed_stages():
    conv, back = random(6, 4, 3, 3), random(6, 4, 3, 3, transposed=True)
    with pytest.raises(ValueError, match="plain or all transposed"):
        chain_algebra.partial_kernels([conv.stages[0], back.stages[0]])


@ALL
def test_sensitivity_matches_simulated_weight_noise(kind, name, variant):
    conv, f = fitted(kind, name, variant)
    c = certificate(conv, f)
    assert c.error == f.error(conv.to_dense())
    assert 0 <= c.bound <= c.error + ROOT
    rng, step, found = np.random.default_rng(0), 1e-7, []
    kernel = f.to_dense()
    sizes = [np.sqrt(np.square(s.weight).mean()) for s in f.stages]
    for _ in range(40):
        noisy = [
            replace(s, weight=s.weight + step * size * rng.standard_normal(s.weight.shape))
            for s, size in zip(f.stages, sizes)
        ]
        found.append(replace(f, stages=tuple(noisy)).to_dense() - kernel)
    measured = np.mean([np.square(d).sum() for d in found]) / step**2
    # Each sample is a sum of squares along at least ten directions, with a relative standard
    # deviation of sqrt(2 / 10); the mean of 40 has 0.07, and the tolerance is three times that.
    assert measured == pytest.approx(c.sensitivity * np.square(conv.to_dense()).sum(), rel=0.21)


def test_sensitivity_of_cp_matches_phan_et_al():
    conv = random(7, 5, 3, 3)
    f = lr.cp3(conv, 4)
    b, c, a = (s.weight for s in f.stages)  # (r, in), (r, taps), (out, r)
    b, c, a = b.reshape(4, 5).T, c.reshape(4, 9).T, a.reshape(7, 4)
    ss = (
        9 * np.trace((a.T @ a) * (b.T @ b)) * np.square(c).mean()
        + 7 * np.trace((b.T @ b) * (c.T @ c)) * np.square(a).mean()
        + 5 * np.trace((a.T @ a) * (c.T @ c)) * np.square(b).mean()
    )
    expected = ss / np.square(conv.to_dense()).sum()
    assert certificate(conv, f).sensitivity == pytest.approx(expected, rel=TIGHT)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_sensitivity_of_the_dense_kernel_is_one_at_any_scale(scale):
    conv = random(6, 4, 3, 3, groups=2)
    conv = lr.dense(scale * conv.to_dense(), padding=1, groups=2)
    c = certificate(conv, conv)
    assert c.sensitivity == pytest.approx(1)
    assert (c.error, c.bound, c.cancellation) == (0, 0, None)
    assert 0 < certificate(conv, lr.cp3(conv, 1)).sensitivity < 3 + 1e-9  # rank 1 cannot cancel


@ALL
def test_cancellation_is_the_norm_of_the_outer_products(kind, name, variant):
    conv, f = fitted(kind, name, variant)
    if not FAMILIES[name].is_outer_product_sum:
        assert certificate(conv, f).cancellation is None
        return
    # the first depthwise stage with taps has one channel per term: keep a single one nonzero
    k = next(
        i
        for i in (range(len(f.stages))[::-1] if f.transposed else range(len(f.stages)))
        if f.stages[i].weight.shape[1] == 1 and math.prod(f.stages[i].kernel) > 1
    )
    total = 0.0
    for r in range(f.stages[k].weight.shape[0]):
        weight = np.zeros_like(f.stages[k].weight)
        weight[r] = f.stages[k].weight[r]
        stages = [*f.stages[:k], replace(f.stages[k], weight=weight), *f.stages[k + 1 :]]
        total += np.square(chain_algebra.compose(stages, f.groups)).sum()
    expected = math.sqrt(total) / np.linalg.norm(conv.to_dense())
    assert certificate(conv, f).cancellation == pytest.approx(expected, rel=TIGHT)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), power=st.floats(0, 2), at=st.floats(0, 1))
def test_error_is_at_least_the_bound(name, seed, power, at):
    rng = np.random.default_rng(seed)
    shape = (1, 1, 3, 4, 3) if name == "separable_sum" else (6, 5, 3, 2)
    decay = np.arange(1, shape[-4] + 1 if name == "separable_sum" else 7) ** -power
    weight = rng.standard_normal(shape) * decay[:, None, None, None]
    conv = lr.dense(weight)
    variant = rng.choice(FAMILIES[name].variants(conv))
    points = list(itertools.islice(FAMILIES[name].sweep(conv, variant), 20))
    point = points[round(at * (len(points) - 1))]
    f = replace(conv, stages=point.build(), family=name, variant=str(variant), rank=point.rank)
    c = certificate(conv, f)
    assert c.bound == pytest.approx(FAMILIES[name].bound(conv, f.rank, variant), abs=ROOT)
    assert c.bound <= f.error(weight) + ROOT
    if FAMILIES[name].exact:
        assert c.gap == pytest.approx(0, abs=ROOT)


def test_certificate_prints_a_table():
    conv = random(8, 6, 3, 3)
    text = str(certificate(conv, lr.cp(conv, 5)))
    lines = [line.split() for line in text.splitlines()]
    assert [x[0] for x in lines] == ["error", "bound", "gap", "sensitivity", "cancellation"]
    assert all(float(x[1]) >= 0 for x in lines)
    assert "cancellation" not in str(certificate(conv, lr.spatial_svd(conv, 5)))


# Rounding


def halved(x, dtype):
    return x.astype(dtype).astype(np.float64)


def types():
    yield "float16", np.float16
    try:
        import ml_dtypes
    except ImportError:
        return
    yield "bfloat16", ml_dtypes.bfloat16


def rounded(f, dtype):
    return replace(f, stages=tuple(replace(s, weight=halved(s.weight, dtype)) for s in f.stages))


def run_rounded(f, x, dtype):
    """Run a chain with rounded weights, input and results of all stages."""
    x = halved(x, dtype)
    for stage in rounded(f, dtype).stages:
        x = halved(reference.run_stage(stage, x), dtype)
    return x


def rounded_chains():
    conv = random(32, 24, 3, 3)
    yield "dense", conv
    yield "channel_svd", lr.channel_svd(conv, 12)
    yield "spatial_svd", lr.spatial_svd(conv, 20)
    yield "cp", lr.cp(conv, 40)
    yield "tucker", lr.tucker(conv, (16, 12))
    yield "tensor train", lr.tensor_train(conv, (16, 30, 16))
    yield "tied", lr.kronecker(conv, 8, "4x4x3x1 first")
    grouped = random(32, 12, 3, 3, groups=2, stride=2)
    yield "grouped, strided", lr.network_decoupling(grouped, 3)
    up = random(24, 32, 3, 3, transposed=True)
    yield "transposed", lr.spatial_svd(up, 20)


@pytest.mark.parametrize(("name", "dtype"), list(types()))
@pytest.mark.parametrize(("label", "f"), list(rounded_chains()))
def test_rounding_errors_match_the_prediction(label, f, name, dtype, rng):
    r = rounding(f, name)
    kernel = f.to_dense()
    got = np.linalg.norm(rounded(f, dtype).to_dense() - kernel) / np.linalg.norm(kernel)
    # The squared error of n Gaussian weights, uniform within each weight's spacing, has a relative
    # standard deviation of sqrt(3 / n).  The smallest two stages (of cp) have 120 weights each:
    # 0.03 for the root, and five times that because terms are of unequal size.
    assert got == pytest.approx(r.weights, rel=0.15)
    assert got <= r.worst
    x = rng.standard_normal((3, f.in_channels, 24, 24))
    exact = run(f, x)
    got = np.linalg.norm(run_rounded(f, x, dtype) - exact) / np.linalg.norm(exact)
    # the thousands of samples between stages add no noticeable deviation
    assert got == pytest.approx(r.output, rel=0.15)
    assert (r.overflows, r.dtype) == (0, name)


@pytest.mark.parametrize(("name", "dtype"), list(types()))
def test_rounding_errors_of_trained_layers_match_the_prediction(name, dtype, data):
    count = 0
    for layer in layers(data / "weights" / "resnet20_cifar10.safetensors")[::5]:
        conv = layer.conv.astype(np.float64)
        conv = lr.Factorization(conv.stages, conv.geometry, conv.groups)
        for f in (conv, lr.spatial_svd(conv, 8), lr.cp(conv, 12)):
            kernel = f.to_dense()
            got = np.linalg.norm(rounded(f, dtype).to_dense() - kernel) / np.linalg.norm(kernel)
            # as above, with at least 36 weights: 0.05 for the root, and three times that
            assert got == pytest.approx(rounding(f, name).weights, rel=0.16), layer.name
            count += 1
    assert count > 8


@pytest.mark.parametrize(("name", "dtype"), list(types()))
def test_worst_rounding_is_attained_by_weights_of_one_sign(name, dtype):
    unit = 2.0 ** -(11 if name == "float16" else 8)
    g = lr.Geometry.of(2)
    # ties to even: all weights are rounded down
    weights = [np.full(s, 1 + unit) for s in ((4, 5, 1, 1), (4, 1, 3, 3), (6, 4, 1, 1))]
    f = lr.chain([lr.Stage(w, g, 4 if w.shape[1] == 1 else 1) for w in weights])
    got = rounded(f, dtype).error(f.to_dense())
    # equal to first order: rounding up would be slightly worse
    assert (1 - 4 * unit) * rounding(f, name).worst < got <= rounding(f, name).worst


def degenerate(n, size=12):
    """Return a kernel of norm about 1 and a sum of two outer products of norm n close to it."""
    rng = np.random.default_rng(0)
    a, b, c = (x / np.linalg.norm(x) for x in (rng.standard_normal(k) for k in (size, size, 9)))
    d, e, f = (rng.standard_normal(k) / math.sqrt(3 * k) for k in (size, size, 9))
    outer = [np.einsum("t,s,k->tsk", *x) for x in ((d, b, c), (a, e, c), (a, b, f))]
    conv = lr.dense(sum(outer).reshape(size, size, 3, 3))
    root = n ** (1 / 3)
    factors = [
        np.stack([root * (x + y / n), sign * root * x])
        for x, y, sign in ((a, d, -1), (b, e, 1), (c, f, 1))
    ]
    g = lr.Geometry.of(2)
    stages = (
        lr.Stage(factors[1].reshape(2, size, 1, 1), g),
        lr.Stage(factors[2].reshape(2, 1, 3, 3), g, groups=2),
        lr.Stage(factors[0].T.reshape(size, 2, 1, 1).copy(), g),
    )
    return conv, replace(conv, stages=stages, family="cp3", rank=(2,))


def test_cancelling_terms_are_accurate_in_float64_only():
    conv, f = degenerate(1e4)
    c = certificate(conv, f)
    assert c.error < 1e-3  # of the order of 1 / n
    assert 1e4 < c.cancellation < 3e4
    r = rounding(f, "float16")
    assert r.weights > 1
    got = rounded(f, np.float16).error(f.to_dense())
    # about thirty weights carry the error: 3 / sqrt(2 * 30)
    assert got == pytest.approx(r.weights, rel=0.4)
    # without cancellation the error is that of the type
    assert rounding(lr.cp3(conv, 3), "float16").weights < 1e-2
    assert c.sensitivity > 1e3 * certificate(conv, lr.channel_svd(conv, 3)).sensitivity


def test_overflowing_and_subnormal_weights_are_counted():
    weight = np.array([65519.0, 65520.0, 1e6, 2.0**-14, 2.0**-15, 1e-9, 0.0, 1.0])[None, None]
    r = rounding(lr.dense(weight), "float16")
    with np.errstate(over="ignore"):
        cast = np.abs(weight.astype(np.float16))
    tiny = np.finfo(np.float16).smallest_normal
    assert r.overflows == np.isinf(cast).sum() == 2
    assert r.subnormal == ((np.abs(weight) < tiny) & (weight != 0)).sum() == 2
    assert (r.largest, r.smallest) == (1e6, 1e-9)
    assert "overflows" in str(r)
    assert "subnormal" in str(r)
    r = rounding(lr.dense(weight), "bfloat16")
    assert r.overflows == r.subnormal == 0


@pytest.mark.parametrize("scale", [1e-5, 1e-6])
def test_rounding_includes_the_error_of_subnormal_weights(scale):
    conv = lr.dense(scale * random(16, 16, 3, 3).to_dense())
    r = rounding(conv, "float16")
    assert r.subnormal > 2000
    got = rounded(conv, np.float16).error(conv.to_dense())
    # 2304 weights: 3 * sqrt(3 / 2304) / 2, as above
    assert got == pytest.approx(r.weights, rel=0.055)
    assert got <= r.worst
    assert r.weights > 5 * rounding(random(16, 16, 3, 3), "float16").weights


def test_rounding_accepts_names_and_dtypes():
    conv = random(3, 3, 3)
    assert rounding(conv, np.float16) == rounding(conv, np.dtype("f2")) == rounding(conv, "float16")
    for name, dtype in types():
        assert rounding(conv, dtype).dtype == name
    for wrong in ("float32", np.float64, "half a float"):
        with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16"):
            rounding(conv, wrong)


def test_zero_kernel_has_no_rounding_error():
    r = rounding(lr.dense(np.zeros((2, 2, 3))), "float16")
    assert (r.weights, r.worst, r.largest) == (0, 0, 0)


# Output bounds


@st.composite
def pairs(draw):
    """Draw a convolution, a perturbed one, an input size larger than the kernel, and an RNG."""
    ndim = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    transposed = draw(st.booleans()) and draw(st.booleans())
    kernel = draw(st.tuples(*[st.integers(1, 5 - ndim)] * ndim))
    shape = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 3)), *kernel)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    conv = lr.dense(
        rng.standard_normal(shape),
        stride=draw(st.tuples(*[st.integers(1, 2)] * ndim)),
        dilation=draw(st.tuples(*[st.integers(1, 2)] * ndim)),
        padding=0 if transposed else draw(st.tuples(*[st.integers(0, 2)] * ndim)),
        groups=groups,
        padding_mode="zeros" if transposed else draw(st.sampled_from(MODES)),
        value=0.5,
        transposed=transposed,
    )
    more = draw(st.tuples(*[st.integers(0, 3)] * ndim))
    # at least one window lies inside, even if the first ones start in the padding
    size = tuple(e + 1 + n for e, n in zip(conv.geometry.extent(kernel), more))
    stage = conv.stages[0]
    other = replace(stage, weight=stage.weight + 0.1 * rng.standard_normal(shape))
    return conv, replace(conv, stages=(other,)), size, rng


@settings(max_examples=120)
@given(pairs())
def test_output_errors_are_within_their_bounds(case):
    conv, f, size, rng = case
    bound = output_bound(conv, f, size, levels=200.0)
    shape = (conv.in_channels, *size)

    def error(x):
        return run(conv, x) - run(f, x)

    n = math.prod(shape)
    offset = error(np.zeros((1, *shape)))
    columns = (error(np.eye(n).reshape(n, *shape)) - offset).reshape(n, -1)
    true = np.linalg.norm(columns, 2)
    assert true <= bound.l2.value * (1 + TIGHT)
    if all(n >= sum(p) + 2 for n, p in zip(size, conv.geometry.padding)):
        assert true <= bound.l2_any_size.value * (1 + TIGHT)
    assert np.abs(offset).max() <= bound.l2.offset * (1 + TIGHT)
    # the worst input of an output has the signs of its row, or the opposite ones
    signs = np.where(columns.T >= 0, 1.0, -1.0).reshape(-1, *shape)
    signs = np.concatenate([signs, -signs])
    largest = np.abs(error(signs)).max()
    assert largest <= bound.linf * (1 + TIGHT)
    assert largest == pytest.approx(bound.linf, rel=TIGHT)
    grey = np.abs(error(100.0 * (signs + 1))).max()
    assert grey <= bound.grey * (1 + TIGHT)
    assert grey == pytest.approx(bound.grey, rel=TIGHT)
    noise = rng.uniform(0, 200, (8, *shape))
    assert np.abs(error(noise)).max() <= bound.grey
    assert bound.rms_relative == pytest.approx(f.error(conv.to_dense()), rel=TIGHT)


@pytest.mark.parametrize("value", [-3.0, 400.0])
def test_grey_bound_includes_a_constant_border_out_of_range(value):
    conv, f = (
        lr.dense(np.array([[w]]), padding=1, padding_mode="constant", value=value)
        for w in ([1.0, 2.0, 3.0], [2.0, 2.0, 3.0])
    )
    bound = output_bound(conv, f, (4,))
    x = 255.0 * np.ones((1, 1, 4))
    assert np.abs(run(conv, x) - run(f, x)).max() == max(abs(value), 255.0)
    assert bound.grey == max(abs(value), 255.0)


def test_rms_error_of_white_input_is_the_kernel_error(rng):
    for conv, size in (
        (random(6, 4, 3, 3, padding=1, padding_mode="circular"), (40, 40)),
        (random(4, 6, 3, 3, stride=2, transposed=True), (40, 40)),
    ):
        f = lr.spatial_svd(conv, 5)
        bound = output_bound(conv, f, size)
        x = rng.standard_normal((8, conv.in_channels, *size))
        error, y = run(conv, x) - run(f, x), run(conv, x)
        if conv.transposed:  # fewer taps at the border
            error, y = error[:, :, 3:-3, 3:-3], y[:, :, 3:-3, 3:-3]
        # 50,000 samples, correlated over nine taps and six channels: about 1000 independent ones,
        # 1 / sqrt(2 * 1000) is 0.022, and twice that
        assert np.sqrt(np.square(error).mean()) == pytest.approx(bound.rms, rel=0.045)
        relative = np.linalg.norm(error) / np.linalg.norm(y)
        assert relative == pytest.approx(bound.rms_relative, rel=0.045)


def second_moment(conv, x):
    """Return the second moment of all patches of `x`."""
    moments = Moments(conv, positions=sys.maxsize)
    moments.add(x)
    return moments.metric(damping=0.0).input_moment


@settings(max_examples=60)
@given(pairs())
def test_rms_error_follows_from_the_second_moment(case):
    conv, f, size, rng = case
    if conv.transposed:
        conv, f = conv.adjoint(), f.adjoint()
    x = rng.standard_normal((3, conv.in_channels, *size)).cumsum(-1)
    moment = second_moment(conv, x)
    bound = output_bound(conv, f, size, second_moment=moment)
    error, y = run(conv, x) - run(f, x), run(conv, x)
    assert bound.rms == pytest.approx(np.sqrt(np.square(error).mean()), rel=TIGHT)
    relative = np.linalg.norm(error) / np.linalg.norm(y)
    assert bound.rms_relative == pytest.approx(relative, rel=TIGHT)
    if conv.groups == 1:
        assert output_bound(conv, f, size, second_moment=moment[0]) == bound


def test_second_moment_of_white_noise_is_the_identity(rng):
    conv = random(3, 2, 3, 2, dilation=2)
    moment = second_moment(conv, rng.standard_normal((20, 2, 40, 40)))
    assert moment.shape == (1, 12, 12)
    # means of 50,000 products of variance at most 2: four times sqrt(2 / 50000)
    np.testing.assert_allclose(moment[0], np.eye(12), atol=0.026)


def test_output_bounds_hold_on_trained_layers(data):
    images = np.load(data / "cifar10" / "test_lossless_500.npz")
    images = next(v for v in images.values() if v.ndim == 4)[:40].transpose(0, 3, 1, 2)
    x = images.astype(np.float64)
    layer = next(
        layer
        for layer in layers(data / "weights" / "resnet20_cifar10.safetensors")
        if layer.conv.in_channels == 3
    )
    conv = layer.conv.astype(np.float64)
    conv = lr.Factorization(conv.stages, conv.geometry, conv.groups)
    for f in (lr.spatial_svd(conv, 4), lr.tucker(conv, (8, 2)), lr.cp(conv, 8)):
        bound = output_bound(conv, f, x.shape[1:], second_moment=second_moment(conv, x))
        error, y = run(conv, x) - run(f, x), run(conv, x)
        lengths = np.linalg.norm(error.reshape(40, -1), axis=1)
        assert (lengths <= bound.l2.value * np.linalg.norm(x.reshape(40, -1), axis=1)).all()
        assert bound.l2.value <= bound.l2_any_size.value
        assert np.abs(error).max() <= min(bound.grey, bound.linf * x.max())
        assert bound.rms == pytest.approx(np.sqrt(np.square(error).mean()), rel=TIGHT)
        # images are smooth, and the error on smooth patterns differs from that on white noise
        white = output_bound(conv, f, x.shape[1:])
        assert bound.rms_relative != pytest.approx(white.rms_relative, rel=0.1)
        relative = np.linalg.norm(error) / np.linalg.norm(y)
        assert bound.rms_relative == pytest.approx(relative, rel=TIGHT)


def test_output_bound_prints_a_table():
    conv = random(4, 3, 3, 3, padding=1, padding_mode="constant", value=2.0)
    text = str(output_bound(conv, lr.spatial_svd(conv, 2), (8, 8)))
    names = [line.split("  ")[0] for line in text.splitlines()]
    assert names == [
        "l2", "offset", "l2, relative", "l2, any size", "linf", "grey", "rms", "rms, relative",
    ]  # fmt: skip


W = np.random.default_rng(0).standard_normal((6, 4, 3, 3))
CONV = lr.dense(W, padding=1)


def stack(first, second):
    """Return a chain of two 1-D passes with these paddings, for a 3 x 3 kernel."""
    g = lr.Geometry.of
    one = np.ones((1, 1, 3, 1)), np.ones((1, 1, 1, 3))
    return lr.chain([lr.Stage(w, g(2, padding=p)) for w, p in zip(one, (first, second))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: output_bound(CONV, lr.dense(W), (8, 8)), "geometry"),
        (
            lambda: output_bound(CONV, lr.dense(W[:, :, :, :2], padding=1), (8, 8)),
            "kernel of shape",
        ),
        (lambda: output_bound(CONV, lr.dense(W, padding=1), (2, 2, 2)), "input_shape"),
        (lambda: output_bound(lr.spatial_svd(CONV, 2), CONV, (8, 8)), "one dense stage"),
        (
            lambda: output_bound(CONV, CONV, (8, 8), second_moment=np.eye(35)),
            r"second_moment.*\(1, 36, 36\).*\(35, 35\)",
        ),
        (
            lambda: output_bound(
                lr.dense(np.ones((1, 1, 3, 3)), padding=1), stack((1, 1), (0, 0)), (8, 8)
            ),
            None,
        ),
        (
            lambda: output_bound(
                lr.dense(np.ones((1, 1, 3, 3)), padding=1), stack((0, 1), (1, 0)), (8, 8)
            ),
            "pad axis 0 once",
        ),
        (
            lambda: output_bound(CONV.adjoint(), CONV.adjoint(), (8, 8), second_moment=np.eye(54)),
            "transposed",
        ),
    ],
)
def test_invalid_arguments_are_rejected(make, message):
    if message is None:
        make()  # padding before the taps, in another stage, is the same convolution
        return
    with pytest.raises(ValueError, match=message):
        make()
