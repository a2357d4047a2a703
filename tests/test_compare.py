"""The comparison with other libraries runs with those that are installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def test_compare_prints_json():
    command = [sys.executable, "-m", "asv_benchmarks.compare", "--quick", "--json"]
    process = subprocess.run(
        [*command, "--only", "9x9x9"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(process.stdout)
    assert all(machine["peak_gflops"] > 0 for machine in found["machine"])
    assert [row["threads"] for row in found["rows"]] == [m["threads"] for m in found["machine"]]
    for row in found["rows"]:
        assert {"name", "ours_s", "peer", "peer_s", "target", "roofline_share"} <= row.keys()
        assert row["peer"].startswith("scipy")
        assert 0 < row["ours_s"] < 10
        assert row["speedup"] > 0


# PyTorch's own module that folds batch norms
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")
def test_networks_are_compared_dense_and_compressed(monkeypatch):
    torch = pytest.importorskip("torch")
    from asv_benchmarks.benchmarks import networks, whole
    from lowrank.interop.torch import layers

    conv, x = torch.nn.Conv2d(32, 32, 3, padding=1), torch.ones(2, 32, 8, 8)
    net = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Conv2d(32, 4, 3)).eval()
    small = networks.Candidates(net, x).compress(1 / 3, 1, 1)
    dense, kept = (
        sum(layer.cost.macs for layer in layers(model, x).values()) for model in (net, small)
    )
    assert 0.25 < kept / dense <= 1 / 3
    assert small(x).shape == net(x).shape

    monkeypatch.setattr(networks, "NETWORKS", [networks.Network("tiny", (1,), 2.0)])
    monkeypatch.setattr(networks, "load", lambda name, batch: (net, x[:batch]))
    monkeypatch.setattr(whole, "SECONDS", 0.01)
    lines = list(networks.measure((1, 2), False, "network: tiny"))
    assert [line[0]["kind"] for line in lines] == ["network", *["low rank", "over dense"] * 2]
    for line in lines:
        assert [row["threads"] for row in line] == [1, 2]
        assert all(t > 0 for row in line for t in row["peers"].values())
    exact, low_rank, over_dense = (line[0] for line in lines[:3])
    assert low_rank["peers"] == {"exact program": exact["ours"]}
    assert over_dense["peers"] == exact["peers"]
    assert over_dense["others"].keys() == {n.replace("dense", "1/2") for n in exact["peers"]}
    assert not list(networks.measure((1,), True, "network: other"))


def test_verdicts_name_missed_targets():
    from asv_benchmarks import compare

    speedups = (2.0, 1.5, 0.8)
    rows = [
        compare._row("chain", f"chain {s}", 1, 1.0, {"a": s, "b": 9.0}, 1.4, least=0.9)
        for s in speedups
    ]
    assert [r["peer"] for r in rows] == ["a"] * 3
    mean, slower = compare.verdicts(rows)
    assert " 1.34 of  1.40 MISSED" in mean
    assert mean.endswith("1 UNDER 0.9, least 0.80: chain 0.8")
    assert slower.endswith("slower in 33.3% of the rows, of 5% MISSED")


def assert_close(ours, theirs):
    """Compare sums of thousands of float32 products in different orders."""
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "depthwise 5x5 stride 2, 128",
        "with bias and ReLU6 512 -> 512",
        "64 3x3 at 56x56, N=1",
        "32 3x3x3 at 16x28x28",
        "filter 9x9 of rank 1, 512x512",
    ],
)
def test_all_libraries_compute_the_same_result(name):
    pytest.importorskip("torch")
    from asv_benchmarks.benchmarks import cases

    found = [c for kind in cases.KINDS.values() for c in kind(2, True) if name in c.name]
    assert found
    for case in found:
        work = case.make()
        ours = np.squeeze(work.ours())
        for call in work.peers.values():
            theirs = call()
            if theirs is not None:  # onnxruntime leaves its result in a bound buffer
                assert_close(ours, np.squeeze(np.asarray(theirs)))
