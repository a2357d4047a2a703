"""Numbers stated by introductory articles on separable convolutions, and their counted values.

A row has the article, the claim, the stated value and the value counted by `Factorization.cost`.
A formula is evaluated at two sizes for which it is stated.
"""

import sys

import numpy as np
import tables

import lowrank
from lowrank import Geometry, Stage


def dense(out, ins, taps, padding=0):
    return lowrank.dense(np.ones((out, ins, taps, taps), np.float32), padding=padding)


def separable(out, ins, taps, padding=0):
    """Depthwise, then pointwise."""
    geometry = Geometry.of(2, padding=padding)
    first = Stage(np.ones((ins, 1, taps, taps), np.float32), geometry, groups=ins)
    return lowrank.chain([first, Stage(np.ones((out, ins, 1, 1), np.float32), Geometry.of(2))])


def macs(f, size):
    return f.cost((size, size)).macs


def passes(taps):
    """Return a dense one-channel filter and its two 1-D passes."""
    whole = dense(1, 1, taps)
    return whole, lowrank.spatial_svd(whole, 1)


ROWS = []


def row(article, what, stated, counted, holds=""):
    """Add a row; `holds` gives the condition or the correction of a claim."""
    ROWS.append((article, what, f"{stated:.10g}", f"{counted:.10g}", holds))


def rotated_gaussian(angle, wide=4.0, narrow=1.3, half=12):
    """Return the share of a rotated Gaussian's energy in its best separable term."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    c, s = np.cos(angle), np.sin(angle)
    along, across = c * x + s * y, c * y - s * x
    g = np.exp(-((along / wide) ** 2 + (across / narrow) ** 2) / 2)
    found = np.linalg.svd(g, compute_uv=False) ** 2
    return found[0] / found.sum()


def main(target):
    ROWS.clear()
    for n, m in ((5, 3), (7, 5)):
        whole, two = passes(m)
        where = f"N = {n}, m = {m}"
        prefix = "" if m == 3 else "for m = 3 only: "
        row("A", f"dense filter, (N-2)(N-2)m², {where}", (n - 2) ** 2 * m * m, macs(whole, n),
            prefix and prefix + "(N-m+1)²m²")  # fmt: skip
        stated = (2 * n - 2) * (n - 2) * m
        row("A", f"two passes, (2N-2)(N-2)m, {where}", stated, macs(two, n),
            prefix and prefix + "m(N-m+1)(2N-m+1)")  # fmt: skip
    whole, two = passes(5)
    row("A", "ratio 2/m, N = 7, m = 5", 2 / 5, macs(two, 7) / macs(whole, 7),
        "in the limit: (2N-m+1)/(m(N-m+1))")  # fmt: skip
    row("A", "ratio 2/m, N = 1024, m = 5", 2 / 5, macs(two, 1024) / macs(whole, 1024))
    row("A", "128 filters 3×3×3 on 7×7", 86_400, macs(dense(128, 3, 3), 7))
    row("A", "the same, depthwise separable", 10_275, macs(separable(128, 3, 3), 7))
    for out in (128, 256):
        gain = macs(dense(out, out, 3), 16) / macs(separable(out, out, 3), 16)
        row("A", f"9 times fewer for 3×3, {out} filters", 9, gain,
            "in the limit of filters ≫ h², not ≫ h")  # fmt: skip
    gain = macs(dense(256, 256, 5), 16) / macs(separable(256, 256, 5), 16)
    row("A", "25 times fewer for 5×5, 256 filters", 25, gain, "the same")
    row("B", "128 × 3 × 3 × 5 × 5, of 128 filters 3×3×3 on 7×7", 128 * 3 * 3 * 5 * 5,
        macs(dense(128, 3, 3), 7), "a factor 3 of channels is missing")  # fmt: skip
    row("B", "the same, depthwise separable", 9_600, macs(separable(128, 3, 3), 7),
        "that is the pointwise stage alone")  # fmt: skip
    c = dense(256, 3, 5)
    row("C", "rows of the output of 256 filters 5×5×3 on 12×12", 12, c.output_shape((12, 12))[1],
        "only with padding, which the article does not mention")  # fmt: skip
    row("C", "weights of its depthwise stage, 5×5×1×1", 25,
        separable(256, 3, 5).stages[0].weight.size, "one filter per channel: 5×5×1×3")  # fmt: skip
    row("D", "MACs per sample, 3×3, 64 to 128", 73_728, macs(dense(128, 64, 3), 3))
    row("D", "trillions for that layer on an image of 512²", 1e12, macs(dense(128, 64, 3), 514),
        "from 13.6 megapixels on")  # fmt: skip
    for out in (64, 128):
        gain = macs(dense(out, out, 3), 16) / macs(separable(out, out, 3), 16)
        nearest = np.clip(gain, 8, 9)  # of the range that is stated
        row("D", f"8 to 9 times fewer, {out} filters", nearest, gain,
            "" if nearest == gain else "from 72 filters on")  # fmt: skip
    ten = np.ones(10, np.float32)
    cube = lowrank.dense(np.ones((1, 1, 10, 10, 10), np.float32), padding=((5, 4),) * 3)
    three = lowrank.filters.separate(np.multiply.outer(np.outer(ten, ten), ten), rank=1)
    side = (512, 512, 512)
    row("D", "K²/3 times fewer for 10×10×10 taps on a volume of 512³", 100 / 3,
        cube.cost(side).macs / three.cost(side).macs, "")  # fmt: skip
    row("D", "a rotated Gaussian is separable: energy of its first term", 1,
        rotated_gaussian(np.pi / 4), "if round, or along the axes")  # fmt: skip
    a, b = (make(128, 128, 3, 1).cost((128, 56, 56)).traffic for make in (dense, separable))
    row("D", "no more memory traffic than dense, 128 channels at 56², unfused", 1, b / a,
        "if weights dominate, or fused")  # fmt: skip
    tables.write(target, ["article", "claim", "stated", "counted", "holds"], ROWS)


if __name__ == "__main__":
    main(sys.argv[1])
