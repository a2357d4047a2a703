"""Checkerboards of transposed convolutions: the response to a constant input, by phase.

For a constant input, sample (a, b) of every stride x stride tile of the output is the sum of the
taps of that phase, S(a, b).  The pattern is S minus its mean over the phases; its strength is the
ratio of the norms of pattern and mean over all channels (input constants are taken as independent
and of equal size).

Rows: kernels of ones and of normal numbers with and without a mean, 2 to 6 taps; with LOWRANK_DATA
the transposed layers of a trained style network, dense and as chains at several shares of the
MACs.  Values are computed from the composed kernel and checked against a run of the chain.  `mean`
and `pattern` are relative to the mean of the dense layer.  `equal phases` is the nearest dense
layer without a pattern; `equal phases by axis` removes the pattern by a linear map of the taps of
each axis, which does not change the rank of any chain.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import tables

from lowrank.interop.weights import layers

CURVES = ("channel_svd output", "channel_svd input", "spatial_svd", "tucker", "cp")
SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
CHANNELS = 64


def phases(taps, stride):
    """Return the matrix that sums the taps of each phase."""
    return (np.arange(taps) % stride == np.arange(stride)[:, None]).astype(float)


def sums(weight, stride):
    """Return the sum of the taps per phase, (in, out, stride, stride)."""
    p, q = (phases(n, stride) for n in weight.shape[2:])
    return np.einsum("ak,bl,stkl->stab", p, q, weight.astype(float))


def parts(weight, stride):
    """Return the norms of the mean over the phases (repeated per phase) and of the pattern."""
    s = sums(weight, stride)
    mean = s.mean((2, 3), keepdims=True)
    return stride * np.linalg.norm(mean), np.linalg.norm(s - mean)


def parts_of_run(conv, stride):
    """Return the same norms from a run on constant inputs, one channel at a time."""
    ins = conv.in_channels
    x = np.zeros((ins, ins, 12, 12), np.float32)
    x[np.arange(ins), np.arange(ins)] = 1
    y = conv(x)[:, :, 8 : 8 + stride, 8 : 8 + stride].astype(float)
    mean = y.mean((2, 3), keepdims=True)
    return stride * np.linalg.norm(mean), np.linalg.norm(y - mean)


def remove_pattern(weight, stride, by_axis):
    """Return taps with equal phase sums: the nearest ones, or by a linear map per axis."""
    p, q = (phases(n, stride) for n in weight.shape[2:])
    off = np.eye(stride) - 1 / stride
    if by_axis:
        a, b = (np.eye(m.shape[1]) - np.linalg.pinv(m) @ off @ m for m in (p, q))
        return np.einsum("ik,jl,stkl->stij", a, b, weight)
    s = sums(weight, stride)
    s -= s.mean((2, 3), keepdims=True)
    return weight - np.einsum("ka,lb,stab->stkl", np.linalg.pinv(p), np.linalg.pinv(q), s)


def trained():
    """Yield (name, convolution, input size)."""
    folder = tables.folder()
    if not folder:
        print("LOWRANK_DATA is not set: no trained layers, only generated kernels", file=sys.stderr)
        return
    for x in layers(Path(folder, "weights", "faststyle_udnie.safetensors")):
        if x.conv.transposed:
            yield x.name, x.conv, x.input_size


def main(target):
    with open(target, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["kernel", "taps", "stride", "family", "rank", "macs", "error", "mean", "pattern",
             "strength"]
        )  # fmt: skip

        def row(name, taps, stride, family, rank, share, error, weight, whole):
            mean, pattern = parts(weight, stride)
            rows.writerow(
                [name, taps, stride, family, rank, f"{share:.4f}", f"{error:.4f}",
                 f"{mean / whole:.4f}", f"{pattern / whole:.4f}", f"{pattern / mean:.4f}"]
            )  # fmt: skip

        for stride in (2, 3):
            for taps in range(2, 7):
                noise = np.random.default_rng(0).standard_normal((CHANNELS, CHANNELS, taps, taps))
                kinds = {
                    "ones": np.ones((1, 1, taps, taps)),
                    "normal": noise,
                    "1 + normal": 1 + noise,
                }
                for name, w in kinds.items():
                    row(name, taps, stride, "dense", "", 1, 0, w, parts(w, stride)[0])
        for name, conv, size in trained():
            stride, w = conv.geometry.stride[0], conv.to_dense().astype(float)
            taps, whole, macs = w.shape[2], parts(w, stride)[0], conv.cost(size).macs
            row(name, taps, stride, "dense", "", 1, 0, w, whole)
            for by_axis, label in ((False, "equal phases"), (True, "equal phases by axis")):
                new = remove_pattern(w, stride, by_axis)
                error = np.linalg.norm(new - w) / np.linalg.norm(w)
                row(name, taps, stride, label, "", 1, error, new, whole)
            for curve in CURVES:
                for f in tables.fits_within(conv, size, curve, SHARES):
                    found, ran = parts(f.to_dense(), stride), parts_of_run(f, stride)
                    assert np.allclose(found, ran, rtol=1e-3), (name, curve, found, ran)
                    row(name, taps, stride, curve, " ".join(map(str, f.rank)),
                        f.cost(size).macs / macs, f.error(w), f.to_dense(), whole)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
