"""Calibration files: one per machine, in the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from lowrank._kernels import _core
from lowrank.core.files import atomic_write
from lowrank.engine import machine
from lowrank.factorization import Factorization
from lowrank.perfmodel import calibration
from lowrank.perfmodel.coefficients import PerformanceModel, Prediction, shipped
from lowrank.perfmodel.runtimes import check_installed

BUSY_ERROR = 0.25  # median, of calibrations on an idle machine 0.05 to 0.15


def path() -> Path:
    """Return the calibration file of this machine, named by processor, instruction set and version.

    Returns
    -------
    Path
        File in the user's cache folder; it need not exist.

    Examples
    --------
    >>> from lowrank import perfmodel
    >>> perfmodel.path().suffix
    '.json'
    """
    return machine.calibration_file()


def calibrate(
    progress: Callable[[str, float], object] | None = None,
    runtimes: Sequence[str] | None = None,
    quick: bool = False,
) -> PerformanceModel:
    """Measure this machine and save its cost coefficients; takes about a minute.

    Parameters
    ----------
    progress : callable, optional
        Function called with the runtime that is measured and the completed share of it.
    runtimes : sequence of str, optional
        Runtimes to measure; default: all that are installed.  Coefficients of others are kept.
    quick : bool
        Whether to measure few workloads, in about five seconds per runtime: errors are larger,
        and the coefficients are marked.

    Returns
    -------
    PerformanceModel
        The model that :func:`current` and :func:`predict` use from now on.

    Raises
    ------
    ValueError
        If a runtime is unknown.
    ImportError
        If a runtime is not installed.
    OSError
        If the cache folder cannot be written to.

    Warns
    -----
    UserWarning
        If predictions of the workloads are off by a quarter or more, as on a busy machine.

    Notes
    -----
    Runs calibration workloads of many kinds and sizes on one thread and on all, and fits
    coefficients to the features of each: vectors of MACs, loads, samples moved, lines from each
    cache and calls.  The fork/join latency of a parallel region is measured in processes of their
    own, one per wait policy of OpenMP.  Run it on an otherwise idle machine.
    """
    unknown = set(runtimes or ()) - set(calibration.BUDGETS)
    if unknown:
        known = ", ".join(calibration.BUDGETS)
        raise ValueError(f"runtimes must be some of {known}, got {', '.join(sorted(unknown))}")
    for name in runtimes or ():
        check_installed(name)
    file = path()
    earlier: PerformanceModel | None = None
    if runtimes is not None:
        with contextlib.suppress(ValueError, OSError):
            earlier = _read(file)
        # Filters choose between these two: coefficients of two machines would not compare.
        stored = {*runtimes, *(earlier.coefficients if earlier else ())}
        if stored & {"fft", "lowrank"}:
            runtimes = [*runtimes, *sorted({"fft", "lowrank"} - stored)]
    model = calibration.measure(progress, runtimes, quick)
    for name, found in model.coefficients.items():
        if found.error >= BUSY_ERROR:
            warnings.warn(
                f"the median error of predictions is {found.error:.0%} for runtime {name!r}: "
                "calibrate again while the machine is idle",
                stacklevel=2,
            )
    if earlier is not None:
        model = replace(model, coefficients={**earlier.coefficients, **model.coefficients})
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as part:
        part.write_text(model.to_json(), "utf-8")
    _read_cached.cache_clear()
    return model


def current() -> PerformanceModel:
    """Return the performance model of this machine.

    Returns
    -------
    PerformanceModel
        The result of :func:`calibrate`; without one, the model of the machine on which the package
        was made, with `calibrated` False: it compares chains, but its seconds are not reliable.

    Warns
    -----
    UserWarning
        If the file cannot be read, is damaged or another machine's: it is set aside if possible,
        and the model of the machine on which the package was made is returned.

    Examples
    --------
    >>> from lowrank import perfmodel
    >>> perfmodel.current().threads >= 1
    True
    """
    file = path()
    try:
        modified = file.stat().st_mtime_ns
    except OSError:
        return shipped()
    return _read_cached(file, modified)


def predict(
    f: Factorization,
    input_shape: Sequence[int],
    *,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
    in_network: bool = False,
) -> Prediction:
    """Predict the run time of a chain on this machine; see :meth:`PerformanceModel.predict`.

    Parameters
    ----------
    f : Factorization
        Chain; its weights are not read.
    input_shape : sequence of int
        Size of the input, (channels, \\*spatial), or the spatial size alone.
    batch : int
        Number of examples.
    threads : int, optional
        Number of threads; default: all that OpenMP offers.
    runtime : str
        Runtime: ``"lowrank"``, ``"onnxruntime"``, ``"torch"``, ``"torch-channels-last"`` or
        ``"cuda"``.
    in_network : bool
        Whether the chain is part of a network, whose layout it need not change at its ends.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        If the runtime is unknown or has no coefficients, or the shape does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((64, 64, 3, 3), np.float32), padding=1)
    >>> f = lowrank.tucker(conv, rank=(8, 8))
    >>> predict = lowrank.perfmodel.predict
    >>> predict(f, (56, 56)).seconds < predict(conv, (56, 56)).seconds
    True
    """
    return current().predict(
        f, input_shape, batch=batch, threads=threads, runtime=runtime, in_network=in_network
    )


@functools.lru_cache(4)
def _read_cached(file: Path, modified: int) -> PerformanceModel:
    """Read `file`, last modified at `modified`; warn once and set it aside if that fails."""
    try:
        return _read(file)
    except (ValueError, OSError) as error:
        aside = file.with_suffix(".bad")
        try:
            file.replace(aside)
            what = f"renamed to {aside.name}"
        except OSError:  # another process was faster, or nothing can be written
            what = "ignored"
        warnings.warn(
            f"{file} is not a calibration of this machine ({error}): {what}; times are those of "
            "the machine on which lowrank was made until 'lowrank calibrate' measures this one",
            stacklevel=3,
        )
        return shipped()


def _read(file: Path) -> PerformanceModel:
    model = PerformanceModel.from_json(file.read_text("utf-8"))
    here = machine.cpu(), _core.default_isa()
    if (model.cpu, model.isa) != here:
        raise ValueError(f"made on {model.cpu}, {model.isa}, not on {', '.join(here)}")
    return model
