"""The frontier, the pick, the certificate; and the fits beside what others reach."""

import itertools
import json

import numpy as np
import pytest

import lowrank as lr
from lowrank.families import FAMILIES, applicable
from lowrank.interop.weights import layers
from lowrank.selection import choose

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
    for limit in (0.0, 0.1, 0.4, 0.9, 1.0):
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
    assert f.error(conv.to_dense()) == min(o.error(conv.to_dense()) for o in others)
    assert lr.approximate(conv, SIZE, rank=(4, 3), families=["tucker"]).rank == (4, 3)


def test_a_rank_that_saves_nothing_is_refused(conv):
    with pytest.raises(ValueError, match="lower rank"):
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
