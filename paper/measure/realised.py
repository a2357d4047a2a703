"""How much of the ratio of multiply-adds becomes time, for chains of ten kinds.

A share is a measured speed-up over a dense layer, divided by the quotient of multiply-adds: 1
where a chain with a third of the work takes a third of the time.  The dense layer is PyTorch's in
its better layout, the median over the rows of a layer; `own_share` is over our engine's.  Ours, and
the same stages in PyTorch's better layout and in onnxruntime; one thread, all in turns.
"""

import itertools
import statistics
import sys

import tables

from asv_benchmarks.benchmarks import cases
from asv_benchmarks.benchmarks.measure import measured

SECONDS = 0.4  # a row


def of(layer, some, own):
    """The rows of one layer; `own` is a call of it, dense, on our engine."""
    found = []
    for chain, case in some:
        work = case.make()
        peers = {n: c for n, c in work.peers.items() if n.startswith(("torch", "onnx"))}
        calls = [work.ours, own, *work.dense.values(), *peers.values()]
        ours, mine, *others = measured(calls, SECONDS)
        dense = min(others[: len(work.dense)])
        seen = dict(zip(peers, others[len(work.dense) :]))
        torch = min(t for n, t in seen.items() if n.startswith("torch"))
        found.append((chain, work.fewer, dense, mine, torch, seen.get("onnxruntime"), ours))
    dense = statistics.median(f[2] for f in found)
    mine = statistics.median(f[3] for f in found)
    for chain, fewer, _, _, torch, onnx, ours in found:
        times = (f"{t:.4g}" if t else "" for t in (dense, mine, torch, onnx, ours))
        shares = (f"{dense / t / fewer:.3f}" if t else "" for t in (torch, onnx, ours))
        yield chain, layer, f"{fewer:.4f}", *times, *shares, f"{mine / ours / fewer:.3f}"


def rows():
    # "tucker 16,16, 64 3x3 at 56x56, N=1"
    named = [(*case.name.rsplit(", ", 2)[:2], case) for case in cases.chain_rows(1, True)]
    dense = [case.make().ours for case in cases.dense_rows(1, True)]
    for (layer, some), own in zip(itertools.groupby(named, key=lambda n: n[1]), dense, strict=True):
        yield from of(layer, [(chain, case) for chain, _, case in some], own)


def main(target):
    tables.peers().set_num_threads(1)
    header = ["chain", "layer", "fewer", "dense", "own_dense", "torch", "onnxruntime", "lowrank",
              "torch_share", "onnxruntime_share", "lowrank_share", "own_share"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
