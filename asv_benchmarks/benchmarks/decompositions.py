"""Error, cost and speed of every family, on layer shapes of well-known networks.

Tracked errors and costs are machine-independent: a change is a change of behaviour.  Times are
relative to the dense layer's, measured interleaved.  Fits of CP and Tucker-2 are compared with
TensorLy's.
"""

import csv
import warnings
from pathlib import Path

import numpy as np

from . import tables
from .compat import MISSING, family_function, family_names, require
from .timing import measure_seconds

with open(Path(__file__).with_name("layers.csv"), newline="") as file:
    LAYERS = {
        row["name"]: {key: int(value) for key, value in row.items() if key != "name"}
        for row in csv.DictReader(file)
    }

FAMILIES = [
    "channel_svd", "spatial_svd", "filter_basis", "network_decoupling", "kronecker", "cp", "cp3",
    "jaderberg", "tucker", "tucker_full", "tucker_cp", "tensor_train",
]  # fmt: skip


def weight(layer):
    """Return noise whose spectrum decays like that of a trained layer."""
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


#: Iterative fits, which take minutes on all but the smaller layers.
SLOW = ("cp", "cp3", "jaderberg", "tucker_cp")
SMALLER = ("64x64", "128x64")
LARGE = "resnet18 layer3 256x256 3x3 at 14"
SMALL = "resnet20 layer3 64x64 3x3 at 8"  # the kernel is that of the 56x56 layer


def pick(layer, family, share):
    """Return the best chain of a family within a share of the MACs, or None."""
    import lowrank as lr

    names = family_names(family)
    if not names or (family in SLOW and layer.split()[2] not in SMALLER):
        return None
    front = lr.frontier(dense(layer), size(layer), names, axis="macs")
    within = [c for c in front if c.cost.macs <= share * front.dense.cost.macs]
    return within[-1].build() if within else None


def quality(layer, family, share=0.25):
    """Return the chain, its error, and its shares of parameters and traffic; or None."""
    f = pick(layer, family, share)
    if f is None:
        return None
    conv = dense(layer)
    cost, dense_cost = f.cost(size(layer)), conv.cost(size(layer))
    return (
        f,
        f.error(conv.to_dense()),
        cost.params / dense_cost.params,
        cost.fused / dense_cost.traffic,
    )


def fit(family, *rank, **options):
    """Return a recipe that fits one family to the 64-channel layer."""

    def make():
        conv, fit_family = dense(SMALL), family_function(family)

        def call():
            with warnings.catch_warnings(action="ignore"):  # few sweeps: not converged
                return fit_family(conv, *rank, **options)

        return call

    return make


def als(c, rank, sweeps):
    """Return calls of CP-ALS on a (c, c, 3, 3) tensor: ours and TensorLy's."""
    from tensorly.decomposition import parafac

    from lowrank.families.als import batched_cp

    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((c, c, 3, 3))
    start = [rng.standard_normal((n, rank)) for n in tensor.shape]

    def theirs():
        init = np.ones(rank), [f.copy() for f in start]
        return parafac(tensor, rank, n_iter_max=sweeps, init=init, tol=0)

    batch = tensor[None], [f[None] for f in start]
    return lambda: batched_cp(*batch, sweeps), theirs


def tucker2(c, rank):
    """Return calls of Tucker-2 on a (c, c, 3, 3) tensor: ours and TensorLy's."""
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


def our_fit(name):
    def make():
        pair, *arguments = FITS[name]
        return pair(*arguments)[0]

    return make


WORK = {
    "spatial_svd 64x64x3x3, rank 16": fit("spatial_svd", 16),
    "kronecker 64x64x3x3, 4 terms": fit("kronecker", 4, "8x8x1x1 first"),
    "tucker 64x64x3x3, ranks 16": fit("tucker", (16, 16)),
    "tensor_train 64x64x3x3, ranks 16,32,16": fit("tensor_train", (16, 32, 16)),
    "cp3 64x64x3x3, rank 32, 10 sweeps": fit("cp3", 32, iterations=10),
} | {name: our_fit(name) for name in list(FITS)[:2]}


def error_of(family):
    def error():
        found = quality(SMALL, family)
        if found is None:
            raise NotImplementedError
        return found[1]

    return error


TRACKED = {f"error of {f}, a quarter of the MACs": error_of(f) for f in FAMILIES if f not in SLOW}


class Quality:
    """Errors, costs and times of chains at a quarter of the MACs."""

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
                except MISSING:
                    continue
        return found

    setup_cache.timeout = 900

    def setup(self, found, *key):
        if key not in found:
            raise NotImplementedError

    def track_error(self, found, *key):
        return found[key][0]

    track_error.unit = "relative Frobenius error"

    def track_params(self, found, *key):
        return found[key][1]

    track_params.unit = "share of the dense parameters"

    def track_fused_traffic(self, found, *key):
        return found[key][2]

    track_fused_traffic.unit = "share of the dense traffic"

    def track_time_share(self, found, *key):
        return found[key][3]

    track_time_share.unit = "share of the dense layer's time, one thread"


def share_of_time(layer, f):
    conv = dense(layer)
    shape = conv.input_shape(size(layer))
    x = np.ones((1, *shape), np.float32)
    runs = [g.compile(shape, np.float32, threads=1) for g in (f, conv)]
    chain_time, dense_time = measure_seconds([lambda run=run: run(x) for run in runs], 0.15)
    return chain_time / dense_time


class BesideTensorly:
    """Times of fits relative to TensorLy's, from the same start if they iterate."""

    params = (list(FITS),)
    param_names = ["fit"]
    timeout = 120

    def setup(self, name):
        pair, *arguments = FITS[name]
        self.calls = require(pair, *arguments)

    def track_ours_over_tensorly(self, name):
        ours, theirs = measure_seconds(self.calls, 1.0)
        return ours / theirs

    track_ours_over_tensorly.unit = "ours / TensorLy"


class Fit(tables.Recipes):
    """Time of a fit."""

    recipes = WORK

    params = (list(WORK),)
    param_names = ["fit"]

    def time_fit(self, name):
        self.call()


class Sweep:
    """Time of the Pareto front of a family over all ranks."""

    params = (FAMILIES,)
    param_names = ["family"]
    timeout = 120
    number, repeat, warmup_time = 1, 3, 0

    def setup(self, family):
        import lowrank as lr

        self.names = require(family_names, family)
        if not self.names:
            raise NotImplementedError
        self.conv, self.frontier = dense(SMALL), lr.frontier

    def time_sweep(self, family):
        self.frontier(self.conv, size(SMALL), self.names, axis="macs")
