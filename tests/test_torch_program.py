"""PyTorch networks as programs."""

import copy
import pickle
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812
from torch_models import single_thread as single_thread  # noqa: E402
from torch_models import with_statistics  # noqa: E402

from lowrank._kernels._core import MAX_ARRAYS  # noqa: E402
from lowrank.interop.torch import describe, on_engine  # noqa: E402
from lowrank.interop.torch.network import TensorProgram  # noqa: E402
from lowrank.interop.torch.program import ProgramModule  # noqa: E402


class Call(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(a, b, k=3, **options):
    return nn.Conv2d(a, b, k, padding=options.pop("padding", k // 2), **options)


def conv_norm(a, b, k=3, act=nn.ReLU, **options):
    layers = [conv(a, b, k, bias=False, **options), nn.BatchNorm2d(b)]
    return nn.Sequential(*layers, *([act()] if act else []))


def residual(a, b, stride):
    shortcut = nn.Identity() if stride == 1 and a == b else conv_norm(a, b, 1, None, stride=stride)

    def forward(m, x):
        out = m.body(x)
        out += m.shortcut(x)
        return F.relu(out)

    body = nn.Sequential(conv_norm(a, b, stride=stride), conv_norm(b, b, act=None))
    return Call(forward, body=body, shortcut=shortcut)


def bottleneck(a, mid, groups):
    """ResNeXt's block."""
    body = nn.Sequential(
        conv_norm(a, mid, 1), conv_norm(mid, mid, groups=groups), conv_norm(mid, a, 1, None)
    )
    return Call(lambda m, x: torch.relu(x + m.body(x)), body=body)


def squeeze_excitation(channels, flat):
    def forward(m, x):
        if flat:
            s = F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)
            s = torch.sigmoid(m.up(F.relu(m.down(s)))).view(x.size(0), x.size(1), 1, 1)
            return x * s.expand_as(x)
        return m.gate(m.up(F.silu(m.down(x.mean((2, 3), keepdim=True))))) * x

    layer = nn.Linear if flat else partial(nn.Conv2d, kernel_size=1)
    return Call(forward, down=layer(channels, 4), up=layer(4, channels), gate=nn.Hardsigmoid())


def mobile_block(a, expanded, b, act):
    """MobileNetV3's block."""
    body = nn.Sequential(
        conv_norm(a, expanded, 1, act), conv_norm(expanded, expanded, 5, act, groups=expanded),
        squeeze_excitation(expanded, False), conv_norm(expanded, b, 1, None),
    )  # fmt: skip
    return Call(lambda m, x: m.body(x) + x, body=body)


def shuffle(x, groups):
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


def shuffle_unit(channels):
    """ShuffleNetV2's block."""
    half = channels // 2

    def forward(m, x):
        a, b = x.chunk(2, dim=1)
        return shuffle(torch.cat((a, m.branch(b)), dim=1), 2)

    branch = nn.Sequential(
        conv_norm(half, half, 1), conv_norm(half, half, act=None, groups=half),
        conv_norm(half, half, 1),
    )  # fmt: skip
    return Call(forward, branch=branch)


def dense_block(channels, growth, layers):
    def forward(m, x):
        features = [x]
        for layer in m.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)

    made = [
        nn.Sequential(
            nn.BatchNorm2d(channels + i * growth), nn.ReLU(inplace=True),
            conv(channels + i * growth, growth, bias=False),
        )
        for i in range(layers)
    ]  # fmt: skip
    return Call(forward, layers=nn.ModuleList(made))


def unet():
    def forward(m, x):
        a = m.a(x)
        b = m.b(F.max_pool2d(a, 2))
        c = m.c(F.avg_pool2d(b, 2))
        y = m.d(torch.cat([m.up(c), b], 1))
        y = torch.cat((F.interpolate(y, scale_factor=2), a), dim=1)
        return m.e(y)

    return Call(
        forward, a=conv_norm(4, 8), b=conv_norm(8, 16), c=conv_norm(16, 24),
        up=nn.ConvTranspose2d(24, 16, 2, 2), d=conv_norm(32, 8), e=conv(16, 3),
    )  # fmt: skip


def inception():
    def forward(m, x):
        pooled = m.d(F.max_pool2d(x, 3, 1, 1))
        return torch.cat([m.a(x), m.b(x), m.c(x), pooled], 1)

    return Call(
        forward, a=conv_norm(4, 6, 1), b=conv_norm(4, 10), c=conv_norm(4, 5, 5),
        d=conv_norm(4, 3, 1),
    )  # fmt: skip


def option_a():
    """Shortcut without parameters: every second sample, and channels of zeros."""

    def forward(m, x):
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 6))
        return torch.relu(m.b(F.relu(m.a(x))) + short)

    return Call(forward, a=conv(4, 12, stride=2), b=conv(12, 12))


