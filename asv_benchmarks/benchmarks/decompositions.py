"""Error, cost and speed of every family, on layer shapes of well-known networks.

What is tracked does not depend on the machine: a change in it is a change of behaviour, and asv
flags it without noise.  What is timed does: it is a share of the dense engine's time, measured
in turns with it, so that a busy machine hits both.  Fits of CP and Tucker are beside TensorLy's.
"""

import csv
import warnings
from pathlib import Path

import numpy as np

from . import measure

with open(Path(__file__).with_name("layers.csv"), newline="") as file:
    LAYERS = {
        row["name"]: {key: int(value) for key, value in row.items() if key != "name"}
        for row in csv.DictReader(file)
    }

FAMILIES = [
    "channel_svd", "channel_svd", "spatial_svd", "filter_basis", "network_decoupling", "kronecker", "cp", "cp3", "jaderberg",
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


#: Fitted by iterations, minutes of them on all but the smaller layers.
SLOW = ("cp", "cp3", "jaderberg", "tucker_cp")
SMALLER = ("64x64", "128x64")
LARGE = "resnet18 layer3 256x256 3x3 at 14"
SMALL = "resnet20 layer3 64x64 3x3 at 8"  # the kernel is that of the 56x56 layer


def pick(layer, family, share):
    """The best chain of a family within a share of the multiply-adds, or None."""
    import lowrank as lr

    if family not in lr.FAMILIES or (family in SLOW and layer.split()[2] not in SMALLER):
        return None
    front = lr.frontier(dense(layer), size(layer), [family], axis="macs")
    within = [c for c in front if c.cost.macs <= share * front.dense.cost.macs]
    return within[-1].build() if within else None


def quality(layer, family, share=0.25):
    """The chain, its error, and its parameters and traffic as shares; or None."""
    f = pick(layer, family, share)
    if f is None:
        return None
    conv = dense(layer)
    cost, whole = f.cost(size(layer)), conv.cost(size(layer))
    return f, f.error(conv.to_dense()), cost.params / whole.params, cost.fused / whole.traffic


def fit(family, *rank, **how):
    """A recipe of a call that fits one family to the 64-channel layer."""

    def make():
        import lowrank as lr

        conv = dense(SMALL)
        fitted = getattr(lr, family)

        def call():
            with warnings.catch_warnings(action="ignore"):  # of few sweeps, that they are few
                return fitted(conv, *rank, **how)

        return call

    return make


def als(c, rank, sweeps):
    """CP by alternating least squares of a (c, c, 3, 3) tensor: ours and TensorLy's own."""
    from tensorly.decomposition import parafac

    from lowrank.families import _tensorly

    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((c, c, 3, 3))
    start = [rng.standard_normal((n, rank)) for n in tensor.shape]

    def theirs():
        init = np.ones(rank), [f.copy() for f in start]
        return parafac(tensor, rank, n_iter_max=sweeps, init=init, tol=0)

    return lambda: _tensorly.parafac(tensor, start, sweeps, 0.0, 0.0), theirs


def tucker2(c, rank):
    """Tucker-2 of a (c, c, 3, 3) tensor: ours and TensorLy's partial_tucker."""
    from tensorly.decomposition import partial_tucker

    import lowrank as lr

    tensor = np.random.default_rng(0).standard_normal((c, c, 3, 3))
    conv = lr.dense(tensor, padding=1)
    return (
        lambda: lr.tucker(conv, (rank, rank)),
        lambda: partial_tucker(tensor, rank=[rank, rank], modes=[0, 1]),
    )


FITS = {
    "CP-ALS 128x128x3x3, R = 64, 4 sweeps": (als, 128, 64, 4),
    "Tucker-2 128x128x3x3, ranks 32": (tucker2, 128, 32),
    "Tucker-2 256x256x3x3, ranks 64": (tucker2, 256, 64),
}


def ours(name):
    def make():
        which, *what = FITS[name]
        return which(*what)[0]

    return make


WORK = {
    "spatial 64x64x3x3, rank 16": fit("spatial_svd", 16),
    "kronecker 64x64x3x3, 4 terms": fit("kronecker", 4, "8x8x1x1 first"),
    "tucker 64x64x3x3, ranks 16": fit("tucker", (16, 16)),
    "tensor_train 64x64x3x3, ranks 16,32,16": fit("tensor_train", (16, 32, 16)),
    "cp3 64x64x3x3, rank 32, 10 sweeps": fit("cp3", 32, iterations=10),
} | {name: ours(name) for name in list(FITS)[:2]}


def error_of(family):
    def error():
        found = quality(SMALL, family)
        if found is None:
            raise NotImplementedError
        return found[1]

    return error


TRACKED = {f"error of {f}, a quarter of the work": error_of(f) for f in FAMILIES if f not in SLOW}


class Quality:
    """Chains of a quarter of the multiply-adds: errors and costs, and their share of the time."""

    layers = [name for name in LAYERS if name != SMALL]
    params = (layers, FAMILIES)
    param_names = ["layer", "family"]

    def setup_cache(self):
        found = {}
        for layer in self.layers:
            for family in FAMILIES:
                try:
                    one = quality(layer, family)
                    if one is not None:
                        found[layer, family] = (*one[1:], share_of_time(layer, one[0]))
                except measure.ABSENT:
                    continue
        return found

    setup_cache.timeout = 900

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

    def track_time_share(self, found, *what):
        return found[what][3]

    track_time_share.unit = "share of the dense layer's time, one thread"


def share_of_time(layer, f):
    conv = dense(layer)
    shape = conv.input_shape(size(layer))
    x = np.ones((1, *shape), np.float32)
    runs = [g.compile(shape, np.float32, threads=1) for g in (f, conv)]
    chain, whole = measure.measured([lambda run=run: run(x) for run in runs], 0.15)
    return chain / whole


class BesideTensorly:
    """Fits beside TensorLy's own, from the same start where they iterate."""

    params = (list(FITS),)
    param_names = ["fit"]
    timeout = 120

    def setup(self, name):
        which, *what = FITS[name]
        self.calls = measure.available(which, *what)

    def track_ours_over_tensorly(self, name):
        ours, theirs = measure.measured(self.calls, 1.0)
        return ours / theirs

    track_ours_over_tensorly.unit = "ours / TensorLy"


class Fit:
    """What a fit takes."""

    params = (list(WORK),)
    param_names = ["fit"]
    timeout = 120

    def setup(self, name):
        self.call = measure.available(WORK[name])
        measure.available(self.call)

    def time_fit(self, name):
        self.call()


class Sweep:
    """What all ranks of a family take, with their errors and costs."""

    params = (FAMILIES,)
    param_names = ["family"]
    timeout = 120
    number, repeat, warmup_time = 1, 3, 0

    def setup(self, family):
        import lowrank as lr

        if family not in measure.available(lambda: lr.FAMILIES):
            raise NotImplementedError
        self.conv, self.frontier = dense(SMALL), lr.frontier

    def time_sweep(self, family):
        self.frontier(self.conv, size(SMALL), [family], axis="macs")
