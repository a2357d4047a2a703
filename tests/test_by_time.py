"""Budgets of time: met by the clock, on clocks that the tests set."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

import lowrank
from lowrank import compress
from lowrank.compress import by_time, latency, references
from lowrank.compress.latency import Latency
from lowrank.core.cost import chain_cost
from lowrank.perfmodel.timing import CallTime, time_calls
from lowrank.selection import front
from lowrank.selection.candidates import Pricing

SECONDS_PER_MAC = 1e-9
PER_STAGE = 2e-5  # seconds of every stage of a chain, which no model predicts here
REST = 1e-3  # seconds between the layers


def seconds_of(stages, shape, per_stage):
    macs = chain_cost(stages, shape, False).macs
    return SECONDS_PER_MAC * macs + per_stage * (len(stages) - 1)


class FakeMeasurements:
    """Measurements of a machine whose times are a formula; counts what is asked for anew."""

    kept: dict
    asked: int
    refused = ()

    def __init__(self, runtime, batch, threads, in_network):
        assert in_network
        self.where = runtime, batch, threads

    def seconds(self, dense, chains, shape):
        for stages in (dense, *chains):
            if any(s.groups > 1 for s in stages) and "groups" in self.refused:
                raise NotImplementedError("no operator with groups")
        new = {repr(s) for s in chains} - self.kept.keys()
        type(self).asked += len(new)
        self.kept.update(dict.fromkeys(new))
        first, *others = (seconds_of(s, shape, PER_STAGE) for s in (dense, *chains))
        return first, others

    def keep(self, subject, measure):
        key = self.where, subject
        if key not in self.kept:
            self.kept[key] = measure()
        return self.kept[key]


class Net:
    """Two layers in a row, which a runtime may run as a whole."""

    def __init__(self, runs=True, rest=REST, extra=0.0):
        rng = np.random.default_rng(0)
        self.convs = {
            f"conv{i}": lowrank.dense(
                rng.standard_normal((32, 32, 3, 3)).astype(np.float32), padding=1
            )
            for i in range(2)
        }
        self.layers = tuple(
            compress.Layer(name, conv, (20, 20)) for name, conv in self.convs.items()
        )
        self.batches = 0
        self.runs, self.rest, self.extra, self.timed = runs, rest, extra, 0

    def fingerprint(self):
        return f"{self.rest} {self.extra}"

    def outputs(self, chains):
        return iter(())  # no data

    def call(self, chains, runtime, batch, threads):
        if not self.runs:
            return None
        self.timed += bool(chains)
        total = self.rest + self.extra * len(chains)
        for name, conv in self.convs.items():
            total += seconds_of(chains.get(name, conv).stages, (32, 20, 20), PER_STAGE)

        def call():
            return None

        call.seconds = total
        return call


@pytest.fixture
def clock(monkeypatch):
    """Fake clocks; returns the class that counts measurements."""
    FakeMeasurements.kept, FakeMeasurements.asked, FakeMeasurements.refused = {}, 0, ()
    monkeypatch.setattr(by_time, "Measurements", FakeMeasurements)
    monkeypatch.setattr(references, "Measurements", FakeMeasurements)
    monkeypatch.setattr(
        latency, "time_calls", lambda calls, budget: [CallTime(c.seconds, 0.01) for c in calls]
    )
    return FakeMeasurements


FAMILIES = ("channel_svd", "spatial_svd", "tucker")


def plan_of(net, seconds, **more):
    return compress.make_plan(net, seconds=seconds, families=FAMILIES, threads=1, **more)


def truth(net, plan):
    """Return the seconds of the network of a plan, by the formula."""
    chains = {name: c.build() for name, c in plan.layers.items() if not c.is_dense}
    return net.call(chains, "lowrank", 1, 1).seconds


@pytest.mark.parametrize("share", [0.9, 0.75, 0.6])
@pytest.mark.parametrize("extra", [0.0, 3e-4, -1e-4])
def test_the_budget_is_met_by_the_clock(clock, share, extra):
    """The network takes more or less than its layers promise: the limit follows."""
    net = Net(extra=extra)
    plan = plan_of(net, share)
    before = net.call({}, "lowrank", 1, 1).seconds
    assert plan.latency.before == before
    assert plan.latency.after == pytest.approx(truth(net, plan))
    assert plan.latency.after <= share * before * (1 + by_time.TOLERANCE)
    assert plan.latency.is_network
    assert plan.latency.is_measured
    changed = [c for c in plan.layers.values() if not c.is_dense]
    assert all(c.is_measured for c in changed)
    # What remains unused would not pay for any more accurate option of one layer.
    spare = share * before * (1 + by_time.TOLERANCE) - plan.latency.after
    for name, chosen in plan.layers.items():
        better = [
            c for c in plan.alternatives[name]
            if c.loss < chosen.loss and c.is_measured and c.seconds - chosen.seconds > 0
        ]  # fmt: skip
        assert all(c.seconds - chosen.seconds > spare - by_time.UNUSED * share * before
                   for c in better)  # fmt: skip


def test_an_amount_is_one_of_the_whole_call(clock):
    net = Net()
    before = net.call({}, "lowrank", 1, 1).seconds
    plan = plan_of(net, f"{0.7 * before * 1e3:.6f}ms")
    assert plan.limits["seconds"] == pytest.approx(0.7 * before, rel=1e-5)
    assert plan.latency.after <= 0.7 * before * (1 + by_time.TOLERANCE)


def test_layers_alone_count_where_the_runtime_does_not_run_the_network(clock):
    plan = plan_of(Net(runs=False), 0.6)
    now, before = plan.total("seconds")
    assert not plan.latency.is_network
    assert plan.latency.before == pytest.approx(before)
    assert now <= 0.6 * before * (1 + by_time.TOLERANCE)


def test_the_second_plan_measures_nothing_and_is_the_same(clock):
    net = Net(extra=1e-4)
    first = plan_of(net, 0.7)
    asked, timed = clock.asked, net.timed
    second = plan_of(net, 0.7)
    assert net.timed == timed
    assert {k: (c.name, c.rank) for k, c in first.layers.items()} == {
        k: (c.name, c.rank) for k, c in second.layers.items()
    }
    assert first.latency == second.latency
    assert clock.asked == asked


def test_options_that_are_slower_than_the_layer_are_not_chosen(clock):
    plan = plan_of(Net(), 0.8)
    for name, c in plan.layers.items():
        assert c.is_dense or c.seconds < plan.dense[name].seconds
    assert plan.slower == []


def test_a_budget_below_the_fastest_network_says_its_time(clock):
    net = Net(rest=0.1)
    with pytest.raises(
        compress.InfeasibleBudgetError, match=r"a time of .* infeasible in lowrank: the fastest"
    ):
        plan_of(net, 0.5)


def test_chains_that_the_runtime_cannot_run_are_left_out(clock):
    net = Net()
    clock.refused = ("groups",)
    plan = compress.make_plan(
        net, seconds=0.8, families=("network_decoupling", "channel_svd"), threads=1
    )
    assert {c.family for c in plan.layers.values()} <= {"channel_svd", "dense"}


def test_predictions_alone_measure_nothing(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr(by_time, "Measurements", refuse)
    monkeypatch.setattr(latency, "time_calls", refuse)
    plan = plan_of(Net(), 0.9, measure=False)
    now, before = plan.total("seconds")
    assert now <= 0.9 * before
    assert not plan.latency.is_measured
    assert "predicted, layers alone" in plan.headline()
    assert "~ predicted" in repr(plan)


@pytest.fixture
def spatial_predicted_slow(monkeypatch):
    """Predict fifty times the seconds of spatial SVDs: all of them seem slower than the layer."""
    time = Pricing.time

    def predict(self, c):
        c = time(self, c)
        return replace(c, seconds=c.seconds * (50 if c.family == "spatial_svd" else 1))

    monkeypatch.setattr(Pricing, "time", predict)


@pytest.mark.parametrize("runtime", ["lowrank", "torch"])
def test_variants_that_seem_slow_are_measured(clock, spatial_predicted_slow, runtime, tmp_path):
    def families(**more):  # options kept from a plan by predictions do not count for one by time
        plan = plan_of(Net(), 0.8, runtime=runtime, folder=tmp_path, **more)
        return {c.family for found in plan.alternatives.values() for c in found}

    assert "spatial_svd" not in families(measure=False)
    assert "spatial_svd" in families()
    clock.refused = ("groups",)  # measured one by one
    shutil.rmtree(tmp_path)
    assert "spatial_svd" in families()


@pytest.mark.parametrize("runtime", ["lowrank", "torch"])
def test_a_measured_front_has_variants_that_seem_slow(monkeypatch, spatial_predicted_slow, runtime):
    class Alone(FakeMeasurements):
        kept, asked = {}, 0

        def __init__(self, runtime, batch, threads, in_network):
            assert not in_network

    monkeypatch.setattr(front, "Measurements", Alone)
    conv = Net().convs["conv0"]

    def families(measure):
        found = lowrank.frontier(
            conv, (20, 20), FAMILIES, threads=1, measure=measure, runtime=runtime
        )
        return {c.family for c in found}

    assert "spatial_svd" not in families(measure=False)
    assert "spatial_svd" in families(measure=True)


def test_another_limit_holds_beside_that_of_time(clock):
    net = Net()
    plan = plan_of(net, 0.95, params=0.3)
    now, before = plan.total("params")
    assert now <= 0.3 * before
    assert plan.latency.after <= 0.95 * plan.latency.before * (1 + by_time.TOLERANCE)


def test_networks_of_the_same_layers_are_told_apart(clock):
    first, second = plan_of(Net(), 0.8), plan_of(Net(rest=5 * REST), 0.8)
    assert second.latency.before == pytest.approx(first.latency.before + 4 * REST)


def test_the_time_of_an_edited_layer_is_predicted(clock):
    net = Net()
    plan = plan_of(net, 0.8)
    name = next(n for n, c in plan.layers.items() if not c.is_dense)
    other = next(c for c in plan.alternatives[name][1:] if c.rank != plan.layers[name].rank)
    read = compress.CompressionPlan.from_json(plan.to_json())
    read.layers[name] = replace(read.layers[name], family=other.family, variant=other.variant,
                                rank=other.rank)  # fmt: skip
    done = compress.compress_model(net, read).plan
    assert not done.latency.is_measured
    assert not done.layers[name].is_measured
    assert done.layers[name].seconds > 0
    assert f"edited after the choice, so that its loss is unknown: {name}" in repr(done)
    assert math.isnan(compress.CompressionPlan.from_json(done.to_json()).loss)
    timed = compress.compress_model(net, read, timed=True)
    expected = net.call(timed.chains, "lowrank", 1, 1).seconds
    assert timed.plan.latency.after == pytest.approx(expected)


def test_a_plan_keeps_its_latency_in_its_file(clock):
    plan = plan_of(Net(), 0.8)
    read = compress.CompressionPlan.from_json(plan.to_json())
    assert read.latency == plan.latency
    assert read.headline() == plan.headline()
    predicted = plan_of(Net(), 0.9, measure=False)
    read = compress.CompressionPlan.from_json(predicted.to_json())
    assert math.isnan(read.latency.spread)


def test_a_layer_that_a_mac_budget_makes_slower_is_marked():
    net = Net()
    plan = compress.make_plan(net, macs=0.5, families=FAMILIES, threads=1)
    name = next(iter(plan.layers))
    slow = plan.layers[name]
    assert not slow.is_dense
    plan.dense[name] = replace(plan.dense[name], seconds=slow.seconds / 2)
    assert name in plan.slower
    assert "200% !" in repr(plan)
    assert "! slower than the dense layer: a budget of seconds leaves such chains out" in repr(plan)


def test_the_finished_network_of_another_budget_is_timed_if_asked(clock):
    net = Net()
    plan = compress.make_plan(net, macs=0.5, families=FAMILIES, threads=1)
    assert not plan.latency.is_measured
    done = compress.compress_model(net, plan, timed=True)
    assert done.plan.latency.is_measured
    assert done.plan.latency.after == pytest.approx(truth(net, plan))
    assert compress.compress_model(net, plan).plan.latency == plan.latency


def test_a_busy_machine_is_said():
    text = str(Latency(2e-3, 1e-3, "torch", 8, 1, 0.4, True))
    assert text == (
        "2 ms -> 1 ms (50.0%, 2.00x) in torch, batch 8, 1 thread: measured, spread 40%; the "
        "machine is busy"
    )


def test_calls_are_timed_in_alternation():
    order = []

    def constant(call, n):
        call()
        return 1e-3

    a, b = time_calls([lambda: order.append("a"), lambda: order.append("b")], 0.0, constant)
    assert a == b == (1e-3, 0.0, (1e-3,) * 3)
    # A first call and a trial of each, then an untimed call before each sample, in three rounds.
    assert "".join(order) == "aabb" + 3 * "aabb"
