"""The operator lowrank::chain, and models on it: gradients, graphs, state dicts, precisions."""

import copy
import io
import pickle
import threading

import numpy as np
import pytest

import lowrank
from lowrank import Geometry, Stage
from lowrank.core.stage import Epilogue
from lowrank.engine.pytorch import run_stage

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_models import compressed_net, is_close, with_statistics  # noqa: E402
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import (  # noqa: E402
    EngineModule,
    on_engine,
    plans,
)
from lowrank.interop.torch.chains import Bias, TiedLayer, to_module  # noqa: E402
from lowrank.interop.torch.operator import (  # noqa: E402
    chain_operator,
    gradient_operator,
    run_chain,
)
from lowrank.interop.torch.plans import describe_stages  # noqa: E402

# TorchScript, and what Inductor uses of it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def stage(
    shape, ndim, *geometry, groups=1, outer=1, inner=1, shuffle=(1, 1), transposed=False, **g
):
    weight = np.random.default_rng(sum(shape)).standard_normal(shape)
    geometry = Geometry.of(ndim, *geometry, **g)
    return Stage(weight, geometry, groups, outer, inner, shuffle, transposed)


def bias(n):
    return np.random.default_rng(n).standard_normal(n)


#: Stages, epilogues and the shape of the input.
CHAINS = {
    "two stages": (
        [stage((4, 3, 3, 1), 2, 1, [1, 0]), stage((5, 4, 1, 3), 2, 1, [0, 1])],
        [Epilogue(), Epilogue(bias(5))], (2, 3, 6, 7),
    ),
    "stride, asymmetric padding, dilation": (
        [stage((4, 3, 3, 3), 2, 2, [(1, 0), 2], [1, 2])], [Epilogue(bias(4))], (2, 3, 8, 9),
    ),
    "activations": (
        [stage((4, 3, 3), 1, 2, [(1, 0)]), stage((4, 1, 3), 1, groups=4)],
        [Epilogue(bias(4), "relu"), Epilogue(bias(4), "relu6")], (2, 3, 11),
    ),
    "reflect": (
        [stage((4, 2, 3, 3), 2, 2, [1, (2, 1)], padding_mode="reflect", groups=2)], [Epilogue()],
        (2, 4, 8, 9),
    ),
    "circular": (
        [stage((4, 2, 3, 3), 2, 2, [1, (2, 1)], padding_mode="circular", groups=2)], [Epilogue()],
        (2, 4, 8, 9),
    ),
    "replicate": (
        [stage((4, 4, 3), 1, 1, [2], padding_mode="replicate")], [Epilogue()], (1, 4, 6),
    ),
    "symmetric": (
        [stage((4, 4, 3), 1, 1, [2], padding_mode="symmetric")], [Epilogue()], (1, 4, 6),
    ),
    "constant": (
        [stage((4, 2, 3, 3), 2, 2, [1, (2, 1)], padding_mode="constant", value=2.0, groups=2)],
        [Epilogue()], (2, 4, 8, 9),
    ),
    "tied": (
        [stage((4, 2, 3, 3), 2, 2, 1, groups=2, outer=2, inner=3, shuffle=(2, 3))],
        [Epilogue(bias(24))], (2, 24, 5, 6),
    ),
    "transposed, stride 2": (
        [stage((4, 2, 3, 3), 2, 2, [(1, 0), 1], output_padding=1, groups=2, transposed=True)],
        [Epilogue(bias(4))], (2, 4, 5, 6),
    ),
    "transposed, stride 1": (
        [stage((4, 2, 3, 3), 2, 1, [(1, 0), 1], groups=2, transposed=True)],
        [Epilogue(bias(4))], (2, 4, 5, 6),
    ),
    "transposed, output padding beyond the stride": (
        [stage((4, 2, 3), 1, 2, [(1, 0)], 3, output_padding=2, groups=2, outer=2, inner=3,
               shuffle=(2, 3), transposed=True)], [Epilogue()], (2, 24, 5),
    ),
    "many samples": (
        [stage((4, 3, 3, 1), 2, 1, [1, 0]), stage((5, 4, 1, 3), 2, [1, 2], [0, 1])],
        [Epilogue(bias(4), "relu"), Epilogue(bias(5))], (2, 3, 24, 47),
    ),
    "many samples with a border": (
        [stage((4, 3, 3), 1, 2, [(2, 1)], 2, padding_mode="reflect")], [Epilogue(bias(4))],
        (2, 3, 517),
    ),
    "many samples, transposed": (
        [stage((4, 2, 3), 1, 2, [(1, 0)], output_padding=1, transposed=True)], [Epilogue(bias(2))],
        (2, 4, 299),
    ),
    "three axes": (
        [stage((4, 2, 1, 3, 1), 3, [1, 2, 1], [0, 1, 0]),
         stage((2, 4, 3, 1, 1), 3, [2, 1, 1], [1, 0, 0])],
        [Epilogue(), Epilogue(bias(2))], (2, 2, 4, 5, 3),
    ),
}  # fmt: skip


