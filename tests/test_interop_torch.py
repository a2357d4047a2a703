"""PyTorch: layers out of any module tree, chains into it, models on the engine."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

import lowrank
from lowrank.compress import make_plan
from lowrank.core.stage import Stage
from lowrank.families import FAMILIES, NotApplicable

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from lowrank.interop import torch as interop  # noqa: E402
from lowrank.interop.torch import TorchNet, compress, layers, on_engine  # noqa: E402
from lowrank.interop.torch.engine import Engine  # noqa: E402
from lowrank.interop.torch.modules import CONVS, TRANSPOSED, Tied, of_module, to_module  # noqa: E402  # noqa: E402

MODES = ("zeros", "reflect", "replicate", "circular")


@pytest.fixture(autouse=True)
def steady():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def equal(found, wanted, terms=1000):
    """Equal but for the rounding of sums of so many products, in the precision of `found`."""
    assert found.shape == wanted.shape
    found, wanted = found.detach(), wanted.detach()
    eps = torch.finfo(found.dtype).eps
    scale = float(wanted.abs().max()) + 1e-30
    # sqrt(terms) roundings at random; 16 of them for the tails and for the chain's own growth
    return float((found.double() - wanted.double()).abs().max()) <= 16 * terms**0.5 * eps * scale


def small_net(bias=False):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def batches(n=2, size=8, shape=(3, 10, 10)):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=random) for _ in range(n)]


def warmed(model, shape=(3, 10, 10)):
    """With batch norms that have seen something."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                m.weight.data.uniform_(0.5, 2)
                m.bias.data.normal_(0, 0.1)
    return model.eval()


# --- chains as modules ------------------------------------------------------------------------

SHAPES = {
    1: ((12, 8, 5), (20,)),
    2: ((12, 8, 3, 4), (9, 8)),
    3: ((8, 4, 3, 2, 3), (6, 5, 6)),
}
OPTIONS = [
    {}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2, "padding": 1},
    {"padding": "same"}, *({"padding": 1, "padding_mode": m} for m in MODES[1:]),
    {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1},
    {"transposed": True, "groups": 2},
]  # fmt: skip


@pytest.mark.parametrize("ndim", SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_family_and_form_is_what_its_chain_is(ndim, options, rng):
    shape, size = SHAPES[ndim]
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
            wanted = torch.from_numpy(f(x.numpy()))
            for tied in (True, False):
                module = to_module(f, like, tied)
                assert equal(module(x), wanted), (name, variant, tied)
                assert any(isinstance(m, Tied) for m in module) <= tied
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
    assert equal(tied(x), wide(x))
    assert equal(tied(x[0]), wide(x)[0])  # without a batch, as PyTorch's layers take it
    assert "left=" in repr(tied)


@pytest.mark.parametrize("family", ["channel_svd", "kronecker"])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 3, 4, 7)])
def test_linear_layers_keep_their_shapes(family, shape, rng):
    like = nn.Linear(8, 12).double()
    conv = of_module(like)
    variant = FAMILIES[family].variants(conv)[0]
    f = FAMILIES[family].fit(conv, next(iter(FAMILIES[family].sweep(conv, variant))).rank, variant)
    x = torch.from_numpy(rng.standard_normal((*shape[:-1], 8)))
    wanted = torch.from_numpy(f.to_dense()[..., 0]) @ x[..., None]
    for tied in (True, False):
        module = to_module(f, like, tied)
        assert equal(module(x), wanted[..., 0] + like.bias)


