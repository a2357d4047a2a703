"""TorchModel: layers, recorded inputs and gradients."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_models import (  # noqa: E402
    OptionalArgument,
    Shared,
    is_close,
    make_batches,
    small_net,
    with_statistics,
)
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.compress import make_plan  # noqa: E402
from lowrank.interop.torch import TorchModel, compress, layers, on_engine  # noqa: E402


def test_shared_modules_count_once_and_idle_ones_are_skipped():
    model = Shared()
    net = TorchModel(model, make_batches(shape=(4, 8, 8)))
    assert [(x.name, x.times) for x in net.layers] == [("a", 2)]
    (one,) = next(net.inputs(["a"], {})).values()
    assert len(one) == 2
    compressed = compress(model, make_batches(shape=(4, 8, 8)), macs=0.6).model
    assert compressed.a is compressed.more["b"]
    assert isinstance(compressed.a, nn.Sequential)
    assert isinstance(compressed.more["idle"], nn.Conv2d)


def test_layer_scale_is_the_gain_of_the_batch_norm():
    model = with_statistics(small_net())
    net = TorchModel(model, make_batches())
    norm = model[1]
    expected = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    np.testing.assert_allclose(net.layers[0].scale, expected.detach(), rtol=1e-6)
    assert net.layers[2].scale is None


def test_layer_inputs_may_be_keyword_arguments():
    data = make_batches(shape=(4, 8, 8))
    net = TorchModel(with_statistics(OptionalArgument()), data)
    (layer,) = net.layers
    assert layer.scale is not None
    np.testing.assert_array_equal(next(net.inputs(["conv"], {}))["conv"][0], data[0])
    compressed = compress(net.original, data, macs=0.5).model
    with torch.inference_mode():
        assert is_close(on_engine(compressed)(data[0], scale=2), 2 * compressed(data[0]))


class Unbatched(nn.Module):
    """A model that calls its layers once per example."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(4, 4, 3), nn.Linear(6, 6)

    def forward(self, x):
        return torch.stack([self.linear(self.conv(one).mean(0)) for one in x])


def test_layers_may_be_called_without_a_batch_axis():
    (x,) = make_batches(1, 5, (4, 8))
    net = TorchModel(Unbatched(), [x])
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


def test_recorded_inputs_are_copied_before_the_model_overwrites_them():
    (x,) = make_batches(1, 3, (2, 4))
    net = TorchModel(Overwriting(), [x.clone()])
    net.data = [x.clone()]
    assert np.abs(next(net.inputs(["conv", "more"], {}))["conv"][0]).min() > 0


class Tokens(nn.Module):
    """Integer inputs, so that the first gradients are at the output of the embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.linear, self.norm = nn.Linear(16, 16), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.layer(self.norm(self.linear(self.table(x))))


def test_integer_inputs_work_with_layers_inside_transformers():
    model = Tokens().eval()
    data = [torch.randint(0, 20, (4, 6)) for _ in range(2)]
    net = TorchModel(model, data)
    names = [x.name for x in net.layers]
    assert "linear" in names
    assert len(names) % 6 == 1  # four projections and two linear layers per block
    (g,) = next(net.gradients(["linear"], 0))["linear"]
    assert g.shape == (4, 16, 6)
    assert np.abs(g).max() > 0
    compressed = compress(model, data, macs=0.5).model
    with torch.inference_mode():
        assert compressed(data[0]).shape == (4, 6, 16)


class Standardised(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_subclass_that_computes_its_weight_is_a_layer():
    model = nn.Sequential(Standardised(3, 8, 3), nn.Conv2d(8, 8, 3))
    x = torch.randn(2, 3, 8, 8)
    assert list(layers(model, x)) == ["0", "1"]
    with torch.inference_mode():
        assert is_close(on_engine(model)(x), model(x))


@pytest.mark.parametrize("loss", ["labels", lambda y, random: (y**2).sum()])
def test_gradients_are_repeatable_for_every_loss(loss):
    model = with_statistics(small_net())
    net = TorchModel(model, make_batches(), loss)
    found = list(net.gradients(["0", "8"], 0))
    assert [g["0"][0].shape for g in found] == [(8, 16, 10, 10)] * 2
    again = list(net.gradients(["0", "8"], 0))
    assert np.array_equal(found[1]["0"][0], again[1]["0"][0])
    if loss == "labels":  # softmax minus one-hot label: the sum is zero
        np.testing.assert_allclose(found[0]["8"][0].sum(1), 0, atol=1e-5)
        other = list(net.gradients(["0", "8"], 1))
        assert not np.array_equal(found[1]["0"][0], other[1]["0"][0])


class Repeated(nn.Module):
    """One convolution three times, at sizes 8, 4 and 2; the last call is not used."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu_(self.conv(x)), 2)
        y = self.conv(x)
        self.conv(y[..., :2, :2])
        return y


