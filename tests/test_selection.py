"""The frontier, the pick, the certificate; and the fits beside what others reach."""

import itertools
import json
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
from fake_clock import FakeMeasurements
from hypothesis import given as given_examples
from hypothesis import settings
from hypothesis import strategies as st

import lowrank as lr
from lowrank.core.cost import speed_up_efficiency
from lowrank.families import FAMILIES, applicable
from lowrank.families.weighted import MetricFit
from lowrank.interop.weights import layers
from lowrank.metric import Moments
from lowrank.selection import choose, format_budget, parse_budget
from lowrank.selection import front as fronts
from lowrank.selection.candidates import Pricing, candidates
from lowrank.selection.pareto import pareto_front

SIZE = (8, 8)


@pytest.fixture(scope="module")
def conv():
    # a decaying spectrum, as a trained layer has: the front is longer than that of noise
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((24, 16, 3, 3))
    return lr.dense(noise * (np.arange(1, 17) ** -0.7)[:, None, None], padding=1)


@pytest.fixture(scope="module")
def front(conv):
    return lr.frontier(conv, SIZE, axis="macs")


def everything(conv, axis="macs"):
    """All candidates of all families: (cost on the axis, error)."""
    for name, variants in applicable(conv).items():
        for variant in variants:
            for p in FAMILIES[name].sweep(conv, variant):
                yield getattr(lr.chain(p.stages).cost(SIZE), axis), p.error


@pytest.mark.parametrize("axis", ["macs", "params", "traffic", "fused", "peak"])
def test_the_front_is_exactly_what_nothing_beats(conv, axis):
    front = lr.frontier(conv, SIZE, axis=axis)
    points = [(getattr(c.cost, axis), c.error) for c in front]
    assert points == sorted(points, key=lambda p: (p[0], -p[1]))
    assert all(a[1] > b[1] for a, b in itertools.pairwise(points))
    whole = getattr(front.dense.cost, axis)
    assert all(cost < whole for cost, _ in points[:-1])
    for cost, error in everything(conv, axis):
        assert cost >= whole or any(c <= cost and e <= error + 1e-12 for c, e in points)


def test_a_front_is_a_sequence_that_prints_itself(front):
    assert front[0] in front
    assert len(front[1:3]) == 2
    assert front[-1] is front.dense
    text = str(front)
    assert text.splitlines()[0].startswith(f"{len(front)} candidates")
    assert all(c.name in text for c in (front[0], front[-1]))
    json.dumps([c.as_dict() for c in front], allow_nan=False)


def test_the_pick_by_error_is_the_cheapest_within_it(conv, front):
    for limit in (0.0, 0.1, 0.4, 0.9, 0.99):
        if front.within(limit) is front.dense:
            with pytest.raises(ValueError, match=r"nothing within .* the cheapest within 0"):
                lr.approximate(conv, SIZE, max_error=limit, axis="macs")
            continue
        f = lr.approximate(conv, SIZE, max_error=limit, axis="macs")
        assert f.error(conv.to_dense()) <= limit
        cheaper = [c for c in front if c.cost.macs < f.cost(SIZE).macs]
        assert all(c.error > limit for c in cheaper)
        near = [c for c in cheaper if not c.exact and c.bound <= limit and c.error <= 1.25 * limit]
        assert all(c.build().error(conv.to_dense()) > limit for c in near)


