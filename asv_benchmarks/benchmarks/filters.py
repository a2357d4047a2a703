"""Filters of images and volumes beside OpenCV and SciPy; one thread."""

import subprocess
import sys

import numpy as np

from . import tables

KINDS = ("image", "rank", "volume", "type")


def correlate_call(kernel, mode="reflect", tolerance=None):
    """Return a recipe that filters an image with the automatically chosen method."""

    def make():
        from lowrank import filters

        image = np.random.default_rng(0).random((480, 640), np.float32)
        taps, out = kernel(filters), np.empty_like(image)
        return lambda: filters.correlate(
            image, taps, mode=mode, tolerance=tolerance, out=out, threads=1
        )

    return make


CHOSEN = {
    "sobel, direct": correlate_call(lambda filters: filters.sobel(), "nearest"),
    "gauss 4, separable": correlate_call(lambda filters: filters.gauss(4.0)),
    "disk 9.5 within 5 %": correlate_call(lambda filters: filters.disk(9.5), tolerance=0.05),
    "disk 19.5 by transforms": correlate_call(lambda filters: filters.disk(19.5)),
}
WORK = CHOSEN | tables.case_recipes(KINDS, "512x512|128^3|uint8")


class Filters(tables.PeerRatios):
    """Times relative to the fastest method of another library."""

    params = (tables.case_names(KINDS), ["OpenCV", "SciPy"])

    def setup_cache(self):
        return tables.measure_table(KINDS)

    setup_cache.timeout = 600


class FilterTimes(tables.OwnTimes):
    """Absolute times."""

    params = (tables.case_names(KINDS),)
    setup_cache = Filters.setup_cache


class Chosen(tables.Recipes):
    """Calls that choose a method; the plan is cached, so this is a look-up and a run."""

    recipes = CHOSEN

    params = (list(CHOSEN),)
    param_names = ["filter"]

    def time_filter(self, name):
        self.call()


#: First calls in a new process, which plan: statements that make the image and the kernel.
FIRST = {
    "3-D Gaussian, 15 taps": "numpy.ones((64, 64, 64), 'f'), filters.gauss(1.75, ndim=3)",
    "3-D Gaussian, 25 taps": "numpy.ones((64, 64, 64), 'f'), filters.gauss(3.0, ndim=3)",
    "Gaussian, 33 taps": "numpy.ones((480, 640), 'f'), filters.gauss(4.0)",
    "disk, 19 taps": "numpy.ones((480, 640), 'f'), filters.disk(9.5)",
}
FIRST_CALL = """
import time, numpy
from lowrank import filters
image, kernel = {}
filters.correlate(numpy.ones((16, 16), "f"), numpy.ones((3, 3), "f"), threads=1)
start = time.perf_counter()
filters.correlate(image, kernel, threads=1)
print(time.perf_counter() - start)
"""


class FirstCalls:
    """Seconds of the first call with a kernel, in a process that has filtered by another one."""

    params = (list(FIRST),)
    param_names = ["filter"]
    timeout = 300

    def track_seconds(self, name):
        command = [sys.executable, "-c", FIRST_CALL.format(FIRST[name])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NotImplementedError(done.stderr)
        return float(done.stdout)

    track_seconds.unit = "seconds"
