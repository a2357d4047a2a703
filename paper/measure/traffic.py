"""Elements moved by chains, stage by stage and fused, and the time of both on one thread.

Counted: what each stage, or the fused chain as a whole, must read and write. Run stage by stage,
a chain of ours is its stages, each compiled alone, with whole intermediates between them.
"""

import functools
import sys

import numpy as np
import tables

import lowrank
from asv_benchmarks.benchmarks.measure import measured

SECONDS = 0.3
#: out and in channels, sizes: those of MobileNet's, where an article says that traffic falls.
SHAPES = [(64, 32, 112), (128, 64, 112), (128, 128, 56), (256, 256, 28), (512, 512, 14),
          (512, 512, 7)]  # fmt: skip


def stage(shape, groups=1):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    padding = [k // 2 for k in shape[2:]]
    return lowrank.Stage(weight, lowrank.Geometry.of(2, padding=padding), groups=groups)


def chains(out, ins):
    quarter = max(ins // 4, 8)
    yield "depthwise + pointwise", [stage((ins, 1, 3, 3), ins), stage((out, ins, 1, 1))]
    yield "cp", [stage((ins, ins, 1, 1)), stage((ins, 1, 3, 1), ins), stage((ins, 1, 1, 3), ins),
                 stage((out, ins, 1, 1))]  # fmt: skip
    yield "tucker", [stage((quarter, ins, 1, 1)), stage((quarter, quarter, 3, 3)),
                     stage((out, quarter, 1, 1))]  # fmt: skip
    yield "spatial_svd", [stage((ins // 2, ins, 3, 1)), stage((out, ins // 2, 1, 3))]


def apart(stages, size):
    """The stages one by one, each on the whole of what the one before it gave."""
    x = np.random.default_rng(1).standard_normal((1, stages[0].in_channels, *size), np.float32)
    runs, outs = [], [x]
    for s in stages:
        run = lowrank.chain([s]).compile(outs[-1].shape[1:], np.float32, threads=1)
        runs.append(run)
        outs.append(run(outs[-1]))

    def call():
        for run, a, b in zip(runs, outs, outs[1:]):
            run(a, b)

    return call


def rows():
    for out, ins, side in SHAPES:
        size = (side, side)
        whole = lowrank.chain([stage((out, ins, 3, 3))])
        for name, stages in chains(out, ins):
            f = lowrank.chain(stages)
            cost, dense = f.cost((ins, *size)), whole.cost((ins, *size))
            run = f.compile((ins, *size), np.float32, threads=1)
            x = np.random.default_rng(1).standard_normal((1, ins, *size), np.float32)
            y = run(x)
            whole_chain = functools.partial(run, x, y)
            fused, single = measured([whole_chain, apart(stages, size)], SECONDS)
            yield (name, f"{ins} to {out} at {side}²", cost.macs, dense.traffic, cost.traffic,
                   cost.fused, f"{single:.4g}", f"{fused:.4g}")  # fmt: skip


def main(target):
    header = ["chain", "layer", "macs", "dense", "unfused", "fused", "seconds_unfused",
              "seconds_fused"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
