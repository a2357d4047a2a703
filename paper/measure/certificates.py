"""Achieved errors beside the least possible, for chains at a third of a layer's multiply-adds.

The layers of the digit network, and where LOWRANK_DATA has it every 3 x 3 layer of ResNet-20: how
separable trained layers are, from the first to the last.
"""

import sys

import tables

import lowrank

FAMILIES = ("channel_svd", "spatial_svd", "network_decoupling", "tucker", "tensor_train", "cp3")


def convolutions():
    """(net, number, name, convolution, input size)"""
    for net in ("digits", "ResNet-20"):
        some = [x for x in tables.trained(net) if x.conv.stages[0].kernel == (3, 3)]
        for i, layer in enumerate(some):
            yield net, i, layer.name, layer.conv, layer.input_size


def rows():
    for net, number, name, conv, size in convolutions():
        whole = conv.cost(size).macs
        for family in FAMILIES:
            try:
                f = lowrank.approximate(conv, size, macs=1 / 3, families=[family])
            except ValueError:  # no form of so few, or none at all
                continue
            sure = lowrank.certificate(conv, f)
            share = f"{f.cost(size).macs / whole:.4f}"
            yield net, number, name, family, share, f"{sure.error:.5f}", f"{sure.bound:.5f}"


def main(target):
    tables.write(target, ["net", "number", "layer", "family", "macs", "error", "bound"], rows())


if __name__ == "__main__":
    main(sys.argv[1])
