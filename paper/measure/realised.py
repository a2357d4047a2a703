"""How much of the saved multiply-adds becomes time, for chains of ten kinds on ResNet's sizes.

The share is the measured speed-up over PyTorch's dense layer in its better layout, divided by the
quotient of multiply-adds: 1 where a chain with a third of the work takes a third of the time.
Ours, and PyTorch's with the same stages in its better layout; one thread, all in turns.
"""

import sys

import tables

from asv_benchmarks.benchmarks.cases import chain_rows
from asv_benchmarks.benchmarks.measure import measured

SECONDS = 0.3  # a row


def rows():
    for case in chain_rows(1, True):
        work = case.make()
        names = [*work.dense, *(n for n in work.peers if n.startswith("torch"))]
        calls = [work.dense.get(n) or work.peers[n] for n in names]
        ours, *others = measured([work.ours, *calls], SECONDS)
        seen = dict(zip(names, others))
        dense = min(seen[n] for n in work.dense)
        theirs = min(t for n, t in seen.items() if n not in work.dense)
        # "tucker 16,16, 64 3x3 at 56x56, N=1"
        chain, layer, _ = case.name.rsplit(", ", 2)
        shares = (f"{dense / t / work.fewer:.3f}" for t in (theirs, ours))
        yield (chain, layer, f"{work.fewer:.4f}", f"{dense:.4g}", f"{theirs:.4g}", f"{ours:.4g}",
               *shares)  # fmt: skip


def main(target):
    tables.peers().set_num_threads(1)
    header = ["chain", "layer", "fewer", "dense", "torch", "lowrank", "torch_share",
              "lowrank_share"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
