"""Baselines are what their papers describe, and intervals cover what they should."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1]))

from asv_benchmarks import accuracy, baselines  # noqa: E402
from asv_benchmarks.benchmarks import nets  # noqa: E402
from asv_benchmarks.intervals import score_difference, time_ratio  # noqa: E402
from lowrank.families.weighted import MetricFit  # noqa: E402
from lowrank.interop.torch import TorchModel  # noqa: E402
from lowrank.metric import unroll  # noqa: E402
from lowrank.selection import InfeasibleBudgetError, ranks  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(8, 12, 3, stride=2), torch.nn.ReLU()]
    layers += [torch.nn.Conv2d(12, 8, 5, padding=2), torch.nn.AdaptiveAvgPool2d(1)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, 4)).eval()


def images(n, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, generator=random).cumsum(-1)


@pytest.fixture
def setting():
    return baselines.Setting(TorchModel(network(), [images(32, 1)]), 0)


def macs(layer, chains):
    return chains.get(layer.name, layer.conv).cost(layer.input_size).macs


def test_lagrangian_relaxation_stays_within_the_limit_and_near_the_optimum(rng):
    for limit in (0.25, 0.5, 0.9):
        values = [np.sort(rng.random(5)) for _ in range(4)]
        costs = [np.cumsum([0.1, *rng.random(4)]) for _ in range(4)]
        limit *= sum(c[-1] for c in costs)
        picks = baselines.lagrangian(values, costs, limit)
        best = max(
            sum(v[i] for v, i in zip(values, some))
            for some in itertools.product(range(5), repeat=4)
            if sum(c[i] for c, i in zip(costs, some)) <= limit
        )
        assert sum(c[i] for c, i in zip(costs, picks)) <= limit
        assert best - max(v[-1] for v in values) <= sum(v[i] for v, i in zip(values, picks))


def test_lagrangian_relaxation_takes_all_or_refuses():
    values, costs = [np.array([0.1, 1.0])] * 2, [np.array([1.0, 4.0])] * 2
    assert baselines.lagrangian(values, costs, 8.0) == [1, 1]
    with pytest.raises(InfeasibleBudgetError, match="minimum is 2"):
        baselines.lagrangian(values, costs, 1.9)


def test_balf_truncates_whitened_kernels_within_the_budget(setting):
    chains = baselines.balf(setting, 0.5)
    layers = {x.name: x for x in setting.net.layers}
    assert sum(macs(x, chains) for x in layers.values()) <= 0.5 * sum(
        x.cost.macs for x in layers.values()
    )
    assert len(chains) > 1
    for name, f in chains.items():
        conv, metric = layers[name].conv, setting.input_metrics[name]
        w = unroll(conv)[0].reshape(conv.out_channels, -1)
        values = np.linalg.svd(w @ np.linalg.cholesky(metric.input_moment[0]), compute_uv=False)
        least = math.sqrt((values[f.rank[0] :] ** 2).sum() / (values**2).sum())
        assert MetricFit(conv, metric).error(f.stages) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("fit", [baselines.uniform_spatial_svd, baselines.second_moment_tucker])
def test_uniform_ranks_are_the_largest_within_the_share(setting, fit):
    chains = fit(setting, 0.5)
    assert list(chains) == ["2", "4"]  # neither the first convolution nor the linear layer
    for layer in setting.net.layers:
        if layer.name not in chains:
            continue
        assert macs(layer, chains) <= 0.5 * layer.cost.macs
        f = chains[layer.name]
        choices = baselines._ranks(layer, f.family)
        above = choices[choices.index(f.rank) + 1]
        assert baselines._macs(layer, f.family, above) > 0.5 * layer.cost.macs


def test_tucker_in_the_second_moment_has_a_smaller_output_error(setting):
    chains = baselines.second_moment_tucker(setting, 0.5)
    for layer in setting.net.layers[1:3]:
        f, fit = chains[layer.name], MetricFit(layer.conv, setting.input_metrics[layer.name])
        plain = baselines.FAMILIES["tucker"].fit(layer.conv, f.rank)
        assert fit.error(f.stages) < fit.error(plain.stages)


@pytest.mark.filterwarnings("ignore::lowrank.selection.ranks.RankWarning")  # kernels are noise
def test_evbmf_tucker_has_the_relaxed_ranks_and_no_larger_layers(setting):
    few, most = baselines.evbmf_tucker(setting, 1.0), baselines.evbmf_tucker(setting, 0.01)
    assert list(most) == ["4"]  # near its full ranks "2" takes more MACs as a chain
    assert macs(setting.net.layers[2], most) < setting.net.layers[2].cost.macs
    assert {x.name: few[x.name].rank for x in setting.net.layers[1:3]} == {
        x.name: ranks.evbmf(x.conv) for x in setting.net.layers[1:3]
    }


def percent(mean):
    return 100 * mean


@pytest.mark.parametrize("lost", range(13))
def test_intervals_of_few_differences_agree_with_mcnemars_exact_test(lost):
    a, b = np.ones((1, 500)), np.ones((1, 500))
    b[0, :lost] = 0
    found = score_difference(a, b, percent, True)
    assert found.value == pytest.approx(-lost / 5)
    exact = stats.binomtest(lost, lost).pvalue if lost else 1.0
    assert (found.high < 0) == (exact < 0.05)


def test_intervals_cover_the_difference_over_images_and_seeds(rng):
    covered = 0
    for _ in range(100):
        image, seed = rng.normal(0, 0.2, 300), rng.normal(0, 0.03, (3, 1))
        right = [rng.random((3, 300)) < np.clip(p + image + seed, 0, 1) for p in (0.6, 0.5)]
        a, b = (x.astype(float) for x in right)
        # the expected difference given the images: clipping moves it from -10 points
        truth = np.clip(0.5 + image + seed, 0, 1).mean() - np.clip(0.6 + image + seed, 0, 1).mean()
        found = score_difference(a, b, percent, True)
        covered += found.low <= 100 * truth <= found.high
    assert covered >= 95  # conservative: images are counted as random, too


def test_one_image_has_no_interval():
    found = score_difference(np.array([[0.5]]), np.array([[0.75]]), percent, True)
    assert found.value == 25
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_ratios_of_times_have_the_interval_of_the_sign_test():
    ours = np.arange(1.0, 10.0)
    assert time_ratio(np.ones(9), ours) == (5, 2, 8)
    with pytest.raises(ValueError, match="at least 6 blocks, got 5"):
        time_ratio(np.ones(5), np.ones(5))


@pytest.mark.parametrize("name", ["caffe_cifar10_full", "espcn_x3"])
def test_values_of_images_make_up_the_score(data, name):
    (case,) = nets.cases(name)
    found = accuracy.Evaluation(case)
    blurred = nets.load_net(name)
    for p in blurred.parameters():
        p.mul_(0.98)
    values = next(iter(found.values(blurred).values()))
    assert found.score(values.mean()) == pytest.approx(case.score(blurred), abs=1e-6)


@pytest.fixture
def case(monkeypatch):
    model, inputs = network(), images(64, 2)
    labels = model(inputs).argmax(1)
    labels[::8] = (labels[::8] + 1) % 4
    found = nets.Case(
        "small", model, lambda seed: [images(32, 3 + seed)], lambda: (inputs, labels),
        lambda small: nets.top1(small, inputs, labels), "% top-1",
    )  # fmt: skip
    monkeypatch.setattr(accuracy.nets, "cases", lambda word: iter([found]))
    monkeypatch.setattr(accuracy.net_data, "folder", lambda: Path("missing"))
    monkeypatch.setattr(accuracy, "BLOCKS", 6)
    return found


@pytest.fixture
def run(case, tmp_path, monkeypatch, capsys):
    """Run the command on the small network; return its tables and what it printed."""

    def call():
        command = ["accuracy", "--net", "small", "--runtime", "torch", "--batch", "2"]
        command += ["--seeds", "2", "--budgets", "0.9", "--shares", "0.5"]
        command += ["--relaxations", "0.9", "--seconds", "0.001"]
        command += ["--fits", str(tmp_path), "--json", str(tmp_path / "t")]
        monkeypatch.setattr(sys, "argv", command)
        accuracy.main()
        return json.loads((tmp_path / "t").read_text()), capsys.readouterr()

    return call


def test_the_command_tabulates_every_method_and_keeps_its_fits(run, case, monkeypatch):
    (first,), shown = run()
    methods = {r["method"] for r in first["rows"]}
    assert {"original", "ours, by MACs", *(m.name for m in baselines.baselines([], []))} < methods
    assert f"{first['net']} on torch, N = 2" in shown.out
    original = first["rows"][0]
    assert original["score"] == case.score(case.model) == 87.5
    assert original["macs"] == 1
    assert original["time"] == [1, 1, 1]
    balf = next(r for r in first["rows"] if r["method"] == "BALF")
    assert balf["macs"] <= 0.5
    assert balf["change, lossless"][0] == pytest.approx(balf["score"] - 87.5)

    def refuse(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(baselines, "balf", refuse)
    monkeypatch.setattr(accuracy.compress, "compress_model", refuse)
    monkeypatch.setattr(accuracy, "Evaluation", original_only(accuracy.Evaluation, case))
    (second,), _ = run()
    assert [r.get("score") for r in second["rows"]] == [r.get("score") for r in first["rows"]]


def original_only(base, case):
    """Return an evaluation that refuses all but the original network."""
    values = base.values

    class OriginalOnly(base):
        def values(self, model):
            assert model is case.model
            return values(self, model)

    return OriginalOnly


def test_a_point_dominates_if_it_is_faster_and_more_accurate(case):
    study = accuracy.Study(case, 1, None)
    random = np.random.default_rng(0)
    good, bad = (random.random((1, 64)) < p for p in (0.95, 0.4))
    points = []
    for label, values in (("fast good", good), ("slow bad", bad), ("fast bad", bad)):
        point = accuracy.Point(label, "share", 0.5, values={"lossless": values.astype(float)})
        points.append(point)
    fast, slow = np.linspace(1, 1.1, 9), np.linspace(2, 2.1, 9)
    times = {p.label: fast if "fast" in p.method else slow for p in points}
    pairs = list(accuracy.dominating(study, points, points, times))
    assert [(p.better.split(",")[0], p.worse.split(",")[0]) for p in pairs] == [
        ("fast good", "slow bad")
    ]
    assert pairs[0].is_certain
    noisy = {**times, "slow bad, share 0.5": np.array([0.9] * 4 + [3.0] * 5)}
    assert not next(accuracy.dominating(study, points, points, noisy)).is_certain