def paddings():
    def forward(m, x):
        x = F.pad(m.a(F.pad(x, (1, 2, 0, 1))), (2, 0, 1, 1), mode="reflect")
        x = F.pad(m.a(x), (1, 1), value=0.5)
        return F.pad(m.a(m.circular(x)), (-1, 0, 1, -2))

    return Call(forward, a=nn.Conv2d(4, 4, 3), circular=nn.CircularPad2d((0, 1, 2, 0)))


def activations():
    kinds = [
        nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.Hardswish(), nn.Hardsigmoid(), nn.SiLU(),
        nn.Sigmoid(), nn.Tanh(), nn.GELU(), nn.Hardtanh(0, 6), nn.Hardtanh(0, 0.5), nn.ELU(0.7),
    ]  # fmt: skip

    def forward(m, x):
        y = [act(m.a(x)) for act in m.kinds]
        y += [F.leaky_relu(m.a(x)), F.hardswish(x), m.a(x).clamp(0, 6), F.gelu(x), x.sigmoid()]
        y += [F.elu(m.a(x)), torch.clip(m.a(x), 0, max=0.25), x.clamp(0)]
        return torch.cat(y, 1)

    return Call(forward, a=conv(4, 4), kinds=nn.ModuleList(kinds))


def handwritten():
    """Activations and scales as arithmetic."""

    def forward(m, x):
        y = m.a(x)
        y = y * F.relu6(y + 3) / 6
        z = m.b(y)
        z = z * torch.sigmoid(z)
        return 0.5 * (1 - z) - 2 + m.norm(m.b(z)) * 3

    return Call(forward, a=conv(4, 8), b=conv(8, 8), norm=nn.BatchNorm2d(8))


def normalizations():
    """Instance normalizations with what is fused to them, and squares."""

    def forward(m, x):
        y = F.elu(x + m.b(x))
        y = F.instance_norm(m.conv(m.c(m.a(y)) + y), eps=0.1) * 3 + 1
        z = m.a(x) + y.mean((2, 3), keepdim=True)
        return F.relu(F.group_norm(y, 16) ** 2 + x.square()) + z.pow(2)

    return Call(
        forward, a=nn.InstanceNorm2d(16, 1e-3, affine=True), b=nn.GroupNorm(16, 16),
        c=nn.InstanceNorm2d(16), conv=conv(16, 16),
    )  # fmt: skip


def later_readers():
    """Values with several readers, of which some concatenate."""

    def forward(m, x):
        a = m.a(x)
        b = m.b(a)
        c = torch.cat([a, b], 1)
        return torch.cat([m.c(c), a, m.b(b)], 1) + torch.cat([b, b, a], 1)

    return Call(forward, a=conv(4, 4), b=conv(4, 4, 5), c=conv(8, 4))


def grouped_orders():
    """Sums of values whose channels are laid out differently."""

    def forward(m, x):
        a = m.multiplied(x)
        b = m.plain(x)
        return (a + b) * torch.cat([x, x], 1)[:, 3:19] + m.shuffle(b)

    return Call(
        forward, multiplied=conv(16, 16, groups=4), plain=conv(16, 16),
        shuffle=nn.ChannelShuffle(4),
    )  # fmt: skip


def head(channels, size, features=5):
    """Flattened planes and linear layers, with what is nothing in evaluation mode."""
    return nn.Sequential(
        nn.Dropout2d(), nn.Flatten(), nn.Linear(channels * size**2, 7), nn.Dropout(),
        nn.BatchNorm1d(7), nn.LeakyReLU(0.3), nn.Linear(7, features), nn.Identity(),
    )  # fmt: skip


