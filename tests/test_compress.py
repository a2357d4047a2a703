"""Budgets over whole networks: the choice, plans, layers fitted one after another."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank
from lowrank import compress
from lowrank.compress import CompressionPlan, Layer, allocate
from lowrank.compress.options import layer_options
from lowrank.metric import white
from lowrank.selection import Candidate


def option(loss, macs, params=1.0):
    cost = lowrank.Cost(macs, params, 0, 0, 0)
    return Candidate("channel_svd", "", (1,), loss, loss, cost, loss=loss)


table = st.lists(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(1, 40), st.integers(1, 40)),
        min_size=1, max_size=4,
    ),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(table, st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_the_choice_is_the_best_of_all(rows, share, other):
    some = {
        str(i): [option(float(a), float(b), float(c)) for a, b, c in r] for i, r in enumerate(rows)
    }
    limits = {
        "macs": share * sum(max(o.amount("macs") for o in v) for v in some.values()),
        "params": other * sum(max(o.amount("params") for o in v) for v in some.values()),
    }
    # Every combination, counted.
    fitting = [
        sum(o.loss for o in pick)
        for pick in itertools.product(*some.values())
        if all(sum(o.amount(a) for o in pick) <= limits[a] for a in limits)
    ]
    if not fitting:
        with pytest.raises(ValueError, match=r"minimum|no allocation"):
            allocate(some, limits)
        return
    found = allocate(some, limits)
    # Losses are whole numbers, so that the best choice is told from all others.
    assert found.loss == min(fitting)
    assert all(
        sum(o.amount(a) for o in found.candidates.values()) <= limits[a] * (1 + 1e-12)
        for a in limits
    )
    assert found.gap == 0


@pytest.mark.parametrize("spread", [1e3, 1e6, 1e9])
def test_one_terrible_option_does_not_blur_the_others(spread):
    rng = np.random.default_rng(0)
    for _ in range(10):
        some = {
            str(i): [
                option(float(loss), float(cost))
                for loss, cost in zip([0, *rng.random(5), spread], [50, *rng.integers(1, 50, 5), 1])
            ]
            for i in range(4)
        }
        limit = 0.5 * 50 * 4
        best = min(
            sum(o.loss for o in pick)
            for pick in itertools.product(*some.values())
            if sum(o.amount("macs") for o in pick) <= limit
        )
        # The solver's tolerance: 1e-6 of about the best loss itself.
        assert allocate(some, {"macs": limit}).loss <= best * (1 + 1e-5)


class Straight:
    """Layers one after another with ReLUs between them, in NumPy."""

    def __init__(self, convs, data, names=None):
        self.convs = dict(zip(names or [f"conv{i}" for i in range(len(convs))], convs))
        self.data = data
        self.batches = len(data)
        self.passes = 0
        found, x = [], data[0]
        for name, conv in self.convs.items():
            found.append(Layer(name, conv, x.shape[2:]))
            x = np.maximum(conv(x), 0)
        self.layers = tuple(found)

    def run(self, x, chains):
        for name, conv in self.convs.items():
            yield name, x
            x = np.maximum(chains.get(name, conv)(x), 0)
        yield "out", x

    def inputs(self, names, chains):
        self.passes += 1
        for x in self.data:
            yield {name: (a,) for name, a in self.run(x, chains) if name in names}

    def gradients(self, names, seed):
        return None

    def fingerprint(self):
        return ""

    def call(self, chains, runtime, batch, threads):
        return None

    def outputs(self, chains):
        for x in self.data:
            yield (dict(self.run(x, chains))["out"],)

    def replaced(self, chains):
        return dict(chains)

    def error(self, chains):
        pairs = list(zip(self.outputs(chains), self.outputs({})))
        missed = sum(float(np.square(a - b).sum()) for (a,), (b,) in pairs)
        return (missed / sum(float(np.square(b).sum()) for _, (b,) in pairs)) ** 0.5


@pytest.fixture
def net():
    rng = np.random.default_rng(0)

    def weight(*shape):
        # Trained kernels fall off in their spectra; these do, by construction.
        low = np.einsum(
            "ar,br->ab",
            rng.standard_normal((shape[0], 3)),
            rng.standard_normal((int(np.prod(shape[1:])), 3)),
        )
        return (low.reshape(shape) + 0.5 * rng.standard_normal(shape)).astype(np.float32) / 5

    convs = [
        lowrank.dense(
            weight(12, 3, 3, 3), bias=rng.standard_normal(12).astype(np.float32), padding=1
        ),
        lowrank.dense(weight(16, 12, 3, 3), bias=np.zeros(16, np.float32), padding=1, stride=2),
        lowrank.dense(weight(16, 16, 3, 3), padding=1),
        lowrank.dense(weight(10, 16, 1, 1)),
    ]
    data = [rng.standard_normal((16, 3, 12, 12)).astype(np.float32) for _ in range(3)]
    data = [x + np.roll(x, 1, 2) + np.roll(x, 1, 3) for x in data]
    return Straight(convs, data)


def test_a_budget_is_kept_and_counted_right(net):
    small = compress.compress_model(net, macs=0.5, params=0.7)
    for axis, share in (("macs", 0.5), ("params", 0.7)):
        now, before = small.plan.total(axis)
        assert now <= share * before * (1 + 1e-9)
    chains = {x.name: small.chains.get(x.name, x.conv) for x in net.layers}
    macs = sum(f.cost(x.input_size).macs for x, f in zip(net.layers, chains.values()))
    assert macs == small.plan.total("macs")[0]
    assert small.plan.total("macs")[1] == sum(x.cost.macs for x in net.layers)


def test_more_budget_costs_less(net):
    losses = [compress.make_plan(net, macs=share).loss for share in (0.3, 0.5, 0.8, 1.0)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


def test_data_beat_white_noise(net):
    blind = Straight(list(net.convs.values()), net.data)
    blind.batches = 0
    plan = compress.make_plan(blind, macs=0.45)
    without = compress.compress_model(blind, plan).chains
    fitted = compress.compress_model(net, plan).chains
    assert net.error(fitted) < 0.9 * net.error(without)


def test_layers_are_fitted_to_what_they_now_get(net):
    plan = compress.make_plan(net, macs=0.4)
    one_by_one = compress.compress_model(net, plan)
    apart = {}
    for name in plan.changed:
        alone = replace(plan, layers={name: plan.layers[name]})
        apart |= compress.compress_model(net, alone).chains
    assert net.error(one_by_one.chains) < net.error(apart)
    again = compress.compress_model(net, plan, passes=2, refit=True)
    assert net.error(again.chains) < net.error(one_by_one.chains) * 1.02


def test_errors_of_rows_are_those_of_the_outputs(net):
    small = compress.compress_model(net, macs=0.4)
    last = small.rows[-1]
    layer = next(x for x in net.layers if x.name == last.name)
    before = {k: f for k, f in small.chains.items() if k != last.name}
    x = np.concatenate([b[last.name][0] for b in net.inputs([last.name], before)])
    x0 = np.concatenate([b[last.name][0] for b in net.inputs([last.name], {})])
    got, want = small.chains[last.name](x), layer.conv(x0)
    missed = np.square(got - want).mean(axis=(0, 2, 3)).sum()
    spread = np.square(want - want.mean(axis=(0, 2, 3), keepdims=True)).mean(axis=(0, 2, 3)).sum()
    # The row's error is against the best kernel for these inputs: what that misses comes on top.
    assert last.error**2 * spread <= missed * 1.1
    assert np.abs((got - want).mean(axis=(0, 2, 3))).max() < 1e-3 * np.abs(want).max()


def test_layers_can_be_pinned_capped_and_left_out(net):
    plan = compress.make_plan(
        net, macs=0.7, pinned=["conv0"], left_out=["conv3"], capped={"conv2": 0.3}
    )
    assert plan.layers["conv0"].family == "dense"
    assert "conv3" not in plan.layers
    capped = plan.layers["conv2"]
    assert capped.amount("macs") <= 0.3 * plan.dense["conv2"].amount("macs")
    assert plan.total("macs")[1] == sum(x.cost.macs for x in net.layers if x.name != "conv3")


def test_a_plan_is_a_readable_file(net, tmp_path):
    plan = compress.make_plan(net, macs=0.5)
    plan.save(tmp_path / "plan.json")
    read = CompressionPlan.from_json((tmp_path / "plan.json").read_text())
    assert read.to_json() == plan.to_json()
    assert read.limits == plan.limits
    a, b = compress.compress_model(net, plan).chains, compress.compress_model(net, read).chains
    assert all((a[k].to_dense() == b[k].to_dense()).all() for k in a)
    assert "conv1" in repr(plan)
    assert "proven optimal" in repr(plan)


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '{"version": 99}', '{"version": 1, "layers": 3}']
)
def test_what_is_no_plan_says_so(text):
    with pytest.raises(ValueError, match="not a plan"):
        CompressionPlan.from_json(text)


def test_a_run_goes_on_from_finished_layers(net, tmp_path):
    plan = compress.make_plan(net, macs=0.4)
    whole = compress.compress_model(net, plan)
    steps = iter(range(100))

    def stop(what, share):
        if what == "layers" and next(steps) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress.compress_model(net, plan, folder=tmp_path, progress=stop)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert 0 < len(kept) < len(plan.changed)
    again = compress.compress_model(net, plan, folder=tmp_path)
    assert all(
        (whole.chains[k].to_dense() == again.chains[k].to_dense()).all() for k in plan.changed
    )
    assert again.rows == whole.rows


def test_the_same_seed_gives_the_same_bits(net):
    a, b = (compress.compress_model(net, macs=0.5, seed=7).chains for _ in range(2))
    assert all((a[k].to_dense() == b[k].to_dense()).all() for k in a)


@pytest.mark.parametrize(
    ("distances", "words"), [([0.211, 0.209], "are 21% away"), ([0.6, 0.2], "are 20% to 60% away")]
)
def test_distances_of_moments_are_one_number_or_a_range(net, distances, words):
    plan = compress.make_plan(net, macs=0.7)
    factored = dict(zip(plan.layers, distances))
    notes = replace(plan, about=plan.about | {"factored": factored}).notes()
    assert any(f"second moments {words}" in note for note in notes)


def test_what_cannot_be_is_said(net):
    with pytest.raises(TypeError, match="give a budget"):
        compress.make_plan(net)
    with pytest.raises(ValueError, match=r"infeasible.*minimum"):
        compress.make_plan(net, macs=0.001)
    with pytest.raises(compress.InfeasibleBudgetError, match="minimum is"):
        compress.make_plan(net, macs=3)  # an amount
    with pytest.raises(ValueError, match="no layer is called 'convX'"):
        compress.make_plan(net, macs=0.5, pinned=["convX"])
    with pytest.raises(ValueError, match="families must be"):
        compress.make_plan(net, macs=0.5, families=["svd"])
    with pytest.raises(ValueError, match="cap of conv1 must be at least"):
        compress.make_plan(net, macs=0.5, capped={"conv1": 0.001})
    with pytest.raises(ValueError, match="conv1 is capped, but pinned"):
        compress.make_plan(net, macs=0.5, capped={"conv1": 0.5}, pinned=["conv1"])
    with pytest.raises(ValueError, match=r"cap of conv1 must be a share in \(0, 1\], got 'half'"):
        compress.make_plan(net, macs=0.5, capped={"conv1": "half"})


@pytest.mark.parametrize(
    "options",
    [
        {"pinned": "01"},
        {"pinned": [0]},
        {"pinned": 0},
        {"left_out": "conv1"},
        {"capped": ["conv1"]},
    ],
)
def test_names_of_layers_are_lists_or_mappings(net, options):
    """A string has characters, which are names of layers in models of PyTorch."""
    ((name, value),) = options.items()
    sentence = f"{name} must (be a list of|map) names or patterns.*, got {re.escape(repr(value))}"
    with pytest.raises(TypeError, match=sentence):
        compress.make_plan(net, macs=0.5, **options)
    plan = compress.make_plan(net, macs=0.5)
    other = Straight(list(net.convs.values()), net.data, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="plan must be of this model"):
        compress.compress_model(other, plan)


def test_nothing_to_win_is_said():
    conv = lowrank.dense(np.ones((4, 1, 1, 1), np.float32), groups=4)
    net = Straight([conv], [np.ones((2, 4, 6, 6), np.float32)])
    with pytest.raises(compress.NothingToCompressError, match="nothing to compress"):
        compress.make_plan(net, macs=0.9)


def test_options_beat_one_another_and_the_layer():
    conv = lowrank.dense(np.random.default_rng(0).standard_normal((16, 16, 3, 3)))
    found = layer_options(Layer("conv", conv, (8, 8)), white(1, (16, 3, 3)))
    dense, *rest = found
    assert dense.name == "dense"
    assert len({o.family for o in rest}) > 1
    for o in rest:
        assert o.amount("macs") < dense.amount("macs")
        f = lowrank.chain(o.build().stages)
        assert f.cost((8, 8)).macs == o.amount("macs")
        assert o.error == pytest.approx(f.error(conv.to_dense()), rel=1e-6)


def with_weight(net, name, weight):
    convs = dict(net.convs)
    old = convs[name]
    convs[name] = lowrank.dense(
        weight, bias=old.bias, padding=old.geometry.padding, stride=old.geometry.stride
    )
    return Straight(list(convs.values()), net.data, list(convs))


def test_a_layer_of_zeros_is_no_obstacle(net):
    dead = with_weight(net, "conv2", np.zeros((16, 16, 3, 3), np.float32))
    small = compress.compress_model(dead, macs=0.5)
    assert all(np.isfinite(f.to_dense()).all() for f in small.chains.values())


def test_a_dead_branch_costs_nothing(net):
    """Where no gradient arrives nothing can be lost: the budget is taken there first."""

    class Dead(Straight):
        def gradients(self, names, seed):
            for batch in self.inputs(names, {}):
                found = {}
                for name in names:
                    y = self.convs[name](batch[name][0])
                    rng = np.random.default_rng(len(name))
                    found[name] = (rng.standard_normal(y.shape) * (name != "conv2"),)
                yield found

    dead = Dead(list(net.convs.values()), net.data, list(net.convs))
    plan = compress.make_plan(dead, macs=0.8)
    assert plan.about["gradients"]
    assert plan.layers["conv2"].loss == 0
    assert plan.layers["conv2"].amount("macs") < 0.1 * plan.dense["conv2"].amount("macs")


def test_positions_count_by_their_gradients(net):
    """Errors are small where the loss depends on outputs, at the cost of the others."""

    class Left(Straight):
        """A loss that sees the left half of every output, but for a little."""

        def gradients(self, names, seed):
            rng = np.random.default_rng(seed)
            for batch in self.inputs(names, {}):
                found = {}
                for name in names:
                    y = self.convs[name](batch[name][0])
                    g = rng.standard_normal(y.shape)
                    g[..., y.shape[-1] // 2 :] *= 0.01
                    found[name] = (g,)
                yield found

    def error(chains, half):
        """Mean square of the error of conv0 on one half of its outputs."""
        missed = 0.0
        for x in data:
            difference = chains["conv0"](x) - net.convs["conv0"](x)
            missed += float(np.square(difference[..., half]).sum())
        return missed

    rng = np.random.default_rng(5)
    mixed = rng.standard_normal((3, 3)).astype(np.float32)
    data = [x.copy() for x in net.data]
    for x in data:  # the right half has other patches than the left
        x[..., 6:] = np.einsum("ncxy,cd->ndxy", x[..., 6:], mixed)
    left = Left(list(net.convs.values()), data)
    pinned = ["conv1", "conv2", "conv3"]
    plan = compress.make_plan(left, macs=0.93, pinned=pinned, families=["channel_svd"])
    assert plan.changed == ["conv0"]
    weighted = compress.compress_model(left, plan).chains
    even = compress.compress_model(
        left, replace(plan, about=plan.about | {"gradients": False})
    ).chains
    assert error(weighted, slice(0, 5)) < 0.95 * error(even, slice(0, 5))
    assert error(weighted, slice(7, 12)) > error(even, slice(7, 12))


def test_another_network_or_other_data_are_not_resumed(net, tmp_path):
    plan = compress.make_plan(net, macs=0.4)
    compress.compress_model(net, plan, folder=tmp_path)
    weight = net.convs["conv1"].to_dense() * np.float32(1.5)
    other = with_weight(net, "conv1", weight)
    fresh = compress.compress_model(other, plan)
    again = compress.compress_model(other, plan, folder=tmp_path)
    assert all(
        (fresh.chains[k].to_dense() == again.chains[k].to_dense()).all() for k in fresh.chains
    )
    for kept in tmp_path.rglob("*.error"):
        kept.write_text("")  # as if cut off
    with pytest.warns(UserWarning, match="damaged .* renamed to"):
        compress.compress_model(net, plan, folder=tmp_path)


def test_a_plan_edited_by_hand_is_counted_anew(net):
    plan = compress.make_plan(net, macs=0.4, families=["channel_svd"])
    name = plan.changed[-1]
    text = plan.to_json()
    read = CompressionPlan.from_json(text)
    entry = read.layers[name]
    largest = min(net.convs[name].to_dense().shape[0], net.convs[name].to_dense()[0].size)
    edited = replace(read, layers=read.layers | {name: replace(entry, rank=(largest,))})
    small = compress.compress_model(net, edited)
    chains = {x.name: small.chains.get(x.name, x.conv) for x in net.layers}
    macs = sum(chains[x.name].cost(x.input_size).macs for x in net.layers)
    assert small.plan.total("macs")[0] == macs > plan.limits["macs"]
    assert "over its limit" in repr(small.plan)
    with pytest.raises(ValueError, match="whole number"):
        CompressionPlan.from_json(text.replace(f'"rank": [{entry.rank[0]}]', '"rank": [2.7]', 1))


def test_the_bias_that_chains_get_is_paid_for(net):
    small = compress.compress_model(net, params=0.5)
    params = sum(small.chains.get(x.name, x.conv).params for x in net.layers)
    assert params == small.plan.total("params")[0] <= small.plan.limits["params"]


def test_a_plan_from_a_file_gives_the_same_bits(net, monkeypatch):
    monkeypatch.setattr("lowrank.metric.moments.MACS", 1)
    wide = Straight(list(net.convs.values()), [np.tile(x, (1, 1, 3, 3)) for x in net.data])
    assert wide.data[0][0, 0].size * 16 > 1 << 14  # a choice of outputs is made
    direct = compress.compress_model(wide, macs=0.5)
    again = compress.compress_model(wide, CompressionPlan.from_json(direct.plan.to_json()))
    assert direct.chains.keys() == again.chains.keys()
    assert all(
        (direct.chains[k].to_dense() == again.chains[k].to_dense()).all() for k in direct.chains
    )


def test_everything_pinned_is_no_failure(net):
    assert compress.make_plan(net, macs=1.0, pinned=["*"]).changed == []
    with pytest.raises(ValueError, match="infeasible"):
        compress.make_plan(net, macs=0.5, pinned=["*"])


@pytest.mark.parametrize("bad", [True, 0, -0.5, float("nan"), "half", "x%", "200%", "3ms"])
def test_what_is_no_budget_is_refused_at_once(net, bad):
    with pytest.raises((ValueError, TypeError), match=r"macs|share"):
        compress.make_plan(net, macs=bad)
    assert net.passes == 0


def test_the_cheapest_rank_of_all_is_an_option():
    """Budgets have to reach it, however many ranks there are to thin out."""
    conv = lowrank.dense(np.random.default_rng(0).standard_normal((48, 48, 3, 3)))
    found = layer_options(
        Layer("conv", conv, (8, 8)), white(1, (48, 3, 3)), ["channel_svd", "spatial_svd"]
    )
    least = min(
        lowrank.channel_svd(conv, rank=1).cost((8, 8)).macs,
        lowrank.spatial_svd(conv, rank=1).cost((8, 8)).macs,
    )
    assert min(o.amount("macs") for o in found) == least


def test_budgets_share_what_was_measured(net):
    statistics = compress.LayerStatistics(net, seed=5)
    compress.make_plan(net, macs=0.4, statistics=statistics)
    passes = net.passes
    shared = compress.make_plan(net, macs=0.7, statistics=statistics)
    assert net.passes == passes
    apart = compress.make_plan(net, macs=0.7, seed=5)
    assert shared.to_json() == apart.to_json()
    assert shared.about == apart.about


def test_values_that_are_not_finite_are_named(net):
    bad = Straight(list(net.convs.values()), [net.data[0] * np.float32(np.inf)])
    with pytest.raises(ValueError, match="layer 'conv0': inputs must be finite"):
        compress.make_plan(bad, macs=0.5)
    with pytest.raises(ValueError, match="model that is planned"):
        compress.make_plan(net, macs=0.5, statistics=compress.LayerStatistics(bad))
