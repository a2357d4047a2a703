"""Performance model: features, fitting of coefficients, calibration files, use in choices."""

import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowrank as lr
from lowrank import perfmodel
from lowrank.core.stage import Epilogue, abstract_weight
from lowrank.engine import costs, cpu, fourier, machine
from lowrank.families import FAMILIES, applicable
from lowrank.perfmodel import calibration, features, store
from lowrank.perfmodel.coefficients import RUNTIMES, _count, shipped
from lowrank.perfmodel.features import Work
from lowrank.perfmodel.runtimes import is_installed
from lowrank.perfmodel.workloads import FFTWorkload, workloads


@pytest.fixture(scope="module")
def conv():
    rng = np.random.default_rng(0)
    return lr.dense(rng.standard_normal((24, 16, 3, 3)).astype(np.float32), padding=1)


@pytest.fixture(scope="module")
def front(conv):
    return lr.frontier(conv, (48, 48), axis="seconds")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Provide an empty cache folder, and a measurement that takes no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = perfmodel.PerformanceModel(
        machine.cpu(),
        store._core.default_isa(),
        2,
        {
            "lowrank": perfmodel.Coefficients({"product": 1e-9, "call": 1e-6}, 0.1, 0.2),
            "fft": perfmodel.Coefficients({"operation": 1e-9}, 0.1, 0.2),
        },
        {"passive": 5e-5, "active": 1e-6},
    )
    calls = []

    def measure(progress, runtimes, quick):
        calls.append(runtimes)
        each = {n: replace(c, is_quick=quick) for n, c in measured.coefficients.items()}
        return replace(measured, coefficients=each)

    monkeypatch.setattr(calibration, "measure", measure)
    return calls


PRODUCTS = ("product", "fast product", "few output term", "tap", "loaded tap", "plane product",
            "row product")  # fmt: skip


def chains(conv):
    """Yield a short chain of every family and variant."""
    for name, variants in applicable(conv).items():
        for variant in variants:
            yield next(iter(FAMILIES[name].sweep(conv, variant))).stages


def test_predictions_add_up_and_grow_with_the_work(conv):
    here = perfmodel.current()
    for stages in chains(conv):
        f = lr.chain(stages)
        small, large, many = (
            here.predict(f, (n, n), batch=b) for n, b in ((16, 1), (64, 1), (64, 8))
        )
        assert 0 < small.seconds < large.seconds < many.seconds
        assert large.seconds == pytest.approx(sum(large.parts.values()))
        assert min(large.parts.values()) > 0


def test_abstract_weights_have_the_features_of_real_ones(conv):
    for f in (conv, lr.tucker(conv, (6, 5)), lr.kronecker(conv, 2), lr.cp3(conv, 4)):
        empty = [lr.Stage(abstract_weight(s.weight.shape), s.geometry, s.groups, s.outer, s.inner)
                 for s in f.stages]  # fmt: skip
        for threads in (1, 2):
            real = features.lowrank(Work(f.stages, (16, 30, 31), 3, threads), 2)
            assert features.lowrank(Work(empty, (16, 30, 31), 3, threads), 2) == real


def test_features_count_macs_including_idle_lanes(conv):
    lanes = 16
    for load in workloads():
        counts = features.lowrank(Work(load.stages, load.shape, load.batch), 2)
        macs = load.batch * lr.chain(load.stages).cost(load.shape).macs
        vectors = sum(counts.get(k, 0) for k in PRODUCTS)
        # At least: F(4, 5) needs 8 products for 4 outputs of 5 taps along each axis, and runs of up
        # to four samples at the end of a row get no vector.
        axes = max(sum(k > 1 for k in s.kernel) for s in load.stages)
        least = (8 / 4 / 5) ** axes if "fast product" in counts else 0.8
        assert vectors * lanes >= least * macs * (1 - 1e-9), load  # it can be that exactly
        assert vectors * lanes <= 32 * macs, load