def test_gradients_of_repeated_calls_are_in_the_order_of_inputs():
    data = make_batches(shape=(2, 8, 8))
    net = TorchModel(Repeated(), data)
    inputs, gradients = (
        next(f)["conv"] for f in (net.inputs(["conv"], {}), net.gradients(["conv"], 0))
    )
    assert (
        [x.shape[2:] for x in inputs]
        == [g.shape[2:] for g in gradients]
        == [(8, 8), (4, 4), (2, 2)]
    )
    assert gradients[0].any()
    assert not gradients[2].any()
    assert (gradients[0] != 0).mean() <= 0.25  # of one in four that is the largest
    assert compress(net.original, data, macs=0.8).plan.about["gradients"]


class SeveralOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv1d(2, 3, 1) for _ in range(3))

    def forward(self, x):
        return {"a": self.a(x), "rest": (self.b(x), self.c(x).argmax(1))}


def test_projections_use_every_differentiable_output():
    net = TorchModel(SeveralOutputs(), make_batches(shape=(2, 4)))
    found = next(net.gradients(["a", "b", "c"], 0))
    assert [len(found[name]) for name in "abc"] == [1, 1, 0]


def test_labels_are_drawn_per_spatial_position():
    model = nn.Conv2d(3, 4, 3)
    (g,) = next(TorchModel(model, make_batches(), "labels").gradients([""], 0))[""]
    assert g.shape == (8, 4, 8, 8)
    np.testing.assert_allclose(g.sum(1), 0, atol=1e-5)
    # The gradient p - 1 is negative only at the label.
    np.testing.assert_array_equal((g < 0).sum(1), 1)


class SequenceFirst(nn.Module):
    """A linear layer on (positions, examples, features), which are not one block per example."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        return self.linear(x.transpose(0, 1).relu()).square().transpose(0, 1)


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_gradients_do_not_depend_on_the_parts_of_a_batch(kind, monkeypatch):
    if kind == "images":
        net, batches, names = with_statistics(small_net()), make_batches(), ["0", "3", "8"]
    else:
        net, batches, names = SequenceFirst().eval(), make_batches(shape=(4, 6)), ["linear"]
    model = TorchModel(net, batches, lambda y, random: y.square().sum())
    runs, run = [], model.run
    model.run = lambda net, x: runs.append(len(x)) or run(net, x)
    whole = list(model.gradients(names, 0))
    assert runs == [8, 8]
    monkeypatch.setattr("lowrank.interop.torch.model.GRAPH_BYTES", 0)
    parts = list(model.gradients(names, 0))
    assert runs[2:] == ([1] * 16 if kind == "images" else [8, 8])
    for one, other in zip(whole, parts, strict=True):
        for name in names:
            for a, b in zip(one[name], other[name], strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_layers_that_run_at_several_sizes_are_priced_at_each():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            half = nn.functional.avg_pool2d(x, 2)
            return self.head(x).mean() + self.head(half).mean()

    net = TorchModel(Pyramid().eval(), [torch.randn(2, 8, 16, 16)])
    (layer,) = net.layers
    assert (layer.times, layer.sizes) == (2, ((16, 16), (8, 8)))
    assert layer.passes == 1.25
    plan = make_plan(net, macs=0.5, families=["channel_svd"])
    assert plan.total("macs")[1] == 8 * 8 * 9 * (16 * 16 + 8 * 8)