def parameters_of(stages, epilogues, dtype=torch.float64):
    """Return new trainable parameters, in the order of the operator."""
    arrays = []
    for s, e in zip(stages, epilogues):
        arrays += [s.weight] if e.bias is None else [s.weight, e.bias]
    return [torch.tensor(np.array(a), dtype=dtype, requires_grad=True) for a in arrays]


def reference(x, parameters, stages, epilogues):
    """Run a chain by PyTorch's convolutions."""
    given = iter(parameters)
    for s, e in zip(stages, epilogues):
        x = run_stage(x, s, next(given))
        if e.bias is not None:
            x = x + next(given).reshape(-1, *[1] * (x.ndim - 2))
        if e.activation != "none":
            x = getattr(nn.functional, e.activation)(x)
    return x


@pytest.mark.parametrize("name", CHAINS)
def test_operator_passes_opcheck(name):
    stages, epilogues, shape = CHAINS[name]
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    chain = describe_stages(stages, epilogues)
    arguments = x, parameters_of(stages, epilogues), chain.text, [], 1, "auto"
    found = torch.library.opcheck(chain_operator, arguments)
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CHAINS)
def test_weight_gradients_pass_opcheck(name):
    stages, epilogues, shape = CHAINS[name]
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    one = describe_stages(stages[:1], epilogues[:1]).text
    parameters = parameters_of(stages[:1], epilogues[:1])
    grad = torch.randn_like(chain_operator(x, parameters, one, [], 1, "direct"))
    found = torch.library.opcheck(gradient_operator, (x, grad.requires_grad_(), one, 1))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("is_split", [False, True])
def test_gradients_of_first_and_second_order(name, is_split):
    stages, epilogues, shape = CHAINS[name]
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    parameters = parameters_of(stages, epilogues)
    chain = describe_stages(stages, epilogues)

    def run(x, *parameters):
        if is_split:
            return run_chain(x, parameters, chain, 1)
        return chain_operator(x, list(parameters), chain.text, [], 1, "direct")

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)
    try:
        wanted = reference(x, parameters, stages, epilogues)
    except NotImplementedError:  # PyTorch has no such padding
        return
    assert is_close(run(x, *parameters), wanted)


def test_gradients_that_are_not_needed_are_not_computed():
    stages, epilogues, shape = CHAINS["two stages"]
    chain = describe_stages(stages, epilogues)
    for needed in range(4):
        tensors = [torch.randn(*shape, dtype=torch.float64), *parameters_of(stages, epilogues)]
        for number, t in enumerate(tensors):
            t.requires_grad_(number == needed)
        run_chain(tensors[0], tensors[1:], chain).sum().backward()
        grads = [t.grad is not None for t in tensors]
        assert grads == [number == needed for number in range(4)]