def test_features_are_few_and_nonnegative():
    seen = set()
    for load in workloads():
        for batch, threads in ((1, 1), (1, 2), (8, 2), (3, 2)):
            counts = features.lowrank(Work(load.stages, load.shape, batch, threads), 2)
            assert min(counts.values()) >= 0
            seen |= counts.keys()
    levels = {"L2", "L3", "L3, all threads", "memory", "memory, all threads"}
    assert seen == {*costs.DEFAULT_COSTS, *levels, "call", "fork/join", "barrier"}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_path_that_is_counted_is_the_one_that_is_planned(threads):
    rng = np.random.default_rng(0)
    programs = []
    for c, out, k, size, stride in itertools.product((1, 8, 48), (6, 32), (1, 3), (9, 30), (1, 2)):
        weight = rng.standard_normal((out, c, k, k)).astype(np.float32)
        conv = lr.dense(weight, padding=k // 2, stride=stride)
        for f in (conv, *([lr.spatial_svd(conv, 3)] if k > 1 else [])):
            counts = features.lowrank(Work(f.stages, (c, size, size), 1, threads), 2)
            plan = cpu.plan(f.stages, (c, size, size), np.float32, [Epilogue()] * len(f.stages),
                            threads, algorithm="auto")  # fmt: skip
            assert ("step" in counts) == (plan.program is not None)
            if plan.program is not None:
                kinds = {op.kind for op in plan.program.program.operations}
                assert ("winograd" in kinds) == ("fast product" in counts)
                assert ("dense" in kinds) == ("product" in counts)
                assert ("few outputs" in kinds) == ("lane sum" in counts)
            programs.append(plan.program is not None)
    assert set(programs) == {False, True}


def test_threads_share_only_the_images_that_are_left():
    stages = lr.dense(np.ones((32, 32, 3, 3), np.float32), padding=1).stages
    shape = 32, 150, 150  # large enough for the time of a fork and join
    one, two, three = (features.lowrank(Work(stages, shape, n, 2), 2) for n in (1, 2, 3))
    assert one["barrier"] == three["barrier"] > 0 == two["barrier"]
    assert two["fast product"] < 2 * one["fast product"] < three["fast product"]


PREDICTION = """
import numpy as np, lowrank
conv = lowrank.dense(np.ones((48, 48, 3, 3), np.float32), padding=1)
for threads in (1, 2):
    for f in (conv, lowrank.dense(np.ones((1, 1, 5, 5), np.float32))):
        print([lowrank.perfmodel.predict(f, (n, n), threads=threads).seconds for n in (8, 64, 500)])
print(lowrank.frontier(conv, (20, 20), ["spatial_svd", "channel_svd"]))
"""


@pytest.mark.parametrize("policy", ["passive", "active"])
def test_predictions_are_the_same_in_every_process(policy):
    env = {**os.environ, "OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-c", PREDICTION]
    first, second = (
        subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    )
    assert first == second
    assert first.count("\n") > 5


def test_latency_is_that_of_the_wait_policy(cache, monkeypatch):
    perfmodel.calibrate()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert machine.fork_join_seconds() == 5e-5
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert machine.fork_join_seconds() == 1e-6
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert machine.fork_join_seconds() == 1e-6
    perfmodel.path().write_text("{")  # damaged: the shipped ones
    shipped = json.loads(machine.shipped_calibration())["fork_join"]
    assert machine.fork_join_seconds() == shipped["active"]


@pytest.mark.parametrize(("printed", "stored"), [("3e-06", 3e-6), ("0.0159", 2e-4)])
def test_latency_of_a_busy_machine_is_limited(monkeypatch, printed, stored):
    done = subprocess.CompletedProcess([], 0, stdout=printed)
    monkeypatch.setattr(calibration.subprocess, "run", lambda *_, **__: done)
    assert calibration._fork_join_seconds("active", 3) == stored


def test_padded_and_transposed_stages_have_predictions():
    weight = np.ones((8, 8, 3, 3), np.float32)
    for options in (
        {"padding_mode": "reflect", "padding": 1},
        {"padding_mode": "constant", "padding": 1, "value": 2.0},
        {"transposed": True, "stride": 2, "padding": 1},
        {"dilation": 3, "padding": 3},
        {"stride": 2},
    ):
        f = lr.dense(weight, **options)
        for g in (f, lr.spatial_svd(f, 4)):
            assert perfmodel.predict(g, (40, 40)).seconds > 0


@given(seed=st.integers(0, 100), noise=st.sampled_from([0.0, 0.05]))
def test_fit_recovers_coefficients(seed, noise):
    rng = np.random.default_rng(seed)
    true = {"multiply": 3e-10, "load": 1e-9, "call": 2e-6}
    counts = [
        {"multiply": 10 ** rng.uniform(3, 6), "load": 10 ** rng.uniform(3, 6), "call": 1.0}
        for _ in range(80)
    ]
    times = [
        sum(true[k] * v for k, v in c.items()) * math.exp(noise * rng.standard_normal())
        for c in counts
    ]
    coefficients = calibration.fit(counts, times, range(80))
    assert all(v > 0 for v in coefficients.seconds.values())
    # Without noise the system is consistent, and least squares end in rounding; with noise the
    # error of a prediction is that of the sample itself: its median is 0.67 sigma, and sampling
    # 80 of them and fitting three coefficients less than doubles it.
    assert coefficients.error <= (2 * 0.67 * noise if noise else 1e-9)
    if not noise:
        assert dict(coefficients.seconds) == pytest.approx(true)


def test_error_is_that_of_workloads_left_out():
    # Every group has a count of its own that nothing else explains: known groups are explained
    # perfectly, and one that was left out not at all.
    counts = [{f"of {g}": 1.0} for g in range(10) for _ in range(4)]
    coefficients = calibration.fit(counts, [1.0] * 40, [g for g in range(10) for _ in range(4)])
    assert coefficients.error == 1.0
    assert dict(coefficients.seconds) == pytest.approx({f"of {g}": 1.0 for g in range(10)})


def test_measure_gives_coefficients_for_every_runtime(monkeypatch):
    loads = list(workloads())
    monkeypatch.setattr(calibration, "workloads", lambda: loads[::25])
    small = [FFTWorkload((5, 5), (60, n), (b, b)) for n in (50, 90) for b in (32, 64)]
    monkeypatch.setattr(
        calibration, "fft_workloads", lambda: [*small, FFTWorkload((3,), (999,), (64,))]
    )
    monkeypatch.setattr(calibration, "BUDGETS", dict.fromkeys(calibration.BUDGETS, 0.01))
    seen = []
    found = calibration.measure(lambda name, share: seen.append((name, share)), ["fft", "lowrank"])
    assert set(found.coefficients) == {"fft", "lowrank"}
    assert {name for name, _ in seen} == {"fft", "lowrank"}
    assert all(0 < share <= 1 for _, share in seen)
    assert all(0 <= r.error < math.inf for r in found.coefficients.values())
    most = calibration.MAX_FORK_JOIN
    assert all(0 < found.fork_join[policy] <= most for policy in machine.WAIT_POLICIES)
    again = perfmodel.PerformanceModel.from_json(found.to_json())
    assert again.to_json() == found.to_json()


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch", "torch-channels-last"])
def test_other_runtimes_are_measured(monkeypatch, runtime):
    if not is_installed(runtime):
        pytest.skip(f"{runtime} is not installed")
    loads = [w for w in workloads() if w.batch * math.prod(w.shape) < 40_000]
    assert len(loads) > 8
    monkeypatch.setattr(calibration, "workloads", lambda: loads[:8])
    monkeypatch.setattr(calibration, "BUDGETS", dict.fromkeys(calibration.BUDGETS, 0.01))
    found = calibration.measure(None, [runtime])
    assert set(found.coefficients) == {runtime}


def test_calibration_is_saved_and_used(cache, conv):
    assert not perfmodel.current().calibrated
    shipped = perfmodel.predict(conv, (48, 48)).seconds
    perfmodel.calibrate()
    assert cache == [None]
    assert perfmodel.current().calibrated
    assert perfmodel.predict(conv, (48, 48)).seconds != shipped
    saved = json.loads(perfmodel.path().read_text())
    assert saved["coefficients"]["lowrank"]["seconds"] == {"product": 1e-9, "call": 1e-6}
    perfmodel.calibrate(runtimes=["lowrank"])
    assert cache == [None, ["lowrank"]]
    perfmodel.path().unlink()
    perfmodel.calibrate(runtimes=["lowrank"])  # filters compare its times with those of fft
    assert cache == [None, ["lowrank"], ["lowrank", "fft"]]
    with pytest.raises(ValueError, match=r"runtimes must be some of fft, lowrank.* got warp"):
        perfmodel.calibrate(runtimes=["warp"])


def test_quick_coefficients_are_marked(cache):
    quick = perfmodel.calibrate(runtimes=["lowrank"], quick=True)
    assert all(c.is_quick for c in quick.coefficients.values())
    again = perfmodel.PerformanceModel.from_json(perfmodel.path().read_text())
    assert {n: c.is_quick for n, c in again.coefficients.items()} == {"lowrank": True, "fft": True}
    assert not any(c.is_quick for c in perfmodel.calibrate().coefficients.values())


def test_large_errors_are_reported(cache, monkeypatch):
    good = calibration.measure(None, None, False)
    bad = replace(good.coefficients["fft"], error=0.5)
    disturbed = replace(good, coefficients={**good.coefficients, "fft": bad})
    monkeypatch.setattr(calibration, "measure", lambda *_: disturbed)
    with pytest.warns(UserWarning, match="error of predictions is 50% for runtime 'fft'") as given:
        perfmodel.calibrate()
    assert len(given) == 1


@pytest.mark.parametrize("runtime", ["lowrank", "onnxruntime", "torch"])
def test_quick_workloads_have_all_features(runtime):
    def features_of(loads):
        count = RUNTIMES[runtime]
        runs = [Work(w.stages, w.shape, w.batch, n) for w in loads for n in (1, 2)]
        return {name for run in runs for name, n in count(run, 2).items() if n}

    loads = list(workloads())
    assert features_of(loads[:: calibration.QUICK_WORKLOADS]) == features_of(loads)


def test_runtimes_that_were_not_measured_have_shipped_coefficients(cache, conv):
    shipped = perfmodel.predict(conv, (48, 48), runtime="onnxruntime")
    perfmodel.calibrate()
    assert "onnxruntime" not in perfmodel.current().coefficients
    found = perfmodel.predict(conv, (48, 48), runtime="onnxruntime")
    assert found.seconds == shipped.seconds
    assert math.isnan(found.error)
    assert perfmodel.predict(conv, (48, 48)).error == 0.1
    with pytest.raises(ValueError, match=r"runtime 'cuda' has no cost coefficients"):
        perfmodel.predict(conv, (48, 48), runtime="cuda")


def test_predictions_are_counted_once(conv, monkeypatch):
    counted = []

    def count(work, max_threads):
        counted.append(work)
        return {"call": float(len(counted))}

    monkeypatch.setitem(RUNTIMES, "lowrank", count)
    here = perfmodel.current()
    f = lr.spatial_svd(conv, 3)

    def predict(stages=f.stages, shape=(16, 41, 43), **options):
        return here.predict_stages(stages, shape, **{"threads": 1, **options}).seconds

    abstract = [replace(s, weight=abstract_weight(s.weight.shape)) for s in f.stages]
    assert predict() == predict() == predict(abstract)
    assert len(counted) == 1
    others = [{"shape": (16, 41, 44)}, {"batch": 2}, {"in_network": True}, {"itemsize": 8},
              {"stages": f.stages[:1]}, {"stages": lr.spatial_svd(conv, 4).stages}]  # fmt: skip
    assert len({predict(**other) for other in others}) == len(others)
    _count.cache_clear()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace(f'"version": {machine.VERSION}', '"version": 0'),
        lambda text: text.replace('"call": 1e-06', '"call": -1'),
        lambda text: text.replace('"call": 1e-06', '"call": NaN'),
        lambda text: text.replace('"cpu": "', '"cpu": "another '),
        lambda text: text.replace('"lowrank"', '"other"'),
        lambda text: text.replace('"product"', '"foo"'),
        lambda text: text.replace('"active"', '"dormant"'),
        lambda text: text.replace('"passive": 5e-05', '"passive": 0'),
        lambda text: text.replace('"threads": 2', '"threads": -3'),
        lambda text: text.replace('"threads": 2', '"threads": 1e999'),
        lambda text: "[" * 100_000,
    ],
    ids=[
        "cut off",
        "no object",
        "version",
        "negative",
        "no number",
        "foreign",
        "missing",
        "names",
        "policy",
        "latency",
        "threads",
        "infinite",
        "deep",
    ],
)
def test_damaged_or_foreign_file_is_set_aside(cache, conv, damage):
    perfmodel.calibrate()
    good = perfmodel.path().read_text()
    bad = damage(good)
    assert bad != good
    perfmodel.path().write_text(bad)
    assert machine.fork_join_seconds() > 0
    with pytest.warns(UserWarning, match="is not a calibration of this machine .* renamed to"):
        found = perfmodel.current()
    assert found is shipped()
    assert perfmodel.path().with_suffix(".bad").read_text() == bad
    assert not perfmodel.path().exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perfmodel.current() is shipped()
    perfmodel.calibrate()
    assert perfmodel.path().read_text() == good


