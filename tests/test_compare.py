"""The comparison with other libraries runs with those that are installed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def test_compare_prints_json():
    command = [sys.executable, "-m", "asv_benchmarks.compare", "--quick", "--json"]
    process = subprocess.run(
        [*command, "--only", "9x9x9"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(process.stdout)
    assert found["machine"]["peak_gflops"] > 0
    (row,) = found["rows"]
    assert {"name", "ours_s", "peer", "peer_s", "speedup", "target", "roofline_share"} <= row.keys()
    assert row["peer"].startswith("scipy")
    assert 0 < row["ours_s"] < 10
    assert row["speedup"] > 0


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