def test_constant_border_after_the_first_stage_has_no_gradient():
    stages = [
        stage((3, 3, 3), 1, 1, 1), stage((3, 3, 3), 1, 1, 1, padding_mode="constant", value=1.0),
    ]  # fmt: skip
    epilogues = [Epilogue(), Epilogue()]
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    y = run_chain(x, parameters_of(stages, epilogues), describe_stages(stages, epilogues))
    wanted = lowrank.chain(stages)(x.detach().numpy())
    np.testing.assert_allclose(y.detach().numpy(), wanted, rtol=1e-12)
    with pytest.raises(ValueError, match=r"zero after the first stage, got 1\.0 in stage 1"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    stages, epilogues, shape = CHAINS["two stages"]
    chain = describe_stages(stages, epilogues)
    wide = parameters_of(stages, epilogues, dtype)
    x = torch.randn(*shape).to(dtype).requires_grad_()
    y = run_chain(x, wide, chain)
    y.float().square().sum().backward()
    exact = [t.detach().float().requires_grad_() for t in (x, *wide)]
    wanted = run_chain(exact[0], exact[1:], chain)
    wanted.square().sum().backward()
    assert y.dtype == dtype
    for t, e in zip((y, x.grad, *(p.grad for p in wide)), (wanted, *(e.grad for e in exact))):
        assert t.dtype == dtype
        # One rounding of each intermediate and of each result.
        limit = 8 * torch.finfo(dtype).eps * float(e.detach().abs().max())
        assert float((t.detach().float() - e.detach()).abs().max()) <= limit


@pytest.mark.parametrize("kind", ["dense", "depthwise", "grouped", "few outputs", "tied", "bias"])
def test_plans_follow_the_weights(kind):
    if kind == "depthwise":
        s = stage((32, 1, 3, 3), 2, 1, 1, groups=32)
    elif kind == "grouped":
        s = stage((32, 16, 3, 3), 2, 1, 1, groups=2)
    elif kind == "few outputs":
        s = stage((2, 32, 3, 3), 2, 1, 1)
    elif kind == "tied":
        s = stage((16, 16, 3, 3), 2, 1, 1, outer=2)
    else:
        s = stage((32, 32, 3, 3), 2, 1, 1)
    epilogue = Epilogue(bias(s.out_channels) if kind == "bias" else None)
    chain, parameters = describe_stages([s], [epilogue]), parameters_of([s], [epilogue])
    parameters = [p.detach().float() for p in parameters]
    x = torch.randn(2, 32, 20, 20)
    for change in range(4):
        for p in parameters:
            p.data.mul_(-1.5).add_(0.1 * change)  # which version counters do not see
        y = run_chain(x, parameters, chain, 1)
        fresh = run_chain(x, [p.clone() for p in parameters], chain, 1)
        assert torch.equal(y, fresh)
        assert is_close(y, reference(x, parameters, [s], [epilogue]))


def test_plans_of_weights_that_are_gone_are_dropped():
    stages, epilogues, shape = CHAINS["two stages"]
    chain = describe_stages(stages, epilogues)
    before = set(plans._plans)
    parameters = parameters_of(stages, epilogues)
    run_chain(torch.randn(*shape), [p.detach() for p in parameters], chain)
    (own,) = set(plans._plans) - before
    del parameters
    run_chain(torch.randn(3, 3, 9, 9), parameters_of(stages, epilogues), chain)
    assert own not in plans._plans


def test_threads_share_plans_of_changing_weights():
    s = stage((32, 32, 3, 3), 2, 1, 1)
    chain = describe_stages([s], [Epilogue()])
    weight = torch.tensor(s.weight, dtype=torch.float32)
    x, wrong = torch.randn(1, 32, 24, 24), []

    def work(number):
        own = weight.clone()
        for i in range(20):
            own.mul_(1 + 0.1 * (number + i) % 3)
            if not is_close(run_chain(x, [own], chain, 1), reference(x, [own], [s], [Epilogue()])):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_wrong_inputs_get_one_sentence():
    stages, epilogues, shape = CHAINS["two stages"]
    chain, parameters = describe_stages(stages, epilogues), parameters_of(stages, epilogues)
    with pytest.raises(TypeError, match=r"x must be one of float32, .*, got torch\.int64"):
        run_chain(torch.ones(shape, dtype=torch.int64), parameters, chain)
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        run_chain(torch.ones(shape, dtype=torch.complex64), parameters, chain)
    for wrong in ((2, 4, 6, 7), (3, 6, 7)):
        with pytest.raises(ValueError, match=r"x must be \(batch, 3 channels, and 2 spatial axes"):
            run_chain(torch.ones(wrong), parameters, chain)
    with pytest.raises(NotImplementedError, match=r"torch\.func does not differentiate"):
        torch.func.grad(lambda x: run_chain(x, parameters, chain).sum())(torch.ones(shape))


def test_vmap_over_inputs_and_over_weights():
    stages, epilogues, shape = CHAINS["two stages"]
    chain = describe_stages(stages, epilogues)
    parameters = [p.detach() for p in parameters_of(stages, epilogues)]
    x = torch.randn(3, *shape, dtype=torch.float64)
    found = torch.func.vmap(lambda x: run_chain(x, parameters, chain))(x)
    for one, wanted in zip(x, found):
        assert is_close(run_chain(one, parameters, chain), wanted)
    several = [torch.stack([p, 2 * p]) for p in parameters]
    found = torch.func.vmap(lambda *p: run_chain(x[0], p, chain))(*several)
    for i, y in enumerate(found):
        assert is_close(y, run_chain(x[0], [p[i] for p in several], chain))


# Models for inference


@pytest.fixture(scope="module")
def engine_net():
    """Return a compressed network, its copy on the engine and a batch."""
    _, result = compressed_net()
    x = torch.randn(4, 3, 10, 10)
    model = copy.deepcopy(result.model).eval().requires_grad_(False)  # others train it
    return model, on_engine(model, x), x


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_models_compile_without_a_graph_break(engine_net, backend):
    model, fast, x = engine_net
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    with torch.inference_mode():
        assert is_close(compiled(x), model(x))
        assert is_close(compiled(x[:3]), model(x[:3]))  # a size that is a symbol from now on


@pytest.mark.parametrize("strict", [False, True])
def test_models_are_exported_with_the_operator(engine_net, strict):
    model, fast, x = engine_net
    batch = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(fast, (x,), strict=strict, dynamic_shapes=batch)
    targets = [n.target for n in exported.graph.nodes]
    assert targets.count(torch.ops.lowrank.chain.default) == 2
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (4, 3):
        assert is_close(loaded(x[:size]), model(x[:size]))


def test_models_can_be_traced_and_transformed(engine_net):
    model, fast, x = engine_net
    traced = torch.jit.trace(fast, x)
    assert is_close(traced(2 * x), model(2 * x))
    found = torch.func.vmap(fast)(torch.stack([x, 2 * x]))
    assert is_close(found[1], model(2 * x))
    with pytest.raises(TypeError, match="cannot be scripted: script the PyTorch model"):
        torch.jit.script(fast)


def test_state_dict_is_that_of_the_pytorch_model(engine_net):
    model, fast, x = engine_net
    other = copy.deepcopy(model)
    for t in (*other.parameters(), *other.buffers()):
        if t.is_floating_point():
            t.uniform_(0.5, 1.5)
    assert list(fast.state_dict()) == list(model.state_dict())
    for alone in (True, False):
        own = copy.deepcopy(fast)
        if alone:
            own.load_state_dict(other.state_dict())
        else:  # as a part of another model
            whole = nn.ModuleDict({"net": own})
            pytorch = nn.ModuleDict({"net": other}).state_dict()
            assert list(whole.state_dict()) == list(pytorch)
            assert not any(whole.load_state_dict(pytorch))
            pytorch.pop("net.0.weight")
            with pytest.raises(RuntimeError, match=r"Missing key\(s\).*\"net\.0\.weight\""):
                whole.load_state_dict(pytorch)
        assert is_close(own(x), other(x))
        assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(),
                                                     other.state_dict().values()))  # fmt: skip
    with pytest.raises(RuntimeError, match="Missing key"):
        copy.deepcopy(fast).load_state_dict({})


