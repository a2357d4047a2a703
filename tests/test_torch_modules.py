"""Conversion between chains and PyTorch modules."""

import numpy as np
import pytest

import lowrank
from lowrank.core.stage import Stage
from lowrank.families import FAMILIES, NotApplicable

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_models import is_close  # noqa: E402
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import on_engine  # noqa: E402
from lowrank.interop.torch.chains import CONVS, TRANSPOSED_CONVS, TiedLayer, to_module  # noqa: E402
from lowrank.interop.torch.modules import from_layer  # noqa: E402

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
WEIGHT_AND_INPUT_SHAPES = {
    1: ((12, 8, 5), (20,)),
    2: ((12, 8, 3, 4), (9, 8)),
    3: ((8, 4, 3, 2, 3), (6, 5, 6)),
}
CONV_OPTIONS = [
    {}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2, "padding": 1},
    {"padding": "same"}, *({"padding": 1, "padding_mode": m} for m in PADDING_MODES[1:]),
    {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1},
    {"transposed": True, "groups": 2},
]  # fmt: skip


@pytest.mark.parametrize("ndim", WEIGHT_AND_INPUT_SHAPES)
@pytest.mark.parametrize("options", CONV_OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_modules_of_every_family_and_variant_compute_what_the_chain_does(ndim, options, rng):
    shape, size = WEIGHT_AND_INPUT_SHAPES[ndim]
    weight = rng.standard_normal(shape)
    if options.get("groups") and not options.get("transposed"):
        weight = weight[:, : shape[1] // 2]
    outs = shape[1] * options.get("groups", 1) if options.get("transposed") else shape[0]
    conv = lowrank.dense(weight, bias=rng.standard_normal(outs), **options)
    like = CONVS[ndim - 1](1, 1, 1).double()
    x = torch.from_numpy(rng.standard_normal((2, conv.in_channels, *size)))
    variants = 0
    for name, family in FAMILIES.items():
        try:
            found = family.variants(conv)
        except NotApplicable:
            continue
        for variant in found[:6]:
            rank = next(iter(family.sweep(conv, variant))).rank
            f = family.fit(conv, rank, variant)
            expected = torch.from_numpy(f(x.numpy()))
            for tied in (True, False):
                module = to_module(f, like, tied)
                assert is_close(module(x), expected), (name, variant, tied)
                assert any(isinstance(m, TiedLayer) for m in module) <= tied
            variants += 1
    assert variants >= 3


def test_tied_weights_are_one_parameter(rng):
    conv = lowrank.dense(rng.standard_normal((8, 8, 3, 3)), padding=1)
    f = lowrank.kronecker(conv, rank=1, variant="2x2x1x1 first")
    assert any(s.outer * s.inner > 1 for s in f.stages)
    tied, wide = (to_module(f, nn.Conv2d(1, 1, 1), t) for t in (True, False))
    assert sum(p.numel() for p in tied.parameters()) == f.params
    assert sum(p.numel() for p in wide.parameters()) > f.params
    x = torch.randn(2, 8, 6, 6)
    assert is_close(tied(x), wide(x))
    assert is_close(tied(x[0]), wide(x)[0])  # without a batch axis
    assert "outer=" in repr(tied)


@pytest.mark.parametrize("family", ["channel_svd", "kronecker"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 3, 4, 7)])
def test_chains_of_linear_layers_take_inputs_of_any_rank(family, shape, rng):
    like = nn.Linear(8, 12).double()
    conv = from_layer(like)
    variant = FAMILIES[family].variants(conv)[0]
    f = FAMILIES[family].fit(conv, next(iter(FAMILIES[family].sweep(conv, variant))).rank, variant)
    x = torch.from_numpy(rng.standard_normal((*shape[:-1], 8)))
    expected = torch.from_numpy(f.to_dense()[..., 0]) @ x[..., None]
    for tied in (True, False):
        module = to_module(f, like, tied)
        assert is_close(module(x), expected[..., 0] + like.bias)


LAYERS = [
    *(
        (lambda n=n, o=o: CONVS[n](4, 6, 3, **o))
        for n in range(3)
        for o in (
            {}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2},
            {"padding": "valid"}, {"groups": 2, "bias": False}, *(
                {"padding": 1, "padding_mode": m} for m in PADDING_MODES
            ),
        )
    ),
    *(
        (lambda n=n, m=m: CONVS[n](4, 6, 4, padding="same", padding_mode=m))
        for n in range(3)
        for m in PADDING_MODES
    ),
    *(
        (lambda n=n, o=o: TRANSPOSED_CONVS[n](4, 6, 3, **o))
        for n in range(3)
        for o in ({}, {"stride": 2, "padding": 1, "output_padding": 1},
                  {"groups": 2, "bias": False}, {"dilation": 2})
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("make", LAYERS)
def test_every_convolution_survives_the_round_trip_through_a_chain(make):
    conv = make()
    f = from_layer(conv)
    back = to_module(f, conv)
    x = torch.randn(2, 4, *(9, 8, 7)[: f.ndim])
    with torch.no_grad():
        expected = conv(x)
        assert is_close(torch.from_numpy(f(x.numpy())), expected)
        assert is_close(back(x), expected)
        assert is_close(on_engine(conv)(x), expected)
        assert is_close(on_engine(nn.Sequential(conv))(x), expected)


def test_padding_that_pytorch_lacks_raises():
    f = lowrank.dense(np.ones((2, 2, 3)), padding=1, padding_mode="symmetric")
    with pytest.raises(ValueError, match="symmetric"):
        to_module(f, nn.Conv1d(1, 1, 1))
    g = lowrank.Geometry.of(1, padding=[(0, 1)])
    f = lowrank.chain([Stage(np.ones((2, 2, 3)), g, transposed=True)])
    with pytest.raises(ValueError, match="same at both ends"):
        to_module(f, nn.ConvTranspose1d(1, 1, 1))


def test_modules_keep_precision_memory_format_mode_and_requires_grad():
    like = nn.Conv2d(8, 8, 3).half().to(memory_format=torch.channels_last).eval()
    like.weight.requires_grad_(False)
    chain = to_module(lowrank.spatial_svd(from_layer(like), rank=2), like)
    assert {p.dtype for p in chain.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in chain.parameters())
    assert not chain.training
    first = chain[0].weight
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert not first.is_contiguous()
    x = torch.randn(1, 8, 6, 6).half().contiguous(memory_format=torch.channels_last)
    assert chain(x).is_contiguous(memory_format=torch.channels_last)


def test_tied_layers_can_be_traced_symbolically(rng):
    conv = lowrank.dense(rng.standard_normal((8, 8, 3, 3)).astype(np.float32), padding=1)
    f = lowrank.kronecker(conv, rank=1, variant="2x2x1x1 first")
    module = to_module(f, nn.Conv2d(8, 8, 3, padding=1))
    assert any(isinstance(m, TiedLayer) for m in module.modules())
    traced = torch.fx.symbolic_trace(module)
    for shape in ((2, 8, 6, 6), (8, 6, 6), (0, 8, 6, 6)):
        x = torch.randn(shape)
        assert torch.equal(traced(x), module(x))