@pytest.mark.parametrize("make", [Path.mkdir, lambda file: file.write_bytes(b"\xff\xfe")])
def test_unreadable_file_that_cannot_be_moved_gives_shipped_coefficients(cache, monkeypatch, make):
    perfmodel.path().parent.mkdir(parents=True)
    make(perfmodel.path())

    def refuse(*_):
        raise PermissionError(30, "Read-only file system", str(perfmodel.path()))

    monkeypatch.setattr(Path, "replace", refuse)
    assert machine.fork_join_seconds() > 0
    with pytest.warns(UserWarning, match="not a calibration of this machine .* ignored"):
        assert perfmodel.current() is shipped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no second warning
        assert perfmodel.current() is shipped()
    assert perfmodel.path().exists()


@pytest.mark.parametrize("given", [{"batch": 0}, {"batch": -1}, {"threads": 0}, {"threads": -2}])
def test_batch_and_threads_must_be_positive(conv, given):
    (name,) = given
    least = {"batch": "at least 1", "threads": "between 1 and"}[name]
    with pytest.raises(ValueError, match=f"{name} must be {least}"):
        perfmodel.predict(conv, (8, 8), **given)
    for options in (
        {"max_error": 0.5},
        {"seconds": "50%"},
        {"rank": 2, "families": ["spatial_svd"]},
    ):
        with pytest.raises(ValueError, match=f"{name} must be {least}"):
            lr.approximate(conv, (8, 8), **options, **given)