ROUND = [
    *(
        (lambda n=n, o=o: CONVS[n](4, 6, 3, **o))
        for n in range(3)
        for o in (
            {}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2},
            {"padding": "valid"}, {"groups": 2, "bias": False}, *(
                {"padding": 1, "padding_mode": m} for m in MODES
            ),
        )
    ),
    *(
        (lambda n=n, m=m: CONVS[n](4, 6, 4, padding="same", padding_mode=m))
        for n in range(3)
        for m in MODES
    ),
    *(
        (lambda n=n, o=o: TRANSPOSED[n](4, 6, 3, **o))
        for n in range(3)
        for o in ({}, {"stride": 2, "padding": 1, "output_padding": 1},
                  {"groups": 2, "bias": False}, {"dilation": 2})
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("make", ROUND)
def test_every_convolution_goes_there_and_back(make):
    conv = make()
    f = of_module(conv)
    back = to_module(f, conv)
    x = torch.randn(2, 4, *(9, 8, 7)[: f.ndim])
    with torch.no_grad():
        wanted = conv(x)
        assert equal(torch.from_numpy(f(x.numpy())), wanted)
        assert equal(back(x), wanted)
        assert equal(on_engine(conv)(x), wanted)
        assert equal(on_engine(nn.Sequential(conv))(x), wanted)


def test_what_pytorch_has_not():
    f = lowrank.dense(np.ones((2, 2, 3)), padding=1, padding_mode="symmetric")
    with pytest.raises(ValueError, match="symmetric"):
        to_module(f, nn.Conv1d(1, 1, 1))
    g = lowrank.Geometry.of(1, padding=[(0, 1)])
    f = lowrank.chain([Stage(np.ones((2, 2, 3)), g, transposed=True)])
    with pytest.raises(ValueError, match="alike at both ends"):
        to_module(f, nn.ConvTranspose1d(1, 1, 1))


def test_precision_memory_format_mode_and_frozen_weights_are_kept():
    like = nn.Conv2d(8, 8, 3).half().to(memory_format=torch.channels_last).eval()
    like.weight.requires_grad_(False)
    chain = to_module(lowrank.spatial_svd(of_module(like), rank=2), like)
    assert {p.dtype for p in chain.parameters()} == {torch.float16}
    assert not any(p.requires_grad for p in chain.parameters())
    assert not chain.training
    first = chain[0].weight
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert not first.is_contiguous()
    x = torch.randn(1, 8, 6, 6).half().contiguous(memory_format=torch.channels_last)
    assert chain(x).is_contiguous(memory_format=torch.channels_last)


# --- what compression sees --------------------------------------------------------------------


class Shared(nn.Module):
    """One convolution under two names, called twice, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.more = nn.ModuleDict({"b": self.a, "idle": nn.Conv2d(4, 4, 3)})

    def forward(self, x):
        return self.more["b"](torch.relu(self.a(x)))


def test_shared_and_idle_modules():
    model = Shared()
    net = TorchNet(model, batches(shape=(4, 8, 8)))
    assert [(x.name, x.times) for x in net.layers] == [("a", 2)]
    (one,) = next(net.inputs(["a"], {})).values()
    assert len(one) == 2
    small = compress(model, batches(shape=(4, 8, 8)), macs=0.6).model
    assert small.a is small.more["b"]
    assert isinstance(small.a, nn.Sequential)
    assert isinstance(small.more["idle"], nn.Conv2d)


def test_the_gain_of_a_batch_norm_counts():
    model = warmed(small_net())
    net = TorchNet(model, batches())
    norm = model[1]
    wanted = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    np.testing.assert_allclose(net.layers[0].scale, wanted.detach(), rtol=1e-6)
    assert net.layers[2].scale is None


def test_inputs_may_be_passed_by_name():
    data = batches(shape=(4, 8, 8))
    net = TorchNet(warmed(Optional()), data)
    (layer,) = net.layers
    assert layer.scale is not None
    np.testing.assert_array_equal(next(net.inputs(["conv"], {}))["conv"][0], data[0])
    small = compress(net.original, data, macs=0.5).model
    with torch.inference_mode():
        assert equal(on_engine(small)(data[0], scale=2), 2 * small(data[0]))


class Unbatched(nn.Module):
    """Calls its layers example by example."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(4, 4, 3), nn.Linear(6, 6)

    def forward(self, x):
        return torch.stack([self.linear(self.conv(one).mean(0)) for one in x])


def test_layers_that_are_called_without_a_batch():
    (x,) = batches(1, 5, (4, 8))
    net = TorchNet(Unbatched(), [x])
    assert [(layer.name, layer.input_size) for layer in net.layers] == [
        ("conv", (8,)), ("linear", (1,)),
    ]  # fmt: skip
    found = next(net.inputs(["conv", "linear"], {}))
    np.testing.assert_array_equal(np.concatenate(found["conv"]), x)
    assert [a.shape for a in found["linear"]] == [(1, 6, 1)] * 5
    gradients = next(net.gradients(["conv"], 0))
    assert [a.shape for a in gradients["conv"]] == [(1, 4, 6)] * 5


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 1)
        self.more = nn.Conv1d(2, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        x.zero_()
        return self.more(y)


def test_inputs_are_those_of_the_call_and_not_what_was_written_there_later():
    (x,) = batches(1, 3, (2, 4))
    net = TorchNet(Overwriting(), [x.clone()])
    net.data = [x.clone()]
    assert np.abs(next(net.inputs(["conv", "more"], {}))["conv"][0]).min() > 0


class Tokens(nn.Module):
    """Integers in: the first gradients are those of an embedding's outputs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.linear, self.norm = nn.Linear(16, 16), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.layer(self.norm(self.linear(self.table(x))))


def test_integer_inputs_and_layers_whose_weights_others_read():
    model = Tokens().eval()
    data = [torch.randint(0, 20, (4, 6)) for _ in range(2)]
    net = TorchNet(model, data)
    assert [x.name for x in net.layers] == ["linear"]
    (g,) = next(net.gradients(["linear"], 0))["linear"]
    assert g.shape == (4, 16, 6)
    assert np.abs(g).max() > 0
    small = compress(model, data, macs=0.5).model
    with torch.inference_mode():
        assert small(data[0]).shape == (4, 6, 16)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_a_layer_with_a_forward_pass_of_its_own_is_no_layer():
    model = nn.Sequential(Standardised(3, 8, 3), nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 3, 8, 8)
    assert list(layers(model, x)) == ["1"]
    with torch.inference_mode():
        assert equal(on_engine(model)(x), model(x))


@pytest.mark.parametrize("loss", ["labels", lambda y, random: (y**2).sum()])
def test_losses(loss):
    model = warmed(small_net())
    net = TorchNet(model, batches(), loss)
    found = list(net.gradients(["0", "8"], 0))
    assert [g["0"][0].shape for g in found] == [(8, 16, 10, 10)] * 2
    again = list(net.gradients(["0", "8"], 0))
    assert np.array_equal(found[1]["0"][0], again[1]["0"][0])
    if loss == "labels":  # of a softmax less the label: they sum to zero
        np.testing.assert_allclose(found[0]["8"][0].sum(1), 0, atol=1e-5)
        other = list(net.gradients(["0", "8"], 1))
        assert not np.array_equal(found[1]["0"][0], other[1]["0"][0])


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv1d(2, 3, 1) for _ in range(3))

    def forward(self, x):
        return {"a": self.a(x), "rest": (self.b(x), self.c(x).argmax(1))}


def test_all_outputs_count_that_have_a_gradient():
    net = TorchNet(Several(), batches(shape=(2, 4)))
    found = next(net.gradients(["a", "b", "c"], 0))
    assert [len(found[name]) for name in "abc"] == [1, 1, 0]


def test_labels_are_drawn_of_channels_at_every_sample():
    model = nn.Conv2d(3, 4, 3)
    (g,) = next(TorchNet(model, batches(), "labels").gradients([""], 0))[""]
    assert g.shape == (8, 4, 8, 8)
    np.testing.assert_allclose(g.sum(1), 0, atol=1e-5)
    # p - 1 at the label, which is one a sample
    np.testing.assert_array_equal((g < 0).sum(1), 1)


# --- compression ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done():
    torch.manual_seed(0)
    model = warmed(small_net())
    return model, compress(model, batches(), macs=0.5)


def macs(model, x):
    """Multiply-adds of one example, counted from what layers get and give."""
    total = 0

    def count(m, args, out):
        nonlocal total
        x, w = args[0], m.weight
        if isinstance(m, nn.Linear):
            total += out.numel() * w.shape[1]
        elif isinstance(m, TRANSPOSED):
            total += x.numel() * w[0].numel()
        else:
            total += out.numel() * w[0].numel()

    hooks = [
        m.register_forward_hook(count)
        for m in model.modules()
        if isinstance(m, (*CONVS, *TRANSPOSED, nn.Linear))
    ]
    with torch.no_grad():
        model(x)
    for h in hooks:
        h.remove()
    return total


def test_a_budget_is_kept_to(done):
    model, small = done
    x = batches()[0][:1]
    now, before = small.plan.total("macs")
    assert macs(model, x) == before
    # Layers count what is really done; a plan leaves out nothing of it.
    assert macs(small.model, x) == now <= 0.5 * before
    with torch.no_grad():
        assert small.model(x).shape == model(x).shape


def test_the_original_is_left_alone():
    model = small_net().train()
    model[0].weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    modules = list(model.modules())
    compress(model, batches(), macs=0.5, renorm=True)
    on_engine(model)
    assert list(model.modules()) == modules
    assert [m.training for m in modules] == modes
    assert [p.requires_grad for p in model.parameters()] == [
        k != "0.weight" for k, _ in model.named_parameters()
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert all(p.grad is None for p in model.parameters())


def test_the_whole_budget_changes_nothing():
    model = warmed(small_net())
    small = compress(model, batches(), macs=1.0)
    assert not small.plan.changed
    x = batches()[0]
    with torch.no_grad():
        assert torch.equal(small.model(x), model(x))


def test_what_has_a_low_rank_is_found_exactly(rng):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Linear(12, 12))
    f = lowrank.spatial_svd(of_module(model[0]), rank=2)
    model[0].weight.data = torch.tensor(f.to_dense())
    model[2].weight.data = torch.randn(12, 3) @ torch.randn(3, 12)
    small = compress(model, batches(4, 8, (8, 12, 12)), macs=0.5)
    x = torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        wanted = model(x)
        off = (small.model(x) - wanted).norm() / wanted.norm()
    # Fits are solved through second moments, whose condition number is that of the data squared.
    assert off < 1e-3


def test_the_same_seed_gives_the_same_bits():
    model = warmed(small_net())
    one, two = (compress(model, batches(), macs=0.4, seed=3).model for _ in range(2))
    a, b = one.state_dict(), two.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_an_interrupted_run_goes_on(tmp_path):
    model = warmed(small_net())

    def stop(what, share):
        if what == "layers" and share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, batches(), macs=0.4, folder=tmp_path, progress=stop)
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert kept
    again = compress(model, batches(), macs=0.4, folder=tmp_path)
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items())
    whole = compress(model, batches(), macs=0.4)
    a, b = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert again.rows == whole.rows


class Pair(nn.Module):
    """Two images through one branch, and a number that scales their difference."""

    def __init__(self):
        super().__init__()
        self.branch = warmed(small_net())

    def forward(self, left, right, scale=1.0):
        return (self.branch(left) - self.branch(right)) * scale


def test_models_of_several_inputs():
    model = Pair().eval()
    pairs = [(a, b) for a, b in zip(batches(4)[:2], batches(4)[2:])]
    named = compress(model, [{"left": a, "right": b} for a, b in pairs], macs=0.5, renorm=True)
    run = lambda m, batch: m(batch["a"], batch["b"][0], scale=2.0)  # noqa: E731
    free = compress(model, [{"a": a, "b": [b]} for a, b in pairs], macs=0.5, run=run)
    for small in (named, free):
        now, before = small.plan.total("macs")
        assert now <= 0.5 * before
        # twice an example: once for each image
        assert before == 2 * make_plan(TorchNet(model.branch, batches()), macs=0.9).total("macs")[1]
        assert small.model(*pairs[0]).shape == model(*pairs[0]).shape


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weights_made_anew_in_every_pass_are_refused():
    model = nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.Conv2d(8, 8, 3))
    model(batches()[0])
    with pytest.raises(ValueError, match="remove_weight_norm"):
        compress(model, batches(), macs=0.5)


def test_a_model_that_is_itself_a_layer():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    data = batches(shape=(8, 8, 8))
    small = compress(conv, data, macs=0.5)
    assert isinstance(small.model, nn.Sequential)
    assert macs(small.model, data[0][:1]) <= 0.5 * macs(conv, data[0][:1])
    runtime = on_engine(small.model)
    with torch.inference_mode():
        assert isinstance(small, interop.Small)
        assert equal(runtime(data[0]), small.model(data[0]))


def test_norms_are_estimated_anew():
    model = warmed(small_net())
    model.train()
    model[1].eval()
    data = batches()
    interop.renormalise(model, data)
    assert model.training
    assert not model[1].training
    assert model[1].momentum == 0.1
    with torch.no_grad():
        y = torch.stack([model[0](x) for x in data])
    wanted = y.transpose(0, 2).reshape(16, len(data), -1).mean((1, 2))
    assert equal(model[1].running_mean, wanted)
    small = compress(model, data, macs=0.5, renorm=True).model
    assert not torch.equal(small[4].running_mean, model[4].running_mean)


ERRORS = [
    (lambda: compress(nn.Sequential(nn.ReLU()), batches(), macs=0.5), "no convolution"),
    (lambda: compress(small_net(), [], macs=0.5), "at least one calibration batch"),
    (lambda: compress(small_net(), [torch.full((2, 3, 8, 8), torch.nan)], macs=0.5), "finite"),
    (lambda: compress(small_net(), batches(shape=(4, 8, 8)), macs=0.5), "cannot be run on a batch"),
    (lambda: compress(small_net(), batches(), macs=0.5, pinned=["x.*"]), "no layer is called"),
    (lambda: compress(small_net(), batches(), macs=0.001), "the cheapest options take"),
    (lambda: compress(small_net(), batches(), macs=2.0), "a share in"),
    (lambda: TorchNet(small_net(), batches(), "entropy"), "'labels'"),
    (lambda: next(TorchNet(nn.Flatten(0), batches(), "labels").gradients([], 0)), "no conv"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[words for _, words in ERRORS])
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_types_are_checked():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        TorchNet("net", batches())
    with pytest.raises(TypeError, match="tensor"):
        TorchNet(small_net(), [{"x": 1.0}])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        on_engine("net")
    with pytest.raises(TypeError, match="give a budget"):
        compress(small_net(), batches())


# --- what people do with models -----------------------------------------------------------------


def test_a_state_dict_goes_into_a_copy(done, tmp_path):
    small = done[1].model
    torch.save(small.state_dict(), tmp_path / "net.pt")
    other = copy.deepcopy(small)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = batches()[0]
    with torch.no_grad():
        assert torch.equal(other(x), small(x))
    torch.save(small, tmp_path / "whole.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), small(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compressed_model_can_be_exported(done):
    small = done[1].model.eval()
    x = batches()[0]
    program = torch.export.export(small, (x,))
    with torch.no_grad():
        assert equal(program.module()(x), small(x))
    tied = to_module(
        lowrank.kronecker(lowrank.dense(np.ones((8, 8, 3, 3), np.float32)), rank=1),
        nn.Conv2d(1, 1, 1),
    )
    program = torch.export.export(tied, (torch.ones(2, 8, 6, 6),))
    assert equal(program.module()(torch.ones(2, 8, 6, 6)), tied(torch.ones(2, 8, 6, 6)))


def test_tied_weights_are_seen_through_by_symbolic_tracing(rng):
    conv = lowrank.dense(rng.standard_normal((8, 8, 3, 3)).astype(np.float32), padding=1)
    f = lowrank.kronecker(conv, rank=1, variant="2x2x1x1 first")
    module = to_module(f, nn.Conv2d(8, 8, 3, padding=1))
    assert any(isinstance(m, Tied) for m in module.modules())
    traced = torch.fx.symbolic_trace(module)
    for shape in ((2, 8, 6, 6), (8, 6, 6), (0, 8, 6, 6)):
        x = torch.randn(shape)
        assert torch.equal(traced(x), module(x))


def test_a_compressed_model_runs_in_half_precision(done):
    small = copy.deepcopy(done[1].model).half()
    x = batches()[0]
    with torch.no_grad():
        wanted = done[1].model(x)
        assert (small(x.half()).float() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_half_precision_models_are_compressed():
    model = warmed(small_net()).half()
    small = compress(model, [x.half() for x in batches()], macs=0.5).model
    assert {p.dtype for p in small.parameters()} == {torch.float16}
    with torch.no_grad():
        assert small(batches()[0].half()).isfinite().all()


def test_channels_last_stays(done):
    small = copy.deepcopy(done[1].model).to(memory_format=torch.channels_last)[:6]
    x = batches()[0]
    with torch.no_grad():
        y = small(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert equal(y, done[1].model[:6](x).detach())


@pytest.mark.parametrize("family", ["spatial_svd", "kronecker"])
def test_a_step_of_training_lowers_the_loss(family):
    model = warmed(small_net())
    small = compress(model, batches(), macs=0.6, families=[family, "channel_svd"]).model.train()
    x, labels = batches()[0], torch.arange(8) % 5
    sgd = torch.optim.SGD(small.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(small(x), labels)
        sgd.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in small.parameters()
                   if p.ndim > 1)  # fmt: skip
        sgd.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_one_process_trains_it_with_ddp(done, tmp_path):
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(done[1].model).train())
        model(batches()[0]).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


# --- on the engine ------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, channels, first=True):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.b, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.first = first

    def forward(self, x):
        y = self.norm(self.b(nn.functional.relu(self.a(x))))
        return torch.relu(x + y if self.first else y + x)


class Control(nn.Module):
    """What cannot be traced, with a part that can."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6())
        self.chain = nn.Sequential(nn.Conv2d(4, 2, (3, 1), bias=False), nn.Conv2d(2, 4, (1, 3)))

    def forward(self, x):
        if x.mean() > 1e9:
            return x
        return self.chain(self.part(x))


class InPlace(nn.Module):
    """Writes where others read, and where nobody does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.InstanceNorm2d(4)

    def forward(self, x):
        x = x * 2
        y = torch.relu_(self.norm(self.a(x)))
        y += self.b(x)
        z = self.a(y)
        z += x
        other = self.b(z)
        x += other
        other = self.a(other)
        other.relu_()
        return x, y, z + self.norm(z), other, self.norm(other)


class Optional(nn.Module):
    """An input that may be left out, and one that is passed by its name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x, scale=None):
        y = self.norm(input=self.conv(input=x))
        return y if scale is None else scale * y


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = self.a(x).relu_()
        z = nn.functional.hardtanh(self.b(y), 0.0, 6.0)
        other = nn.functional.hardtanh(self.b(y), -1.0, 6.0)  # another use, another end
        return {"sum": z + other, "y": (y, nn.functional.relu6(self.a(x)))}


