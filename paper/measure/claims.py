"""Numbers that popular articles on separable convolutions state, beside what is counted.

A row: who says it, what of, what they say, and the multiply-adds that a chain really does, counted
by `Factorization.cost`.  A formula is evaluated where it is said to hold, at two sizes.
"""

import csv
import sys

import numpy as np

import lowrank
from lowrank import Geometry, Stage


def dense(out, ins, taps):
    return lowrank.dense(np.ones((out, ins, taps, taps), np.float32))


def separable(out, ins, taps):
    """Depthwise, then pointwise."""
    first = Stage(np.ones((ins, 1, taps, taps), np.float32), Geometry.of(2), groups=ins)
    return lowrank.chain([first, Stage(np.ones((out, ins, 1, 1), np.float32), Geometry.of(2))])


def macs(f, size):
    return f.cost((size, size)).macs


def passes(taps):
    """A filter of one channel, and the same in two passes."""
    whole = dense(1, 1, taps)
    return whole, lowrank.spatial(whole, 1)


ROWS = []


def row(article, what, stated, counted):
    ROWS.append((article, what, f"{stated:.10g}", f"{counted:.10g}"))


def main(target):
    ROWS.clear()
    for n, m in ((5, 3), (7, 5)):
        whole, two = passes(m)
        where = f"N = {n}, m = {m}"
        row("A", f"dense filter, (N-2)(N-2)m², {where}", (n - 2) ** 2 * m * m, macs(whole, n))
        stated = (2 * n - 2) * (n - 2) * m
        row("A", f"two passes, (2N-2)(N-2)m, {where}", stated, macs(two, n))
    whole, two = passes(5)
    row("A", "ratio 2/m, N = 7, m = 5", 2 / 5, macs(two, 7) / macs(whole, 7))
    row("A", "ratio 2/m, N = 1024, m = 5", 2 / 5, macs(two, 1024) / macs(whole, 1024))
    row("A", "128 filters 3×3×3 on 7×7", 86_400, macs(dense(128, 3, 3), 7))
    row("A", "the same, depthwise separable", 10_275, macs(separable(128, 3, 3), 7))
    for out in (128, 256):
        gain = macs(dense(out, out, 3), 16) / macs(separable(out, out, 3), 16)
        row("A", f"9 times fewer for 3×3, {out} filters", 9, gain)
    row("B", "128 × 3 × 3 × 5 × 5, of 128 filters 3×3×3 on 7×7", 128 * 3 * 3 * 5 * 5,
        macs(dense(128, 3, 3), 7))  # fmt: skip
    row("B", "the same, depthwise separable", 9_600, macs(separable(128, 3, 3), 7))
    c = dense(256, 3, 5)
    row("C", "rows of the output of 256 filters 5×5×3 on 12×12", 12, c.output_shape((12, 12))[1])
    row("D", "multiply-adds a sample, 3×3, 64 to 128", 73_728, macs(dense(128, 64, 3), 3))
    for out in (64, 128):
        gain = macs(dense(out, out, 3), 16) / macs(separable(out, out, 3), 16)
        row("D", f"8 to 9 times fewer, {out} filters", 8, gain)
    a, b = (f.cost((128, 58, 58)).traffic for f in (dense(128, 128, 3), separable(128, 128, 3)))
    row("D", "no more memory traffic than dense, 128 channels at 56², unfused", 1, b / a)
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["article", "claim", "stated", "counted"])
        rows.writerows(ROWS)


if __name__ == "__main__":
    main(sys.argv[1])
