"""Error and cost of every candidate of every family, on layers of trained networks.

The layers of the digit network come with the library; that of ResNet-20 is added where the
folder LOWRANK_DATA has it.
"""

import csv
import os
import sys
from pathlib import Path

import lowrank
from lowrank import demo
from lowrank.weights import layers


def convolutions():
    """(name, convolution, input size)"""
    for layer in layers(demo.WEIGHTS)[1:]:
        yield f"digits {layer.name}", layer.conv, layer.input_size
    folder = os.environ.get("LOWRANK_DATA")
    if folder:
        path = Path(folder, "weights", "resnet20_cifar10.safetensors")
        for layer in layers(path, only="layer2.2.conv2"):
            yield "ResNet-20 layer2.2.conv2", layer.conv, layer.input_size


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["layer", "family", "form", "rank", "macs", "error", "bound"])
        for name, conv, size in convolutions():
            whole = conv.cost(size).macs
            for family in lowrank.FAMILIES:
                for c in lowrank.frontier(conv, size, [family], axis="macs"):
                    rank = " ".join(map(str, c.rank))
                    share = f"{c.cost.macs / whole:.6g}"
                    row = [name, c.family, c.form, rank, share, f"{c.error:.5f}", f"{c.bound:.5f}"]
                    if c.family != "dense":
                        rows.writerow(row)


if __name__ == "__main__":
    main(sys.argv[1])
