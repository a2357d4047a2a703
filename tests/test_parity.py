"""Dense convolutions and chains compared with ONNX, SciPy and PyTorch."""

import itertools
import json

import numpy as np
import pytest
import scipy.ndimage

import lowrank as lr
from lowrank.core import reference

# Sums of n products in float32 differ by rounding: about sqrt(n) * eps of the sum of magnitudes,
# here below 200 terms of order 1.
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}

MODES = {"reflect": "mirror", "replicate": "nearest", "circular": "wrap", "symmetric": "reflect"}


def outputs(f, x):
    """Return the outputs of the engine and of the reference."""
    return f(x), reference.run_chain(f.stages, x, f.bias)


def onnx_cases(folder):
    with np.load(folder / "conformance" / "onnx_conv_cases.npz") as cases:
        for case in json.loads(str(cases["manifest"])):
            arrays = [cases[f"{case['i']}.{k}"] for k in "xwy"]
            bias = cases[f"{case['i']}.b"] if case["bias"] else None
            yield case, *arrays, bias


def test_onnx_conformance_cases(data):
    count = 0
    for case, x, w, expected, bias in onnx_cases(data):
        attrs, n = case["attrs"], w.ndim - 2
        pads = attrs.get("pads", [0] * 2 * n)
        conv = lr.dense(
            w,
            bias,
            stride=attrs.get("strides", 1),
            padding=list(zip(pads[:n], pads[n:])),
            dilation=attrs.get("dilations", 1),
            groups=attrs.get("group", 1),
            transposed=case["op"] == "ConvTranspose",
            output_padding=attrs.get("output_padding", 0),
        )
        for y in outputs(conv, x):
            np.testing.assert_allclose(y, expected, **FLOAT32, err_msg=case["name"])
        count += 1
    assert count == 14


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_padding_modes_equal_scipy(rng, ndim, mode):
    kernel = rng.standard_normal((3, 4, 5)[-ndim:])
    x = rng.standard_normal((7, 8, 9)[-ndim:])
    before = [n // 2 for n in kernel.shape]
    conv = lr.dense(
        kernel[None, None],
        padding=[(b, n - 1 - b) for b, n in zip(before, kernel.shape)],
        padding_mode=mode,
    )
    expected = scipy.ndimage.correlate(x, kernel, mode=MODES[mode])
    for y in outputs(conv, x[None, None]):
        np.testing.assert_allclose(y[0, 0], expected, **FLOAT64)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_border_value_passes_through_a_chain(rng, ndim):
    # The border value of a later stage is the constant times the sum of the earlier taps.
    kernel = rng.standard_normal((3, 5, 3)[-ndim:])
    x = rng.standard_normal((7, 8, 9)[-ndim:])
    conv = lr.dense(kernel[None, None], padding="same", padding_mode="constant", value=2.5)
    expected = scipy.ndimage.correlate(x, kernel, mode="constant", cval=2.5)
    chains = [conv]
    if ndim == 2:
        chains += [lr.spatial_svd(conv, 3, variant) for variant in ("h-w", "w-h")]
    if ndim == 3:
        chains += [lr.spatial_svd(conv, 3), lr.tensor_train(conv, (3, 3))]
    for f in chains:
        for y in outputs(f, x[None, None]):
            np.testing.assert_allclose(y[0, 0], expected, **FLOAT64)


def geometries(ndim):
    """Yield strides, paddings, dilations and groups, equal or different per axis."""
    odd = [(1, 2, 3)[-ndim:], (2, 1, 2)[-ndim:]]
    for stride, padding, dilation, groups in itertools.product(
        [1, 2, odd[0]], [0, 2, odd[1]], [1, 2, odd[1]], [1, 2, 4]
    ):
        yield {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@pytest.mark.full
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolution_equals_pytorch(rng, ndim):
    torch = pytest.importorskip("torch")
    conv = getattr(torch.nn.functional, f"conv{ndim}d")
    x = rng.standard_normal((2, 8, *(11, 12, 13)[-ndim:]))
    for options in geometries(ndim):
        w = rng.standard_normal((12, 8 // options["groups"], *(3, 2, 4)[-ndim:]))
        b = rng.standard_normal(12)
        expected = conv(*map(torch.tensor, (x, w, b)), **options).numpy()
        for y in outputs(lr.dense(w, b, **options), x):
            np.testing.assert_allclose(y, expected, **FLOAT64, err_msg=str(options))


@pytest.mark.full
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_transposed_convolution_equals_pytorch(rng, ndim):
    torch = pytest.importorskip("torch")
    conv = getattr(torch.nn.functional, f"conv_transpose{ndim}d")
    x = rng.standard_normal((2, 8, *(5, 6, 7)[-ndim:]))
    for options in geometries(ndim):
        stride = np.broadcast_to(options["stride"], ndim)
        dilation = np.broadcast_to(options["dilation"], ndim)
        options["output_padding"] = tuple(int(max(s, d) - 1) for s, d in zip(stride, dilation))
        w = rng.standard_normal((8, 12 // options["groups"], *(3, 2, 4)[-ndim:]))
        b = rng.standard_normal(12)
        expected = conv(*map(torch.tensor, (x, w, b)), **options).numpy()
        for y in outputs(lr.dense(w, b, transposed=True, **options), x):
            np.testing.assert_allclose(y, expected, **FLOAT64, err_msg=str(options))


@pytest.mark.full
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_padding_modes_equal_pytorch(rng, ndim, mode):
    torch = pytest.importorskip("torch")
    layer = getattr(torch.nn, f"Conv{ndim}d")(
        4, 6, 3, stride=2, padding=2, padding_mode=mode, dtype=torch.float64
    )
    x = rng.standard_normal((2, 4, *(7, 8, 9)[-ndim:]))
    conv = lr.dense(
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy(),
        stride=2,
        padding=2,
        padding_mode=mode,
    )
    expected = layer(torch.tensor(x)).detach().numpy()
    for y in outputs(conv, x):
        np.testing.assert_allclose(y, expected, **FLOAT64)
