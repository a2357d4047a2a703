"""Accuracy of ResNet-20 against measured latency, of methods by name on three runtimes.

Three calibration seeds and all test images of the folder LOWRANK_DATA; see asv_benchmarks.accuracy.
The fits are kept in build/fits: delete the folder after a change to fits.
"""

import json
import subprocess
import sys
from pathlib import Path

import tables

NET = "resnet20_cifar10"
RUNTIMES = "lowrank", "onnxruntime", "torch"
HEADER = (
    "runtime", "method", "value", "macs", "milliseconds", "time", "time_low", "time_high", "score",
    "change", "change_low", "change_high", "seeds",
)  # fmt: skip


def rows(found):
    for one in found:
        for row in one["rows"]:
            method = row["method"].partition(" on ")[0]  # ours are named with their runtime
            change = row.get("change, all") or (0.0, 0.0, 0.0)
            yield (
                one["runtime"], method, f"{row['value']:.2f}", f"{row['macs']:.4f}",
                f"{1e3 * row['seconds']:.4f}", *(f"{t:.3f}" for t in row["time"]),
                f"{row['score']:.2f}", *(f"{c:.2f}" for c in change), one["seeds"],
            )  # fmt: skip


def main(target):
    tables.required_folder()
    tables.require_torch()
    file = Path(target).with_suffix(".json")
    command = [sys.executable, "-m", "asv_benchmarks.accuracy", "--net", NET, "--batch", "1"]
    command += ["--seeds", "3", "--runtime", *RUNTIMES]
    command += ["--fits", str(file.with_name("fits")), "--json", str(file)]
    subprocess.run(command, check=True)
    tables.write(target, HEADER, rows(json.loads(file.read_text())))


if __name__ == "__main__":
    main(sys.argv[1])