def depthwise(n):
    return [nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False), nn.BatchNorm2d(n), nn.ReLU6()]


TREES = {
    "small": (lambda: small_net(True), 2),
    "residual": (lambda: nn.Sequential(Residual(4), Residual(4, False)), 4),
    "mobile": (
        lambda: nn.Sequential(
            *depthwise(4), nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Dropout2d(), *depthwise(8), nn.Conv2d(8, 6, 1), nn.Hardtanh(0, 6),
        ),
        2,
    ),
    "control": (Control, 2),
    "inside": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Control(), nn.ReLU()), 3),
    "methods": (Methods, 4),
    "in place": (InPlace, 5),
    "optional": (Optional, 1),
    "shared": (Shared, 2),
    "pads": (
        lambda: nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2), nn.ReflectionPad2d(1),
            nn.Conv2d(4, 4, 3), nn.ConstantPad2d(1, 2.0), nn.Conv2d(4, 4, 3),
            nn.ReplicationPad2d((2, 1, 0, 1)), nn.Conv2d(4, 4, 3), nn.ZeroPad2d(-1),
            nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1),
        ),
        5,
    ),
    "padded twice": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=2, bias=False),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
            nn.ConvTranspose2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 1),
        ),
        1,
    ),
    "norm without an affine": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
            nn.BatchNorm2d(6),
        ),
        1,
    ),
    "norm of the batch": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_model_gives_the_same_on_the_engine(name):
    make, wanted = TREES[name]
    model = warmed(make())
    channels = 3 if name == "small" else 4
    x = torch.randn(3, channels, 12, 12)
    fast = on_engine(model, x)
    assert sum(isinstance(m, Engine) for m in fast.modules()) == wanted
    with torch.inference_mode():
        a, b = (torch.utils._pytree.tree_leaves(m(x.clone())) for m in (model, fast))
        assert all(equal(f, w) for f, w in zip(b, a, strict=True))
        again = torch.utils._pytree.tree_leaves(fast(x.clone()))
        assert all(torch.equal(f, w) for f, w in zip(again, b, strict=True))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "family", ["channel_svd", "kronecker", "network_decoupling", "cp", "filter_basis"]
)
def test_chains_run_fused_on_the_engine(family, tied, rng):
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate")
    f = FAMILIES[family]
    variant = f.variants(of_module(conv))[0]
    rank = list(f.sweep(of_module(conv), variant))[1].rank
    chain = to_module(f.fit(of_module(conv), rank, variant), conv, tied)
    model = warmed(nn.Sequential(chain, nn.BatchNorm2d(8), nn.ReLU()))
    fast = on_engine(model)
    (runtime,) = (m for m in fast.modules() if isinstance(m, Engine))
    x = torch.randn(2, 8, 9, 9)
    with torch.inference_mode():
        assert equal(fast(x), model(x))
    assert "Factorization" in repr(runtime)


