"""PyTorch models in which something else than a layer's own call depends on it."""

import copy
import functools
import types
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations, parametrize, prune  # noqa: E402
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.compress import CompressionPlan  # noqa: E402
from lowrank.interop.torch import compress, on_engine  # noqa: E402
from lowrank.interop.torch.copies import copy_model  # noqa: E402

X = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two convolutions that can be replaced, around `middle`, a subclass's own business."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3, padding=1)
        self.layer = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 3, padding=1)

    def middle(self, x):
        return self.layer(x)

    def forward(self, x):
        return self.last(nn.functional.relu(self.middle(nn.functional.relu(self.first(x)))))


def compressed(model, x=X, **options):
    """Return the compression to 60 % of a model, after the checks that all models must pass."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = compress(model, [x], **{"macs": 0.6, "families": ["channel_svd"], **options})
    assert result.plan.changed
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    with torch.no_grad():
        wanted, found = (copy_model(m).eval()(x) for m in (model, result.model))
    assert found.shape == wanted.shape
    # The small networks here lose about a half at random weights; a wrong layer loses all.
    error = float((found - wanted).norm() / wanted.norm())
    assert error == pytest.approx(result.output_error, rel=1e-3, abs=1e-6)
    assert error < 0.8
    return result


class UsesWeight(Net):
    def middle(self, x):
        return nn.functional.conv_transpose2d(self.layer(x), self.layer.weight, padding=1)


class UsesWeightAlone(Net):
    def middle(self, x):
        return nn.functional.conv2d(x, self.layer.weight, padding=1)


class ReadsNorm(Net):
    def middle(self, x):
        return self.layer(x) / self.layer.weight.norm()


class ChecksType(Net):
    def middle(self, x):
        return self.layer(x) if isinstance(self.layer, nn.Conv2d) else x


class ChecksTypeOfAll(Net):
    def middle(self, x):
        return self.layer(x) * (1 + sum(type(m) is nn.Conv2d for m in self.children()))


class CatchesErrors(Net):
    def middle(self, x):
        try:
            return self.layer(x) * self.layer.weight.abs().max()
        except AttributeError:
            return self.layer(x)


class OutputSize(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.ConvTranspose2d(16, 16, 3, stride=2, padding=1)

    def middle(self, x):
        return self.layer(x, output_size=(18, 18))


class CallsForward(Net):
    def middle(self, x):
        return self.layer.forward(x)


class CallsInner(Net):
    def middle(self, x):
        return self.layer._conv_forward(x, self.layer.weight, self.layer.bias)


class FunctionalCall(Net):
    def middle(self, x):
        values = {k: 2 * v for k, v in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, values, (x,))


class ReadsStateDict(Net):
    def middle(self, x):
        return self.layer(x) + self.state_dict()["layer.bias"].view(-1, 1, 1)


class ReadsParameters(Net):
    def middle(self, x):
        _, bias = self.layer.parameters()
        return self.layer(x) * bias.abs().mean()


class InObject(Net):
    def __init__(self):
        super().__init__()
        self.held = types.SimpleNamespace(op=self.layer)

    def middle(self, x):
        return self.held.op(x)


class InPartial(Net):
    def __init__(self):
        super().__init__()
        self.call = functools.partial(self.layer)

    def middle(self, x):
        return self.call(x)


class InClosure(Net):
    def __init__(self):
        super().__init__()
        layer = self.layer
        self.call = lambda x: layer(x)

    def middle(self, x):
        return self.call(x)


class InVmap(Net):
    def middle(self, x):
        return torch.vmap(self.layer)(x)


class Decays(Net):
    def middle(self, x):
        return self.layer(x) / sum(p.square().sum() for p in self.layer.parameters())


class WeightInList(Net):
    def __init__(self):
        super().__init__()
        self.weights = [self.layer.weight]

    def middle(self, x):
        return self.layer(x) * self.weights[0].abs().max()


class WeightInDict(Net):
    def __init__(self):
        super().__init__()
        self.by_name = {"a": {"b": [self.layer.weight]}}


READERS = [
    InVmap, Decays, UsesWeight, UsesWeightAlone, ReadsNorm, ChecksType, CatchesErrors, OutputSize,
    CallsForward, CallsInner, FunctionalCall, ReadsStateDict, ReadsParameters, InObject, InPartial,
    InClosure, WeightInList, WeightInDict,
]  # fmt: skip


@pytest.mark.parametrize("kind", READERS)
def test_layers_that_something_else_reads_stay_and_the_plan_says_why(kind):
    model = kind()
    result = compressed(model)
    assert result.plan.left_out["layer"].reason
    assert result.plan.left_out["layer"].reason in repr(result.plan)
    assert type(result.model.layer) is type(model.layer)
    assert list(result.plan.layers) == ["first", "last"]


def test_model_in_which_every_layer_is_read_raises():
    with pytest.raises(ValueError, match="layer: the output changes if its type does"):
        compress(ChecksTypeOfAll(), [X], macs=0.6)


class ReadsSizes(Net):
    def middle(self, x):
        y = self.layer(x)[:, : self.layer.out_channels]
        return y + self.layer.kernel_size[0] + self.layer.groups


class ReadsDtype(Net):
    def middle(self, x):
        weight = self.layer.weight
        assert weight.ndim == 4
        return self.layer(x.to(weight.device, weight.dtype))[:, : weight.shape[0]]


class ChecksDtypeOfTensor(Net):  # as the feed-forward layers of T5 do
    def middle(self, x):
        is_tensor = isinstance(self.layer.weight, torch.Tensor)
        return self.layer(x.to(self.layer.weight.dtype) if is_tensor else x)


class InList(Net):
    def __init__(self):
        super().__init__()
        self.ops = [nn.ReLU(), (self.layer, 1.0)]

    def middle(self, x):
        return self.ops[1][0](x)


class InDict(Net):
    def __init__(self):
        super().__init__()
        self.ops = OrderedDict(conv=[self.layer])

    def middle(self, x):
        return self.ops["conv"][0](x)


class PlainAttribute(Net):
    def __init__(self):
        super().__init__()
        vars(self)["alias"] = self.layer

    def middle(self, x):
        return self.alias(x)


class Twice(Net):
    def __init__(self):
        super().__init__()
        self.alias = self.layer

    def middle(self, x):
        return self.layer(x) + self.alias(x)


class CopiesLayer(Net):
    def middle(self, x):
        return copy.deepcopy(self.layer)(x)


class Keyword(Net):
    def middle(self, x):
        return self.layer(input=x)


class DictKeys(Net):
    def __init__(self):
        super().__init__()
        self.order = {self.layer: 1, "none": 0}

    def middle(self, x):
        return next(iter(self.order))(x)


class InSet(Net):
    def __init__(self):
        super().__init__()
        self.doubled = {self.layer}

    def middle(self, x):
        return self.layer(x) * (2 if self.layer in self.doubled else 1)


class Children(Net):
    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


class ReadsDevice(Net):
    def middle(self, x):
        first = next(self.parameters())
        return self.layer(x.to(first.device, first.dtype))


class Checkpointed(Net):
    def middle(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


class Autocast(Net):
    def middle(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.layer(x).float()


class InPlace(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(2))


class Noisy(Net):
    def middle(self, x):
        return self.layer(x) + 1e-3 * torch.randn_like(x)


class Stateful(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.step = 0

    def middle(self, x):
        self.calls += 1
        self.step += 1
        return self.layer(x) * (1 + 1e-3 * self.step) + self.calls * 1e-3


SAFE = [
    DictKeys, InSet, Children, ReadsDevice,
    ReadsSizes, ReadsDtype, ChecksDtypeOfTensor, InList, InDict, PlainAttribute, Twice,
    CopiesLayer, Keyword, Checkpointed, Autocast,
]  # fmt: skip


@pytest.mark.parametrize("kind", SAFE)
def test_all_references_to_a_layer_are_replaced(kind):
    result = compressed(kind())
    assert not result.plan.left_out
    assert "layer" in result.plan.changed
    assert isinstance(result.model.layer, nn.Sequential)


def test_models_that_overwrite_their_input_are_compressed():
    x = X.clone()
    result = compress(InPlace(), [x], macs=0.6, families=["channel_svd"])
    assert torch.equal(x, X)
    assert result.plan.about["gradients"]
    assert result.output_error < 0.8


def test_random_numbers_and_state_do_not_count_as_readers():
    for kind in (Noisy, Stateful):
        result = compress(kind(), [X], macs=0.6, families=["channel_svd"])
        assert not result.plan.left_out
        assert result.output_error < 0.8


class Forward(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * x.std(), self.bias, padding=1)


class Property(nn.Conv2d):
    @property
    def bias(self):
        return self.weight.mean((1, 2, 3))

    @bias.setter
    def bias(self, value):
        pass

    def register_parameter(self, name, value):
        if name != "bias":
            super().register_parameter(name, value)


def hooked(register):
    conv = nn.Conv2d(16, 16, 3, padding=1)
    register(conv)
    return conv


def set_forward(conv):
    conv.forward = lambda x: 2 * nn.functional.conv2d(x, conv.weight, padding=1)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def two_wide(make):
    return lambda: make(nn.Conv2d(16, 16, 3, padding=1))


OBSTACLES = {
    "own forward": (lambda: Forward(16, 16, 3, padding=1), "has its own forward"),
    "weight property": (lambda: Property(16, 16, 3, padding=1, bias=False), "computes its weight"),
    "forward replaced": (lambda: hooked(set_forward), "forward was replaced"),
    "pre-hook": (
        lambda: hooked(lambda c: c.register_forward_pre_hook(lambda m, args: (2 * args[0],))),
        "hook",
    ),
    "hook": (lambda: hooked(lambda c: c.register_forward_hook(lambda m, a, y: 2 * y)), "hook"),
    "backward hook": (
        lambda: hooked(lambda c: c.register_full_backward_hook(lambda m, a, b: None)), "hook",
    ),
    "state-dict hook": (
        lambda: hooked(lambda c: c.register_state_dict_post_hook(lambda *args: None)),
        "hook of its state dict",
    ),
    "load hook": (
        lambda: hooked(lambda c: c.register_load_state_dict_pre_hook(lambda *args: None)),
        "hook of its state dict",
    ),
    "weight norm": (two_wide(parametrizations.weight_norm), "remove_parametrizations"),
    "spectral norm": (two_wide(parametrizations.spectral_norm), "remove_parametrizations"),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Conv2d(16, 16, 1)), "remove_parametrizations",
    ),
    "bias parametrized": (
        two_wide(lambda c: parametrize.register_parametrization(c, "bias", Doubled())),
        "Doubled",
    ),
    "old spectral norm": (two_wide(nn.utils.spectral_norm), "remove_spectral_norm"),
    "old weight norm": (two_wide(nn.utils.weight_norm), "remove_weight_norm"),
    "pruned": (
        two_wide(lambda c: prune.l1_unstructured(c, "weight", 0.3)), "prune.remove",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", OBSTACLES)
def test_layers_with_hooks_and_computed_weights_stay(name):
    make, words = OBSTACLES[name]
    model = Net()
    model.layer = make()
    with torch.no_grad():
        model(X)
    result = compressed(model)
    assert words in result.plan.left_out["layer"].reason
    own = 81 * 16 * 16 * model.layer.weight[0, 0].numel()
    # Old spectral norms multiply by the weight in every pass: as many MACs as it has entries.
    assert result.plan.left_out["layer"].macs == pytest.approx(own, rel=1 / 81)
    fast = on_engine(result.model)
    with torch.inference_mode():
        wanted = copy_model(result.model).eval()(X)
        torch.testing.assert_close(fast(X), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weights_of_old_hooks_are_trained_on_in_the_result():
    model = Net()
    model.layer = nn.utils.weight_norm(model.layer)
    model(X)  # computes a weight that copy.deepcopy refuses
    small = compressed(model).model
    small(X).sum().backward()
    assert small.layer.weight_g.grad.abs().max() > 0


def test_hooks_of_other_modules_are_kept():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Sequential(nn.Conv2d(16, 8, 3)))
    model[1].register_forward_hook(lambda m, args, y: 2 * y)
    result = compressed(model)
    assert len(result.model[1]._forward_hooks) == 1
    fast = on_engine(model)
    with torch.inference_mode():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-4)


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3, padding=1, dtype=torch.complex64)

    def middle(self, x):
        return self.layer(x.to(torch.complex64)).abs()


def test_complex_layers_stay_complex():
    result = compressed(Complex())
    assert "complex64" in result.plan.left_out["layer"].reason
    assert result.model.layer.weight.is_complex()
    with pytest.raises(ValueError, match="complex64"):
        compress(nn.Conv2d(8, 8, 3, dtype=torch.complex64), [X.to(torch.complex64)], macs=0.5)


class Frozen(Net):
    context = torch.no_grad

    def forward(self, x):
        with self.context():
            x = nn.functional.relu(self.first(x))
        if x.is_inference():
            x = x.clone()
        return self.last(nn.functional.relu(self.layer(x)))


class FrozenInference(Frozen):
    context = torch.inference_mode


class Detached(Net):
    def middle(self, x):
        return self.layer(x.detach()).data


class Reentrant(Net):
    def middle(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True)


@pytest.mark.parametrize("kind", [Frozen, FrozenInference, Detached])
def test_layers_without_a_gradient_are_compressed_and_named(kind):
    result = compressed(kind())
    assert "first" in result.plan.layers
    assert not result.plan.about["gradients"]
    assert "first" in result.plan.about["without_gradient"]
    assert "no gradient reaches first" in repr(result.plan)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradients_that_cannot_be_computed_are_dropped():
    with pytest.warns(UserWarning, match="use_reentrant"):
        result = compressed(Reentrant())
    assert not result.plan.about["gradients"]


def test_frozen_parameters_stay_frozen():
    model = Net()
    model.first.requires_grad_(False)
    small = compressed(model).model
    assert not any(p.requires_grad for p in small.first.parameters())
    assert all(p.requires_grad for p in small.layer.parameters())


class Sequence(Net):
    """The convolutions, then a recurrent layer, attention, and one that does not run."""

    def __init__(self):
        super().__init__()
        self.idle, self.gru = nn.Linear(3, 3), nn.GRU(9, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        rows = self.gru(super().forward(x).mean(1))[0]
        return self.attention(rows, rows, rows)[0]


def test_left_out_layers_are_listed_with_their_share():
    result = compress(Sequence(), [X], macs=0.7, families=["channel_svd"], left_out=["last"])
    left = result.plan.left_out
    own = 81 * 9
    assert {k: x.macs for k, x in left.items()} == {
        "last": 16 * 8 * own, "idle": 0, "gru": 9 * 3 * 16 * (9 + 16),
    }  # fmt: skip
    _, dense = result.plan.total("macs")
    assert dense == (8 * 16 + 16 * 16) * own + 9 * 16 * 4 * 16
    assert result.plan.limits["macs"] == pytest.approx(0.7 * dense)
    text = repr(result.plan)
    assert "70% of the layers in the table" in text
    assert "the first example does not run it" in text
    again = CompressionPlan.from_json(result.plan.to_json())
    assert again.left_out == left
    assert repr(again) == text


class Block(nn.Module):
    """A convolution, a batch norm, an activation and a sequence of two convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.pair = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.pair(self.act(self.norm(self.conv(x))))


