"""Filters with several outputs against scikit-image.

    OMP_WAIT_POLICY=passive python -m asv_benchmarks.filter_targets [--seconds S]

Each row has the seconds of this library and of its peer on one and on two threads (scikit-image
has one), medians of interleaved calls that allocate their results.
"""

from __future__ import annotations

import argparse
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank import filters

VOLUME = 128, 128, 128
SCALES = 1.0, 2.0
THREADS = 1, 2


class Row(NamedTuple):
    """A measured target.

    Attributes
    ----------
    work : str
        What is computed.
    threads : int
        Number of threads of this library.
    ours, peer : float
        Seconds per call.
    """

    work: str
    threads: int
    ours: float
    peer: float

    @property
    def ratio(self) -> float:
        """Seconds of the peer over those of this library."""
        return self.peer / self.ours


def tensor_rows(seconds: float) -> Iterator[Row]:
    """Measure the Hessian and the structure tensor of a volume.

    scikit-image has two Hessians: by derivatives of Gaussians, as here, and by differences, its
    present default.  Its structure tensor has Sobel differences in the place of derivatives at
    scale 1.
    """
    from skimage import feature

    x = np.random.default_rng(0).random(VOLUME, np.float32)
    size = "x".join(map(str, VOLUME))
    peers = {True: "derivatives of Gaussians", False: "differences"}
    for sigma in SCALES:
        for threads in THREADS:
            ours = functools.partial(filters.hessian, x, sigma, threads=threads)
            for is_exact, name in peers.items():
                peer = functools.partial(
                    feature.hessian_matrix, x, sigma, use_gaussian_derivatives=is_exact
                )
                work = f"Hessian of {size}, sigma {sigma:g}, over {name}"
                yield _measure(work, threads, ours, peer, seconds)
            ours = functools.partial(filters.structure_tensor, x, 1.0, sigma, threads=threads)
            peer = functools.partial(feature.structure_tensor, x, sigma)
            yield _measure(
                f"structure tensor of {size}, rho {sigma:g}", threads, ours, peer, seconds
            )


def _measure(
    work: str, threads: int, ours: Callable[[], object], peer: Callable[[], object], seconds: float
) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-image announces another default
        return Row(work, threads, *measure_seconds([ours, peer], seconds))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="time per row")
    for row in tensor_rows(parser.parse_args().seconds):
        print(
            f"{row.work:64}{row.threads} threads{row.ours * 1e3:9.2f} ms{row.peer * 1e3:9.1f} ms"
            f"{row.ratio:8.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
