"""Operator norms: above the norm of the operator written out, and equal to it where they say so."""

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

# Singular values from an SVD and from the eigenvalues of a Gram matrix in float64, of at most a
# few thousand products: 1e-10 is room enough, and so it is for the bounds to be passed.
EXACT = 1e-10
MODES = ["zeros", "constant", "reflect", "replicate", "symmetric", "circular"]


def run(conv, x):
    return reference.run_chain(conv.stages, x)


def matrix(conv, size):
    """The linear map of a convolution on inputs of `size`, written out by unit vectors."""
    n = conv.in_channels * math.prod(size)
    x = np.eye(n).reshape(n, conv.in_channels, *size)
    return (run(conv, x) - run(conv, 0 * x[:1])).reshape(n, -1).T


def norm_of(conv, size):
    return np.linalg.norm(matrix(conv, size), 2)


def random(*shape, seed=0, **options):
    return lr.dense(np.random.default_rng(seed).standard_normal(shape), **options)


@st.composite
def convolutions(draw):
    """A small convolution of any kind, with an input size."""
    ndim = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    transposed = draw(st.booleans()) and draw(st.booleans())
    kernel = draw(st.tuples(*[st.integers(1, 5 - ndim)] * ndim))
    shape = (groups * draw(st.integers(1, 3)), draw(st.integers(1, 3)), *kernel)
    weight = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape)
    if draw(st.booleans()):
        weight = np.abs(weight)  # the largest frequency is 0, for which many bounds are tight
    dilation = draw(st.tuples(*[st.integers(1, 3)] * ndim))
    padding = draw(st.tuples(*[st.tuples(*[st.integers(0, 3)] * 2)] * ndim))
    if draw(st.booleans()):  # as much as keeps the size
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
def test_no_input_grows_beyond_the_bound(case):
    conv, size = case
    true, bound, free = norm_of(conv, size), operator_norm(conv, size), resolution_free(conv)
    assert true <= bound.value * (1 + EXACT)
    if bound.exact:
        assert true == pytest.approx(bound.value, rel=EXACT)
    if conv.geometry.padding_mode in ("zeros", "constant") or all(
        n >= sum(p) + 2 for n, p in zip(size, conv.geometry.padding)
    ):
        assert true <= free.value * (1 + EXACT)
    # what a constant border adds is what is left for the input of zeros
    added = np.abs(run(conv, np.zeros((1, conv.in_channels, *size)))).max()
    assert added <= bound.offset * (1 + EXACT) == free.offset * (1 + EXACT)


def wrapped(*shape, before=0, seed=0, **options):
    """A circular convolution whose padding keeps the size."""
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
        pytest.param(wrapped(2, 2, 3, dilation=4, seed=2), (7,), id="dilated, out of step"),
        pytest.param(wrapped(6, 2, 3, 3, groups=3), (5, 5), id="grouped"),
        pytest.param(wrapped(6, 1, 3, 3, groups=6), (5, 5), id="depthwise"),
        pytest.param(wrapped(3, 4, 3, 3, stride=2), (6, 8), id="strided"),
        pytest.param(wrapped(5, 1, 3, 4, stride=(3, 2)), (6, 8), id="strided, more outputs"),
        pytest.param(wrapped(3, 2, 3, 3, stride=2, dilation=3), (8, 6), id="strided and dilated"),
        pytest.param(random(6, 4, 1, 1), (3, 4), id="pointwise"),
        pytest.param(random(6, 4, 1, 1, stride=2, padding_mode="reflect"), (5, 4), id="thinned"),
        pytest.param(random(6, 3, 2, 3, stride=(2, 3)), (7, 9), id="patches"),
        pytest.param(random(4, 6, 2, 2, stride=2, transposed=True), (3, 4), id="woven patches"),
    ],
)
def test_what_is_called_exact_is_the_largest_singular_value(conv, size):
    bound = operator_norm(conv, size)
    assert bound.exact
    assert bound.value == pytest.approx(norm_of(conv, size), rel=EXACT)


@pytest.mark.parametrize("size", [9, 10, 11])
@pytest.mark.parametrize("padding", [0, 1, (2, 2)])
def test_a_circle_that_is_cropped_or_out_of_step_is_only_bounded(size, padding):
    for seed in range(10):
        conv = random(2, 3, 5, seed=seed, stride=2, padding=(padding,), padding_mode="circular")
        true, bound = norm_of(conv, (size,)), operator_norm(conv, (size,))
        keeps = np.sum(padding) * (1 if np.ndim(padding) else 2) >= 3
        assert bound.exact == (keeps and size % 2 == 0)
        assert true <= bound.value * (1 + EXACT)


