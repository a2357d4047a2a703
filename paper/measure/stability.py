"""CP layers with and without error-preserving correction: error, sensitivity, and in float16.

The layers of the digit network, and one of ResNet-20 where LOWRANK_DATA has it; CP of three stages
at half, once and one and a half times as many terms as channels.
"""

import csv
import os
import sys
from pathlib import Path

import lowrank
from lowrank import demo
from lowrank.families import _als
from lowrank.weights import layers


def convolutions():
    """(name, convolution)"""
    for layer in layers(demo.WEIGHTS)[1:]:
        yield f"digits {layer.name}", layer.conv
    folder = os.environ.get("LOWRANK_DATA")
    if folder:
        path = Path(folder, "weights", "resnet20_cifar10.safetensors")
        for layer in layers(path, only="layer2.2.conv2"):
            yield "ResNet-20 layer2.2.conv2", layer.conv


def plain(conv, rank):
    """The same fit, and nothing of its error spent on correction."""
    kept = _als.SLACK
    _als.SLACK = 0.0
    try:
        return lowrank.cp3(conv, rank)
    finally:
        _als.SLACK = kept


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["layer", "rank", "way", "error", "sensitivity", "float16"])
        for name, conv in convolutions():
            largest = min(conv.out_channels, conv.in_channels)
            for share in (0.5, 1.0, 1.5):
                rank = round(share * largest)
                for way, fit in (("without", plain), ("with", lowrank.cp3)):
                    f = fit(conv, rank)
                    sure = lowrank.certificate(conv, f)
                    half = lowrank.certify.rounding(f, "float16").output
                    rows.writerow(
                        [name, rank, way, f"{sure.error:.5f}", f"{sure.sensitivity:.4g}",
                         f"{half:.3g}"]
                    )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
