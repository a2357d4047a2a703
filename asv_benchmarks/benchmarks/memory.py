"""Memory: workspaces of plans, arrays of runs and fits, peaks of processes."""

import tracemalloc

import numpy as np

from .cases import CHAIN_LAYERS, chain_shapes
from .compat import family_function, require
from .decompositions import LARGE, dense

ROW = CHAIN_LAYERS[0]  # 64 channels at 56x56
FAMILIES = list(chain_shapes(ROW))


def chain(family):
    """Return a float32 chain of the comparison."""
    import lowrank as lr

    from .cases import weight

    stages, channels = [], ROW["channels"]
    for shape in chain_shapes(ROW)[family]:
        g = lr.Geometry.of(2, padding=[k // 2 for k in shape[2:]])
        stages.append(lr.Stage(weight(*shape), g, channels // shape[1]))
        channels = shape[0]
    return lr.chain(stages)


def workspace(family):
    """Return the workspace of one thread in bytes."""
    f = chain(family)
    run = f.compile((f.in_channels, *ROW["size"]), np.float32, threads=1)
    return max(s.core.workspace for s in run.segments)


def allocated(call):
    """Return the peak of NumPy array bytes that a call allocates."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def run_bytes(family):
    f = chain(family)
    x = np.ones((1, f.in_channels, *ROW["size"]), np.float32)
    run = f.compile(x.shape[1:], np.float32, threads=1)
    return allocated(lambda: run(x))


def filter_bytes():
    from lowrank import filters

    image = np.ones((1024, 1024), np.float32)
    taps = filters.disk(19.5)
    return allocated(lambda: filters.correlate(image, taps, method="fft", threads=1))


def fit_bytes(name, *rank):
    conv, fit = dense(LARGE), family_function(name)
    return allocated(lambda: fit(conv, *rank))


#: Repeatable up to a few bytes of Python objects.
TRACKED = {
    **{f"workspace of {family}, bytes": lambda f=family: workspace(f) for family in FAMILIES},
    "arrays of a run, bytes": lambda: run_bytes(FAMILIES[0]),
    "arrays of an FFT filter, bytes": filter_bytes,
    "arrays of spatial_svd, 256 channels, bytes": lambda: fit_bytes("spatial_svd", 64),
    "arrays of tucker, 256 channels, bytes": lambda: fit_bytes("tucker", (64, 64)),
}


class Bytes:
    """Bytes that a plan, a run or a fit holds besides its arguments."""

    params = (list(TRACKED),)
    param_names = ["what"]
    timeout = 120

    def track_bytes(self, name):
        return require(TRACKED[name])

    track_bytes.unit = "bytes"


class Peak:
    """Resident memory of a run on a large input, fused and stage by stage.

    Some hundred megabytes are the libraries that asv has imported.
    """

    params = (["fused", "stage by stage"],)
    param_names = ["how"]

    def setup(self, how):
        self.f = require(chain, "cp 64")
        self.x = np.ones((1, 64, 768, 768), np.float32)  # 151 MB

    def peakmem_run(self, how):
        import lowrank as lr

        parts = [self.f] if how == "fused" else [lr.chain([s]) for s in self.f.stages]
        x = self.x
        for part in parts:
            x = part.compile(x.shape[1:], np.float32, threads=1)(x)
