"""Compression of PyTorch models within a budget."""

import copy

import pytest

import lowrank
from lowrank.compress import make_plan

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_models import (  # noqa: E402
    compressed_net,
    is_close,
    make_batches,
    small_net,
    with_statistics,
)
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import (  # noqa: E402
    CompressionResult,
    TorchModel,
    compress,
    on_engine,
    reestimate_batch_norm,
)
from lowrank.interop.torch.chains import CONVS, TRANSPOSED_CONVS  # noqa: E402
from lowrank.interop.torch.modules import from_layer  # noqa: E402


def count_macs(model, x):
    """Return the MACs of a batch, counted from inputs and outputs of the layers."""
    total = 0

    def count(m, args, out):
        nonlocal total
        x, w = args[0], m.weight
        if isinstance(m, nn.Linear):
            total += out.numel() * w.shape[1]
        elif isinstance(m, TRANSPOSED_CONVS):
            total += x.numel() * w[0].numel()
        else:
            total += out.numel() * w[0].numel()

    hooks = [
        m.register_forward_hook(count)
        for m in model.modules()
        if isinstance(m, (*CONVS, *TRANSPOSED_CONVS, nn.Linear))
    ]
    with torch.no_grad():
        model(x)
    for h in hooks:
        h.remove()
    return total


def test_compressed_model_stays_within_the_budget():
    model, result = compressed_net()
    x = make_batches()[0][:1]
    planned, original = result.plan.total("macs")
    assert count_macs(model, x) == original
    assert count_macs(result.model, x) == planned <= 0.5 * original
    with torch.no_grad():
        assert result.model(x).shape == model(x).shape


def test_original_model_is_not_changed():
    model = small_net().train()
    model[0].weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    modules = list(model.modules())
    compress(model, make_batches(), macs=0.5, reestimate_norms=True)
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


def test_full_budget_changes_nothing():
    model = with_statistics(small_net())
    result = compress(model, make_batches(), macs=1.0)
    assert not result.plan.changed
    x = make_batches()[0]
    with torch.no_grad():
        assert torch.equal(result.model(x), model(x))


def test_low_rank_weights_are_recovered(rng):
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Linear(12, 12))
    f = lowrank.spatial_svd(from_layer(model[0]), rank=2)
    model[0].weight.data = torch.tensor(f.to_dense())
    model[2].weight.data = torch.randn(12, 3) @ torch.randn(3, 12)
    result = compress(model, make_batches(4, 8, (8, 12, 12)), macs=0.5)
    x = torch.randn(2, 8, 12, 12)
    with torch.no_grad():
        expected = model(x)
        error = (result.model(x) - expected).norm() / expected.norm()
    # Fits solve second moments, whose condition number is the square of that of the data.
    assert error < 1e-3


def test_same_seed_gives_the_same_bits():
    model = with_statistics(small_net())
    one, two = (compress(model, make_batches(), macs=0.4, seed=3).model for _ in range(2))
    a, b = one.state_dict(), two.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_interrupted_run_resumes(tmp_path):
    model = with_statistics(small_net())

    def stop(what, share):
        if what == "layers" and share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, make_batches(), macs=0.4, folder=tmp_path, progress=stop)
    finished = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert finished
    resumed = compress(model, make_batches(), macs=0.4, folder=tmp_path)
    assert all(p.stat().st_mtime_ns == time for p, time in finished.items())
    uninterrupted = compress(model, make_batches(), macs=0.4)
    a, b = resumed.model.state_dict(), uninterrupted.model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert resumed.rows == uninterrupted.rows


class TwoInputs(nn.Module):
    """The scaled difference of one branch on two images."""

    def __init__(self):
        super().__init__()
        self.branch = with_statistics(small_net())

    def forward(self, left, right, scale=1.0):
        return (self.branch(left) - self.branch(right)) * scale


