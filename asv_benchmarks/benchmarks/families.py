"""Error, cost and speed of every family, on layer shapes of well-known networks.

What is tracked does not depend on the machine: a change in it is a change of behaviour, and asv
flags it without noise.  What is timed does: it is a share of the dense engine's time, measured
in turns with it, so that a busy machine hits both.
"""

import csv
import statistics
import time
from pathlib import Path

import numpy as np

with open(Path(__file__).with_name("layers.csv"), newline="") as file:
    LAYERS = {
        row["name"]: {key: int(value) for key, value in row.items() if key != "name"}
        for row in csv.DictReader(file)
    }

FAMILIES = [
    "encode", "decode", "spatial", "basis", "decouple", "kronecker", "cp", "cp3", "jaderberg",
    "tucker", "tucker_full", "tucker_cp", "tensor_train",
]  # fmt: skip


def weight(layer):
    """Noise with a spectrum that falls off as that of a trained layer: what can be tracked
    anywhere, without the weights of anyone."""
    p = LAYERS[layer]
    rng = np.random.default_rng(0)
    w = rng.standard_normal((p["out"], p["in"], p["kernel"], p["kernel"]))
    for axis, n in enumerate(w.shape):
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        fall = np.arange(1, n + 1) ** -0.6
        w = np.moveaxis(np.tensordot((q * fall) @ q.T, w, (1, axis)), 0, axis)
    return w.astype(np.float32)


def dense(layer):
    import lowrank as lr

    p = LAYERS[layer]
    return lr.dense(weight(layer), stride=p["stride"], padding=p["padding"])


def size(layer):
    return LAYERS[layer]["height"], LAYERS[layer]["width"]


def picks(layer, family, shares):
    """The best chain of a family within each share of the multiply-adds, or None."""
    import lowrank as lr

    if family not in lr.FAMILIES:
        return [None for _ in shares]
    front = lr.frontier(dense(layer), size(layer), [family], axis="macs")
    found = []
    for share in shares:
        within = [c for c in front if c.cost.macs <= share * front.dense.cost.macs]
        found.append(within[-1].build() if within else None)
    return found


class Quality:
    """Errors and costs at a quarter and at half of the multiply-adds."""

    shares = (0.25, 0.5)
    params = (list(LAYERS), FAMILIES, list(shares))
    param_names = ["layer", "family", "share of macs"]

    def setup_cache(self):
        found = {}
        for layer in LAYERS:
            conv = dense(layer)
            whole = conv.cost(size(layer))
            for family in FAMILIES:
                for share, f in zip(self.shares, picks(layer, family, self.shares)):
                    if f is not None:
                        cost = f.cost(size(layer))
                        found[layer, family, share] = (
                            f.error(conv.to_dense()),
                            cost.params / whole.params,
                            cost.fused / whole.traffic,
                        )
        return found

    setup_cache.timeout = 1800

    def setup(self, found, *what):
        if what not in found:
            raise NotImplementedError  # asv's word for n/a

    def track_error(self, found, *what):
        return found[what][0]

    track_error.unit = "relative Frobenius error"

    def track_params(self, found, *what):
        return found[what][1]

    track_params.unit = "share of the dense parameters"

    def track_fused_traffic(self, found, *what):
        return found[what][2]

    track_fused_traffic.unit = "share of the dense traffic"


class Speed:
    """Time of a chain with a quarter of the multiply-adds, as a share of the dense time."""

    params = (list(LAYERS), FAMILIES)
    param_names = ["layer", "family"]
    timeout = 300

    def setup(self, layer, family):
        (f,) = picks(layer, family, [0.25])
        if f is None:
            raise NotImplementedError
        shape = dense(layer).shape(size(layer))
        self.x = np.ones((1, *shape), np.float32)
        self.runs = [g.compile(shape, np.float32, threads=1) for g in (dense(layer), f)]

    def track_time_share(self, layer, family):
        return ratio(self.runs[1], self.runs[0], self.x)

    track_time_share.unit = "share of the dense time"


class Fit:
    """Seconds of a frontier over one family: what a sweep costs."""

    params = (["resnet20 layer3 64x64 3x3 at 8", "resnet18 layer3 256x256 3x3 at 14"], FAMILIES)
    param_names = ["layer", "family"]
    timeout = 300
    number, repeat, warmup_time = 1, 3, 0

    def setup(self, layer, family):
        import lowrank as lr

        if family not in lr.FAMILIES or (family in ("cp", "cp3", "tucker_cp") and "256" in layer):
            raise NotImplementedError  # minutes on the large layer
        self.conv, self.frontier = dense(layer), lr.frontier

    def time_frontier(self, layer, family):
        self.frontier(self.conv, size(layer), [family], axis="macs")


def ratio(run, other, x, seconds=0.4):
    """Time of `run` over that of `other`: medians of samples of a millisecond, in turns."""
    calls, times = [], ([], [])
    for f in (run, other):
        f(x)
        start = time.perf_counter()
        f(x)
        calls.append(max(1, round(1e-3 / (time.perf_counter() - start))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for f, n, seen in zip((run, other), calls, times):
            start = time.perf_counter()
            for _ in range(n):
                f(x)
            seen.append((time.perf_counter() - start) / n)
    return statistics.median(times[0]) / statistics.median(times[1])
