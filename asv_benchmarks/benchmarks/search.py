"""Choice of a chain or of a filter's method, and certificates."""

from . import tables
from .compat import family_function, family_names, require, resolve
from .decompositions import SMALL, dense, size

#: Families that are fitted by a single SVD.
FAMILIES = ["channel_svd", "spatial_svd", "filter_basis", "network_decoupling"]


def frontier(axis):
    """Return a recipe of the Pareto front of four families."""

    def make():
        import lowrank as lr

        conv, families = dense(SMALL), family_names(*FAMILIES)
        return lambda: lr.frontier(conv, size(SMALL), families, axis=axis)

    return make


def approximate(**budget):
    def make():
        import lowrank as lr

        conv, families = dense(SMALL), family_names(*FAMILIES)
        return lambda: lr.approximate(conv, size(SMALL), families=families, **budget)

    return make


def plan_filter(kernel, tolerance):
    def make():
        from lowrank import filters

        taps = kernel(filters)
        return lambda: filters.plan_filter(taps, (480, 640), tolerance=tolerance)

    return make


def certificate():
    import lowrank as lr

    conv = dense(SMALL)
    f = family_function("spatial_svd")(conv, 16)
    return lambda: lr.certificate(conv, f)


def operator_norm():
    import lowrank as lr

    conv = dense(SMALL)
    return lambda: lr.operator_norm(conv, (28, 28))


def compiling():
    import numpy as np

    f = family_function("spatial_svd")(dense(SMALL), 16)
    return lambda: f.compile((64, 56, 56), np.float32, threads=1)


def predicting():
    f = family_function("spatial_svd")(dense(SMALL), 16)
    predict = resolve("perfmodel:predict", "machine:predict")
    return lambda: predict(f, (56, 56))


WORK = {
    "frontier by MACs": frontier("macs"),
    "frontier by seconds": frontier("seconds"),
    "approximate within an error": approximate(max_error=0.3, axis="macs"),
    "plan_filter, disk within 5 %": plan_filter(lambda filters: filters.disk(9.5), 0.05),
    "plan_filter, gauss": plan_filter(lambda filters: filters.gauss(4.0), None),
    "certificate": certificate,
    "operator norm": operator_norm,
    "compile": compiling,
    "predict": predicting,
}


def macs_within(error):
    def share():
        f = require(approximate(max_error=error, axis="macs"))()
        return f.cost(size(SMALL)).macs / dense(SMALL).cost(size(SMALL)).macs

    return share


def error_at_half():
    f = require(approximate(macs=0.5))()
    return f.error(dense(SMALL).to_dense())


def macs_of_disk():
    """Return MACs per sample of the smallest separable sum within 5 %."""
    from lowrank import filters

    taps = filters.disk(9.5)
    f = next(
        f
        for f in (filters.separate(taps, rank=r) for r in range(1, 12))
        if f.error(taps[None, None]) <= 0.05
    )
    return f.cost((480, 640)).macs / (480 * 640)


TRACKED = {
    "MACs within an error of 0.3": macs_within(0.3),
    "MACs within an error of 0.1": macs_within(0.1),
    "error at half of the MACs": error_at_half,
    "MACs per sample of a disk within 5 %": macs_of_disk,
}


class Search(tables.Recipes):
    """Time of a choice or a certificate."""

    recipes = WORK
    params = (list(WORK),)
    param_names = ["question"]

    def time_answer(self, name):
        self.call()


class Found:
    """Machine-independent results."""

    params = (list(TRACKED),)
    param_names = ["what"]

    def track_found(self, name):
        return require(TRACKED[name])

    track_found.unit = "shares, errors, MACs per sample"
