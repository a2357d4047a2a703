"""The comparison with other libraries runs, with whatever of them is installed."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_compare_prints_json():
    command = [sys.executable, "-m", "asv_benchmarks.compare", "--quick", "--json"]
    done = subprocess.run(
        [*command, "--only", "9x9x9"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["machine"]["peak_gflops"] > 0
    (row,) = found["rows"]
    assert {"name", "ours_s", "peer", "peer_s", "speedup", "target", "roofline_share"} <= row.keys()
    assert row["peer"].startswith("scipy")
    assert 0 < row["ours_s"] < 10
    assert row["speedup"] > 0
