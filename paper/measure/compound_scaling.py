"""MACs and parameters of EfficientNet under compound scaling.

EfficientNet-B0's blocks with depth times 1.2^phi, width times 1.1^phi and image size times
1.15^phi (Tan and Le 2019), stated to double the MACs per step; and the published widths and depths
of B0 to B7.  Every convolution is a stage, priced by `Factorization.cost`, so the counts include
the rounding of channels, repeats and sizes.

`rounding` is "multiples of 8" (channels, as is customary), "integer" (channels) or "published";
repeats are rounded upwards.  `dense inside` has dense kernels in place of the depthwise ones;
`dense blocks` has one 3 x 3 convolution in place of each block.  Norms and squeeze-excitation
count as parameters only, in `extra`.
"""

import csv
import math
import sys
from collections import Counter

import numpy as np

import lowrank
from lowrank import Geometry, Stage

DEPTH, WIDTH, FINER = 1.2, 1.1, 1.15
#: expansion, channels, repeats, stride, taps
BLOCKS = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip
STEM, HEAD, CLASSES, SIZE = 32, 1280, 1000, 224
#: width, depth, image size, stated GMACs, stated millions of parameters
PUBLISHED = (
    (1.0, 1.0, 224, 0.39, 5.3), (1.0, 1.1, 240, 0.70, 7.8), (1.1, 1.2, 260, 1.0, 9.2),
    (1.2, 1.4, 300, 1.8, 12), (1.4, 1.8, 380, 4.2, 19), (1.6, 2.2, 456, 9.9, 30),
    (1.8, 2.6, 528, 19, 43), (2.0, 3.1, 600, 37, 66),
)  # fmt: skip


def layer(out, ins, taps, stride, size, groups=1):
    """Return a convolution whose output size is the input size over the stride, rounded upwards."""
    pad = max((math.ceil(size / stride) - 1) * stride + taps - size, 0)
    geometry = Geometry.of(2, stride, [(pad // 2, pad - pad // 2)] * 2)
    # A broadcast zero: only shapes are counted, and the largest kernels would take gigabytes.
    weight = np.broadcast_to(np.float32(0), (out, ins // groups, taps, taps))
    return lowrank.chain([Stage(weight, geometry, groups=groups)])


class Net:
    """Counts of a network by part."""

    def __init__(self, variant):
        self.variant, self.macs, self.params, self.extra = variant, Counter(), Counter(), 0

    def add(self, part, out, ins, taps, stride, size, groups=1):
        """Count a convolution and its norm; return the output size."""
        f = layer(out, ins, taps, stride, size, groups)
        cost = f.cost((size, size))
        self.macs[part] += cost.macs
        self.params[part] += cost.params
        self.extra += 2 * out
        return f.output_shape((size, size))[1]

    def block(self, out, ins, expansion, taps, stride, size):
        if self.variant == "dense blocks":
            return self.add("dense", out, ins, 3, stride, size)
        inner = expansion * ins
        if expansion > 1:
            self.add("pointwise", inner, ins, 1, 1, size)
        inside = self.variant == "dense inside"
        end = self.add("dense" if inside else "depthwise", inner, inner, taps, stride, size,
                       1 if inside else inner)  # fmt: skip
        squeezed = max(1, ins // 4)
        self.extra += 2 * inner * squeezed + inner + squeezed
        self.add("pointwise", out, inner, 1, 1, end)
        return end


def counted(variant, width, depth, size, multiple):
    def channels(n):
        """Round as the authors' published code does."""
        rounded = max(multiple, int(n * width + multiple / 2) // multiple * multiple)
        return rounded + multiple * (rounded < 0.9 * n * width)

    net = Net(variant)
    ins = channels(STEM)
    size = net.add("ends", ins, 3, 3, 2, size)
    for expansion, out, repeats, stride, taps in BLOCKS:
        out = channels(out)
        for i in range(math.ceil(round(depth * repeats, 9))):  # 1.2 * 5 must not round up to 7
            size = net.block(out, ins, expansion, taps, 1 if i else stride, size)
            ins = out
    net.add("ends", channels(HEAD), ins, 1, 1, size)
    net.add("ends", CLASSES, channels(HEAD), 1, 1, 1)
    net.extra -= 2 * CLASSES - CLASSES  # the classifier has a bias and no norm
    return net


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["net", "rounding", "step", "width", "depth", "image", "macs", "depthwise", "pointwise",
             "dense", "ends", "params", "extra", "stated_macs", "stated_params"]
        )  # fmt: skip

        def row(variant, rounding, step, width, depth, image, stated=("", "")):
            net = counted(variant, width, depth, image, 1 if rounding == "integer" else 8)
            parts = [net.macs[p] for p in ("depthwise", "pointwise", "dense", "ends")]
            rows.writerow(
                [variant, rounding, step, f"{width:.4f}", f"{depth:.4f}", image, sum(parts), *parts,
                 sum(net.params.values()), net.extra, *stated]
            )  # fmt: skip

        for variant in ("blocks", "dense inside", "dense blocks"):
            for phi in range(8):
                scaled = WIDTH**phi, DEPTH**phi, round(SIZE * FINER**phi)
                row(variant, "multiples of 8", phi, *scaled)
                if variant == "blocks":
                    row(variant, "integer", phi, *scaled)
        for i, (width, depth, image, macs, params) in enumerate(PUBLISHED):
            row("blocks", "published", i, width, depth, image, (f"{macs * 1e9:g}",
                                                                f"{params * 1e6:g}"))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
