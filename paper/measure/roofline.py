"""Operations, bytes and time of every kind of workload, with the machine's peak and copy rate.

Bytes are the compulsory traffic: input, weights and output once.  The peak is that of FMAs in
registers, the copy rate that of arrays beyond the caches; one thread.  The peer is the fastest
installed library of PyTorch (two layouts), onnxruntime, OpenCV and SciPy.
"""

import contextlib
import datetime
import sys
from importlib.metadata import PackageNotFoundError, version

import tables

from asv_benchmarks import compare
from asv_benchmarks.benchmarks import libraries
from asv_benchmarks.benchmarks.cases import KINDS
from asv_benchmarks.benchmarks.timing import measure_seconds

WORK = ("dense", "depthwise", "series", "mobilenet", "chain", "image", "rank", "volume")
SECONDS = 0.2  # per row


def versions():
    """Return the versions of the compared libraries."""
    packages = {"NumPy": "numpy", "SciPy": "scipy", "PyTorch": "torch",
                "onnxruntime": "onnxruntime", "OpenCV": "opencv-python-headless",
                "TensorLy": "tensorly"}  # fmt: skip
    found = {}
    for name, package in packages.items():
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(package).partition("+")[0]
    return ", ".join(f"{name} {number}" for name, number in found.items())


def rows():
    about = compare.machine(1)
    facts = [about["cpu"], about["isa"], f"{about['peak_gflops']:.1f}", f"{about['copy_gbs']:.1f}",
             datetime.date.today().isoformat(), versions()]  # fmt: skip
    for kind in WORK:
        for case in KINDS[kind](1, True):
            work = case.make()
            ours, *others = measure_seconds([work.ours, *work.peers.values()], SECONDS)
            peer, best = min(zip(others, work.peers), default=("", ""))
            peer = peer if peer == "" else f"{peer:.4g}"
            yield (kind, case.name, f"{work.flops:.6g}", f"{work.bytes:.6g}", f"{ours:.4g}",
                   best, peer, tables.spread(ours), *facts)  # fmt: skip


def main(target):
    if libraries.torch is not None:
        libraries.torch.set_num_threads(1)
    if libraries.cv2 is not None:
        libraries.cv2.setNumThreads(1)
    header = ["kind", "work", "flops", "bytes", "seconds", "peer", "peer_seconds", "spread",
              "cpu", "isa", "peak_gflops", "copy_gbs", "date", "versions"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
