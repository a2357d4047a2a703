"""CP layers with and without error-preserving correction: error, sensitivity, and in float16.

The layers of the digit network, and one of ResNet-20 where LOWRANK_DATA has it; CP of three
stages at half, once and one and a half times as many terms as channels.
"""

import sys

import tables

import lowrank
from lowrank.families import als


def plain(conv, rank):
    """The same fit, and nothing of its error spent on correction."""
    kept = als.SLACK
    als.SLACK = 0.0
    try:
        return lowrank.cp3(conv, rank)
    finally:
        als.SLACK = kept


def rows():
    layers = [("digits", x) for x in tables.trained("digits")[1:]]
    layers += [("ResNet-20", x) for x in tables.trained("ResNet-20", "layer2.2.conv2")]
    for net, layer in layers:
        conv = layer.conv
        largest = min(conv.out_channels, conv.in_channels)
        for share in (0.5, 1.0, 1.5):
            rank = round(share * largest)
            for way, fit in (("without", plain), ("with", lowrank.cp3)):
                f = fit(conv, rank)
                sure = lowrank.certificate(conv, f)
                half = lowrank.certify.rounding(f, "float16").output
                yield (f"{net} {layer.name}", rank, way, f"{sure.error:.5f}",
                       f"{sure.sensitivity:.4g}", f"{half:.3g}")  # fmt: skip


def main(target):
    header = ["layer", "rank", "way", "error", "sensitivity", "float16"]
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
