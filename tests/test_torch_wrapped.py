"""PyTorch models that are compiled, scripted, exported, wrapped, without values or unusual."""

import copy
import functools
import pickle

import numpy as np
import pytest

import lowrank

torch = pytest.importorskip("torch")

from torch import fx, nn  # noqa: E402
from torch_models import is_close, make_batches, small_net, with_statistics  # noqa: E402
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank import demo  # noqa: E402
from lowrank.compress import compress_model, make_plan  # noqa: E402
from lowrank.interop.torch import TorchModel, compress, on_engine  # noqa: E402
from lowrank.interop.weights import WeightsModel  # noqa: E402

DATA = make_batches(1, 4, (8, 9, 9))


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()


def half_of(model, data=DATA):
    return compress(model, data, macs=0.6, families=["channel_svd"])


def test_compiled_models_are_compressed_as_what_was_compiled():
    model = plain()
    wanted = half_of(model)
    compiled_by = functools.partial(torch.compile, backend="eager")
    for compiled in (compiled_by(model), nn.Sequential(*map(compiled_by, model))):
        result = half_of(compiled)
        assert list(result.plan.layers) == ["0", "2"]
        assert result.plan.changed == wanted.plan.changed
        assert not any(hasattr(m, "_orig_mod") for m in result.model.modules())
        with torch.no_grad():
            assert torch.equal(result.model(DATA[0]), wanted.model(DATA[0]))
    model.compile(backend="eager")
    assert half_of(model).output_error == wanted.output_error


class CompiledFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = plain()
        self.calls = []

    @functools.partial(torch.compile, backend="eager")
    def forward(self, x):
        self.calls.append(1)
        return self.layers(x)


def test_compiled_forward_passes_are_run_as_written():
    model = CompiledFunction()
    assert list(half_of(model).plan.layers) == ["layers.0", "layers.2"]


REFUSED = {
    "scripted": (lambda: torch.jit.script(plain()), TypeError, "was scripted"),
    "traced": (lambda: torch.jit.trace(plain(), DATA[0]), TypeError, "was scripted or traced"),
    "exported": (lambda: torch.export.export(plain(), (DATA[0],)), TypeError, "was exported"),
    "meta": (lambda: plain().to("meta"), ValueError, "0.weight on the meta device.*to_empty"),
    "partly meta": (
        lambda: nn.Sequential(plain(), nn.Conv2d(8, 8, 3, device="meta")), ValueError,
        "1.weight on the meta device",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), ValueError, "0.weight.*on an example"),
    "function": (lambda: lambda x: x, TypeError, "torch.nn.Module, got function"),
    "class": (lambda: nn.Sequential, TypeError, "torch.nn.Module, got type"),
    "state dict": (lambda: plain().state_dict(), TypeError, "torch.nn.Module, got OrderedDict"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_compressed_raise_one_sentence(name):
    make, kind, words = REFUSED[name]
    for call in (lambda m: half_of(m), lambda m: on_engine(m)):
        with pytest.raises(kind, match=words) as caught:
            call(make())
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_functional_graphs_say_that_they_have_no_layers():
    batch = ({0: torch.export.Dim("batch")},)
    module = torch.export.export(plain(), (DATA[0],), dynamic_shapes=batch).module()
    with pytest.raises(ValueError, match="no convolution or linear layer that can be replaced"):
        half_of(module)


def test_graph_modules_with_layers_are_compressed():
    result = half_of(fx.symbolic_trace(plain()))
    assert result.plan.changed
    assert result.output_error < 0.9


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_stay_and_count_as_left_out():
    model = nn.Sequential(plain(), torch.jit.script(plain()))
    result = half_of(model)
    assert list(result.plan.layers) == ["0.0", "0.2"]
    left = result.plan.left_out
    assert left["1.0"].macs == 49 * 8 * 16 * 9
    assert left["1.2"].macs == 25 * 8 * 16 * 9
    assert "TorchScript" in left["1.0"].reason


def test_data_parallel_models_are_compressed():
    result = half_of(nn.DataParallel(plain()))
    assert list(result.plan.layers) == ["module.0", "module.2"]
    assert result.output_error == half_of(plain()).output_error


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_distributed_models_are_compressed_as_the_module_inside(tmp_path):
    start = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=start, rank=0, world_size=1)
    try:
        result = half_of(nn.parallel.DistributedDataParallel(plain()))
    finally:
        torch.distributed.destroy_process_group()
    assert list(result.plan.layers) == ["0", "2"]
    assert type(result.model) is nn.Sequential