def test_models_with_several_inputs():
    model = TwoInputs().eval()
    pairs = [(a, b) for a, b in zip(make_batches(4)[:2], make_batches(4)[2:])]
    named = compress(
        model, [{"left": a, "right": b} for a, b in pairs], macs=0.5, reestimate_norms=True
    )
    run = lambda m, batch: m(batch["a"], batch["b"][0], scale=2.0)  # noqa: E731
    free = compress(model, [{"a": a, "b": [b]} for a, b in pairs], macs=0.5, run=run)
    branch_plan = make_plan(TorchModel(model.branch, make_batches()), macs=0.9)
    _, branch_macs = branch_plan.total("macs")
    for result in (named, free):
        planned, original = result.plan.total("macs")
        assert planned <= 0.5 * original
        assert original == 2 * branch_macs  # the branch runs once per image
        assert result.model(*pairs[0]).shape == model(*pairs[0]).shape


def test_model_may_be_a_single_layer():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    data = make_batches(shape=(8, 8, 8))
    result = compress(conv, data, macs=0.5)
    assert isinstance(result.model, nn.Sequential)
    assert count_macs(result.model, data[0][:1]) <= 0.5 * count_macs(conv, data[0][:1])
    fast = on_engine(result.model)
    with torch.inference_mode():
        assert isinstance(result, CompressionResult)
        assert is_close(fast(data[0]), result.model(data[0]))


def test_batch_norm_statistics_are_reestimated():
    model = with_statistics(small_net())
    model.train()
    model[1].eval()
    data = make_batches()
    reestimate_batch_norm(model, data)
    assert model.training
    assert not model[1].training
    assert model[1].momentum == 0.1
    with torch.no_grad():
        y = torch.stack([model[0](x) for x in data])
    expected = y.transpose(0, 2).reshape(16, len(data), -1).mean((1, 2))
    assert is_close(model[1].running_mean, expected)
    compressed = compress(model, data, macs=0.5, reestimate_norms=True).model
    assert not torch.equal(compressed[4].running_mean, model[4].running_mean)


ERRORS = [
    (lambda: compress(nn.Sequential(nn.ReLU()), make_batches(), macs=0.5), "no convolution"),
    (lambda: compress(small_net(), [], macs=0.5), "at least one calibration batch"),
    (lambda: compress(small_net(), [torch.full((2, 3, 8, 8), torch.nan)], macs=0.5), "finite"),
    (
        lambda: compress(small_net(), make_batches(shape=(4, 8, 8)), macs=0.5),
        "cannot be run on a batch",
    ),
    (lambda: compress(small_net(), make_batches(), macs=0.5, pinned=["x.*"]), "no layer is called"),
    (lambda: compress(small_net(), make_batches(), macs=0.001), "cheapest|minimum|infeasible"),
    (lambda: compress(small_net(), make_batches(), macs=2.0), "macs budget of 2 is infeasible"),
    (lambda: compress(small_net(), make_batches(), macs="150%"), "macs.*150%"),
    (lambda: TorchModel(small_net(), make_batches(), "entropy"), "'labels'"),
    (lambda: next(TorchModel(nn.Flatten(0), make_batches(), "labels").gradients([], 0)), "no conv"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[words for _, words in ERRORS])
def test_errors_name_the_problem(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_types_raise():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        TorchModel("net", make_batches())
    with pytest.raises(TypeError, match="tensor"):
        TorchModel(small_net(), [{"x": 1.0}])
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        on_engine("net")
    with pytest.raises(TypeError, match="give a budget"):
        compress(small_net(), make_batches())


def test_plan_can_be_passed_in():
    model = with_statistics(small_net())
    plan = make_plan(TorchModel(model, make_batches()), macs=0.5)
    result = compress(model, make_batches(), plan=plan)
    assert result.plan.to_json() == plan.to_json()


def test_error_gives_the_shape_of_the_batch():
    (x,) = make_batches(1)
    wrong = torch.zeros(2, x.shape[1] + 1, *x.shape[2:])
    with pytest.raises(ValueError, match=r"cannot be run on a batch of shape \(2, "):
        compress(small_net(), [x, wrong], macs=0.5)


def test_half_precision_models_can_be_compressed():
    model = with_statistics(small_net()).half()
    compressed = compress(model, [x.half() for x in make_batches()], macs=0.5).model
    assert {p.dtype for p in compressed.parameters()} == {torch.float16}
    with torch.no_grad():
        assert compressed(make_batches()[0].half()).isfinite().all()