def test_models_are_copied_pickled_and_cast(engine_net):
    model, fast, x = engine_net
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))
        assert twin.state_dict()["0.weight"].data_ptr() != fast.state_dict()["0.weight"].data_ptr()
    assert is_close(
        copy.deepcopy(fast).double()(x.double()), copy.deepcopy(model).double()(x.double())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(engine_net, dtype):
    model, _, x = engine_net
    half, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    wanted = copy.deepcopy(half).float()(x.float())
    for fast in (on_engine(half, x), on_engine(model).to(dtype)):
        y = fast(x)
        assert y.dtype == dtype
        # Pooled features and the result are rounded in PyTorch's last layer.
        limit = 8 * torch.finfo(dtype).eps * float(wanted.abs().max())
        assert float((y.float() - wanted).abs().max()) <= limit
    f = lowrank.dense(np.ones((4, 3, 3), np.float32))
    assert EngineModule([(f, "relu")])(torch.ones(1, 3, 9, dtype=dtype)).dtype == dtype


# Training


def layer_of(family, rank, padding_mode="zeros", transposed=False):
    if transposed:
        like = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1)
    else:
        like = nn.Conv2d(8, 8, 3, padding=1, padding_mode=padding_mode)
    f = lowrank.dense(
        like.weight.detach().numpy(), bias=like.bias.detach().numpy(), stride=like.stride,
        padding=[1, 1], padding_mode=padding_mode, transposed=transposed,
        output_padding=like.output_padding,
    )  # fmt: skip
    return to_module(getattr(lowrank, family)(f, rank=rank), like)


