"""The README's table: times of common workloads in several libraries.

    python -m asv_benchmarks.readme [--rounds N] [--threads 1 2]      prints it as Markdown

Milliseconds, each library in its fastest configuration: PyTorch's better layout, the best function
of OpenCV and SciPy, the better implementation of TensorLy-Torch, and the best number of threads.
Each library runs in its own process, since idle thread pools would occupy the others' cores; the
processes run alternately, and a cell is the median of their medians.  The fastest is bold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys

import numpy as np
import scipy.ndimage as ndi

from asv_benchmarks.benchmarks.cases import KINDS, Work, bell
from asv_benchmarks.benchmarks.libraries import Call, cv2, torch, torch_peers
from asv_benchmarks.benchmarks.timing import measure_seconds
from asv_benchmarks.compare import cpu
from lowrank._kernels import _core

#: Title in the table: name of the case.
ROWS = {
    "3×3 layer, 64 channels at 56²": "dense 3x3, 64 at 56x56, N=1",
    "the same as CP of rank 64": "cp 64, 64 3x3 at 56x56, N=1",
    "the same as Tucker, 16 × 16": "tucker 16,16, 64 3x3 at 56x56, N=1",
    "3×3 layer, 256 channels at 14², as CP": "cp 256, 256 3x3 at 14x14, N=1",
    "the same in two passes of 128 maps": "spatial_svd 128, 256 3x3 at 14x14, N=1",
    "the same as three depthwise terms": "network_decoupling dw-pw 3, 256 3x3 at 14x14, N=1",
    "3×3 layer, 512 channels at 7², 8 images": "dense 3x3, 512 at 7x7, N=8",
    "the 13 blocks of MobileNetV1": "all 13 blocks of MobileNetV1, N=1",
    "separable 9×9, image of 2048²": "filter 9x9 of rank 1, 2048x2048",
    "separable 31×31, image of 2048²": "filter 31x31 of rank 1, 2048x2048",
    "15×15 of rank 3, image of 2048²": "filter 15x15 of rank 3, 2048x2048",
    "separable 9×9, colours of 1024², uint8": "filter 9x9 of rank 1, 1024x1024x3 uint8",
    "separable 9×9×9, volume of 256³": "filter 9x9x9 of rank 1, 256^3",
}
#: Column: prefixes of its peers' names.
COLUMNS = {
    "lowrank": ("ours",),
    "PyTorch": ("torch",),
    "onnxruntime": ("onnxruntime",),
    "TensorLy-Torch": ("TensorLy-Torch",),
    "OpenCV": ("cv2", "R x cv2"),
    "SciPy": ("scipy",),
}
SECONDS = 0.3  # per row and library


def extra_peers(name: str) -> dict[str, Call]:
    """Return PyTorch's and SciPy's image filters, which asv_benchmarks.compare omits."""
    if not name.endswith("of rank 1, 2048x2048"):
        return {}
    line = bell(int(name.split()[1].split("x")[0]))
    image = np.random.default_rng(0).random((2048, 2048), dtype=np.float32)
    found: dict[str, Call] = {
        "scipy.ndimage": lambda: ndi.correlate1d(ndi.correlate1d(image, line, 0), line, 1)
    }
    if torch is not None:
        import lowrank

        f = lowrank.filters.separate(np.outer(line, line), rank=1)
        stages = [  # PyTorch has no mirrored borders; zero padding is cheaper
            lowrank.Stage(
                s.weight.astype(np.float32),
                lowrank.Geometry.of(2, padding=[k // 2 for k in s.kernel]),
            )
            for s in f.stages
        ]
        found |= torch_peers(stages, image[None, None])
    return found


def worker(column: str, threads: int) -> dict[str, float]:
    """Return seconds of one library by title."""
    if torch is not None:
        torch.set_num_threads(threads)
    if cv2 is not None:
        cv2.setNumThreads(threads)
    cases = {c.name: c for make in KINDS.values() for c in make(threads, False)}
    found = {}
    for title, name in ROWS.items():
        work: Work = cases[name].make()
        calls = {"ours": work.ours} | work.peers | extra_peers(name)
        mine = [call for peer, call in calls.items() if peer.startswith(COLUMNS[column])]
        if mine:
            found[title] = min(measure_seconds(mine, SECONDS))
    return found


def run_in_process(column: str, threads: int) -> dict[str, float]:
    """Run `worker` in a new process."""
    command = [sys.executable, "-m", "asv_benchmarks.readme", "--worker", column]
    command += ["--threads", str(threads)]
    # Threads may spin: no other library runs.
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "active"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(given.worker, given.threads[0])))
        return
    rounds = [
        {(column, n): run_in_process(column, n) for column in COLUMNS for n in given.threads}
        for _ in range(given.rounds)
    ]
    many = " or ".join(map(str, given.threads))
    print(f"{datetime.date.today()}, {cpu()}, {_core.default_isa()}, {many} threads\n")
    print(f"| milliseconds | {' | '.join(COLUMNS)} |")
    print("| --- |" + " --- |" * len(COLUMNS))
    for title in ROWS:
        cells = []
        for column in COLUMNS:
            medians = [
                statistics.median(r[column, n][title] for r in rounds)
                for n in given.threads
                if title in rounds[0][column, n]
            ]
            cells.append(f"{1e3 * min(medians):.3g}" if medians else "-")
        best = min((c for c in cells if c != "-"), key=float)
        marked = (f"**{c}**" if c == best else c for c in cells)
        print(f"| {title} | {' | '.join(marked)} |", flush=True)


if __name__ == "__main__":
    main()