def test_models_that_cannot_be_copied_are_named():
    model = plain()
    model.lock = (i for i in range(3))
    with pytest.raises(ValueError, match=r"the model cannot be copied.*generator"):
        half_of(model)


def test_lazy_models_are_compressed_after_a_run():
    model = nn.Sequential(nn.LazyConv2d(16, 3), nn.ReLU(), nn.LazyConv2d(8, 3))
    model(DATA[0])
    assert half_of(model).plan.changed


def test_memory_format_precision_and_mode_are_kept():
    for model, data in (
        (plain().to(memory_format=torch.channels_last), DATA),
        (plain().double(), [x.double() for x in DATA]),
        (plain().bfloat16(), [x.bfloat16() for x in DATA]),
        (plain().train(), DATA),
    ):
        result = half_of(model, data)
        assert result.model.training == model.training
        assert {p.dtype for p in result.model.parameters()} == {model[0].weight.dtype}
        with torch.no_grad():
            y, wanted = result.model(data[0]), model(data[0])
        assert y.dtype == wanted.dtype
        assert y.is_contiguous(memory_format=torch.channels_last) == wanted.is_contiguous(
            memory_format=torch.channels_last
        )


class Quantised(nn.Module):
    """A float convolution, then one with 8-bit weights that every call unpacks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        weight = torch.randn(16, 16, 3, 3)
        self.scale = float(weight.abs().max()) / 127
        self.register_buffer("integers", (weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return nn.functional.conv2d(self.conv(x), self.integers.float() * self.scale)


def test_convolutions_with_unpacked_weights_are_listed():
    result = half_of(Quantised())
    assert list(result.plan.layers) == ["conv"]
    (left,) = result.plan.left_out.values()
    assert left.macs == 49 * 16 * 16 * 9
    assert "the model itself" in repr(result.plan)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_sparse_weights_stay():
    model = nn.Sequential(plain(), nn.Flatten(), nn.Linear(8 * 49, 16, bias=False))
    weight = model[2].weight.detach().to_sparse_csr()
    model[2].weight = nn.Parameter(weight, requires_grad=False)
    result = half_of(model)
    assert list(result.plan.layers) == ["0.0", "0.2"]
    assert "dense tensor" in result.plan.left_out["2"].reason


def test_zero_and_unit_sized_layers_do_not_stop_a_compression():
    model = nn.Sequential(nn.Conv2d(8, 1, 1), nn.Conv2d(1, 8, 1), plain())
    with torch.no_grad():
        model[1].weight.zero_()
    result = half_of(model)
    assert np.isfinite(result.output_error) or result.output_error != result.output_error


def test_weights_that_are_not_finite_name_their_layer():
    model = plain()
    model[2].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"weight must be finite.*\(layer 2\)"):
        half_of(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::FutureWarning")
def test_result_can_be_exported_and_scripted():
    result = half_of(nn.Sequential(plain(), nn.ConvTranspose2d(8, 8, 2, stride=2)))
    with torch.no_grad():
        wanted = result.model(DATA[0])
        exported = torch.export.export(result.model.eval(), (DATA[0],)).module()
        for model in (exported, torch.jit.script(result.model)):
            torch.testing.assert_close(model(DATA[0]), wanted)


def test_result_can_be_pickled_copied_and_saved(tmp_path):
    result = half_of(plain())
    again = pickle.loads(pickle.dumps(copy.deepcopy(result.model)))
    torch.save(result.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        for model in (again, loaded):
            assert torch.equal(model(DATA[0]), result.model(DATA[0]))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 1e30])
def test_activations_of_any_size_are_fitted(scale):
    model = plain()
    with torch.no_grad():
        for p in (model[0].weight, model[0].bias):
            p.mul_(scale)
    model[2].weight.data.mul_(1 / scale if scale < 1 else 1)
    result = half_of(model)
    reference = half_of(plain_of(model, scale))
    assert result.output_error == pytest.approx(reference.output_error, rel=0.05)
    fitted = compress(nn.Sequential(model), [x * (1 / scale) for x in DATA], macs=0.6)
    assert fitted.output_error < 0.9


def plain_of(model, scale):
    """Return the model with activations of about 1 in place of `scale`."""
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for p in (scaled[0].weight, scaled[0].bias):
            p.mul_(1 / scale)
        scaled[2].weight.mul_(scale)
    return scaled


def test_batches_of_very_different_sizes_are_added():
    model = with_statistics(small_net(bias=True))
    data = [1e-3 * make_batches()[0], 1e22 * make_batches()[1], make_batches()[0]]
    result = compress(model, data, macs=0.6)
    assert result.plan.changed


def test_dense_takes_parameters_of_pytorch():
    conv = nn.Conv2d(4, 8, 3)
    f = lowrank.dense(conv.weight, conv.bias, padding=1)
    np.testing.assert_array_equal(f.to_dense(), conv.weight.detach().numpy())
    np.testing.assert_array_equal(f.bias, conv.bias.detach().numpy())
    half = conv.weight.detach().bfloat16()
    f = lowrank.dense(half)
    assert f.dtype == np.float32
    np.testing.assert_array_equal(f.to_dense(), half.float().numpy())
    assert lowrank.dense(conv.weight.double()).dtype == np.float64
    assert lowrank.dense(conv.weight.half()).dtype == np.float32
    turned = conv.weight.to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(lowrank.dense(turned).to_dense(), conv.weight.detach().numpy())
    before = conv.weight.detach().clone()
    conv.weight.data.zero_()
    assert lowrank.dense(before).error(before) == 0
    assert f.error(half.float()) == 0


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: torch.zeros(8, 4, 3, 3, device="meta"), ValueError, "meta device"),
        (lambda: torch.zeros(8, 4, 3, 3, dtype=torch.complex64), TypeError, "complex64"),
        (lambda: torch.zeros(8, 4, 3, 3, dtype=torch.int8), TypeError, "int8"),
        (lambda: nn.LazyConv2d(8, 3).weight, ValueError, "lazy layer"),
        (lambda: nn.Conv2d(4, 8, 3), TypeError, "weight"),
        (lambda: torch.zeros(8, 4).to_sparse(), (TypeError, ValueError), "dense|strided|sparse"),
    ],
)
def test_dense_refuses_tensors_without_real_values(make, kind, words):
    with pytest.raises(kind, match=words) as caught:
        lowrank.dense(make())
    assert "\n" not in str(caught.value)


def test_biases_of_chains_may_be_tensors():
    stage = lowrank.Stage(np.ones((8, 4, 3, 3)), lowrank.Geometry.of(2))
    f = lowrank.chain([stage], bias=torch.zeros(8, requires_grad=True))
    assert isinstance(f.bias, np.ndarray)


def test_plan_of_one_model_is_used_for_another_copy():
    model = plain()
    plan = make_plan(TorchModel(model, DATA), macs=0.6, families=["channel_svd"])
    result = compress(copy.deepcopy(model), DATA, plan=plan)
    with torch.no_grad():
        assert is_close(result.model(DATA[0]), half_of(model).model(DATA[0]))


def test_pipeline_compares_the_outputs_of_models_that_can_be_run():
    done = compress_model(TorchModel(plain(), DATA), macs=0.6, families=["channel_svd"])
    assert done.output_error == pytest.approx(half_of(plain()).output_error, rel=1e-4)
    assert np.isnan(compress_model(WeightsModel(demo.WEIGHTS), macs=0.5).output_error)


class Logarithm(nn.Module):
    """An output that is finite only where the sum of the inputs keeps its sign."""

    def __init__(self):
        super().__init__()
        self.layers = plain()

    def forward(self, x):
        return torch.log(self.layers(x))


def test_outputs_that_are_no_longer_finite_are_refused():
    with pytest.raises(ValueError, match="finite where those of the original are"):
        half_of(Logarithm())
