"""Operator norms against singular values of the operator as an explicit matrix."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import lowrank as lr
from lowrank.certify import norms
from lowrank.certify.norms import operator_norm, resolution_free
from lowrank.core import reference
from lowrank.interop.weights import layers

# Relative tolerance for singular values in float64, from an SVD and from a Gram matrix, of sums of
# at most a few thousand products.
EXACT = 1e-10
MODES = ["zeros", "constant", "reflect", "replicate", "symmetric", "circular"]


def run(conv, x):
    return reference.run_chain(conv.stages, x)


def matrix(conv, size):
    """Return the matrix of a convolution on inputs of `size`, from unit vectors."""
    n = conv.in_channels * math.prod(size)
    x = np.eye(n).reshape(n, conv.in_channels, *size)
    return (run(conv, x) - run(conv, 0 * x[:1])).reshape(n, -1).T


def norm_of(conv, size):
    return np.linalg.norm(matrix(conv, size), 2)


def random(*shape, seed=0, **options):
    return lr.dense(np.random.default_rng(seed).standard_normal(shape), **options)


@st.composite
def convolutions(draw):
    """Draw a small convolution of any kind and an input size."""
    ndim = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    transposed = draw(st.booleans()) and draw(st.booleans())
    kernel = draw(st.tuples(*[st.integers(1, 5 - ndim)] * ndim))
    shape = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 3)), *kernel)
    weight = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape)
    if draw(st.booleans()):
        weight = np.abs(weight)  # the maximum is at frequency 0, where many bounds are tight
    dilation = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    padding = draw(st.tuples(*[st.tuples(*[st.integers(0, 3)] * 2)] * ndim))
    if draw(st.booleans()):  # padding that keeps the size
        extents = (d * (k - 1) + 1 for d, k in zip(dilation, kernel))
        padding = [(min(p[0], e - 1), e - 1 - min(p[0], e - 1)) for p, e in zip(padding, extents)]
    conv = lr.dense(
        weight,
        stride=draw(st.tuples(*[st.integers(1, 3)] * ndim)),
        dilation=dilation,
        padding=padding,
        groups=groups,
        padding_mode="zeros" if transposed else draw(st.sampled_from([*MODES, "circular"])),
        value=0.5,
        transposed=transposed,
    )
    size = draw(st.tuples(*[st.integers(1, (12, 6, 4)[ndim - 1])] * ndim))
    try:
        conv.output_shape(size)
    except ValueError:
        assume(False)
    return conv, size


@settings(max_examples=300)
@given(convolutions())
def test_norm_is_within_the_bounds(case):
    conv, size = case
    true, bound, free = norm_of(conv, size), operator_norm(conv, size), resolution_free(conv)
    assert true <= bound.value * (1 + EXACT)
    if bound.exact:
        assert true == pytest.approx(bound.value, rel=EXACT)
    if conv.geometry.padding_mode in ("zeros", "constant") or all(
        n >= sum(p) + 2 for n, p in zip(size, conv.geometry.padding)
    ):
        assert true <= free.value * (1 + EXACT)
    # the response to zeros is the contribution of a constant border
    added = np.abs(run(conv, np.zeros((1, conv.in_channels, *size)))).max()
    assert added <= bound.offset * (1 + EXACT) == free.offset * (1 + EXACT)


def wrapped(*shape, before=0, seed=0, **options):
    """Return a circular convolution whose padding keeps the size."""
    g = lr.Geometry.of(len(shape) - 2, dilation=options.get("dilation", 1))
    pads = [(min(before, e - 1), e - 1 - min(before, e - 1)) for e in g.extent(shape[2:])]
    return random(*shape, seed=seed, padding=pads, padding_mode="circular", **options)


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        pytest.param(wrapped(3, 4, 3, before=1), (9,), id="1-D"),
        pytest.param(wrapped(3, 4, 3, 3, before=1), (6, 7), id="2-D"),
        pytest.param(wrapped(2, 3, 2, 3, 2), (4, 3, 5), id="3-D"),
        pytest.param(wrapped(5, 2, 3, 3), (6, 6), id="more outputs"),
        pytest.param(wrapped(3, 2, 5, 4), (3, 3), id="a kernel larger than the circle"),
        pytest.param(wrapped(2, 2, 3, 3, dilation=(2, 3), before=2), (6, 7), id="dilated"),
        pytest.param(wrapped(2, 2, 3, dilation=4), (6,), id="dilated around the circle"),
        pytest.param(
            wrapped(2, 2, 3, dilation=4, seed=2), (7,), id="dilated, coprime to the circle"
        ),
        pytest.param(wrapped(6, 2, 3, 3, groups=3), (5, 5), id="grouped"),
        pytest.param(wrapped(6, 1, 3, 3, groups=6), (5, 5), id="depthwise"),
        pytest.param(wrapped(3, 4, 3, 3, stride=2), (6, 8), id="strided"),
        pytest.param(wrapped(5, 1, 3, 4, stride=(3, 2)), (6, 8), id="strided, more outputs"),
        pytest.param(wrapped(3, 2, 3, 3, stride=2, dilation=3), (8, 6), id="strided and dilated"),
        pytest.param(random(6, 4, 1, 1), (3, 4), id="pointwise"),
        pytest.param(random(6, 4, 1, 1, stride=2, padding_mode="reflect"), (5, 4), id="subsampled"),
        pytest.param(random(6, 3, 2, 3, stride=(2, 3)), (7, 9), id="patches"),
        pytest.param(
            random(4, 6, 2, 2, stride=2, transposed=True), (3, 4), id="transposed patches"
        ),
    ],
)
def test_exact_norm_is_the_largest_singular_value(conv, size):
    bound = operator_norm(conv, size)
    assert bound.exact
    assert bound.value == pytest.approx(norm_of(conv, size), rel=EXACT)


@pytest.mark.parametrize("size", [9, 10, 11])
@pytest.mark.parametrize("padding", [0, 1, (2, 2)])
def test_cropped_or_misaligned_circle_gives_a_bound(size, padding):
    for seed in range(10):
        conv = random(2, 3, 5, seed=seed, stride=2, padding=(padding,), padding_mode="circular")
        true, bound = norm_of(conv, (size,)), operator_norm(conv, (size,))
        keeps = np.sum(padding) * (1 if np.ndim(padding) else 2) >= 3
        assert bound.exact == (keeps and size % 2 == 0)
        assert true <= bound.value * (1 + EXACT)


def test_peak_is_the_largest_eigenvalue():
    # eigenvalues so close that a few steps of the power method do not separate them
    rng = np.random.default_rng(0)
    for n in (1, 3, 8):
        for _ in range(30):
            q = np.linalg.qr(rng.standard_normal((50, n, n)))[0]
            values = 1 - 0.1 * rng.random((50, n))
            grams = q @ (values[:, :, None] * q.swapaxes(1, 2)) + 0j
            assert norms._peak(grams, 0.0) == pytest.approx(values.max(), rel=EXACT)
            assert norms._peak(grams, 2.0) == 2.0


def test_norm_matches_the_fourier_transform_of_the_kernel():
    # Sedghi, Gupta, Long (2019)
    conv = wrapped(16, 12, 3, 3, before=1)
    spectrum = np.fft.fft2(conv.to_dense(), (14, 14))
    values = np.linalg.svd(spectrum.transpose(2, 3, 0, 1), compute_uv=False)
    assert operator_norm(conv, (14, 14)).value == pytest.approx(values.max(), rel=EXACT)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "symmetric", "circular"])
@pytest.mark.parametrize("size", [4, 7])
def test_norm_of_a_border_is_the_root_of_its_copies(mode, size):
    # with a single tap the operator is the padding
    border = lr.dense(np.ones((1, 1, 1, 1)), padding=(2, (3, 1)), padding_mode=mode)
    value = operator_norm(border, (size, size)).value
    assert value == pytest.approx(norm_of(border, (size, size)), rel=EXACT)
    assert value > 1.9


def peak(weight, points):
    """Return the largest singular value of a 2-D kernel over `points` frequencies per axis."""
    spectrum = np.fft.fft2(weight, (points, points)).transpose(2, 3, 0, 1)
    return np.linalg.svd(spectrum, compute_uv=False).max()


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_bound_for_any_size_is_tight_between_frequencies(taps):
    weight = np.random.default_rng(taps).standard_normal((4, 3, taps, taps))
    free = resolution_free(lr.dense(weight, padding=1)).value
    # 512 frequencies per axis miss at most 1 - cos(pi (taps - 1) / 512) < 3e-4 of the square; the
    # bound with 32 (taps - 1) frequencies is at most 1 / cos(pi / 32) = 1.0048 times the maximum
    assert peak(weight, 512) <= free <= 1.0055 * peak(weight, 512)


def test_coarse_grid_needs_the_interpolation_factor(monkeypatch):
    monkeypatch.setattr(norms, "MAX_POINTS", 8)
    passed = 0
    for seed in range(20):
        weight = np.random.default_rng(seed).standard_normal((1, 1, 3))
        sup = np.abs(np.fft.fft(weight[0, 0], 4096)).max()
        on_grid = np.abs(np.fft.fft(weight[0, 0], 8)).max()
        free = resolution_free(lr.dense(weight))
        assert sup * (1 - EXACT) <= free.value
        # at most, since the matricised bound may be smaller
        assert free.value <= on_grid / math.sqrt(math.cos(2 * math.pi / 8)) * (1 + EXACT)
        passed += sup > on_grid * (1 + 1e-3)
    assert passed > 5


@settings(max_examples=60)
@given(convolutions(), st.integers(1, 40))
def test_large_grid_is_bounded_from_a_coarser_one(case, points):
    conv, size = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "MAX_POINTS", points)
        coarse = operator_norm(conv, size)
    fine = operator_norm(conv, size)
    assert norm_of(conv, size) <= coarse.value * (1 + EXACT)
    if "interpolated" not in coarse.method:
        assert coarse == fine


def test_norm_does_not_depend_on_chunks(monkeypatch):
    conv = wrapped(4, 5, 3, 3)
    whole = operator_norm(conv, (9, 8))
    monkeypatch.setattr(norms, "CHUNK", 300)
    monkeypatch.setattr(norms, "CHOLESKY_BATCH", 1)
    assert operator_norm(conv, (9, 8)).value == pytest.approx(whole.value, rel=EXACT)


def test_matricised_bound_is_the_smallest_of_four():
    # one matrix for all taps: both bounds coincide at frequency 0, which is on every grid
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 6))[:, :, None, None] * np.ones((3, 3))
    free = resolution_free(lr.dense(weight))
    four = []
    for rows in ([0], [0, 2], [0, 3], [0, 2, 3]):
        columns = [a for a in range(4) if a not in rows]
        m = weight.transpose(rows + columns).reshape(math.prod(weight.shape[a] for a in rows), -1)
        four.append(3 * np.linalg.norm(m, 2))
    assert free.value == pytest.approx(min(four), rel=EXACT)
    assert "matricised" in free.method
    assert free.value == pytest.approx(9 * np.linalg.norm(weight[:, :, 0, 0], 2), rel=EXACT)


def test_norm_of_large_inputs_approaches_the_bound_for_any_size():
    conv = random(3, 2, 3, padding=1)
    true = [norm_of(conv, (n,)) for n in (4, 16, 64)]
    free = resolution_free(conv).value
    assert true == sorted(true)
    # at a smooth peak an input of n samples misses a relative O(1 / n^2), here below 0.5 %, and
    # the grid of the bound a similar share
    assert true[-1] <= free <= 1.01 * true[-1]


def test_dilation_adds_no_frequencies(monkeypatch):
    # the taps never mix the 16 x 16 phases, each of which has 4 x 4 frequencies
    conv = random(3, 3, 3, 3, dilation=16, padding=16)
    seen = []
    half = norms._half_spectrum
    monkeypatch.setattr(norms, "_half_spectrum", lambda grid: seen.append(grid) or half(grid))
    bound = operator_norm(conv, (48, 48))
    assert seen == [(4, 4)]
    small = random(3, 3, 3, 3, padding=1)
    assert bound.value == pytest.approx(operator_norm(small, (3, 3)).value, rel=EXACT)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_norm_scales_with_the_kernel(scale):
    conv = random(3, 4, 3, 3, padding=1)
    scaled = lr.dense(conv.to_dense() * scale, padding=1)
    assert operator_norm(scaled, (6, 6)).value == scale * operator_norm(conv, (6, 6)).value
    assert resolution_free(scaled).value == scale * resolution_free(conv).value


def test_zero_kernel_has_norm_zero():
    conv = lr.dense(np.zeros((3, 4, 3, 3)), padding=1)
    assert operator_norm(conv, (6, 6)).value == resolution_free(conv).value == 0


def test_chain_has_the_norm_of_its_kernel():
    conv = wrapped(6, 5, 3, 3, before=1)
    for f in (lr.spatial_svd(conv, 4), lr.kronecker(conv, 2), lr.filter_basis(conv, 2)):
        same = lr.dense(f.to_dense(), padding=1, padding_mode="circular")
        assert operator_norm(f, (6, 6)).value == pytest.approx(
            operator_norm(same, (6, 6)).value, rel=EXACT
        )


def test_invalid_arguments_are_rejected():
    conv = random(3, 4, 3, 3)
    with pytest.raises(ValueError, match="larger than the padded input"):
        operator_norm(conv, (2, 5))
    mixed = lr.chain([conv.stages[0], random(3, 2, 3, 3, transposed=True).stages[0]])
    with pytest.raises(ValueError, match="all plain or all transposed"):
        resolution_free(mixed)


def test_norm_prints_value_and_method():
    texts = {
        (1, "circular"): "3.5 (DFT on the circle of 8)",
        (1, "zeros"): "at most 3.5 (DFT on a circle of 9 for input and border)",
        (1, "reflect"): "at most 4.95 (DFT on a circle of 10 for input and border, "
        "times 1.414 for the border's copies)",
        (0, "zeros"): "at most 3.5 (DFT on a circle of 8 for input and border)",
    }
    for (padding, mode), text in texts.items():
        conv = lr.dense(np.array([[[1.0, 2.0, 0.5]]]), padding=padding, padding_mode=mode)
        assert str(operator_norm(conv, (8,))) == text
    conv = lr.dense(np.ones((1, 1, 3)), padding=1, padding_mode="constant", value=-2.0)
    assert "and an offset of 6" in str(operator_norm(conv, (8,)))


def longest(conv, adjoint, size, steps=30):
    """Return a lower bound on an operator norm, by the power method."""
    x = np.random.default_rng(0).standard_normal((1, conv.in_channels, *size))
    for _ in range(steps):
        x /= np.linalg.norm(x)
        y = run(conv, x)
        x = run(adjoint, y)
    return np.linalg.norm(y)


def test_bounds_are_tight_on_trained_layers(data):
    count = 0
    for net in ("resnet20_cifar10", "espcn_x3", "vww_mobilenet_025_96"):
        for layer in itertools.islice(layers(data / "weights" / f"{net}.safetensors"), 0, None, 4):
            conv, size = layer.conv.astype(np.float64), layer.input_size
            if max(size) > 64 or max(conv.geometry.stride) > 1:  # size of the adjoint differs
                continue
            conv = lr.Factorization(conv.stages, conv.geometry, conv.groups)
            low = longest(conv, conv.adjoint(), size)
            bound, free = operator_norm(conv, size), resolution_free(conv)
            # the power method has not converged, and zero padding is slightly below the circle
            assert low * (1 - EXACT) <= bound.value <= 1.25 * low, layer.name
            assert bound.value <= free.value * (1 + EXACT)
            count += 1
    assert count > 6
