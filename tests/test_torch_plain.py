"""Modules that compute what a layer does in another way: they are layers, too."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from lowrank.interop.torch import TorchModel, compress  # noqa: E402
from lowrank.interop.torch.attention import Attention  # noqa: E402
from lowrank.interop.torch.plain import find_plain_layers  # noqa: E402


class Conv1D(nn.Module):
    """Linear layer with the weight (inputs, outputs), as in GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        y = torch.addmm(self.bias, x.reshape(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.nf)


class StdConv(nn.Conv2d):
    """Convolution with a standardized weight, as in BiT."""

    def forward(self, x):
        w = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6
        ).reshape_as(self.weight)
        return functional.conv2d(
            x, w, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class GainConv(nn.Conv2d):
    """Convolution with a standardized weight and trained gains, as in NFNets."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        centered = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = self.gain * centered / centered.std((1, 2, 3), keepdim=True)
        return functional.conv2d(
            x, w, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class EqualizedLinear(nn.Linear):
    """Linear layer with a run-time scale, as in StyleGAN."""

    def forward(self, x):
        return functional.linear(x, self.weight * 0.5, self.bias * 2)


class EqualizedTransposed(nn.ConvTranspose2d):
    def forward(self, x):
        return functional.conv_transpose2d(
            x, self.weight * 0.5, self.bias, self.stride, self.padding
        )


class DynamicConv(nn.Conv2d):
    """Convolution whose weight depends on the input."""

    def forward(self, x):
        return functional.conv2d(x, self.weight * x.mean(), self.bias, padding=self.padding)


class SamePadding(nn.Conv2d):
    """Convolution whose padding depends on the size of the input."""

    def forward(self, x):
        pads = [(-(-n // 2) - 1) * 2 + 3 - n for n in x.shape[-2:]]
        x = functional.pad(x, [p for n in pads[::-1] for p in (n // 2, n - n // 2)])
        return functional.conv2d(x, self.weight, self.bias, self.stride)


class CausalConv(nn.Conv1d):
    """Dilated convolution that pads in front alone, as in WaveNet."""

    def forward(self, x):
        return super().forward(functional.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class CausalPlanes(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (1, 2, 3, 0)))


@pytest.mark.parametrize(
    ("layer", "shape", "pads"),
    [
        (CausalConv(8, 16, 3, dilation=4), (3, 8, 20), (8, 0)),
        (CausalConv(8, 8, 2, groups=8), (3, 8, 20), (1, 0)),
        (CausalPlanes(8, 16, 3, 2, padding=1), (3, 8, 9, 9), (1, 2, 3, 0)),
    ],
)
def test_convolutions_behind_zeros_are_layers(layer, shape, pads):
    torch.manual_seed(0)
    model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(shape)
    net = TorchModel(model, [x])
    (found,) = net.layers
    assert found.name == "0.conv"
    assert not net.left_out
    small = net.replaced({"0.conv": found.conv})
    assert small[0].pad.padding == pads
    other = torch.randn(*shape[:2], *(n + 3 for n in shape[2:]))
    assert torch.allclose(small(other), model(other), atol=1e-5)
    assert net.verify(small, {"0.conv": found.conv}) < 1e-5


LAYERS = {
    "Conv1D": (lambda: Conv1D(24, 16), (3, 5, 16)),
    "square Conv1D": (lambda: Conv1D(16, 16), (3, 5, 16)),
    "StdConv": (lambda: StdConv(8, 16, 3, padding=1), (3, 8, 9, 9)),
    "strided StdConv": (lambda: StdConv(8, 16, 3, 2, groups=2, bias=False), (3, 8, 9, 9)),
    "GainConv": (lambda: GainConv(8, 16, (3, 1), dilation=2), (3, 8, 9, 9)),
    "EqualizedLinear": (lambda: EqualizedLinear(16, 24), (3, 16)),
    "EqualizedTransposed": (lambda: EqualizedTransposed(8, 16, 4, 2, 1), (3, 8, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_plain_layers_compute_the_same(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make(), nn.ReLU()).eval(), torch.randn(shape)
    found, changed = find_plain_layers(copy.deepcopy(model), lambda m: m(x))
    assert list(found) == ["0"]
    assert type(found["0"]).__module__.startswith("torch.nn.modules")
    other = 3 * torch.randn(shape)
    assert torch.allclose(changed(other), model(other), atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_chains_replace_such_layers(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = nn.Sequential(make(), nn.ReLU()).train(), torch.randn(shape)
    net = TorchModel(model, [x])
    (layer,) = net.layers
    assert layer.name == "0"
    assert not net.left_out
    small = net.replaced({"0": layer.conv})
    assert type(small[0]) is nn.Sequential
    assert small.training
    assert all(p.requires_grad for p in small.parameters())
    assert torch.allclose(small(x), model(x), atol=1e-4)
    assert net.verify(small, {"0": layer.conv}) < 1e-5
    assert type(net.replaced({})[0]) is type(model[0])


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (DynamicConv(8, 8, 3, padding=1), 12),
        (SamePadding(8, 8, 3, 2), 12),
        (SamePadding(8, 8, 3, 2), 13),
    ],
)
def test_layers_that_depend_on_the_input_are_left_out(layer, size):
    model = nn.Sequential(layer, nn.Conv2d(8, 8, 3))
    net = TorchModel(model, [torch.randn(2, 8, size, size)])
    assert [one.name for one in net.layers] == ["1"]
    assert "has its own forward" in net.left_out["0"]
    assert net.left_out_macs["0"] > 0


def test_shared_weights_stay():
    a, b = Conv1D(16, 16), Conv1D(16, 16)
    b.weight = a.weight
    net = TorchModel(nn.Sequential(a, b, nn.Linear(16, 16)), [torch.randn(2, 16)])
    assert [layer.name for layer in net.layers] == ["2"]
    assert set(net.left_out) == {"0", "1"}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}, {"bias": False}])
@pytest.mark.parametrize("masks", ["", "keys", "pairs", "both", "heads", "scores", "causal"])
def test_attention_computes_what_that_of_pytorch_does(batch_first, sizes, masks):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes).eval()
    ours = Attention(theirs)
    n, length, keys = 3, 4, 4 if masks == "causal" else 5
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    args = [
        order(torch.randn(n, size, width))
        for size, width in ((length, 8), (keys, theirs.kdim), (keys, theirs.vdim))
    ]
    padding = torch.zeros(n, keys, dtype=torch.bool)
    padding[1, -2:] = True
    pairs = torch.rand(length, keys) < 0.4
    pairs[:, 0] = False
    options = {
        "": {},
        "keys": {"key_padding_mask": padding},
        "pairs": {"attn_mask": pairs},
        "both": {"key_padding_mask": padding, "attn_mask": pairs},
        "heads": {"attn_mask": torch.randn(n * 2, length, keys)},
        "scores": {"attn_mask": torch.randn(length, keys)},
        "causal": {
            "attn_mask": torch.full((length, length), -torch.inf).triu(1),
            "is_causal": True,
        },
    }[masks]
    for kind in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        expected, found = theirs(*args, **options, **kind), ours(*args, **options, **kind)
        assert torch.allclose(found[0], expected[0], atol=1e-5)
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            assert torch.allclose(found[1], expected[1], atol=1e-5)
    if masks in ("", "pairs", "scores"):
        one = [t[0] if batch_first else t[:, 0] for t in args]
        expected, found = theirs(*one, **options), ours(*one, **options)
        assert found[0].shape == expected[0].shape
        assert found[1].shape == expected[1].shape
        assert torch.allclose(found[0], expected[0], atol=1e-5)


def test_causal_attention_needs_its_mask():
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="attn_mask must be given"):
        Attention(nn.MultiheadAttention(8, 2))(x, x, x, is_causal=True)


class Block(nn.Module):
    """Attention with a connection around it."""

    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **settings)
        self.last = nn.Linear(16, 16)

    def forward(self, x):
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


PROJECTIONS = [f"attention.{name}_proj" for name in ("q", "k", "v", "out")]


def test_projections_of_attention_are_layers():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(4, 6, 16)
    net = TorchModel(model, [x])
    assert [layer.name for layer in net.layers] == [*PROJECTIONS, "last"]
    assert not net.left_out
    result = compress(model, [x], macs=0.7)
    assert np.isfinite(result.output_error)
    y = result.model.train()(x)
    y.sum().backward()
    assert all(p.grad is not None for p in result.model.parameters())


@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_of_a_transformer_encoder_are_layers(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(4, 6, 16)
    net = TorchModel(model, [x])
    assert len(net.layers) == 12
    assert not net.left_out
    chains = {
        "layers.1.linear1": {layer.name: layer for layer in net.layers}["layers.1.linear1"].conv
    }
    small = net.replaced(chains)
    assert torch.allclose(small(x), model(x), atol=1e-4)
    assert (
        compress(model, [x], macs=0.7).plan.total("macs")[0] <= 0.7 * net.layers[0].cost.macs * 16
    )


def test_projections_of_a_transformer_decoder_are_layers():
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 16)
    net = TorchModel(model, [(x, x)], run=lambda m, b: m(*b))
    assert len(net.layers) == 10
    assert not net.left_out


def test_attention_with_further_keys_is_listed():
    net = TorchModel(Block(add_bias_kv=True), [torch.randn(4, 6, 16)])
    assert [layer.name for layer in net.layers] == ["last"]
    assert "attention" in net.left_out
    assert "attention.out_proj" in net.left_out


class Reader(Block):
    """A model that reads weights of its attention."""

    def forward(self, x):
        x = x * self.attention.in_proj_weight.mean()
        return super().forward(x)


def test_attention_whose_weights_the_model_reads_stays():
    net = TorchModel(Reader(), [torch.randn(4, 6, 16)])
    assert [layer.name for layer in net.layers] == ["last"]
    assert net.left_out["attention.out_proj"] == "MultiheadAttention reads its weight"