def test_more_threads_than_measured_are_not_slower(conv):
    f = lr.dense(np.ones((16, 16, 1, 1), np.float32))
    counts = [features.lowrank(Work(f.stages, (16, 1024, 1024), 1, n), 2) for n in (2, 4, 16)]
    coefficients = perfmodel.current().coefficients["lowrank"]
    times = [coefficients.predict(c).seconds for c in counts]
    assert times == sorted(times, reverse=True)
    # coefficients of one thread alone stand in for those of more
    alone = features.lowrank(Work(f.stages, (16, 1024, 1024), 1, 2), 1)
    assert alone["memory"] > 0 == alone["memory, all threads"]


def test_coefficients_of_another_machine_have_no_error(conv):
    p = perfmodel.predict(conv, (8, 8))
    assert math.isnan(p.error)
    assert "lowrank calibrate" in str(p)
    assert "lowrank calibrate" in str(lr.frontier(conv, (8, 8), ["spatial_svd"]))


def test_unknown_runtime_is_rejected(conv):
    with pytest.raises(ValueError, match=r"runtime must be one of lowrank.* got 'warp'"):
        perfmodel.predict(conv, (8, 8), runtime="warp")


def test_frontier_by_seconds_is_pareto_optimal(conv, front):
    points = [(c.seconds, c.error) for c in front]
    assert points == sorted(points, key=lambda p: (p[0], -p[1]))
    assert all(a[1] > b[1] for a, b in itertools.pairwise(points))
    here = perfmodel.current()
    whole = here.predict(conv, (48, 48)).seconds
    assert front.dense.seconds == whole
    for name, variants in applicable(conv).items():
        for variant in variants:
            for p in FAMILIES[name].sweep(conv, variant):
                f = lr.chain(p.stages)
                if f.cost((48, 48)).macs >= conv.cost((48, 48)).macs:
                    continue
                took = here.predict(f, (48, 48)).seconds
                assert took >= whole or any(s <= took and e <= p.error + 1e-12 for s, e in points)


