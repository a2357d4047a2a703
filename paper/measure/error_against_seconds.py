"""Weight error against measured time: every family on layers of trained networks.

The best candidates per family within a few shares of the MACs, timed interleaved with the dense
layer; one image, one thread.  Candidates slower than the dense layer are included.
"""

import sys

import numpy as np
import tables

import lowrank
from asv_benchmarks.benchmarks.timing import measure_seconds

LAYERS = {"digits": ["conv3"], "ResNet-20": ["layer1.1.conv1", "layer3.1.conv2"],
          "style": ["resid3.conv1"]}  # fmt: skip
SHARES = (1 / 8, 1 / 5, 1 / 3, 1 / 2, 3 / 4)
SECONDS = 0.1


def rows():
    for net, names in LAYERS.items():
        for name in names:
            for layer in tables.trained(net, name):
                yield from measure(f"{net} {name}", layer.conv, layer.input_size)


def measure(name, conv, size):
    shape = (conv.in_channels, *size)
    x = np.random.default_rng(0).standard_normal((1, *shape), dtype=np.float32)
    dense = conv.compile(shape, np.float32, threads=1)
    out = dense(x)
    dense_macs = conv.cost(size).macs
    for family in lowrank.FAMILIES:
        if family in ("cp", "tucker_cp") and conv.in_channels > 64:
            continue  # the sweep takes minutes
        try:
            front = lowrank.frontier(conv, size, [family], axis="macs")
        except ValueError:
            continue
        seen = set()
        for share in SHARES:
            some = [c for c in front if c.cost.macs <= share * dense_macs and c.family != "dense"]
            if not some or some[-1].rank in seen:
                continue
            c = some[-1]
            seen.add(c.rank)
            f = c.build()
            run = f.compile(shape, np.float32, threads=1)
            y = run(x)
            seconds, dense_s = measure_seconds(
                [lambda r=run, y=y: r(x, y), lambda: dense(x, out)], SECONDS
            )
            rank = " ".join(map(str, c.rank))
            error = f.error(conv.to_dense())
            yield (name, c.family, c.variant, rank, f"{c.cost.macs / dense_macs:.4f}",
                   f"{error:.5f}", f"{c.bound:.5f}",
                   f"{seconds / dense_s:.4f}", f"{dense_s:.4g}",
                   tables.spread(seconds, dense_s))  # fmt: skip


def main(target):
    header = ["layer", "family", "variant", "rank", "macs", "error", "bound", "seconds",
              "dense_seconds", "spread"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