def test_the_largest_eigenvalue_is_found_wherever_it_is():
    # close to many others, so that a few steps of the power method do not tell them apart
    rng = np.random.default_rng(0)
    for n in (1, 3, 8):
        for _ in range(30):
            q = np.linalg.qr(rng.standard_normal((50, n, n)))[0]
            values = 1 - 0.1 * rng.random((50, n))
            grams = q @ (values[:, :, None] * q.swapaxes(1, 2)) + 0j
            assert norms._peak(grams, 0.0) == pytest.approx(values.max(), rel=EXACT)
            assert norms._peak(grams, 2.0) == 2.0


def test_singular_values_are_those_of_the_transformed_kernel():
    # the formula of Sedghi, Gupta and Long, by a Fourier transform of the whole kernel
    conv = wrapped(16, 12, 3, 3, before=1)
    spectrum = np.fft.fft2(conv.to_dense(), (14, 14))
    values = np.linalg.svd(spectrum.transpose(2, 3, 0, 1), compute_uv=False)
    assert operator_norm(conv, (14, 14)).value == pytest.approx(values.max(), rel=EXACT)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "symmetric", "circular"])
@pytest.mark.parametrize("size", [4, 7])
def test_the_norm_of_a_border_is_the_root_of_its_copies(mode, size):
    # a kernel of one tap leaves the border alone: the operator is the padding itself
    border = lr.dense(np.ones((1, 1, 1, 1)), padding=(2, (3, 1)), padding_mode=mode)
    value = operator_norm(border, (size, size)).value
    assert value == pytest.approx(norm_of(border, (size, size)), rel=EXACT)
    assert value > 1.9


def peak(weight, points):
    """Largest singular value of a 2-D kernel among `points` frequencies an axis."""
    spectrum = np.fft.fft2(weight, (points, points)).transpose(2, 3, 0, 1)
    return np.linalg.svd(spectrum, compute_uv=False).max()


@pytest.mark.parametrize("taps", [2, 3, 5])
def test_between_frequencies_the_bound_holds_and_is_tight(taps):
    weight = np.random.default_rng(taps).standard_normal((4, 3, taps, taps))
    free = resolution_free(lr.dense(weight, padding=1)).value
    # 512 frequencies an axis miss at most 1 - cos(pi (taps - 1) / 512) < 3e-4 of the square;
    # the bound's own 32 (taps - 1) make it 1 / cos(pi / 32) = 1.0048 times as large, at most
    assert peak(weight, 512) <= free <= 1.0055 * peak(weight, 512)


def test_the_factor_for_what_lies_between_frequencies_is_needed(monkeypatch):
    monkeypatch.setattr(norms, "POINTS", 8)
    passed = 0
    for seed in range(20):
        weight = np.random.default_rng(seed).standard_normal((1, 1, 3))
        sup = np.abs(np.fft.fft(weight[0, 0], 4096)).max()
        on_grid = np.abs(np.fft.fft(weight[0, 0], 8)).max()
        free = resolution_free(lr.dense(weight))
        assert sup * (1 - EXACT) <= free.value
        # at most: the matricised kernel may be better still
        assert free.value <= on_grid / math.sqrt(math.cos(2 * math.pi / 8)) * (1 + EXACT)
        passed += sup > on_grid * (1 + 1e-3)
    assert passed > 5


@settings(max_examples=60)
@given(convolutions(), st.integers(1, 40))
def test_a_grid_too_fine_to_pay_for_is_bounded_from_a_coarser_one(case, points):
    conv, size = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "POINTS", points)
        coarse = operator_norm(conv, size)
    fine = operator_norm(conv, size)
    assert norm_of(conv, size) <= coarse.value * (1 + EXACT)
    if "between" not in coarse.how:
        assert coarse == fine


def test_chunks_of_frequencies_change_nothing(monkeypatch):
    conv = wrapped(4, 5, 3, 3)
    whole = operator_norm(conv, (9, 8))
    monkeypatch.setattr(norms, "CHUNK", 300)
    monkeypatch.setattr(norms, "TOGETHER", 1)
    assert operator_norm(conv, (9, 8)).value == pytest.approx(whole.value, rel=EXACT)