def test_efficiency_compares_the_logarithms_of_speed_up_and_mac_ratio(front):
    for c in front:
        saved = front.dense.cost.macs / c.cost.macs
        faster = front.dense.seconds / c.seconds
        if not c.is_dense:
            wanted = math.log(faster) / math.log(saved)
            assert c.efficiency(front.dense) == pytest.approx(wanted)
    assert front.dense.efficiency(front.dense) == 1


def test_time_budget_is_met(conv):
    families = ["channel_svd", "spatial_svd", "tucker"]  # the others take most of the time
    front = lr.frontier(conv, (48, 48), families)
    whole = front.dense.seconds
    for budget in (0.5, f"{whole / 2 * 1e3}ms", f"{whole / 2 * 1e6} us", "50%"):
        f = lr.approximate(conv, (48, 48), seconds=budget, families=families, measure=False)
        pick = front.affordable(whole / 2)
        assert (f.family, f.variant, f.rank) == (pick.family, pick.variant, pick.rank)
        assert perfmodel.predict(f, (48, 48)).seconds <= whole / 2
    with pytest.raises(ValueError, match=r"infeasible.*minimum"):
        lr.approximate(conv, (48, 48), seconds="1e-12s", families=families, measure=False)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, "2", "fast", "-1ms", "1 minute"])
def test_wrong_time_budget_is_rejected(conv, budget):
    with pytest.raises(ValueError, match=r"seconds must be .* amount with a unit"):
        lr.approximate(conv, (48, 48), seconds=budget)


def test_batch_changes_the_prediction(conv):
    one = lr.frontier(conv, (48, 48), ["spatial_svd"])
    eight = lr.frontier(conv, (48, 48), ["spatial_svd"], batch=8)
    assert eight.dense.seconds > 4 * one.dense.seconds
    assert "batch 8" in str(eight)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        lr.frontier(conv, (48, 48), batch=0)
    with pytest.raises(ValueError, match="axis must be one of seconds"):
        lr.frontier(conv, (48, 48), axis="time")


def test_fft_features_match_the_plan():
    for taps, spatial in (((9, 9), (100, 120)), ((5, 5, 5), (30, 31, 32)), ((99,), (5000,))):
        for block in fourier.blocks(taps, spatial):
            work = fourier.work(taps, spatial, block)
            counts = features.fft(taps, spatial, block, 1, 2)
            assert counts["group"] == work.groups
            assert counts["point"] * 16 == work.transforms * work.points
