"""A kernel that is not separable: a horizontal line in one channel, a vertical one in the other.

One output, two inputs, 5 x 5 taps.  Rows: for every bipartition of the modes (t, s, i, j) the rank
of the kernel and the smallest relative error at rank 1; then the entries of the kernel and of its
best spatial SVD of rank 1.
"""

import itertools
import sys

import numpy as np
import tables

import lowrank

TAPS = 5


def kernel():
    w = np.zeros((1, 2, TAPS, TAPS))
    w[0, 0, TAPS // 2] = 1
    w[0, 1, :, TAPS // 2] = 1
    return w


def rows():
    w = kernel()
    modes = "tsij"
    for size in (1, 2):
        for left in itertools.combinations(range(4), size):
            if size == 2 and 0 not in left:
                continue  # each bipartition once
            right = [m for m in range(4) if m not in left]
            shape = np.prod([w.shape[m] for m in left])
            s = np.linalg.svd(w.transpose(*left, *right).reshape(int(shape), -1), compute_uv=False)
            rank = int((s > 1e-12 * s[0]).sum())
            error = np.sqrt((s[1:] ** 2).sum() / (s**2).sum())
            name = "".join(modes[m] for m in left) + "|" + "".join(modes[m] for m in right)
            yield "bipartition", name, rank, "", "", "", f"{error:.6f}"
    one = lowrank.spatial_svd(lowrank.dense(w), 1).to_dense()
    for what, k in (("kernel", w), ("rank one", one)):
        for s, i, j in np.ndindex(*k.shape[1:]):
            yield what, "", "", s, i, j, f"{k[0, s, i, j] + 0.0:.6f}"


def main(target):
    tables.write(target, ["what", "bipartition", "rank", "s", "i", "j", "value"], rows())


if __name__ == "__main__":
    main(sys.argv[1])
