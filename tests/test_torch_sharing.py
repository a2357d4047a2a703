"""PyTorch models whose layers share weights."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import TorchModel, compress  # noqa: E402
from lowrank.interop.torch.copies import copy_model  # noqa: E402

X = torch.randn(4, 8, 9, 9, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randint(0, 50, (8, 12), generator=torch.Generator().manual_seed(3))


def count_parameters(model):
    """Return the number of values in memory: those of a shared parameter once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


class Language(nn.Module):
    """An embedding, a hidden layer, and an output layer with the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embed(x))))


class Repeated(nn.Module):
    """Four convolutions with one weight and one bias, then another one."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        for conv in self.convs[1:]:
            conv.weight, conv.bias = self.convs[0].weight, self.convs[0].bias
        self.last = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.last(x)


def test_output_layer_with_the_weight_of_an_embedding_stays_tied():
    model = Language()
    result = compress(model, [TOKENS], params=0.6)
    assert list(result.plan.layers) == ["hidden"]
    assert "shared with embed" in result.plan.left_out["head"].reason
    assert result.model.head.weight is result.model.embed.weight
    planned, dense = result.plan.total("params")
    assert planned <= 0.6 * dense == 0.6 * (16 * 16 + 16)
    assert count_parameters(result.model) == count_parameters(model) - dense + planned


def test_layers_that_share_all_weights_are_one_unknown():
    model = Repeated()
    result = compress(model, [X], params=0.8, pinned=["last"])
    assert list(result.plan.layers) == ["convs.0", "last"]
    planned, dense = result.plan.total("params")
    assert dense == count_parameters(model) == 2 * (8 * 8 * 9 + 8)
    assert planned == count_parameters(result.model) <= 0.8 * dense
    assert result.plan.dense["convs.0"].cost.macs == 4 * 81 * 8 * 8 * 9
    first, *others = result.model.convs
    assert isinstance(first, nn.Sequential)
    assert all(conv is first for conv in others)
    with torch.no_grad():
        wanted = model(X)
        error = float((result.model(X) - wanted).norm() / wanted.norm())
    assert error == pytest.approx(result.output_error, rel=1e-3)
    assert error < 0.8


def test_inputs_and_gradients_of_shared_layers_are_those_of_all_calls():
    net = TorchModel(Repeated(), [X])
    assert [(x.name, x.times) for x in net.layers] == [("convs.0", 4), ("last", 1)]
    assert len(next(net.inputs(["convs.0"], {}))["convs.0"]) == 4
    assert [g.any() for g in next(net.gradients(["convs.0"], 0))["convs.0"]] == [True] * 4


def untie_bias(model):
    model.convs[2].bias = nn.Parameter(torch.ones(8))


def other_stride(model):
    model.convs[2].padding, model.convs[2].dilation = (2, 2), (2, 2)


def hook_one(model):
    model.convs[2].register_forward_hook(lambda m, args, y: 2 * y)


def tie_memory(model):
    """Give the layers parameters of their own in the same memory."""
    for conv in model.convs[1:]:
        conv.weight = nn.Parameter(model.convs[0].weight.data)


def tie_part(model):
    model.last.weight = nn.Parameter(model.convs[0].weight.data[:4])
    model.last.bias = None
    model.last.out_channels = 4


def tie_buffer(model):
    model.register_buffer("shared", model.convs[0].weight.data)


def tie_bias_only(model):
    model.last.bias = model.convs[0].bias


class Transpose(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.other = other

    def forward(self, weight):
        return self.other.weight.transpose(0, 1)


def tie_by_parametrization(model):
    for conv in model.convs[1:]:
        conv.weight, conv.bias = (nn.Parameter(p.detach().clone()) for p in conv.parameters())
    parametrize.register_parametrization(model.last, "weight", Transpose(model.convs[0]))


TIES = {
    untie_bias: {"convs.0", "convs.1", "convs.2", "convs.3"},
    other_stride: {"convs.0", "convs.1", "convs.2", "convs.3"},
    hook_one: {"convs.0", "convs.1", "convs.2", "convs.3"},
    tie_memory: {"convs.0", "convs.1", "convs.2", "convs.3"},
    tie_part: {"convs.0", "convs.1", "convs.2", "convs.3", "last"},
    tie_buffer: {"convs.0", "convs.1", "convs.2", "convs.3"},
    tie_bias_only: {"convs.0", "convs.1", "convs.2", "convs.3", "last"},
    tie_by_parametrization: {"convs.0", "last"},
}


class Longer(Repeated):
    def __init__(self, change):
        super().__init__()
        change(self)
        self.free = nn.Conv2d(self.last.out_channels, 16, 3)

    def forward(self, x):
        return self.free(super().forward(x))


@pytest.mark.parametrize("change", TIES, ids=[f.__name__ for f in TIES])
def test_partly_shared_layers_stay_shared(change):
    model = Longer(change)
    assert model(X).shape == (4, 16, 5, 5)
    result = compress(model, [X], macs=0.6, families=["channel_svd"])
    assert set(result.plan.left_out) == TIES[change]
    assert "free" in result.plan.changed
    for copied in (result.model, copy_model(model)):
        with torch.no_grad():  # a change of one is a change of all, as in the original
            copied.convs[0].weight.mul_(2)
        for name in ("convs.1", "convs.2", "convs.3", "last"):
            original = model.get_submodule(name).weight
            changed = copied.get_submodule(name)
            is_tied = change is not tie_by_parametrization or name == "last"
            if name in result.plan.left_out and is_tied and change is not tie_bias_only:
                torch.testing.assert_close(changed.weight, 2 * original)
    if change is tie_bias_only:
        assert result.model.last.bias is result.model.convs[0].bias


def test_copies_of_layers_are_layers_of_their_own():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), copy.deepcopy(conv), nn.ReLU(), conv)
    result = compress(model, [X], macs=0.6, families=["channel_svd"])
    assert list(result.plan.layers) == ["0", "2"]
    assert result.model[0] is result.model[4]
    assert result.model[0] is not result.model[2]
