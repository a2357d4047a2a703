"""Families and ranks that are requested for single layers of a network."""

import pytest

from lowrank import FAMILIES
from lowrank.compress import CompressionPlan, compress_model, make_plan

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_models import make_batches  # noqa: E402
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import TorchModel, compress  # noqa: E402

DATA = make_batches(1, 4, (8, 9, 9))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 8, 3)
        self.up = nn.ConvTranspose2d(8, 8, 3)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        x = self.up(torch.relu(self.conv3(x)), output_size=(9, 9))
        return self.fc(x.mean((2, 3)))


def net():
    torch.manual_seed(0)
    return Net()


def test_requested_ranks_are_fitted_and_other_layers_stay_dense():
    requested = {"conv3": ("tucker", (6, 5)), "conv1": ("channel_svd", 5, "input"), "fc": "dense"}
    result = compress(net(), DATA, layers=requested)
    plan = result.plan
    assert {k: (c.family, c.rank, c.variant) for k, c in plan.layers.items()} == {
        "conv1": ("channel_svd", (5,), "input"), "conv2": ("dense", (), ""),
        "conv3": ("tucker", (6, 5), ""), "fc": ("dense", (), ""),
    }  # fmt: skip
    assert [tuple(m.weight.shape) for m in result.model.conv3] == [
        (5, 16, 1, 1), (6, 5, 3, 3), (8, 6, 1, 1),
    ]  # fmt: skip
    assert 0 < result.output_error < 1
    again = compress(net(), DATA, plan=CompressionPlan.from_json(plan.to_json()))
    assert [c.rank for c in again.plan.layers.values()] == [c.rank for c in plan.layers.values()]


@pytest.mark.parametrize("gradients", [True, False])
def test_budget_is_kept_with_a_requested_rank(gradients):
    model = TorchModel(net(), DATA)
    requested = {"conv2": ("tucker", (12, 12)), "conv1": "channel_svd"}
    plan = make_plan(model, macs=0.6, layers=requested, gradients=gradients)
    assert plan.layers["conv2"].rank == (12, 12)
    assert plan.layers["conv1"].family in ("channel_svd", "dense")
    compressed, dense = plan.total("macs")
    assert compressed <= 0.6 * dense


def test_patterns_shares_and_later_requests():
    model = TorchModel(net(), DATA)
    plan = make_plan(model, layers={"conv*": ("channel_svd", 0.5), "conv2": ("tucker", (4, 4))})
    assert plan.layers["conv2"].rank == (4, 4)
    for name in ("conv1", "conv3"):
        assert plan.layers[name].family == "channel_svd"
        assert plan.layers[name].cost.params <= 0.5 * plan.dense[name].cost.params
    done = compress_model(model, layers={"conv3": ("spatial_svd", 8)})
    assert done.chains["conv3"].family == "spatial_svd"
    assert list(done.chains) == ["conv3"]


@pytest.mark.parametrize("family", [n for n in FAMILIES if n != "separable_sum"])
def test_every_family_can_be_requested(family):
    ranks = {"tucker": 2, "tucker_full": 4, "tucker_cp": 3, "tensor_train": 3}
    rank = (2,) * ranks[family] if family in ranks else 2
    model = TorchModel(net(), DATA)
    plan = make_plan(model, layers={"conv3": (family, rank)})
    assert plan.layers["conv3"].family == family
    assert plan.changed == ["conv3"]


IMPOSSIBLE = [
    ({"conv3": ("tucker", (500, 8))}, ValueError, r"got \(500, 8\) \(layer conv3\)"),
    ({"conv3": ("tucker", 4)}, ValueError, r"2 numbers, got 4 \(layer conv3\)"),
    ({"conv3": ("channel_svd", 2.5)}, TypeError, r"got 2.5 \(layer conv3\)"),
    ({"conv3": ("channel_svd", 1e-6)}, ValueError, r"rank must be at least .*\(layer conv3\)"),
    ({"conv3": ("channel_svd", 3, "up")}, ValueError, r"variant .* got 'up' \(layer conv3\)"),
    ({"fc": ("tucker", (2, 2))}, ValueError, r"spatial kernel .*\(layer fc\)"),
    ({"conv3": ("svd", 3)}, ValueError, r"family must be one of .* got 'svd' \(layer conv3\)"),
    ({"conv3": "tucker"}, ValueError, r"rank must be given if no budget is.*\(layer conv3\)"),
    ({"conv3": 4}, TypeError, r"layers\['conv3'\] must be a family, .* got 4"),
    ({"conv3": ()}, TypeError, r"layers\['conv3'\] must be a family"),
    ({3: ("tucker", (2, 2))}, TypeError, "layers must name layers by strings, got 3"),
    (["conv3"], TypeError, r"layers must map names .*, got \['conv3'\]"),
    ("conv3", TypeError, "layers must map names .*, got 'conv3'"),
    ({"conv9": ("tucker", (2, 2))}, ValueError, r"\(conv1, conv2, conv3, fc\), got 'conv9'"),
    ({"up": ("channel_svd", 2)}, ValueError, "can be replaced, got 'up': .*output_size"),
]


@pytest.mark.parametrize(("requested", "kind", "words"), IMPOSSIBLE)
def test_impossible_requests_name_the_layer(requested, kind, words):
    with pytest.raises(kind, match=words) as caught:
        make_plan(TorchModel(net(), DATA), layers=requested)
    assert "\n" not in str(caught.value)


def test_requests_are_checked_against_budgets_and_pins():
    model = TorchModel(net(), DATA)
    with pytest.raises(ValueError, match=r"spatial kernel .*\(layer fc\)"):
        make_plan(model, macs=0.5, layers={"fc": "tucker"})
    with pytest.raises(ValueError, match="layers must name layers that may change"):
        make_plan(model, macs=0.5, pinned=["conv3"], layers={"conv3": ("tucker", (2, 2))})
    with pytest.raises(ValueError, match=r"macs budget .* infeasible"):
        make_plan(model, macs=0.05, layers={"conv2": ("tucker", (16, 16))})
    with pytest.raises(TypeError, match=r"give a budget.* or layers="):
        make_plan(model)
