"""PyTorch models on lowrank's engine."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

import lowrank
from lowrank.families import FAMILIES, NotApplicable

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_models import (  # noqa: E402
    OptionalArgument,
    Shared,
    compressed_net,
    is_close,
    make_batches,
    small_net,
    with_statistics,
)
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import EngineModule, TorchModel, on_engine  # noqa: E402
from lowrank.interop.torch.chains import to_module  # noqa: E402
from lowrank.interop.torch.modules import from_layer  # noqa: E402
from lowrank.interop.torch.program import ProgramModule  # noqa: E402


class Residual(nn.Module):
    def __init__(self, channels, first=True):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.b, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.first = first

    def forward(self, x):
        y = self.norm(self.b(nn.functional.relu(self.a(x))))
        return torch.relu(x + y if self.first else y + x)


class DataDependent(nn.Module):
    """A model that cannot be traced, with a submodule that can."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6())
        self.chain = nn.Sequential(nn.Conv2d(4, 2, (3, 1), bias=False), nn.Conv2d(2, 4, (1, 3)))

    def forward(self, x):
        if x.mean() > 1e9:
            return x
        return self.chain(self.part(x))


class InPlace(nn.Module):
    """In-place operations on tensors that are read again, and on tensors that are not."""

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


class FunctionalActivations(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = self.a(x).relu_()
        z = nn.functional.hardtanh(self.b(y), 0.0, 6.0)
        other = nn.functional.hardtanh(self.b(y), -1.0, 6.0)  # not ReLU6
        return {"sum": z + other, "y": (y, nn.functional.relu6(self.a(x)))}


def depthwise(n):
    return [nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False), nn.BatchNorm2d(n), nn.ReLU6()]


MODELS = {
    "small": (lambda: small_net(True), 2),
    "residual": (lambda: nn.Sequential(Residual(4), Residual(4, False)), 4),
    "depthwise-separable": (
        lambda: nn.Sequential(
            *depthwise(4), nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Dropout2d(), *depthwise(8), nn.Conv2d(8, 6, 1), nn.Hardtanh(0, 6),
        ),
        2,
    ),
    "data-dependent": (DataDependent, 2),
    "data-dependent part": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), DataDependent(), nn.ReLU()), 3,
    ),
    "functional activations": (FunctionalActivations, 4),
    "in place": (InPlace, 5),
    "optional argument": (OptionalArgument, 1),
    "shared": (Shared, 2),
    "padding modules": (
        lambda: nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2), nn.ReflectionPad2d(1),
            nn.Conv2d(4, 4, 3), nn.ConstantPad2d(1, 2.0), nn.Conv2d(4, 4, 3),
            nn.ReplicationPad2d((2, 1, 0, 1)), nn.Conv2d(4, 4, 3), nn.ZeroPad2d(-1),
            nn.Conv2d(4, 4, 1), nn.ZeroPad2d(1),
        ),
        5,
    ),
    "fused padding": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=2, bias=False),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False),
            nn.ConvTranspose2d(4, 4, 3, 2, 1, bias=False), nn.Conv2d(4, 4, 1),
        ),
        1,
    ),
    "norm without affine": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False), nn.ReLU(),
            nn.BatchNorm2d(6),
        ),
        1,
    ),
    "norm without running statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_engine_model_matches_pytorch(name):
    make, engine_modules = MODELS[name]
    model = with_statistics(make())
    channels = 3 if name == "small" else 4
    x = torch.randn(3, channels, 12, 12)
    fast = on_engine(model, x)
    assert sum(isinstance(m, EngineModule) for m in fast.modules()) == engine_modules
    with torch.inference_mode():
        expected, first, second = (
            torch.utils._pytree.tree_leaves(m(x.clone())) for m in (model, fast, fast)
        )
    assert all(map(is_close, first, expected))
    assert len(first) == len(second) == len(expected)
    assert all(map(torch.equal, second, first))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "family", ["channel_svd", "kronecker", "network_decoupling", "cp", "filter_basis"]
)
def test_chains_fuse_into_one_engine_module(family, tied, rng):
    conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate")
    f = FAMILIES[family]
    variant = f.variants(from_layer(conv))[0]
    rank = list(f.sweep(from_layer(conv), variant))[1].rank
    chain = to_module(f.fit(from_layer(conv), rank, variant), conv, tied)
    model = with_statistics(nn.Sequential(chain, nn.BatchNorm2d(8), nn.ReLU()))
    fast = on_engine(model)
    (engine,) = (m for m in fast.modules() if isinstance(m, EngineModule))
    x = torch.randn(2, 8, 9, 9)
    with torch.inference_mode():
        assert is_close(fast(x), model(x))
    assert "Factorization" in repr(engine)


