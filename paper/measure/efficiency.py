"""Times and MAC ratios of ten kinds of chains, for their speed-up efficiency.

`dense` is PyTorch's dense layer in its better layout, `own_dense` lowrank's (medians over the rows
of a layer).  Chains run on lowrank, in PyTorch's better layout and in onnxruntime; one thread,
interleaved.
"""

import itertools
import statistics
import sys

import tables

from asv_benchmarks.benchmarks import cases
from asv_benchmarks.benchmarks.timing import measure_seconds

SECONDS = 0.4  # per row


def measure_layer(layer, some, own):
    """Yield the rows of one layer; `own` is a call of the dense layer on lowrank."""
    found = []
    for chain, case in some:
        work = case.make()
        peers = {n: c for n, c in work.peers.items() if n.startswith(("torch", "onnx"))}
        calls = [work.ours, own, *work.dense.values(), *peers.values()]
        ours, own_dense, *others = measure_seconds(calls, SECONDS)
        dense = min(others[: len(work.dense)])
        seen = dict(zip(peers, others[len(work.dense) :]))
        torch = min(t for n, t in seen.items() if n.startswith("torch"))
        times = dense, own_dense, torch, seen.get("onnxruntime"), ours
        found.append((chain, work.fewer, *times, tables.spread(*times)))
    dense = statistics.median(f[2] for f in found)
    own_dense = statistics.median(f[3] for f in found)
    for chain, fewer, _, _, torch, onnx, ours, spread in found:
        times = (f"{t:.4g}" if t else "" for t in (dense, own_dense, torch, onnx, ours))
        yield chain, layer, f"{fewer:.4f}", *times, spread


def rows():
    # "tucker 16,16, 64 3x3 at 56x56, N=1"
    labelled = [(*case.name.rsplit(", ", 2)[:2], case) for case in cases.chain_rows(1, True)]
    dense = [case.make().ours for case in cases.dense_rows(1, True)]
    for (layer, some), own in zip(
        itertools.groupby(labelled, key=lambda n: n[1]), dense, strict=True
    ):
        yield from measure_layer(layer, [(chain, case) for chain, _, case in some], own)


def main(target):
    tables.require_torch().set_num_threads(1)
    header = ["chain", "layer", "fewer", "dense", "own_dense", "torch", "onnxruntime", "lowrank",
              "spread"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
