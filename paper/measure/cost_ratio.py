"""MACs of a separated filter relative to the dense filter, by image size.

The ratio tends to 2/m for m x m taps on large images.  Articles quote this limit, some a formula
that holds for m = 3 only; here it is counted.
"""

import csv
import sys

import numpy as np

import lowrank


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["taps", "size", "ratio", "limit"])
        for taps in (3, 5, 7, 11):
            conv = lowrank.dense(np.ones((1, 1, taps, taps)))
            separated = lowrank.spatial_svd(conv, 1)
            for size in np.unique(np.geomspace(taps, 512, 40).round().astype(int)):
                shape = (int(size), int(size))
                ratio = separated.cost(shape).macs / conv.cost(shape).macs
                rows.writerow([taps, size, f"{ratio:.6f}", f"{2 / taps:.6f}"])


if __name__ == "__main__":
    main(sys.argv[1])
