"""Filters of images and volumes beside OpenCV and SciPy: one thread."""

import numpy as np

from . import measure

KINDS = ("image", "rank", "volume", "type")


def chosen(kernel, mode="reflect", tolerance=None):
    """A call of the way that is chosen for one of the classical filters, on an image."""

    def make():
        from lowrank import filters

        image = np.random.default_rng(0).random((480, 640), np.float32)
        taps, out = kernel(filters), np.empty_like(image)
        return lambda: filters.correlate(
            image, taps, mode=mode, tolerance=tolerance, out=out, threads=1
        )

    return make


CHOSEN = {
    "sobel, direct": chosen(lambda filters: filters.sobel(), "nearest"),
    "gauss 4, separable": chosen(lambda filters: filters.gauss(4.0)),
    "disk 9.5 within 5 %": chosen(lambda filters: filters.disk(9.5), tolerance=0.05),
    "disk 19.5 by transforms": chosen(lambda filters: filters.disk(19.5)),
}
WORK = CHOSEN | measure.works(KINDS, "512x512|128^3|uint8")


class Filters(measure.Beside):
    """Beside the fastest way that another library has for the same."""

    params = (measure.names(KINDS), ["OpenCV", "SciPy"])

    def setup_cache(self):
        return measure.table(KINDS)

    setup_cache.timeout = 600


class FilterTimes(measure.Alone):
    """Their own times."""

    params = (measure.names(KINDS),)
    setup_cache = Filters.setup_cache


class Chosen:
    """Calls that choose a way: the plan is kept, so that this is a look-up and a run."""

    params = (list(CHOSEN),)
    param_names = ["filter"]

    def setup(self, name):
        self.call = measure.available(CHOSEN[name])
        measure.available(self.call)

    def time_filter(self, name):
        self.call()