NETWORKS = {
    "residual": lambda: nn.Sequential(residual(4, 8, 1), residual(8, 8, 1), residual(8, 12, 2)),
    "resnext": lambda: nn.Sequential(conv(4, 32), bottleneck(32, 16, 4), bottleneck(32, 64, 2)),
    "mobile": lambda: nn.Sequential(
        conv(4, 16), mobile_block(16, 24, 16, nn.Hardswish), mobile_block(16, 40, 16, nn.ReLU6)
    ),
    "squeeze-excitation": lambda: nn.Sequential(conv(4, 20), squeeze_excitation(20, True)),
    "shuffle": lambda: nn.Sequential(conv(4, 32), shuffle_unit(32), shuffle_unit(32)),
    "dense": lambda: nn.Sequential(conv(4, 8), dense_block(8, 6, 3), conv(26, 8, 1)),
    "unet": unet,
    "inception": lambda: nn.Sequential(inception(), Call(lambda m, x: x.mean([-1, -2]))),
    "option a": option_a,
    "paddings": paddings,
    "activations": activations,
    "handwritten": handwritten,
    "normalizations": lambda: nn.Sequential(conv(4, 16), normalizations(), conv(16, 3)),
    "later readers": later_readers,
    "orders": lambda: nn.Sequential(conv(4, 16), grouped_orders()),
    "dilated": lambda: nn.Sequential(
        *(m for d in (1, 2, 4) for m in (nn.Conv2d(4, 4, 3, padding=d, dilation=d), nn.ReLU()))
    ),
    "pools": lambda: nn.Sequential(
        conv(4, 8), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d((2, 1), 1, (1, 0)),
        nn.AdaptiveMaxPool2d((4, None)), nn.MaxPool2d(2, 1, dilation=2),
        nn.AvgPool2d(3, 2, 1, True, False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ),
    "head": lambda: nn.Sequential(conv(4, 6, stride=2), nn.ReLU(), head(6, 6)),
    "upsampling": lambda: nn.Sequential(
        conv(4, 18), nn.Upsample(scale_factor=(2, 3)), nn.PixelShuffle(3), conv(2, 3)
    ),
    "channels last": lambda: nn.Sequential(
        conv(4, 5), Call(lambda m, x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
        nn.Linear(720, 3),
    ),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 4, 3, groups=2, dilation=2), nn.BatchNorm2d(6),
        Call(lambda m, x: x[:, :, :-1, 3:-4].relu()), nn.ConvTranspose2d(6, 2, (3, 1), (2, 1), 1),
        Call(lambda m, x: x[..., 1:]), Call(lambda m, x: x[..., ::2]),
    ),
}  # fmt: skip


def programs(model):
    """Return the plans of all programs that have run; those of split ones follow them."""
    found = []
    for module in model.modules():
        if isinstance(module, ProgramModule):
            for plan in module._plans.values():
                found += [plan] if isinstance(plan, TensorProgram) else [plan, *programs(plan)]
    return found


