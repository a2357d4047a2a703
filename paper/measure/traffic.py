"""Memory traffic and time of chains, stage by stage and fused, on one thread.

Traffic is counted in elements that each stage, or the fused chain, must read and write.  Stage by
stage, every stage is compiled alone and its whole output is stored.
"""

import functools
import sys

import numpy as np
import tables

import lowrank
from asv_benchmarks.benchmarks.timing import measure_seconds

SECONDS = 0.3
#: Output channels, input channels, size: layers of MobileNet.
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


def stage_by_stage(stages, size):
    """Return a call that runs each stage on the whole output of the previous one."""
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
        dense_layer = lowrank.chain([stage((out, ins, 3, 3))])
        for name, stages in chains(out, ins):
            f = lowrank.chain(stages)
            cost, dense = f.cost((ins, *size)), dense_layer.cost((ins, *size))
            run = f.compile((ins, *size), np.float32, threads=1)
            x = np.random.default_rng(1).standard_normal((1, ins, *size), np.float32)
            y = run(x)
            fused_call = functools.partial(run, x, y)
            fused, single = measure_seconds([fused_call, stage_by_stage(stages, size)], SECONDS)
            yield (name, f"{ins} to {out} at {side}²", cost.macs, dense.traffic, cost.traffic,
                   cost.fused, f"{single:.4g}", f"{fused:.4g}",
                   tables.spread(single, fused))  # fmt: skip


def main(target):
    header = ["chain", "layer", "macs", "dense", "unfused", "fused", "seconds_unfused",
              "seconds_fused", "spread"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
