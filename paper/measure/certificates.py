"""Achieved errors beside the least possible, for chains at a third of a layer's multiply-adds.

The layers of the digit network, and where LOWRANK_DATA has it every 3 x 3 layer of ResNet-20: how
separable trained layers are, from the first to the last.
"""

import csv
import os
import sys
from pathlib import Path

import lowrank
from lowrank import demo
from lowrank.weights import layers

FAMILIES = ("encode", "spatial", "decouple", "tucker", "tensor_train", "cp3")


def convolutions():
    """(net, number, name, convolution, input size)"""
    for i, layer in enumerate(layers(demo.WEIGHTS)):
        yield "digits", i, layer.name, layer.conv, layer.input_size
    folder = os.environ.get("LOWRANK_DATA")
    if folder:
        path = Path(folder, "weights", "resnet20_cifar10.safetensors")
        every = [x for x in layers(path) if x.conv.stages[0].kernel == (3, 3)]
        for i, layer in enumerate(every):
            yield "ResNet-20", i, layer.name, layer.conv, layer.input_size


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["net", "number", "layer", "family", "macs", "error", "bound"])
        for net, number, name, conv, size in convolutions():
            whole = conv.cost(size).macs
            for family in FAMILIES:
                try:
                    f = lowrank.approximate(conv, size, macs=1 / 3, families=[family])
                except ValueError:  # no form of so few, or none at all
                    continue
                sure = lowrank.certificate(conv, f)
                share = f"{f.cost(size).macs / whole:.4f}"
                rows.writerow(
                    [net, number, name, family, share, f"{sure.error:.5f}", f"{sure.bound:.5f}"]
                )


if __name__ == "__main__":
    main(sys.argv[1])
