"""Error, sensitivity and float16 error of CP layers with and without error-preserving correction.

Layers of the digit network and, with LOWRANK_DATA, one of ResNet-20; CP of three stages with rank
0.5, 1 and 1.5 times the number of channels.
"""

import sys

import tables

import lowrank
from lowrank.families import als


def fit_uncorrected(conv, rank):
    """Return the fit without correction."""
    slack = als.SLACK
    als.SLACK = 0.0
    try:
        return lowrank.cp3(conv, rank)
    finally:
        als.SLACK = slack


def rows():
    layers = [("digits", x) for x in tables.trained("digits")[1:]]
    layers += [("ResNet-20", x) for x in tables.trained("ResNet-20", "layer2.2.conv2")]
    for net, layer in layers:
        conv = layer.conv
        largest = min(conv.out_channels, conv.in_channels)
        for share in (0.5, 1.0, 1.5):
            rank = round(share * largest)
            for label, fit in (("without", fit_uncorrected), ("with", lowrank.cp3)):
                f = fit(conv, rank)
                certificate = lowrank.certificate(conv, f)
                half = lowrank.certify.rounding(f, "float16").output
                yield (f"{net} {layer.name}", rank, label, f"{certificate.error:.5f}",
                       f"{certificate.sensitivity:.4g}", f"{half:.3g}")  # fmt: skip


def main(target):
    header = ["layer", "rank", "fit", "error", "sensitivity", "float16"]
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