def test_compressed_models_run_on_the_engine(done):
    fast = on_engine(done[1].model, batches()[0])
    with torch.inference_mode():
        assert equal(fast(batches()[1]), done[1].model.eval()(batches()[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_copy_is_made_of_what_comes_and_goes(dtype, monkeypatch):
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(dtype)
    fast = on_engine(model, threads=1)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    with torch.inference_mode():
        y = fast(x)
        assert y.dtype == dtype
        (runtime,) = (m for m in fast.modules() if isinstance(m, Engine))
        seen = []
        for key, (run, shape) in engine._plans.items():

            def spy(a, b, run=run):
                seen.append((a.ctypes.data, b.ctypes.data))
                return run(a, b)

            engine._plans[key] = spy, shape
        y = fast(x)
        assert seen == [(x.data_ptr(), y.data_ptr())]
        other = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(fast(other), y)
        assert seen[1][0] not in (other.data_ptr(), x.data_ptr())


def test_what_the_engine_refuses():
    fast = on_engine(nn.Sequential(nn.Conv2d(4, 4, 3)))
    x = torch.ones(1, 4, 6, 6)
    for wrong in (x.half(), x.long(), x.to("meta")):
        with pytest.raises(TypeError, match="float32 and float64 tensors on the CPU"):
            fast(wrong)
    with pytest.raises(ValueError, match="4 channels"):
        fast(torch.ones(1, 3, 6, 6))
    with pytest.raises(ValueError, match="no gradients"):
        fast(x.clone().requires_grad_())
    with torch.no_grad():
        assert not fast(x.clone().requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in fast.parameters())


def test_copies_of_a_model_on_the_engine_work():
    fast = on_engine(warmed(small_net()), batches()[0])
    x = batches()[0]
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(fast)(x), fast(x))
        for size in (1, 3, 2):
            assert fast(x[:size]).shape == (size, 5)
        assert fast(x[:0]).shape == (0, 5)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return x * self.conv.weight.sum()


def test_a_model_that_reads_weights_is_refused():
    with pytest.raises(ValueError, match="does not give what it gives"):
        on_engine(Reads(), torch.ones(1, 3, 4, 4))


class Counts(nn.Module):
    """Python's own state: traced once, it would stand still."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        return y[: len(x)] if isinstance(x, torch.Tensor) else y * 2


def test_an_example_finds_out_what_tracing_gets_wrong():
    x = torch.ones(2, 3, 4, 4)
    model = Counts()
    fast = on_engine(model, x)
    with torch.inference_mode():
        assert equal(fast(x), model(x))


# --- trained nets -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20", "vww", "crepe", "espcn", "faststyle"])
def test_trained_nets_on_the_engine(data, name):
    sys.path.insert(0, str(Path(lowrank.__file__).parents[1] / "asv_benchmarks"))
    try:
        from benchmarks import nets
    finally:
        sys.path.pop(0)
    (case,) = nets.cases(name)
    x = case.calibration(0)[0][:2]
    net = TorchNet(case.model, [x])
    chains = {}
    for layer in net.layers:
        family = FAMILIES["channel_svd"]
        try:
            point = list(family.sweep(layer.conv, family.variants(layer.conv)[0]))[1]
        except (NotApplicable, IndexError):
            continue
        chains[layer.name] = family.fit(layer.conv, point.rank, family.variants(layer.conv)[0])
    assert chains
    with torch.inference_mode():
        for model in (case.model, net.replaced(chains)):
            # Instance norms divide by deviations of channels that hardly vary.
            assert equal(on_engine(model)(x), model(x), terms=10000)


def test_a_plan_can_be_made_beforehand():
    model = warmed(small_net())
    plan = make_plan(TorchNet(model, batches()), macs=0.5)
    small = compress(model, batches(), plan=plan)
    assert small.plan.layers == plan.layers  # counted anew, and alike


def test_a_batch_that_does_not_fit_is_named():
    (x,) = batches(1)
    wrong = torch.zeros(2, x.shape[1] + 1, *x.shape[2:])
    with pytest.raises(ValueError, match=r"cannot be run on a batch of shape \(2, "):
        compress(small_net(), [x, wrong], macs=0.5)