def error(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("algorithm", ["auto", "direct"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_one_program(name, algorithm):
    model = with_statistics(NETWORKS[name]())
    fast = on_engine(model, algorithm=algorithm)
    limit = 1e-4 if algorithm == "auto" else 3e-6
    with torch.inference_mode():
        for x in (torch.randn(3, 4, 12, 12), torch.randn(1, 4, 12, 12)):
            assert error(fast(x), model(x)) < limit
            strided = x.contiguous(memory_format=torch.channels_last)
            assert error(fast(strided), model(x)) < limit
        x, double = x.double(), copy.deepcopy(model).double()
        assert error(on_engine(double)(x), double(x)) < 1e-12
    assert [type(p) for p in programs(fast)] == [TensorProgram]
    assert [n.op for n in fast.converted.graph.nodes] == ["placeholder", "call_module", "output"]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (
            lambda: nn.Sequential(
                nn.Conv1d(3, 20, 5, padding=2), nn.BatchNorm1d(20), nn.ReLU(),
                nn.MaxPool1d(2), nn.Conv1d(20, 8, 3, dilation=2), nn.AvgPool1d(3, 1, 1),
                nn.ConvTranspose1d(8, 4, 4, 2), nn.Upsample(scale_factor=2), nn.Flatten(),
                nn.Linear(4 * 72, 3),
            ),
            (3, 42),
        ),
        (
            lambda: nn.Sequential(
                nn.Conv3d(2, 18, 3, padding=1), nn.BatchNorm3d(18), nn.ELU(), nn.Conv3d(18, 4, 1),
                nn.ReplicationPad3d(1), nn.MaxPool3d((1, 2, 2)), nn.Conv3d(4, 4, 3, groups=4),
                nn.AdaptiveAvgPool3d(1),
            ),
            (2, 6, 7, 8),
        ),
        (lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)), (6,)),
    ],
    ids=["1-D", "3-D", "linear"],
)  # fmt: skip
def test_other_numbers_of_axes(make, shape):
    model = with_statistics(make())
    fast = on_engine(model)
    with torch.inference_mode():
        x = torch.randn(2, *shape)
        assert error(fast(x), model(x)) < 1e-5
        assert fast(x[:0]).shape == model(x[:0]).shape
    assert {type(p) for p in programs(fast)} >= {TensorProgram}


@pytest.mark.parametrize(("name", "shape"), [("style", (3, 16, 20)), ("meshnet", (1, 6, 7, 5))])
def test_third_party_networks_are_one_program(name, shape):
    architectures = pytest.importorskip("asv_benchmarks.benchmarks.architectures")
    model = getattr(architectures, name)().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    fast, x = on_engine(model), torch.randn(2, *shape)
    with torch.inference_mode():
        assert error(fast(x), model(x)) < 1e-4
    assert [type(p) for p in programs(fast)] == [TensorProgram]
    kinds = [op.kind for op in programs(fast)[0].program.operations]
    assert "combine" not in kinds, "crops, sums and activations are fused"


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_run_without_programs(name, monkeypatch):
    """As tensors on a GPU do."""
    model = with_statistics(NETWORKS[name]())
    fast, x = on_engine(model), torch.randn(2, 4, 12, 12)
    monkeypatch.setattr(ProgramModule, "plan", lambda self, inputs: self.traced)
    with torch.inference_mode():
        assert error(fast(x), model(x)) < 1e-5
    assert not programs(fast)


def test_planes_of_features_start_a_new_program():
    model = nn.Sequential(
        nn.Linear(6, 128), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)), conv(8, 4), nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2, 2), Call(lambda m, x: x.permute(0, 2, 3, 1)),
    ).eval()  # fmt: skip
    reshaped = nn.Sequential(*model)
    reshaped[2] = Call(lambda m, x: x.view(-1, 8, 4, 4))
    x = torch.randn(2, 6)
    for net in (model, reshaped):
        fast = on_engine(net)
        with torch.inference_mode():
            assert error(fast(x), net(x)) < 1e-5
        assert sum(isinstance(p, TensorProgram) for p in programs(fast)) == 2


