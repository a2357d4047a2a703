"""Achieved errors and their lower bounds, for chains at a third of a layer's MACs.

Layers of the digit network and, with LOWRANK_DATA, every 3 x 3 layer of ResNet-20.
"""

import sys

import tables

import lowrank

CURVES = (
    "channel_svd output",
    "spatial_svd",
    "network_decoupling",
    "tucker",
    "tensor_train",
    "cp3",
)


def convolutions():
    """Yield (net, number, name, convolution, input size)."""
    for net in ("digits", "ResNet-20"):
        some = [x for x in tables.trained(net) if x.conv.stages[0].kernel == (3, 3)]
        for i, layer in enumerate(some):
            yield net, i, layer.name, layer.conv, layer.input_size


def rows():
    for net, number, name, conv, size in convolutions():
        dense = conv.cost(size).macs
        for curve in CURVES:
            for f in tables.fits_within(conv, size, curve, [1 / 3]):
                certificate = lowrank.certificate(conv, f)
                yield (net, number, name, curve, f"{f.cost(size).macs / dense:.4f}",
                       f"{certificate.error:.5f}", f"{certificate.bound:.5f}")  # fmt: skip


def main(target):
    tables.write(target, ["net", "number", "layer", "family", "macs", "error", "bound"], rows())


if __name__ == "__main__":
    main(sys.argv[1])
