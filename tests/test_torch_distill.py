"""Training of compressed PyTorch models against their originals."""

import copy
import functools
import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torch_models import (  # noqa: E402
    Shared,
    compressed_net,
    make_batches,
    small_net,
    with_statistics,
)
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import compress, distill  # noqa: E402
from lowrank.interop.torch.chains import TiedLayer  # noqa: E402

STEPS = 20


def relative_error(small, model, x):
    with torch.no_grad():
        wanted = model(x)
        return float((small(x) - wanted).norm() / wanted.norm())


def unseen():
    return torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(7))


@functools.cache
def data():
    return make_batches(4, 16)


@functools.cache
def trained_net():
    model, result = compressed_net()
    return model, result.model, distill(result.model, model, data(), steps=STEPS)


def states_are_equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_training_reduces_the_error_on_unseen_inputs():
    model, small, result = trained_net()
    assert result.after < result.before
    assert relative_error(result.model, model, unseen()) < relative_error(small, model, unseen())


def test_report_is_one_line():
    result = trained_net()[2]
    text = str(result)
    assert "\n" not in text
    assert f"{result.steps} steps ({result.examples:,} examples" in text
    assert text.endswith(result.reason)


def test_models_are_not_changed():
    model, result = compressed_net()
    small = copy.deepcopy(result.model).train()
    before = copy.deepcopy(model), copy.deepcopy(small)
    trained = distill(small, model, data(), steps=2, activations=["0"]).model
    assert states_are_equal(model, before[0])
    assert states_are_equal(small, before[1])
    assert small.training
    assert trained.training
    assert not model.training
    assert not any(m._forward_hooks for net in (model, small, trained) for m in net.modules())
    assert all(p.grad is None for net in (model, small, trained) for p in net.parameters())


def test_statistics_of_batch_norms_stay():
    _, small, result = trained_net()
    trained = dict(result.model.named_buffers())
    assert trained
    assert all(torch.equal(b, trained[name]) for name, b in small.named_buffers())


def test_result_is_deterministic_for_a_seed():
    model, small, result = trained_net()
    assert states_are_equal(result.model, distill(small, model, data(), steps=STEPS).model)
    other = distill(small, model, data(), steps=STEPS, seed=1).model
    assert not states_are_equal(result.model, other)


def test_frozen_parameters_stay_frozen():
    model, result = compressed_net()
    small = copy.deepcopy(result.model)
    frozen = next(iter(small.state_dict()))
    dict(small.named_parameters())[frozen].requires_grad_(False)
    trained = distill(small, model, data(), steps=2).model
    for name, p in trained.named_parameters():
        assert p.requires_grad == (name != frozen)
        assert torch.equal(p, small.state_dict()[name]) == (name == frozen)


def test_tied_weights_stay_tied():
    model = with_statistics(small_net())
    small = compress(model, make_batches(), macs=0.5, families=["kronecker"]).model
    assert any(isinstance(m, TiedLayer) for m in small.modules())
    result = distill(small, model, data(), steps=STEPS)
    assert result.after < result.before
    assert [p.shape for p in result.model.parameters()] == [p.shape for p in small.parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions_are_kept(dtype):
    model = copy.deepcopy(compressed_net()[0]).to(dtype)
    small = copy.deepcopy(compressed_net()[1].model).to(dtype)
    result = distill(small, model, [x.to(dtype) for x in data()], steps=STEPS)
    assert result.after < result.before
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    x = unseen().to(dtype)
    assert relative_error(result.model, model, x) < relative_error(small, model, x)


def test_mixed_precision_is_kept():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3, padding=1).bfloat16()
            self.second = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            return self.second(torch.relu(self.first(x.to(self.first.weight.dtype))).float())

    model = Mixed().eval()
    small = compress(model, data(), macs=0.5).model
    result = distill(small, model, data(), steps=STEPS)
    assert result.after < result.before
    for a, b in zip(result.model.parameters(), small.parameters(), strict=True):
        assert a.dtype == b.dtype


def test_labels_are_ignored():
    model, small, _ = trained_net()
    x = torch.cat(data())
    loader = DataLoader(TensorDataset(x, torch.arange(len(x))), 16)
    for batches in (loader, [{"input": b} for b in data()]):
        run = (lambda net, batch: net(batch["input"])) if isinstance(batches, list) else None
        # Mappings are not augmented unless asked.
        found = distill(small, model, batches, steps=STEPS, run=run, augment=False)
        plain = distill(small, model, data(), steps=STEPS, augment=False)
        assert states_are_equal(found.model, plain.model)


def test_mappings_are_arguments():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x, scale=1.0):
            return self.net(x) * scale

    model = with_statistics(Scaled())
    batches = [{"x": x, "scale": torch.rand(len(x), 1)} for x in data()]
    small = compress(model, batches, macs=0.5).model
    result = distill(small, model, batches, steps=STEPS)
    assert result.after < result.before


def test_batches_of_other_shapes_and_layers_that_are_called_twice():
    model = Shared().eval()
    batches = [torch.randn(2, 4, 6 + i, 8) for i in range(6)]
    small = compress(model, batches, macs=0.7).model
    result = distill(small, model, batches, steps=STEPS, batch_size=2, activations=["a"])
    assert result.after < result.before


def test_batches_that_cannot_be_split_stay_whole():
    model, small, _ = trained_net()
    seen = []

    def run(net, batch):
        seen.append(len(batch["x"]))
        return net(batch["x"]) * batch["scale"]

    batches = [{"x": x, "scale": torch.tensor(2.0)} for x in data()]
    result = distill(small, model, batches, steps=4, run=run)
    assert result.steps == 4
    assert result.reason == "the budget is spent"
    assert set(seen) == {16}


