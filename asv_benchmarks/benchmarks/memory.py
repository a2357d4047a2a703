"""Memory: workspaces of plans, arrays of runs and fits, peaks of whole processes."""

import tracemalloc

import numpy as np

from . import measure
from .cases import chain_shapes, layers
from .decompositions import LARGE, dense

ROW = next(layers())  # 64 channels at 56x56
FAMILIES = list(chain_shapes(ROW))


def chain(family):
    """A chain of the comparison, float32."""
    import lowrank as lr

    from .cases import weight

    stages, channels = [], ROW["channels"]
    for shape in chain_shapes(ROW)[family]:
        g = lr.Geometry.of(2, padding=[k // 2 for k in shape[2:]])
        stages.append(lr.Stage(weight(*shape), g, channels // shape[1]))
        channels = shape[0]
    return lr.chain(stages)


def workspace(family):
    """Bytes that one thread works in."""
    f = chain(family)
    run = f.compile((f.in_channels, *ROW["size"]), np.float32, threads=1)
    return max(s.core.workspace for s in run.segments)


def allocated(call):
    """Most bytes of NumPy's arrays that a call holds at once."""
    call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def of_run(family):
    f = chain(family)
    x = np.ones((1, f.in_channels, *ROW["size"]), np.float32)
    run = f.compile(x.shape[1:], np.float32, threads=1)
    return allocated(lambda: run(x))


def of_filter():
    from lowrank import filters

    image = np.ones((1024, 1024), np.float32)
    taps = filters.disk(19.5)
    return allocated(lambda: filters.correlate(image, taps, method="fft", threads=1))


def of_fit(name, *rank):
    import lowrank as lr

    conv = dense(LARGE)
    return allocated(lambda: getattr(lr, name)(conv, *rank))


#: The same on every run, but for a few bytes of Python's own.
TRACKED = {
    **{f"workspace of {family}, bytes": lambda f=family: workspace(f) for family in FAMILIES},
    "arrays of a run, bytes": lambda: of_run(FAMILIES[0]),
    "arrays of a filter by transforms, bytes": of_filter,
    "arrays of spatial, 256 channels, bytes": lambda: of_fit("spatial_svd", 64),
    "arrays of tucker, 256 channels, bytes": lambda: of_fit("tucker", (64, 64)),
}


class Bytes:
    """What a plan, a run, a fit holds beside its arguments."""

    params = (list(TRACKED),)
    param_names = ["what"]
    timeout = 120

    def track_bytes(self, name):
        return measure.available(TRACKED[name])

    track_bytes.unit = "bytes"


class Peak:
    """A process that runs a chain on a large input, fused and stage by stage.

    Of the resident memory some hundred megabytes are the libraries that asv has imported.
    """

    params = (["fused", "stage by stage"],)
    param_names = ["how"]

    def setup(self, how):
        self.f = measure.available(chain, "cp 64")
        self.x = np.ones((1, 64, 768, 768), np.float32)  # 151 MB

    def peakmem_run(self, how):
        import lowrank as lr

        parts = [self.f] if how == "fused" else [lr.chain([s]) for s in self.f.stages]
        x = self.x
        for part in parts:
            x = part.compile(x.shape[1:], np.float32, threads=1)(x)