LAYERS = {
    "dense": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "spatial_svd": lambda: layer_of("spatial_svd", 4),
    "channel_svd": lambda: layer_of("channel_svd", 4),
    "tucker": lambda: layer_of("tucker", (3, 4)),
    "cp": lambda: layer_of("cp", 5),
    "reflect": lambda: layer_of("spatial_svd", 4, "reflect"),
    "kronecker": lambda: layer_of("kronecker", 2),
    "transposed": lambda: layer_of("spatial_svd", 4, transposed=True),
}


def gradients(module, x):
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_as_in_pytorch(name):
    layer = nn.Sequential(LAYERS[name](), nn.ReLU())
    fast = on_engine(layer, trainable=True)
    assert list(fast.state_dict()) == list(layer.state_dict())
    assert type(fast[0]).__name__ == "EngineLayer"
    x = torch.randn(3, 8, 12, 13)
    for found, wanted in zip(gradients(fast, x), gradients(layer, x)):
        assert is_close(found, wanted)
    assert is_close(fast(x[0]), layer(x[0]))  # without a batch axis
    for model in (fast, layer):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for twin in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert is_close(twin(x), layer(x), 100_000)  # rounding of three steps
    layer.load_state_dict(fast.state_dict())
    assert is_close(fast(x), layer(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_compiles_without_a_graph_break(backend):
    model = nn.Sequential(LAYERS["spatial_svd"](), nn.BatchNorm2d(8), nn.ReLU(), LAYERS["tucker"]())
    model = with_statistics(model)
    compiled = torch.compile(on_engine(model, trainable=True), fullgraph=True, backend=backend)
    x = torch.randn(3, 8, 12, 12)
    for found, wanted in zip(gradients(compiled, x), gradients(model, x)):
        assert is_close(found, wanted, 10_000)


def test_trainable_layers_keep_their_attributes_and_hooks():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), LAYERS["spatial_svd"]())
    fast = on_engine(model[0], trainable=True)
    assert (fast.out_channels, fast.kernel_size) == (8, (3, 3))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fast.nothing  # noqa: B018
    fast = on_engine(model[1], trainable=True)
    seen = []
    fast.layer[0].register_forward_hook(lambda *call: seen.append(call))
    fast(torch.randn(1, 8, 6, 6))
    assert len(seen) == 1
    double = on_engine(model, trainable=True).double()
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    assert is_close(double(x), copy.deepcopy(model).double()(x))


def test_tied_layers_and_trainable_layers_are_scripted():
    weight = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    tied = nn.Sequential(TiedLayer(nn.Sequential(weight), 2, 3, (2, 3)), Bias(np.ones(36, "f"), 2))
    x = torch.randn(2, 24, 5, 6)
    scripted = torch.jit.script(tied)
    assert is_close(scripted(x), tied(x))
    assert is_close(scripted(x[0]), tied(x[0]))
    linear = nn.Sequential(TiedLayer(nn.Linear(4, 6), 2, 3, (2, 3)), Bias(np.ones(36, "f")))
    x = torch.randn(2, 5, 24)
    assert is_close(torch.jit.script(linear)(x), linear(x))
    fast = on_engine(nn.Sequential(LAYERS["spatial_svd"]()), trainable=True)
    x = torch.randn(1, 8, 6, 6)
    assert is_close(torch.jit.script(fast)(x), fast(x))


def test_models_may_read_their_layers_on_the_engine():
    class Casts(nn.Module):
        """A model that cannot be traced, and reads the type and the values of a weight."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=4)

        def forward(self, x, scale=None):
            x = x.to(self.conv.weight.dtype)
            return self.conv(x) + nn.functional.conv1d(x, self.conv.weight, groups=4, padding=1)

    model, x = Casts().eval(), torch.randn(2, 4, 9)
    for fast in (on_engine(model), on_engine(model, x), copy.deepcopy(on_engine(model))):
        with torch.no_grad():
            assert is_close(fast(x), model(x))
        assert any(isinstance(m, EngineModule) for m in fast.modules())
