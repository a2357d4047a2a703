"""Error and cost of every Pareto-optimal candidate per family on layers of trained networks.

Layers of the digit network and, with LOWRANK_DATA, one of ResNet-20.
"""

import sys

import tables

import lowrank


def rows():
    layers = [("digits", x) for x in tables.trained("digits")[1:]]
    layers += [("ResNet-20", x) for x in tables.trained("ResNet-20", "layer2.2.conv2")]
    for net, layer in layers:
        conv, size = layer.conv, layer.input_size
        dense = conv.cost(size).macs
        for family in lowrank.FAMILIES:
            for c in lowrank.frontier(conv, size, [family], axis="macs"):
                if c.family != "dense":
                    rank = " ".join(map(str, c.rank))
                    share = f"{c.cost.macs / dense:.6g}"
                    yield (f"{net} {layer.name}", c.family, c.variant, rank, share,
                           f"{c.error:.5f}", f"{c.bound:.5f}")  # fmt: skip


def main(target):
    header = ["layer", "family", "variant", "rank", "macs", "error", "bound"]
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
