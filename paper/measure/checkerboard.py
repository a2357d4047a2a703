"""Checkerboards of transposed convolutions: what a constant input gives, phase by phase.

A constant input makes sample (a, b) of every stride x stride tile of the output the sum of the
taps of that phase, S(a, b). So the pattern is S less its mean over the phases, and its strength
the norm of that over the norm of the mean, channels included: the constants of the inputs are
taken to be independent and of one size.

Kernels of ones, and normal ones with and without a mean, of 2 to 6 taps; then the transposed
layers of a trained network for styles, where LOWRANK_DATA has it, dense and as chains at several
shares of the multiply-adds. What counts is the chain multiplied out; that the engine's run on
constant inputs gives the same is checked. `mean` and `pattern` are shares of the dense layer's
mean, so that one sees which of the two a truncation lets go. `even` is the nearest dense layer
without a pattern, `even by axis` one whose taps had it taken out axis by axis, by a map of the
taps of an axis, which would leave the rank of any chain as it is.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import tables

import lowrank
from lowrank.interop.weights import layers

FAMILIES = ("channel_svd", "channel_svd", "spatial_svd", "tucker", "cp")
SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
CHANNELS = 64


def phases(taps, stride):
    """The matrix that adds up the taps of each phase."""
    return (np.arange(taps) % stride == np.arange(stride)[:, None]).astype(float)


def sums(weight, stride):
    """What each phase gets, (in, out, stride, stride)."""
    p, q = (phases(n, stride) for n in weight.shape[2:])
    return np.einsum("ak,bl,stkl->stab", p, q, weight.astype(float))


def parts(weight, stride):
    """Norms of the mean over the phases, spread over them all, and of what is left."""
    s = sums(weight, stride)
    mean = s.mean((2, 3), keepdims=True)
    return stride * np.linalg.norm(mean), np.linalg.norm(s - mean)


def ran_parts(conv, stride):
    """Parts of what the engine makes of constant inputs, one channel at a time."""
    ins = conv.in_channels
    x = np.zeros((ins, ins, 12, 12), np.float32)
    x[np.arange(ins), np.arange(ins)] = 1
    y = conv(x)[:, :, 8 : 8 + stride, 8 : 8 + stride].astype(float)
    mean = y.mean((2, 3), keepdims=True)
    return stride * np.linalg.norm(mean), np.linalg.norm(y - mean)


def norm_balance(weight, stride, apart):
    """The nearest taps with phase sums all alike: of both axes together, or of each axis."""
    p, q = (phases(n, stride) for n in weight.shape[2:])
    off = np.eye(stride) - 1 / stride
    if apart:  # a map of the taps of each axis alone
        a, b = (np.eye(m.shape[1]) - np.linalg.pinv(m) @ off @ m for m in (p, q))
        return np.einsum("ik,jl,stkl->stij", a, b, weight)
    s = sums(weight, stride)
    s -= s.mean((2, 3), keepdims=True)
    return weight - np.einsum("ka,lb,stab->stkl", np.linalg.pinv(p), np.linalg.pinv(q), s)


def trained():
    """(name, convolution, input size)"""
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
            for apart, said in ((False, "even"), (True, "even by axis")):
                new = norm_balance(w, stride, apart)
                error = np.linalg.norm(new - w) / np.linalg.norm(w)
                row(name, taps, stride, said, "", 1, error, new, whole)
            for family in FAMILIES:
                front = lowrank.frontier(conv, size, [family], axis="macs")
                picks = dict.fromkeys(front.affordable(share * macs) for share in SHARES)
                for f in (pick.build() for pick in picks if pick.family == family):
                    found, ran = parts(f.to_dense(), stride), ran_parts(f, stride)
                    assert np.allclose(found, ran, rtol=1e-3), (name, family, found, ran)
                    row(name, taps, stride, family, " ".join(map(str, f.rank)),
                        f.cost(size).macs / macs, f.error(w), f.to_dense(), whole)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