def test_unsupported_operations_stay_in_pytorch_between_programs():
    def forward(m, x):
        a = m.a(x)
        b = m.b(torch.cumsum(a, 1)) + a  # a skip around what is not supported
        return torch.log_softmax(m.c(b).flatten(1), 1), a.sum(), x.shape[0] * b.size(-1)

    model = with_statistics(Call(forward, a=conv(4, 6), b=conv_norm(6, 6), c=conv(6, 2)))
    fast = on_engine(model)
    targets = [n.target for n in fast.converted.graph.nodes if n.op == "call_module"]
    assert targets == ["program_0", "program_1"]
    x = torch.randn(2, 4, 6, 6)
    with torch.inference_mode():
        found, wanted = fast(x), model(x)
    assert error(found[0], wanted[0]) < 1e-5
    assert torch.allclose(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    assert found[2] == wanted[2] == 12


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, x: m.b(F.interpolate(m.a(x), size=(9, 13))), (2, 4, 6, 6)),
        (lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 4)), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x).permute(0, 1, 3, 2)), (2, 4, 6, 5)),
        (lambda m, x: m.b(m.a(x).mean(3, keepdim=True)), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x)[:, :, 1].unsqueeze(2)), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x).view(2, 1, 4, 36).reshape(-1, 4, 4, 9)), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x) + m.a(x)[:, :1]), (2, 4, 6, 6)),
        (lambda m, x: m.b(torch.cat([m.a(x), x], 2)), (2, 4, 6, 6)),
        (lambda m, x: m.b(torch.add(m.a(x), x, alpha=2)), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x) + torch.arange(6.0)), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x).max(2, keepdim=True)[0]), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x).view(1, 8, 6, 6)[:, :4]), (2, 4, 6, 6)),
        (lambda m, x: m.b(F.dropout(m.a(x), 0.0, True)), (2, 4, 6, 6)),
        (lambda m, x: m.b(F.gelu(m.a(x), approximate="tanh")), (2, 4, 6, 6)),
        (lambda m, x: m.b((m.a(x)).expand_as(x).sigmoid()), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x).squeeze()), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x) ** 3), (2, 4, 6, 6)),
        (lambda m, x: m.b(m.a(x).clamp(-0.5, 0.5)), (2, 4, 6, 6)),
        (lambda m, x: m.b(F.group_norm(m.a(x), 2)), (2, 4, 6, 6)),
        (lambda m, x: m.b(F.instance_norm(m.a(x), eps=0)), (2, 4, 6, 6)),
        (lambda m, x: m.b(F.group_norm(F.avg_pool2d(m.a(x), 6), 4)), (2, 4, 6, 6)),
    ],
)
def test_shapes_that_programs_do_not_support(function, shape):
    model = Call(function, a=conv(4, 4), b=conv(4, 4, 1)).eval()
    fast, x = on_engine(model, algorithm="direct"), torch.randn(*shape)
    with torch.inference_mode():
        for _ in range(2):
            assert error(fast(x), model(x)) < 3e-6
    assert sum(isinstance(p, TensorProgram) for p in programs(fast)) >= 2


def test_normalization_by_running_statistics_stays():
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    model = with_statistics(nn.Sequential(conv(4, 4), norm, conv(4, 4))).eval()
    nn.init.uniform_(norm.running_var, 1, 2)
    fast, x = on_engine(model), torch.randn(2, 4, 6, 6)
    with torch.inference_mode():
        assert error(fast(x), model(x)) < 1e-5
    assert sum(isinstance(p, TensorProgram) for p in programs(fast)) == 2


def overwritten(m, x):
    y = m.a(x)
    z = y.view(y.shape[0], -1)
    z.add_(1)
    y.relu_()
    return m.b(y), z


def overwritten_input(m, x):
    y = m.b(m.a(x))
    x.mul_(2)
    return m.a(x), y


def overwritten_half(m, x):
    y = m.a(x)
    first, second = y.chunk(2, 1)
    first.clamp_(0)
    return m.b(y), second


def overwritten_before(m, x):
    y = m.a(x)
    z = m.b(y)
    F.relu(y, inplace=True)
    return m.b(y), F.hardswish(z, True), z


@pytest.mark.parametrize(
    "function",
    [overwritten, overwritten_input, overwritten_half, overwritten_before],
)
def test_operations_in_place_keep_their_order(function):
    model = Call(function, a=conv(4, 4), b=conv(4, 4, 1)).eval()
    fast, x = on_engine(model, algorithm="direct"), torch.randn(2, 4, 6, 6)
    with torch.inference_mode():
        inputs = x.clone(), x.clone()
        for found, wanted in zip(fast(inputs[0]), model(inputs[1])):
            assert error(found, wanted) < 3e-6
    assert torch.equal(*inputs)
    assert programs(fast)


