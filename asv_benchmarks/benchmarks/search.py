"""The choice of a chain or of a way to run a filter, and what is said of it."""

from . import measure
from .decompositions import SMALL, dense, size

FAMILIES = [
    "channel_svd",
    "channel_svd",
    "spatial_svd",
    "filter_basis",
    "network_decoupling",
]  # those that an SVD fits


def frontier(axis):
    """All ranks of five families, with what nothing beats on error and cost."""

    def make():
        import lowrank as lr

        conv = dense(SMALL)
        return lambda: lr.frontier(conv, size(SMALL), FAMILIES, axis=axis)

    return make


def approximate(**wanted):
    def make():
        import lowrank as lr

        conv = dense(SMALL)
        return lambda: lr.approximate(conv, size(SMALL), families=FAMILIES, **wanted)

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
    f = lr.spatial_svd(conv, 16)
    return lambda: lr.certificate(conv, f)


def operator_norm():
    import lowrank as lr

    conv = dense(SMALL)
    return lambda: lr.operator_norm(conv, (28, 28))


def compiling():
    import numpy as np

    import lowrank as lr

    f = lr.spatial_svd(dense(SMALL), 16)
    return lambda: f.compile((64, 56, 56), np.float32, threads=1)


def predicting():
    import lowrank as lr

    f = lr.spatial_svd(dense(SMALL), 16)
    return lambda: lr.machine.predict(f, (56, 56))


WORK = {
    "frontier by multiply-adds": frontier("macs"),
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
        f = measure.available(approximate(max_error=error, axis="macs"))()
        return f.cost(size(SMALL)).macs / dense(SMALL).cost(size(SMALL)).macs

    return share


def error_at_half():
    f = measure.available(approximate(macs=0.5))()
    return f.error(dense(SMALL).to_dense())


def terms_of_disk():
    """Multiply-adds a sample of the separable terms that are within 5 %."""
    from lowrank import filters

    taps = filters.disk(9.5)
    f = next(
        f
        for f in (filters.separate(taps, rank=r) for r in range(1, 12))
        if f.error(taps[None, None]) <= 0.05
    )
    return f.cost((480, 640)).macs / (480 * 640)


TRACKED = {
    "multiply-adds within an error of 0.3": macs_within(0.3),
    "multiply-adds within an error of 0.1": macs_within(0.1),
    "error at half of the multiply-adds": error_at_half,
    "taps a sample of a disk within 5 %": terms_of_disk,
}


class Search:
    """How long an answer takes."""

    params = (list(WORK),)
    param_names = ["question"]
    timeout = 120

    def setup(self, name):
        self.call = measure.available(WORK[name])
        measure.available(self.call)

    def time_answer(self, name):
        self.call()


class Found:
    """What is found: the same on every machine."""

    params = (list(TRACKED),)
    param_names = ["what"]

    def track_found(self, name):
        return measure.available(TRACKED[name])

    track_found.unit = "shares, errors, taps"
