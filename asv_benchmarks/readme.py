"""The table of the README: a dozen works beside the libraries that people use for them today.

    python -m asv_benchmarks.readme [--threads N]      prints it as Markdown

Milliseconds, medians of calls that take turns in one process.  A column is a library's fastest way
to do the same work: PyTorch's better layout, OpenCV's and SciPy's best function, TensorLy-Torch's
better implementation of the same factors.  SciPy has one thread.
"""

from __future__ import annotations

import argparse
import datetime
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import scipy.ndimage as ndi

from asv_benchmarks.benchmarks.cases import KINDS, Work, bell
from asv_benchmarks.benchmarks.libraries import Call, cv2, torch, torch_peers
from asv_benchmarks.benchmarks.measure import measured
from asv_benchmarks.compare import cpu
from lowrank._kernels import _core

#: What the table says, and the row of the comparison that it is.
ROWS = {
    "3×3 layer, 64 channels at 56²": "dense 3x3, 64 at 56x56, N=1",
    "the same as CP of rank 64": "cp 64, 64 3x3 at 56x56, N=1",
    "the same as Tucker, 16 × 16": "tucker 16,16, 64 3x3 at 56x56, N=1",
    "3×3 layer, 256 channels at 14², as CP": "cp 256, 256 3x3 at 14x14, N=1",
    "the same in two passes of 128 maps": "spatial 128, 256 3x3 at 14x14, N=1",
    "the same as three depthwise terms": "decouple dw-pw 3, 256 3x3 at 14x14, N=1",
    "the 13 blocks of MobileNetV1": "all 13 blocks of MobileNetV1, N=1",
    "separable 9×9, image of 2048²": "filter 9x9 of rank 1, 2048x2048",
    "separable 31×31, image of 2048²": "filter 31x31 of rank 1, 2048x2048",
    "15×15 of rank 3, image of 2048²": "filter 15x15 of rank 3, 2048x2048",
    "separable 9×9×9, volume of 256³": "filter 9x9x9 of rank 1, 256^3",
}
#: A column, and the beginnings of its peers' names.
COLUMNS = {
    "PyTorch": ("torch",), "onnxruntime": ("onnxruntime",), "TensorLy-Torch": ("TensorLy-Torch",), "OpenCV": ("cv2", "R x cv2"),
    "SciPy": ("scipy",),
}  # fmt: skip
SECONDS = 1.5  # a row


def others(name: str) -> dict[str, Call]:
    """PyTorch's and SciPy's ways to filter an image: the comparison leaves them out."""
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
        stages = [  # PyTorch has no mirrored borders of its own: zeros cost it less
            lowrank.Stage(
                s.weight.astype(np.float32),
                lowrank.Geometry.of(2, padding=[k // 2 for k in s.kernel]),
            )
            for s in f.stages
        ]
        found |= torch_peers(stages, image[None, None])
    return found


def row(title: str, name: str, work: Work) -> str:
    peers = work.peers | others(name)
    ours, *rest = measured([work.ours, *peers.values()], SECONDS)
    seen = dict(zip(peers, rest))
    cells = []
    for starts in COLUMNS.values():
        some = [t for peer, t in seen.items() if peer.startswith(starts)]
        cells.append(f"{1e3 * min(some):.3g}" if some else "")
    return f"| {title} | **{1e3 * ours:.3g}** | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=min(2, _core.max_threads()))
    threads = parser.parse_args().threads
    if torch is not None:
        torch.set_num_threads(threads)
    if cv2 is not None:
        cv2.setNumThreads(threads)
    cases = {c.name: c for make in KINDS.values() for c in make(threads, False)}
    print(f"{datetime.date.today()}, {cpu()}, {_core.default_isa()}, {threads} threads\n")
    print(f"| milliseconds | lowrank | {' | '.join(COLUMNS)} |")
    print("| --- |" + " --- |" * (1 + len(COLUMNS)))
    for title, name in ROWS.items():
        print(row(title, name, cases[name].make()), flush=True)


if __name__ == "__main__":
    main()