@pytest.mark.parametrize("name", ["", "conv", "norm", "act", "pair", "pair.0"])
@pytest.mark.parametrize("is_pre", [True, False])
def test_engine_models_run_the_hooks_of_every_module_in_every_call(name, is_pre):
    model, calls = Block().eval(), []

    def hook(module, args, out=None):
        value = args[0] if is_pre else out
        calls.append(value.shape)
        return (2 * value,) if is_pre else 2 * value

    module = model.get_submodule(name)
    module.register_forward_pre_hook(hook) if is_pre else module.register_forward_hook(hook)
    fast = on_engine(model)
    with torch.inference_mode():
        wanted = model(X)
        calls.clear()
        for _ in range(2):
            torch.testing.assert_close(fast(X), wanted, rtol=1e-4, atol=1e-4)
    assert calls == [torch.Size([4, 8, 9, 9])] * 2


class Forces(nn.Module):
    """A model whose output is a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.b(torch.tanh(self.a(x))).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


def test_models_that_differentiate_themselves_are_compressed():
    result = compress(Forces(), [X[:, :, 0, 0]], params=0.9)
    assert result.plan.changed == ["a"]
    assert not result.plan.left_out


class Tokens(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(9, 16), middle, nn.Linear(16, 8)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize("is_training", [True, False])
def test_layers_of_transformers_are_compressed(is_training):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = Tokens(nn.TransformerEncoder(layer, 1)).train(is_training)
    result = compress(model, [X.mean(1)], macs=0.8)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    inner = [f"middle.layers.0.{name}" for name in (*names, "linear1", "linear2")]
    assert list(result.plan.layers) == ["first", *inner, "last"]
    assert not result.plan.left_out
    with torch.no_grad():
        assert result.model.eval()(X.mean(1)).isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_listed():
    model = Tokens(nn.ReLU())
    model.middle = nn.Sequential(nn.Linear(16, 16))
    model.middle = torch.ao.quantization.quantize_dynamic(model.middle, {nn.Linear})
    result = compress(model, [X.mean(1)], macs=0.8)
    assert list(result.plan.layers) == ["first", "last"]
    assert "quantized" in result.plan.left_out["middle.0"].reason
