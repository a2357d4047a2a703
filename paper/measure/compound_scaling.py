"""Compound scaling counted: a network of separable blocks made deeper, wider and finer.

EfficientNet-B0's table of blocks, its depth times 1.2^phi, its width times 1.1^phi and its images
times 1.15^phi (Tan and Le 2019), which is said to double the work each time; and the widths and
depths that its authors published as B1 to B7.  Every convolution is a stage of lowrank, priced by
`Factorization.cost`, so the rounding of channels, repeats and sizes is in the counts.

`kept` says what is done about rounding: channels to multiples of 8 and repeats upwards as is
customary, or channels to whole numbers only.  `dense inside` has dense kernels in place of the
depthwise ones; `dense blocks` one 3 x 3 convolution in place of each block.  Norms and
squeeze-excitation, which are no convolutions of images, count as parameters alone, in `extra`.
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
#: width, depth, image, and what the article states in 1e9 multiply-adds and 1e6 parameters
PUBLISHED = (
    (1.0, 1.0, 224, 0.39, 5.3), (1.0, 1.1, 240, 0.70, 7.8), (1.1, 1.2, 260, 1.0, 9.2),
    (1.2, 1.4, 300, 1.8, 12), (1.4, 1.8, 380, 4.2, 19), (1.6, 2.2, 456, 9.9, 30),
    (1.8, 2.6, 528, 19, 43), (2.0, 3.1, 600, 37, 66),
)  # fmt: skip


def layer(out, ins, taps, stride, size, groups=1):
    """A convolution that keeps the size, or divides it by the stride, rounded upwards."""
    lack = max((math.ceil(size / stride) - 1) * stride + taps - size, 0)
    geometry = Geometry.of(2, stride, [(lack // 2, lack - lack // 2)] * 2)
    # The same zero everywhere: counting does not look at weights, and the largest have gigabytes.
    weight = np.broadcast_to(np.float32(0), (out, ins // groups, taps, taps))
    return lowrank.chain([Stage(weight, geometry, groups=groups)])


class Net:
    """Counts of a network, part by part."""

    def __init__(self, variant):
        self.variant, self.macs, self.params, self.extra = variant, Counter(), Counter(), 0

    def add(self, part, out, ins, taps, stride, size, groups=1):
        """Count a convolution with the norm behind it, and give the size of its output."""
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
        """As in the code that the authors published."""
        rounded = max(multiple, int(n * width + multiple / 2) // multiple * multiple)
        return rounded + multiple * (rounded < 0.9 * n * width)

    net = Net(variant)
    ins = channels(STEM)
    size = net.add("ends", ins, 3, 3, 2, size)
    for expansion, out, repeats, stride, taps in BLOCKS:
        out = channels(out)
        for i in range(math.ceil(round(depth * repeats, 9))):  # 1.2 x 5 is no more than 6
            size = net.block(out, ins, expansion, taps, 1 if i else stride, size)
            ins = out
    net.add("ends", channels(HEAD), ins, 1, 1, size)
    net.add("ends", CLASSES, channels(HEAD), 1, 1, 1)
    net.extra -= 2 * CLASSES - CLASSES  # the last has a bias and no norm
    return net


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["net", "kept", "step", "width", "depth", "image", "macs", "depthwise", "pointwise",
             "dense", "ends", "params", "extra", "stated_macs", "stated_params"]
        )  # fmt: skip

        def row(variant, kept, step, width, depth, image, stated=("", "")):
            net = counted(variant, width, depth, image, 1 if kept == "whole" else 8)
            parts = [net.macs[p] for p in ("depthwise", "pointwise", "dense", "ends")]
            rows.writerow(
                [variant, kept, step, f"{width:.4f}", f"{depth:.4f}", image, sum(parts), *parts,
                 sum(net.params.values()), net.extra, *stated]
            )  # fmt: skip

        for variant in ("blocks", "dense inside", "dense blocks"):
            for phi in range(8):
                scaled = WIDTH**phi, DEPTH**phi, round(SIZE * FINER**phi)
                row(variant, "customary", phi, *scaled)
                if variant == "blocks":
                    row(variant, "whole", phi, *scaled)
        for i, (width, depth, image, macs, params) in enumerate(PUBLISHED):
            row("blocks", "published", i, width, depth, image, (f"{macs * 1e9:g}",
                                                                f"{params * 1e6:g}"))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