def test_the_matricised_kernel_is_the_smallest_of_four():
    # one matrix for all taps: at frequency 0 both bounds meet, and grids miss nothing there
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 6))[:, :, None, None] * np.ones((3, 3))
    free = resolution_free(lr.dense(weight))
    four = []
    for rows in ([0], [0, 2], [0, 3], [0, 2, 3]):
        columns = [a for a in range(4) if a not in rows]
        m = weight.transpose(rows + columns).reshape(math.prod(weight.shape[a] for a in rows), -1)
        four.append(3 * np.linalg.norm(m, 2))
    assert free.value == pytest.approx(min(four), rel=EXACT)
    assert "matricised" in free.how
    assert free.value == pytest.approx(9 * np.linalg.norm(weight[:, :, 0, 0], 2), rel=EXACT)


def test_large_inputs_come_near_the_bound_for_every_size():
    conv = random(3, 2, 3, padding=1)
    true = [norm_of(conv, (n,)) for n in (4, 16, 64)]
    free = resolution_free(conv).value
    assert true == sorted(true)
    # at a smooth peak an input of n samples misses a share of order 1 / n^2, here below 0.5
    # percent, and so does the bound
    assert true[-1] <= free <= 1.01 * true[-1]


def test_a_large_dilation_costs_no_more_frequencies(monkeypatch):
    # phases that taps never mix: those of 16 by 16 samples have 4 by 4 frequencies
    conv = random(3, 3, 3, 3, dilation=16, padding=16)
    seen = []
    half = norms._half
    monkeypatch.setattr(norms, "_half", lambda grid: seen.append(grid) or half(grid))
    bound = operator_norm(conv, (48, 48))
    assert seen == [(4, 4)]
    small = random(3, 3, 3, 3, padding=1)
    assert bound.value == pytest.approx(operator_norm(small, (3, 3)).value, rel=EXACT)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_norms_scale_with_the_kernel(scale):
    conv = random(3, 4, 3, 3, padding=1)
    scaled = lr.dense(conv.to_dense() * scale, padding=1)
    assert operator_norm(scaled, (6, 6)).value == scale * operator_norm(conv, (6, 6)).value
    assert resolution_free(scaled).value == scale * resolution_free(conv).value


def test_a_kernel_of_zeros_has_norm_zero():
    conv = lr.dense(np.zeros((3, 4, 3, 3)), padding=1)
    assert operator_norm(conv, (6, 6)).value == resolution_free(conv).value == 0


def test_a_chain_has_the_norm_of_its_kernel():
    conv = wrapped(6, 5, 3, 3, before=1)
    for f in (lr.spatial_svd(conv, 4), lr.kronecker(conv, 2), lr.filter_basis(conv, 2)):
        same = lr.dense(f.to_dense(), padding=1, padding_mode="circular")
        assert operator_norm(f, (6, 6)).value == pytest.approx(
            operator_norm(same, (6, 6)).value, rel=EXACT
        )


def test_what_has_no_norm_is_refused():
    conv = random(3, 4, 3, 3)
    with pytest.raises(ValueError, match="more than the padded input"):
        operator_norm(conv, (2, 5))
    mixed = lr.chain([conv.stages[0], random(3, 2, 3, 3, transposed=True).stages[0]])
    with pytest.raises(ValueError, match="mixes"):
        resolution_free(mixed)


def test_a_norm_says_what_it_is():
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
    """A lower bound on an operator's norm, by the power method."""
    x = np.random.default_rng(0).standard_normal((1, conv.in_channels, *size))
    for _ in range(steps):
        x /= np.linalg.norm(x)
        y = run(conv, x)
        x = run(adjoint, y)
    return np.linalg.norm(y)


def test_bounds_hold_and_are_near_on_trained_layers(data):
    count = 0
    for net in ("resnet20_cifar10", "espcn_x3", "vww_mobilenet_025_96"):
        for layer in itertools.islice(layers(data / "weights" / f"{net}.safetensors"), 0, None, 4):
            conv, size = layer.conv.astype(np.float64), layer.input_size
            if max(size) > 64 or max(conv.geometry.stride) > 1:  # the adjoint has another size
                continue
            conv = lr.Factorization(conv.stages, conv.geometry, conv.groups)
            low = longest(conv, conv.adjoint(), size)
            bound, free = operator_norm(conv, size), resolution_free(conv)
            # the power method has not ended, and zero borders are a little shorter than circles
            assert low * (1 - EXACT) <= bound.value <= 1.25 * low, layer.name
            assert bound.value <= free.value * (1 + EXACT)
            count += 1
    assert count > 6
