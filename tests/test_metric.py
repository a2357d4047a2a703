"""Chains as tensor networks, second moments, and fits in a metric."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank
from lowrank.core import chain_algebra
from lowrank.core.tensor_network import contract, tensor_network
from lowrank.families import FAMILIES, applicable
from lowrank.families.weighted import MetricFit
from lowrank.metric import Moments, nearest_kronecker, unroll, white

CASES = {
    "plain": ((8, 6, 3, 3), {"padding": 1}),
    "strided": ((8, 6, 3, 5), {"stride": 2, "padding": 1}),
    "grouped": ((8, 4, 3, 3), {"groups": 2, "padding": 1}),
    "dilated": ((6, 4, 3, 3), {"dilation": 2, "padding": 2}),
    "transposed": ((6, 8, 3, 3), {"transposed": True, "stride": 2, "padding": 1}),
    "transposed grouped": ((6, 4, 4), {"transposed": True, "stride": 3, "groups": 2}),
    "1-D": ((8, 6, 5), {}),
    "3-D": ((6, 5, 3, 3, 3), {"padding": 1}),
    "depthwise": ((8, 1, 3, 3), {"groups": 8, "padding": 1}),
    "pointwise": ((8, 6, 1, 1), {}),
    "grey": ((8, 1, 3, 3), {"padding": 1}),
}


def made(name, seed=0):
    shape, about = CASES[name]
    return lowrank.dense(np.random.default_rng(seed).standard_normal(shape), **about)


def inputs(conv, seed=1, batch=12):
    """Samples that depend on their neighbours, along space and channels."""
    rng = np.random.default_rng(seed)
    sizes = {1: (40,), 2: (11, 12), 3: (7, 6, 8)}[conv.ndim]
    x = rng.standard_normal((batch, conv.in_channels, *sizes))
    for axis in range(2, x.ndim):
        x = x + np.roll(x, 1, axis) + 0.5 * np.roll(x, 2, axis)
    mixed = rng.standard_normal((conv.in_channels,) * 2)
    return np.einsum("nc...,cd->nd...", x, mixed)


def metric_of(conv, gradients=True):
    moments = Moments(conv)
    x = inputs(conv)
    moments.add(x)
    if gradients:
        shape = conv(x).shape
        tilt = np.linspace(0.1, 2, shape[1]).reshape(-1, *[1] * conv.ndim)
        moments.add_gradients(np.random.default_rng(2).standard_normal(shape) * tilt)
    return moments.metric()


def chains(conv, points=(0, 2)):
    for name, variants in applicable(conv).items():
        for variant in variants:
            for i, point in enumerate(FAMILIES[name].sweep(conv, variant)):
                if i in points:
                    yield name, variant, point


@pytest.mark.parametrize("name", CASES)
def test_a_network_makes_the_kernel_of_every_chain(name):
    conv = made(name)
    seen = 0
    for family, variant, point in chains(conv):
        stages = point.build()
        n = tensor_network(stages)
        assert n == tensor_network(point.stages)  # shapes are enough
        kernel = chain_algebra.compose(stages, conv.groups)
        every = (slice(None, None, d) for d in conv.geometry.dilation)
        want = kernel[(..., *every)]
        got = contract(n, n.tensors(stages)).reshape(want.shape)
        # A sum of products of a few hundred terms in float64.
        assert np.abs(got - want).max() <= 1e-12 * max(np.abs(want).max(), 1), (family, variant)
        seen += 1
    assert seen > 0


def test_taps_that_overlap_are_no_network():
    g = lowrank.Geometry.of(1)
    stages = [lowrank.Stage(np.ones((1, 1, 3)), g)] * 2
    with pytest.raises(ValueError, match="overlap"):
        tensor_network(stages)


def test_channels_without_common_modes_are_no_network():
    g = lowrank.Geometry.of(1)
    stages = [
        lowrank.Stage(np.ones((4, 1, 1)), g, outer=3),  # 12 channels as 3 x 4
        lowrank.Stage(np.ones((1, 2, 1)), g, outer=2, inner=3),  # as 2 x 2 x 3
    ]
    with pytest.raises(ValueError, match="modes"):
        tensor_network(stages)


@pytest.mark.parametrize("name", CASES)
def test_energy_is_the_mean_square_of_the_outputs(name):
    conv, x = made(name), None
    x = inputs(conv)
    moments = Moments(conv)
    moments.add(x)
    metric = moments.metric(damping=0.0)
    y = conv(x)
    want = np.square(y).sum() / (y.size / y.shape[1])
    # The same sums in another order, of thousands of terms in float64.
    assert metric.energy(unroll(conv)) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_weights_repeat_patches(name):
    """A weight counts as so many copies of an example."""
    conv = made(name)
    x = inputs(conv, batch=6)
    times = np.array([0, 1, 2, 3, 1, 2])
    spatial = conv(x).shape[2:]
    found = []
    for paired in (True, False):
        weighted = Moments(conv, centred=True, paired=paired)
        repeated = Moments(conv, centred=True, paired=paired)
        shares = np.broadcast_to(times.reshape(-1, *[1] * conv.ndim), (6, *spatial))
        copies = np.repeat(x, times, axis=0)
        given = [(x, shares), (copies, None)]
        for moments, (samples, w) in zip((weighted, repeated), given):
            moments.add(samples, 1.1 * samples if paired else None, w)
        found.append([m.metric(damping=0.0) for m in (weighted, repeated)])
    for a, b in found:
        for one, other in ((a.input_moment, b.input_moment), (a.mean, b.mean)):
            # The same sums in another order, of thousands of terms in float64.
            assert np.abs(one - other).max() <= 1e-10 * np.abs(other).max()
    (a, b), _ = found
    assert np.abs(a.output_power - b.output_power).max() <= 1e-10 * np.abs(b.output_power).max()
    with pytest.raises(ValueError, match="weights must have the shape"):
        Moments(conv).add(x, weights=shares[..., :-1])


def test_batches_add_up():
    conv, one, two = made("plain"), Moments(made("plain")), Moments(made("plain"))
    x = inputs(conv)
    one.add(x)
    two.add(x[:5])
    two.add(x[5:])
    a, b = one.metric().input_moment, two.metric().input_moment
    assert np.abs(a - b).max() <= 1e-12 * np.abs(a).max()


def test_a_choice_of_outputs_is_an_estimate_and_the_same_for_a_seed():
    conv = made("plain")
    x = inputs(conv, batch=60)
    found = []
    for seed in (3, 3, 4):
        moments = Moments(conv, positions=1500, seed=seed)
        moments.add(x)
        found.append(moments.metric().input_moment)
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()
    whole = Moments(conv)
    whole.add(x)
    c = whole.metric().input_moment
    assert 0 < np.linalg.norm(found[0] - c) < 0.2 * np.linalg.norm(c)


def test_wide_layers_keep_factors_only(monkeypatch):
    monkeypatch.setattr("lowrank.metric.moments.WIDEST", 10)
    conv = made("plain")
    metric = metric_of(conv)
    assert metric.input_moment is None
    assert metric.channel_factor.shape == (1, 6, 6)
    fit = MetricFit(conv, metric)
    points = FAMILIES["spatial_svd"].sweep(conv, "h-w", metric)
    point = next(p for p in points if p.rank == (4,))
    # A single stage has each mode: whitening expresses all of a factored metric, to rounding.
    assert fit.error(point.start()) == pytest.approx(point.error, rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_have_to_be_finite(bad):
    conv = made("plain")
    x = inputs(conv)
    x[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        Moments(conv).add(x)


def test_inputs_have_to_fit():
    conv = made("plain")
    with pytest.raises(ValueError, match=r"input_shape|channels|shape"):
        Moments(conv).add(np.zeros((2, 5, 8, 8)))
    with pytest.raises(ValueError, match="paired"):
        Moments(conv).add(inputs(conv), inputs(conv))
    with pytest.raises(ValueError, match="no inputs"):
        Moments(conv).metric()
    with pytest.raises(ValueError, match="gradients"):
        Moments(conv).add_gradients(np.zeros((2, 3, 8, 8)))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_factors_of_a_product_are_found(seed):
    rng = np.random.default_rng(seed)
    parts = []
    for n in (4, 3, 2):
        a = rng.standard_normal((n, n + 2))
        parts.append(a @ a.T)
    c = np.kron(np.kron(parts[0], parts[1]), parts[2])[None]
    channels, taps, distance = nearest_kronecker(c, (4, 3, 2))
    assert distance < 1e-6
    again = np.kron(np.kron(channels[0], taps[0]), taps[1])
    # Each factor is damped by 1e-6.
    assert np.linalg.norm(again - c) <= 1e-5 * np.linalg.norm(c)


@pytest.mark.parametrize("name", [n for n in CASES if n != "depthwise"])
def test_the_closed_form_of_a_bipartition_is_exact_in_the_full_metric(name):
    conv = made(name)
    family, variant = "channel_svd", "input" if conv.transposed else "output"
    metric = metric_of(conv)
    fit = MetricFit(conv, metric)
    points = list(FAMILIES[family].sweep(conv, variant, metric))
    point = points[len(points) // 2]
    stages = point.start()
    assert point.bound == point.error  # whitening is exact
    assert fit.error(stages) == pytest.approx(point.error, rel=1e-6)
    # A stationary point, too: alternation finds nothing better.
    assert fit.refine(stages, 20, 0.0)[1] == pytest.approx(point.error, rel=1e-6)
    plain = FAMILIES[family].fit(conv, point.rank, variant)
    assert point.error < fit.error(plain.stages)


@pytest.mark.parametrize("name", CASES)
def test_fits_in_a_metric_beat_plain_ones(name):
    conv = made(name)
    metric = metric_of(conv)
    for family, variants in applicable(conv).items():
        fit = MetricFit(conv, metric)
        points = list(FAMILIES[family].sweep(conv, variants[0], metric))
        point = points[len(points) // 2]
        plain = FAMILIES[family].fit(conv, point.rank, variants[0])
        stages, error = fit.refine(point.start())
        assert fit.error(stages) == pytest.approx(error, rel=1e-6, abs=1e-9), family
        # Alternating fits end where they are led to; a plain start may lead elsewhere.
        assert error <= 1.02 * fit.error(plain.stages) + 1e-9, family


def test_refining_never_harms():
    conv = made("plain")
    metric = metric_of(conv)
    for family, _, point in chains(conv, points=(3,)):
        fit = MetricFit(conv, metric)
        stages = point.build()
        assert fit.refine(stages, 2)[1] <= fit.error(stages) * (1 + 1e-9), family


def test_white_inputs_leave_optimal_fits_alone():
    conv = made("plain")
    fit = MetricFit(conv, white(1, (6, 3, 3)))
    f = lowrank.spatial_svd(conv, rank=5)
    stages, error = fit.refine(f.stages)
    assert error == pytest.approx(f.error(conv.to_dense()), rel=1e-9)
    assert lowrank.chain(stages).params == f.params


def test_a_paired_metric_wants_the_outputs_of_the_original():
    """On other inputs the best kernel gives what the old one gave there, as far as it can."""
    conv = made("plain")
    x = inputs(conv)
    distorted = np.einsum("nc...,cd->nd...", x, np.diag(np.linspace(0.5, 1.5, 6)))
    moments = Moments(conv, paired=True)
    moments.add(distorted, x)
    metric = moments.metric(damping=0.0)
    wanted = metric.target[0]
    # Channels are only scaled: undoing it is exact.
    want = conv.to_dense() / np.linspace(0.5, 1.5, 6)[:, None, None]
    assert np.abs(wanted - want).max() <= 1e-5 * np.abs(want).max()


def test_few_samples_are_regularised():
    conv = made("plain")
    moments = Moments(conv)
    moments.add(inputs(conv)[:1, :, :3, :3])
    c = moments.metric().input_moment[0]
    values = np.linalg.eigvalsh(c)
    assert values[0] > 1e-2 * values.mean() * 0.9  # nine patches for 54 unknowns
    FAMILIES["spatial_svd"].fit(conv, 3, "h-w", moments.metric())


def test_a_layer_that_sees_nothing_can_be_fitted():
    conv = made("plain")
    moments = Moments(conv)
    moments.add(np.zeros((2, 6, 8, 8)))
    f = FAMILIES["spatial_svd"].fit(conv, 3, "h-w", moments.metric())
    assert np.isfinite(f.to_dense()).all()


def test_means_far_from_zero_do_not_drown_the_moments():
    conv = lowrank.dense(np.ones((4, 3, 3, 3), np.float32))
    x = np.random.default_rng(0).standard_normal((8, 3, 12, 12))
    found = []
    for offset, dtype in ((0, np.float64), (3000, np.float32)):
        moments = Moments(conv, centred=True)
        moments.add((x + offset).astype(dtype))
        found.append(moments.metric().input_moment)
    # 3000 in single precision is known to 2e-4; samples have a spread of 1.
    assert np.abs(found[0] - found[1]).max() < 2e-3


def test_tiny_outputs_do_not_underflow():
    shape, about = CASES["plain"]
    weight = 1e-20 * np.random.default_rng(0).standard_normal(shape)
    conv = lowrank.dense(weight.astype(np.float32), **about)
    moments = Moments(conv)
    moments.add(inputs(conv))
    metric = moments.metric()
    fit = MetricFit(conv, metric)
    start = FAMILIES["spatial_svd"].fit(conv, 3, "h-w", metric).stages
    stages, error = fit.refine(start, 3, dtype=np.float32)
    assert error == pytest.approx(fit.error(stages), rel=1e-3)
    assert error > 0.05