def test_compressed_model_runs_on_the_engine():
    compressed = compressed_net()[1].model.eval()
    first, second = make_batches()
    fast = on_engine(compressed, first)
    with torch.inference_mode():
        assert is_close(fast(second), compressed(second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engine_reads_and_writes_tensors_without_copies(dtype):
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).to(dtype)
    fast = on_engine(model, threads=1)
    x = torch.randn(2, 4, 8, 8, dtype=dtype)
    with torch.inference_mode():
        y = fast(x)
        assert y.dtype == dtype
        (module,) = (m for m in fast.modules() if isinstance(m, ProgramModule))
        plan = module.plan([x])
        arrays, tensors = module.arrays(plan, [x])
        assert [a.ctypes.data for a in arrays] == [t.data_ptr() for t in (x, *tensors)]
        other = x.contiguous(memory_format=torch.channels_last)
        arrays, _ = module.arrays(plan, [other])
        assert arrays[0].ctypes.data == other.data_ptr()
        assert torch.equal(fast(other), y)


def test_unsupported_inputs_raise():
    fast = on_engine(nn.Sequential(nn.Conv2d(4, 4, 3)))
    x = torch.ones(1, 4, 6, 6)
    for wrong in (x.long(), x.to("meta")):
        with pytest.raises(TypeError, match="x must be of a floating-point precision"):
            fast(wrong)
    with pytest.raises(ValueError, match="4 channels"):
        fast(torch.ones(1, 3, 6, 6))
    with pytest.raises(ValueError, match="no gradients"):
        fast(x.clone().requires_grad_())
    with torch.no_grad():
        assert not fast(x.clone().requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in fast.parameters())


def test_engine_model_can_be_copied_and_takes_any_batch_size():
    fast = on_engine(with_statistics(small_net()), make_batches()[0])
    x = make_batches()[0]
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(fast)(x), fast(x))
        for size in (1, 3, 2):
            assert fast(x[:size]).shape == (size, 5)
        assert fast(x[:0]).shape == (0, 5)


class ReadsWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return x * self.conv.weight.sum()


def test_model_may_read_weights_of_its_layers():
    model, x = ReadsWeights(), torch.ones(1, 3, 4, 4)
    with torch.inference_mode():
        assert is_close(on_engine(model, x)(x), model(x))


class AddsRandomNumbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) + torch.rand_like(x)


def test_model_with_random_outputs_raises():
    with pytest.raises(ValueError, match=r"outputs of model.*differ.*random numbers"):
        on_engine(AddsRandomNumbers(), torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize("algorithm", ["auto", "direct"])
def test_modules_without_a_trace_run_by_the_given_algorithm(algorithm):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(64, 64, 3, padding=1)

        def forward(self, x):
            return self.conv(x) if x.sum() < 1e9 else x

    model = nn.Sequential(Branches(), nn.ReLU())
    x = torch.randn(1, 64, 28, 28)
    fast = on_engine(model, x, threads=1, algorithm=algorithm)
    (engine,) = (m for m in fast.modules() if isinstance(m, EngineModule))
    ((f, _),) = engine.links
    with torch.inference_mode():
        run = f.compile(x.shape[1:], np.float32, 1, algorithm=algorithm)
        np.testing.assert_array_equal(fast(x), np.maximum(run(x.numpy()), 0))
    assert ("F(" in run.describe()) == (algorithm == "auto")


class BranchesOnType(nn.Module):
    """A Python branch that a trace takes the other way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        return y[: len(x)] if isinstance(x, torch.Tensor) else y * 2


def test_example_reveals_a_wrong_trace():
    x = torch.ones(2, 3, 4, 4)
    model = BranchesOnType()
    fast = on_engine(model, x)
    with torch.inference_mode():
        assert is_close(fast(x), model(x))


@pytest.mark.parametrize("name", ["resnet20", "vww", "crepe", "espcn", "faststyle"])
def test_trained_networks_match_pytorch_on_the_engine(data, name):
    sys.path.insert(0, str(Path(lowrank.__file__).parents[1] / "asv_benchmarks"))
    try:
        from benchmarks import nets
    finally:
        sys.path.pop(0)
    (case,) = nets.cases(name)
    x = case.calibration(0)[0][:2]
    net = TorchModel(case.model, [x])
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
            # Instance norms divide by deviations of near-constant channels and amplify rounding.
            assert is_close(on_engine(model)(x), model(x), terms=10000)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image, shift):
        return self.conv(image) + shift


@pytest.mark.parametrize("is_named", [False, True])
def test_example_of_several_arguments(is_named):
    image, shift = torch.rand(2, 3, 8, 8), torch.rand(2, 4, 6, 6)
    example = {"shift": shift, "image": image} if is_named else (image, shift)
    model = TwoInputs()
    fast = on_engine(model, example)
    assert fast.is_traced
    with torch.inference_mode():
        assert torch.allclose(fast(image, shift), model(image, shift), atol=1e-5)


@pytest.mark.parametrize("example", [(), {}, 3])
def test_example_without_tensors(example):
    with pytest.raises(TypeError, match="example must be a tensor, a tuple"):
        on_engine(TwoInputs(), example)