@pytest.mark.parametrize("axis", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_the_pick_by_budget_keeps_to_it(conv, axis, budget):
    whole = getattr(conv.cost(SIZE), axis)
    f = lr.approximate(conv, SIZE, **{axis: budget})
    assert getattr(f.cost(SIZE), axis) <= budget * whole
    same = lr.approximate(conv, SIZE, **{axis: f"{budget * whole / 1e3}k"})
    assert (same.family, same.variant, same.rank) == (f.family, f.variant, f.rank)
    for cost, error in everything(conv, axis):
        assert cost > budget * whole or error >= f.error(conv.to_dense()) - 1e-9


def test_the_pick_by_rank_is_of_that_rank(conv):
    f = lr.approximate(conv, SIZE, rank=5, families=["spatial_svd", "channel_svd"])
    assert f.rank == (5,)
    others = [lr.spatial_svd(conv, 5), lr.spatial_svd(conv, 5, "w-h"), lr.channel_svd(conv, 5)]
    others.append(lr.channel_svd(conv, 5, "input"))
    assert f.error(conv.to_dense()) == min(o.error(conv.to_dense()) for o in others)
    assert lr.approximate(conv, SIZE, rank=(4, 3), families=["tucker"]).rank == (4, 3)


def test_a_rank_that_saves_nothing_is_refused(conv):
    with pytest.raises(ValueError, match="rank must be lower"):
        lr.approximate(conv, SIZE, rank=48, families=["spatial_svd"])


def test_choose_takes_an_axis(conv):
    front, pick = choose(conv, SIZE, max_error=0.3, axis="params")
    assert front.axis == "params"
    assert pick.cost.params <= min(c.cost.params for c in front if c.error <= 0.3)
    assert pick.build().error(conv.to_dense()) == pick.error <= 0.3


def test_progress_names_every_family(conv):
    seen = []
    lr.frontier(conv, SIZE, ["spatial_svd", "channel_svd"], progress=seen.append)
    assert seen == ["spatial_svd", "channel_svd"]


def test_sweeps_on_several_threads_give_the_same_candidates(conv):
    pricing = Pricing(conv, SIZE)
    found = [[], []]
    for groups, workers in zip(found, (1, 3)):
        for group in candidates(pricing, FAMILIES, workers=workers):
            groups.append([(c.name, c.rank, c.error, c.bound, c.cost) for c in group])
    assert found[0] == found[1]


def test_an_interruption_ends_sweeps_on_other_threads(conv, monkeypatch):
    began, swept, stop = threading.Event(), [], threading.Event()

    def endless(conv, variant, metric=None):
        original = FAMILIES["spatial_svd"].sweep_white(conv, "h-w")
        point = next(iter(original))
        while not stop.is_set():  # in case that it is never cancelled
            swept.append(threading.current_thread())
            began.set()
            yield point

    slow = replace(FAMILIES["tucker"], sweep_white=endless)
    monkeypatch.setitem(FAMILIES, "tucker", slow)

    def interrupt(name):
        if name == "tucker":
            began.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for _ in candidates(
            Pricing(conv, SIZE), ["channel_svd", "tucker"], progress=interrupt, workers=2
        ):
            pass
    try:
        swept[0].join(timeout=60)
        assert not swept[0].is_alive()
    finally:
        stop.set()


def test_sweep_points_share_one_copy_of_the_kernel(conv):
    groups = list(candidates(Pricing(conv, SIZE), ["channel_svd", "spatial_svd", "kronecker"]))
    kernels = {id(c.point.build.func.__self__.kernel) for group in groups for c in group}
    assert len(kernels) == 1


def test_certificates_hold(conv):
    for f in (
        lr.cp(conv, 6),
        lr.cp3(conv, 6),
        lr.jaderberg(conv, 2),
        lr.tucker(conv, (6, 5)),
        lr.tucker_full(conv, (6, 5, 2, 2)),
        lr.tensor_train(conv, (4, 5, 6)),
    ):
        c = lr.certificate(conv, f)
        assert 0 < c.bound < c.error == f.error(conv.to_dense())
    c = lr.certificate(conv, lr.spatial_svd(conv, 7))
    assert c.gap == pytest.approx(0, abs=1e-7)
    assert lr.certificate(conv, conv).error == 0


def test_the_bound_of_cp_is_the_largest_of_the_matricisations(conv):
    w = conv.to_dense()
    tails = []
    for rows in ([0], [1], [2], [3], [0, 1], [0, 2], [0, 3]):
        columns = [a for a in range(4) if a not in rows]
        m = w.transpose(rows + columns).reshape(np.prod([w.shape[a] for a in rows]), -1)
        s = np.linalg.svd(m, compute_uv=False)
        tails.append(np.sqrt((s[5:] ** 2).sum()) / np.linalg.norm(w))
    assert lr.certificate(conv, lr.cp(conv, 5)).bound == pytest.approx(max(tails), abs=1e-7)


def test_tucker_is_never_worse_than_that_of_tensorly(conv):
    tucker = pytest.importorskip("tensorly.decomposition").partial_tucker
    w = conv.to_dense()
    for rank in ((4, 4), (12, 6), (20, 10)):
        (core, (a, b)), _ = tucker(w, rank, modes=[0, 1], n_iter_max=100, tol=1e-8)
        theirs = np.linalg.norm(np.einsum("rshw,or,is->oihw", core, a, b) - w) / np.linalg.norm(w)
        # it stops where the error changes by 1e-8; ours may stop as early
        assert lr.tucker(conv, rank).error(w) <= theirs + 1e-6


@pytest.mark.filterwarnings("ignore:Trying to compute SVD with n_eigenvecs")
@pytest.mark.parametrize("rank", [3, 10, 25])
def test_cp_is_never_worse_than_that_of_tensorly_by_more_than_5_percent(conv, rank):
    decomposition = pytest.importorskip("tensorly.decomposition")
    tl = pytest.importorskip("tensorly")
    w = conv.to_dense()
    cp = decomposition.parafac(w, rank, n_iter_max=100, init="svd", tol=1e-8, random_state=0)
    theirs = np.linalg.norm(tl.cp_to_tensor(cp) - w) / np.linalg.norm(w)
    assert lr.cp(conv, rank).error(w) <= 1.05 * theirs


def test_spatial_and_depthwise_are_optimal_on_trained_layers(data):
    count = 0
    for path in sorted((data / "weights").glob("*.safetensors")):
        for layer in layers(path):
            conv = layer.conv
            w = conv.to_dense().astype(np.float64)
            if w.ndim != 4 or min(w.shape[2:]) < 2 or conv.groups > 1 or conv.transposed:
                continue
            o, i, h, k = w.shape
            count += 1
            by_axis = {
                "h-w": w.transpose(1, 2, 0, 3).reshape(1, i * h, o * k),
                "w-h": w.transpose(1, 3, 0, 2).reshape(1, i * k, o * h),
            }
            by_slice = {
                "dw-pw": w.transpose(1, 0, 2, 3).reshape(i, o, h * k),
                "pw-dw": w.reshape(o, i, h * k),
            }
            for make, matrices in ((lr.spatial_svd, by_axis), (lr.network_decoupling, by_slice)):
                for variant, m in matrices.items():
                    if variant not in applicable(conv).get(make.__name__, ()):
                        continue
                    s = np.linalg.svd(m, compute_uv=False)
                    rank = max(1, s.shape[-1] // 3)
                    best = np.sqrt((s[:, rank:] ** 2).sum() / (s**2).sum())
                    got = make(conv, rank, variant).error(w)
                    assert got == pytest.approx(best, abs=1e-5), (path.name, layer.name, variant)
    assert count > 40


def test_errors_of_trained_layers_are_those_that_others_computed(data):
    facts = json.loads((data / "facts" / "spectra.json").read_text())
    count = 0
    for net, entries in facts.items():
        convs = {x.name: x.conv for x in layers(data / "weights" / f"{net}.safetensors")}
        for entry in entries:
            conv = convs.get(entry["layer"])
            if conv is None or list(conv.stages[0].weight.shape) != entry["shape"]:
                continue
            count += 1
            known = applicable(conv)
            for name, variant, key in (
                ("spatial_svd", "h-w", "spatial_rank_err"),
                ("network_decoupling", "dw-pw", "dw_rank_err"),
            ):
                if variant in known.get(name, ()):
                    found = {p.rank[0]: p.error for p in FAMILIES[name].sweep(conv, variant)}
                    for rank, error in found.items():
                        # printed with five digits, fitted in float32
                        assert error == pytest.approx(entry[key][rank - 1], abs=2e-5)
            if "cp" in known:
                assert lr.cp(conv, 1).error(conv.to_dense()) <= entry["cp_rank1_err"] + 1e-3
    assert count > 20


@pytest.mark.parametrize(
    ("axis", "given", "amount"),
    [
        ("macs", 0.5, 500.0),
        ("macs", "0.5", 500.0),
        ("macs", "50%", 500.0),
        ("macs", 1, 1000.0),
        ("macs", 300, 300.0),
        ("macs", 5_000_000, 5e6),
        ("macs", "20M", 2e7),
        ("params", "300k", 3e5),
        ("bytes", "1.5e3", 1500.0),
        ("seconds", 0.5, 500.0),
        ("seconds", "50%", 500.0),
        ("seconds", "1", 1000.0),
        ("seconds", "0.6ms", 6e-4),
        ("seconds", "300us", 3e-4),
        ("seconds", "2 s", 2.0),
    ],
)
def test_a_budget_is_a_share_or_an_amount(axis, given, amount):
    assert parse_budget(axis, given).amount(1000.0) == pytest.approx(amount, rel=1e-15)


@pytest.mark.parametrize(
    ("axis", "given"),
    [
        ("macs", 0), ("macs", -1), ("macs", "0%"), ("macs", "150%"), ("macs", "3ms"),
        ("macs", "half"), ("macs", float("nan")), ("macs", float("inf")), ("macs", ""),
        ("seconds", 2), ("seconds", "3"), ("seconds", "20M"), ("seconds", "-1ms"),
        ("seconds", "0ms"), ("params", "1e400"),
    ],
)  # fmt: skip
def test_a_budget_that_is_neither_is_refused(axis, given):
    with pytest.raises(ValueError, match=rf"{axis} must be a share.*got {re.escape(repr(given))}"):
        parse_budget(axis, given)


@pytest.mark.parametrize("limit", [-0.1, 1, 2.0, float("nan"), True, "0.1"])
def test_an_error_limit_is_at_least_0_and_below_1(conv, front, limit):
    message = rf"must be a relative error, at least 0 and below 1, got {re.escape(repr(limit))}"
    with pytest.raises(ValueError, match=f"max_error {message}"):
        lr.approximate(conv, SIZE, max_error=limit)
    with pytest.raises(ValueError, match=f"error {message}"):
        front.within(limit)


@pytest.mark.parametrize(
    ("axis", "amount"),
    [("macs", 447_000.5), ("params", 0.3), ("bytes", 1.0), ("seconds", 1 / 3e4), ("seconds", 1e-7)],
)
def test_a_formatted_budget_is_parsed_to_the_same_amount(axis, amount):
    assert parse_budget(axis, format_budget(axis, amount)).amount(1.0) == amount


def test_a_budget_error_names_the_option():
    with pytest.raises(ValueError, match=r"^--time must be a share .* got '3'"):
        parse_budget("seconds", "3", "--time")


@pytest.mark.parametrize("given", [True, None, [1]])
def test_a_budget_of_another_type_is_refused(given):
    with pytest.raises(TypeError, match="macs must be a number or a string"):
        parse_budget("macs", given)


@settings(max_examples=200)
@given_examples(
    st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=12),
    st.sampled_from([1.0, 1.25]),
    st.integers(1, 2),
)
def test_the_pareto_front_is_that_of_every_pair(items, slack, axes):
    costs, errors = [x[:axes] for x in items], [float(x[2]) for x in items]

    def dominates(i, j):
        cheaper = all(a <= b for a, b in zip(costs[i], costs[j]))
        equal = errors[i] == errors[j] and (costs[i] != costs[j] or i < j)
        return cheaper and (slack * errors[i] < errors[j] or equal)

    n = range(len(items))
    want = {j for j in n if not any(dominates(i, j) for i in n if i != j)}
    assert set(pareto_front(costs, errors, slack)) == want


def test_one_layer_is_approximated_in_a_metric():
    """A frontier and a pick in a metric beat those of the Frobenius norm there."""
    rng = np.random.default_rng(0)
    conv = lr.dense(rng.standard_normal((12, 8, 3, 3)), padding=1)
    moments = Moments(conv)
    moments.add(rng.standard_normal((32, 8, 10, 10)).cumsum(axis=-1))
    metric = moments.metric()
    fit, families = MetricFit(conv, metric), ["channel_svd", "spatial_svd", "tucker"]
    front = lr.frontier(conv, (10, 10), families, axis="macs", metric=metric)
    for c in front[:-1:5]:
        # Whitening does not express the metric of a spatial SVD: its errors are estimates.
        slack = 1 + 1e-6 if c.exact else 1.02
        assert fit.error(c.build().stages) <= slack * c.error
    plain = lr.approximate(conv, (10, 10), macs=0.4, families=families)
    weighted = lr.approximate(conv, (10, 10), macs=0.4, families=families, metric=metric)
    assert fit.error(weighted.stages) < 0.9 * fit.error(plain.stages)
    limit = fit.error(weighted.stages) * 1.001
    f = lr.approximate(
        conv, (10, 10), max_error=limit, families=families, axis="macs", metric=metric
    )
    assert fit.error(f.stages) <= limit


def test_efficiency_at_its_edges():
    assert speed_up_efficiency(1.0, 1.0) == 1.0  # the dense kernel
    assert speed_up_efficiency(4.0, 4.0) == 1.0
    assert speed_up_efficiency(1.0, 2.0) == 0.0
    assert speed_up_efficiency(0.5, 2.0) == -1.0
    for speed_up, mac_ratio in (
        (2.0, 1.0),
        (2.0, 0.5),
        (0.5, 0.5),
        (0.0, 2.0),
        (1.0, float("nan")),
    ):
        assert np.isnan(speed_up_efficiency(speed_up, mac_ratio))


def test_chains_slower_than_the_dense_kernel_are_not_offered_by_time_and_else_marked():
    rng = np.random.default_rng(0)
    conv = lr.dense(rng.standard_normal((64, 64, 3, 3)), padding=1)
    families = ["channel_svd"]
    front = lr.frontier(conv, (4, 4), families, axis="macs", threads=1)
    dense = front.dense
    slower = [c for c in front if c.seconds > dense.seconds]
    assert slower
    assert all(c.is_slower(dense) and c.efficiency(dense) < 0 for c in slower)
    by_time = lr.frontier(conv, (4, 4), families, threads=1)
    assert all(c.seconds < dense.seconds for c in by_time[:-1])
    for text in (str(front), front._repr_html_()):
        assert "! slower than the dense kernel" in text
    marked = [line for line in str(lr.frontier(conv, (4, 4), families, axis="macs", threads=1))
              .splitlines() if "x !" in line]  # fmt: skip
    assert marked
    assert all(float(re.search(r"([\d.]+)x !", line)[1]) <= 1.0 for line in marked)
    last = str(front).splitlines()[-3].split()
    assert last[0] == "dense"
    assert {"1.00x", "100%"} <= set(last)
    assert "!" not in str(by_time)


def chain_seconds(clock, f):
    return clock.seconds(f.stages, [], (16, *SIZE))[0]


@pytest.mark.parametrize("factors", [{1: 1, 2: 0.7, 3: 3}, {1: 1, 2: 3, 3: 0.5}])
def test_the_pick_within_a_time_budget_is_measured(conv, monkeypatch, factors):
    families = ["spatial_svd", "channel_svd", "tucker"]
    clock = FakeMeasurements(factors)
    monkeypatch.setattr(fronts, "Measurements", clock)
    call = {"families": families, "batch": 2, "threads": 1}
    front, pick = choose(conv, SIZE, seconds=0.5, **call)
    dense = front.dense
    assert dense.is_measured
    assert dense.seconds == chain_seconds(clock, conv)
    assert pick.is_measured
    assert pick.seconds == chain_seconds(clock, pick.build()) <= 0.5 * dense.seconds
    assert set(clock.calls) == {("lowrank", 2, 1, False)}
    assert len(clock.known) < 40
    # No measured candidate within the budget is more accurate.
    fitting = [c for c in front if c.is_measured and c.seconds <= 0.5 * dense.seconds]
    assert pick.error == min(c.error for c in fitting)
    are_predicted = not all(c.is_measured for c in front)
    assert ("~ predicted, scaled to the measured times" in str(front)) == are_predicted
    asked = len(clock.known)
    same = lr.approximate(conv, SIZE, seconds="50%", **call)
    assert (same.family, same.variant, same.rank) == (pick.family, pick.variant, pick.rank)
    assert len(clock.known) == asked
    predicted, _ = choose(conv, SIZE, seconds=0.5, measure=False, **call)
    assert not any(c.is_measured for c in predicted)


def test_a_time_budget_that_the_clock_refuses_is_infeasible(conv, monkeypatch):
    clock = FakeMeasurements({1: 1, 2: 50, 3: 50})
    monkeypatch.setattr(fronts, "Measurements", clock)
    families = ["spatial_svd", "tucker"]
    with pytest.raises(ValueError, match=r"seconds budget .* infeasible: the minimum is"):
        lr.approximate(conv, SIZE, seconds=0.1, families=families)
    # Whatever is slower by the clock than the dense kernel is no candidate.
    front = lr.frontier(conv, SIZE, families, measure=True)
    assert all(c.is_measured and c.seconds <= front.dense.seconds for c in front)
    assert "~" not in str(front)


def test_a_budget_is_infeasible_by_the_clock_not_by_predictions(conv, monkeypatch):
    monkeypatch.setattr(fronts, "Measurements", FakeMeasurements({1: 1, 2: 1}))
    predict = fronts.Pricing.time

    def pessimistic(pricing, c):
        timed = predict(pricing, c)
        return timed if c.is_dense else replace(timed, seconds=99 * timed.seconds)

    monkeypatch.setattr(fronts.Pricing, "time", pessimistic)
    call = {"seconds": 0.5, "families": ["spatial_svd"]}
    with pytest.raises(ValueError, match="infeasible"):
        choose(conv, SIZE, measure=False, **call)
    front, pick = choose(conv, SIZE, **call)
    assert pick.is_measured
    assert 0.3 * front.dense.seconds < pick.seconds <= 0.5 * front.dense.seconds


def test_chains_that_the_runtime_cannot_run_are_dropped(conv, monkeypatch):
    clock = FakeMeasurements({1: 1, 2: 0.7, 3: 0.1}, unable=(3,))
    monkeypatch.setattr(fronts, "Measurements", clock)
    front, pick = choose(conv, SIZE, seconds=0.5, families=["spatial_svd", "tucker"])
    assert pick.family == "spatial_svd"
    assert not any(c.family == "tucker" and c.is_measured for c in front)
    clock.unable = (1,)
    with pytest.raises(NotImplementedError, match="no operator"):
        choose(conv, SIZE, seconds=0.5, families=["spatial_svd"])