def test_color_images_are_augmented_by_default():
    model, small, _ = trained_net()
    known = {x.numpy().tobytes() for batch in data() for x in batch}
    seen = set()

    def run(net, batch):
        seen.update(x.contiguous().numpy().tobytes() for x in batch.detach())
        return net(batch)

    distill(small, model, data(), steps=4, run=run, augment=False)
    assert seen <= known
    distill(small, model, data(), steps=4, run=run)
    assert not seen <= known
    seen.clear()
    distill(small, model, data(), steps=4, run=run, augment=lambda x, random: torch.zeros_like(x))
    assert torch.zeros(3, 10, 10).numpy().tobytes() in seen


def test_augmented_images_are_shifted_or_flipped():
    model, small, _ = trained_net()
    column, row = (
        torch.arange(10.0).expand(3, 10, 10),
        torch.arange(10.0)[:, None].expand(3, 10, 10),
    )
    images = torch.stack([column + 100 * row] * 8)
    steps = set()

    def run(net, batch):
        middle = batch.detach()[
            :, :, 2:-2, 2:-2
        ]  # a shift of up to 1 and its reflection are outside
        steps.update(middle.diff(dim=-1).unique().tolist())
        assert middle.diff(dim=-2).unique().tolist() == [100.0]
        return net(batch)

    distill(small, model, [images], steps=8, run=run, augment=True)
    assert steps == {-1.0, 1.0}


def test_activations_are_matched_in_place_operations_included():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU(inplace=True),
        nn.Conv2d(16, 4, 3),
    ).eval()  # fmt: skip
    small = compress(model, data(), macs=0.4).model

    def error(found):
        return relative_error(found[:3], model[:3], unseen())

    with_activations, without = (
        distill(small, model, data(), steps=STEPS, activations=names).model
        for names in (["0", "2"], [])
    )
    assert error(with_activations) < error(without)


def test_blocks_around_compressed_layers_are_matched_by_default():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.block = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))

        def forward(self, x):
            return self.block(self.stem(x)).mean((2, 3))

    model = Net().eval()
    small = compress(model, data(), macs=0.5).model
    assert type(small.block[0]) is nn.Sequential
    default, named, without = (
        distill(small, model, data(), steps=2, **given).model
        for given in ({}, {"activations": ["block"]}, {"activations": []})
    )
    assert states_are_equal(default, named)
    assert not states_are_equal(default, without)


def test_training_ends_when_the_loss_no_longer_falls():
    model, _ = compressed_net()
    result = distill(model, model, data(), steps=40)
    assert result.reason == "the held-out loss no longer falls"
    assert result.steps == 30  # at three quarters of the budget
    assert states_are_equal(result.model, model)


def test_training_ends_when_the_loss_is_not_finite():
    model, small, _ = trained_net()
    result = distill(small, model, data(), steps=40, rate=1e30)
    assert result.reason.startswith("the loss became NaN or infinite at step")
    assert states_are_equal(result.model, small)
    assert result.after == result.before


def test_interrupt_returns_the_best_weights():
    model, small, complete = trained_net()
    shares = []

    def interrupt(name, share):
        shares.append(share)
        if share >= 0.5:
            raise KeyboardInterrupt

    result = distill(small, model, data(), steps=STEPS, progress=interrupt)
    assert result.reason == "interrupted"
    assert result.steps == STEPS / 2
    assert shares == [i / STEPS for i in range(STEPS // 2 + 1)]
    assert complete.after < result.after < result.before


def test_a_budget_of_no_time_changes_nothing():
    model, small, _ = trained_net()
    result = distill(small, model, data(), minutes=1e-9)
    assert result.steps == 0
    assert states_are_equal(result.model, small)


def not_finite():
    model = small_net()
    model[-1].weight.data *= math.inf
    return model.eval()


def pooled(net, x):
    return net(x[:, :, None, None].expand(-1, -1, 10, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"minutes": 0}, "minutes must be positive, got 0"),
        ({"minutes": math.inf}, "minutes must be positive"),
        ({"steps": -1}, "steps must be positive, got -1"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"rate": math.nan}, "rate must be positive, got nan"),
        ({"batches": []}, "batches must hold at least 2 examples, got 0"),
        ({"batches": [torch.zeros(1, 3, 10, 10)]}, "at least 2 examples, got 1"),
        ({"batches": [torch.zeros(4, 2, 10, 10)]}, "cannot be run on a batch of shape"),
        ({"activations": ["nowhere"]}, "activations must name modules of both models"),
        ({"augment": True, "batches": [torch.zeros(4, 3)], "run": pooled}, "augment=True needs"),
        ({"model": nn.Flatten()}, "tensors of the same shapes, got"),
        ({"model": not_finite()}, "must be finite"),
        ({"small": small_net().requires_grad_(False)}, "small must have a parameter"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    model, small, _ = trained_net()
    given = {"small": small, "model": model, "batches": data(), "steps": 2} | arguments
    with pytest.raises(ValueError, match=message):
        distill(**given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_on_a_gpu_are_trained_there():
    model, small, _ = trained_net()
    batches = [x.cuda() for x in data()]
    result = distill(copy.deepcopy(small).cuda(), copy.deepcopy(model).cuda(), batches, steps=STEPS)
    assert result.after < result.before
    assert all(p.is_cuda for p in result.model.parameters())