def test_more_tensors_than_a_program_takes_stay():
    def forward(m, x):
        y = torch.relu(x)
        return [layer(y) for layer in m.layers]

    model = Call(forward, layers=nn.ModuleList([conv(4, 2) for _ in range(MAX_ARRAYS)])).eval()
    fast, x = on_engine(model), torch.randn(1, 4, 3, 3)
    with torch.inference_mode():
        for found, wanted in zip(fast(x), model(x), strict=True):
            assert error(found, wanted) < 1e-5
    assert not any(isinstance(p, TensorProgram) for p in programs(fast))


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(4, 4), conv(4, 4)

        def forward(self, x, y):
            z = self.a(x) + y
            return {"z": z, "both": (self.b(z), x)}

    model = Two().eval()
    fast = on_engine(model, algorithm="direct")
    x, y = torch.randn(2, 3, 4, 5, 5)
    with torch.inference_mode():
        for other in (y, y[:1], torch.tensor(2.0), y[0], 1.5):  # the last ones are broadcast
            found, wanted = fast(x, other), model(x, other)
            assert error(found["z"], wanted["z"]) < 3e-6
            assert error(found["both"][0], wanted["both"][0]) < 3e-6
            assert found["both"][1] is x
        with pytest.raises((RuntimeError, ValueError)):
            fast(x, y[:, :2])
        with pytest.raises((RuntimeError, ValueError)):
            fast(x, y[:2])


def test_examples_without_a_batch_axis():
    model = nn.Sequential(
        conv(4, 16), nn.ReLU(), nn.MaxPool2d(2), conv(16, 4), nn.AdaptiveAvgPool2d(1)
    ).eval()
    fast, x = on_engine(model), torch.randn(4, 10, 10)
    with torch.inference_mode():
        assert error(fast(x), model(x)) < 1e-5


def test_programs_can_be_copied_and_pickled():
    model = with_statistics(nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 4)))
    x = torch.randn(2, 4, 8, 8)
    fast = on_engine(model, x)
    with torch.inference_mode():
        y = fast(x)
        for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(twin(x), y)
            assert len(programs(twin)) == 1


def test_wrong_inputs_and_settings():
    model = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4)).eval()
    fast = on_engine(model)
    x = torch.randn(1, 4, 6, 6)
    fast(x)
    for wrong in (x[:, :3], x[None], torch.randn(4)):
        with pytest.raises((ValueError, RuntimeError), match="x must be"):
            fast(wrong)
    with pytest.raises(ValueError, match="no gradients"):
        fast(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="algorithm must be one of auto, direct, got 'fast'"):
        on_engine(model, algorithm="fast")
    x[0, 0, 0, 0] = float("nan")
    exact = on_engine(model, algorithm="direct")
    with torch.inference_mode():
        assert torch.equal(exact(x).isnan(), model(x).isnan())


def test_views_and_repeated_samples_are_read_in_place():
    model = conv(4, 5).eval()
    fast = on_engine(model)
    x = torch.randn(3, 9, 14, 13)
    with torch.inference_mode():
        for view in (
            x[:, 1:9:2, 1::2, 2:11], x[:1, :4].expand(3, 4, 14, 13), x.transpose(2, 3)[:, :4],
            x.transpose(0, 1)[:4, :, :5].transpose(0, 1),
        ):  # fmt: skip
            assert error(fast(view), model(view)) < 1e-5


def test_description_names_operations():
    model = nn.Sequential(
        conv_norm(4, 16), nn.Conv2d(16, 16, 3, bias=False), nn.Softsign(), conv(16, 4, 1)
    ).eval()
    x = torch.randn(2, 4, 12, 12)
    lines = describe(on_engine(model, algorithm="direct"), x).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines[1:]] == [
        ["pack", "pack"], ["0.0", "dense"], ["1", "dense"], ["unpack", "unpack"],
        ["2", "PyTorch"], ["pack", "pack"], ["3", "dense"], ["unpack", "unpack"],
        ["total", lines[-1].split()[1]],
    ]  # fmt: skip
    assert "82.9k" in lines[2]  # 4 * 16 * 9 * 144 MACs

    model = nn.Sequential(conv(40, 1, 9), nn.InstanceNorm2d(1), nn.ELU()).eval()
    lines = describe(on_engine(model), torch.randn(2, 40, 12, 12)).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[:3] == ["0", "few", "outputs"]
    assert lines[3].split()[:2] == ["1", "normalize"]

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv(4, 4)

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    lines = describe(on_engine(Branches()), x).splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [["body", "chain"], ["rest", "PyTorch"]]
