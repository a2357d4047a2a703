"""Where calibrations are kept: a file a machine in the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import platformdirs

from lowrank._kernels import _core
from lowrank.factorization import Factorization
from lowrank.perfmodel import calibration
from lowrank.perfmodel.coefficients import VERSION, Machine, Prediction


def path() -> Path:
    """The file of this machine: the processor, the instruction set and the version name it.

    Returns
    -------
    Path
        In the user's cache folder; it need not exist.

    Examples
    --------
    >>> from lowrank import perfmodel
    >>> perfmodel.path().suffix
    '.json'
    """
    facts = f"{calibration.cpu()}|{_core.default_isa()}|{VERSION}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return platformdirs.user_cache_path("lowrank") / f"machine-{key}.json"


def calibrate(
    progress: Callable[[str, float], object] | None = None,
    engines: Sequence[str] | None = None,
) -> Machine:
    """Measure this machine and keep the result; takes less than a minute.

    Parameters
    ----------
    progress : callable, optional
        Called with the engine that is measured and the share of it that is done.
    engines : sequence of str, optional
        What to measure; all that is installed if not given.  The rates of others are kept.

    Returns
    -------
    Machine
        Which :func:`current` and :func:`predict` use from now on.

    Raises
    ------
    ValueError
        If an engine is unknown.
    OSError
        If the cache folder cannot be written to.

    Notes
    -----
    Runs chains of many kinds and sizes on one thread and on all, and fits rates to what each
    does: vectors of multiply-adds, loads, samples moved, lines from each cache, calls and
    wakings of threads.  Run it when the machine has nothing else to do.
    """
    unknown = set(engines or ()) - set(calibration.BUDGETS)
    if unknown:
        known = ", ".join(calibration.BUDGETS)
        raise ValueError(f"engines must be some of {known}, got {', '.join(sorted(unknown))}")
    file = path()
    kept: Machine | None = None
    if engines is not None:
        with contextlib.suppress(ValueError, OSError):
            kept = _read(file)
    # Without a calibration to add to, everything is measured: rates of another machine do not mix.
    if engines is not None and kept is None:
        engines = tuple(dict.fromkeys((*calibration.ON_CPU, *engines)))
    found = calibration.measure(progress, engines)
    if kept is not None:
        found = replace(found, rates={**kept.rates, **found.rates})
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{os.getpid()}")  # so that nobody reads half a file
    written.write_text(found.to_json())
    written.replace(file)
    _kept.cache_clear()
    return found


def current() -> Machine:
    """The rates of this machine.

    Returns
    -------
    Machine
        Those that :func:`calibrate` measured; without them those of the machine that the package
        was made on, with `calibrated` False: good for comparing, not for seconds.

    Warns
    -----
    UserWarning
        If the file is damaged or another machine's: it is set aside, and this one measured anew.

    Examples
    --------
    >>> from lowrank import perfmodel
    >>> perfmodel.current().threads >= 1
    True
    """
    file = path()
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        return _shipped()
    try:
        return _kept(file, changed)
    except (ValueError, OSError) as why:
        aside = file.with_suffix(".bad")
        warnings.warn(
            f"{file} is no calibration of this machine ({why}): it is now {aside.name}, and the "
            "machine is measured anew, for less than a minute",
            stacklevel=2,
        )
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            file.replace(aside)
        return calibrate()


def predict(
    f: Factorization,
    input_shape: Sequence[int],
    *,
    batch: int = 1,
    threads: int | None = None,
    runtime: str = "lowrank",
) -> Prediction:
    """How long a chain is going to take on this machine; see :meth:`Machine.predict`.

    Parameters
    ----------
    f : Factorization
        Any chain; its weights are not looked at.
    input_shape : sequence of int
        (channels, \\*spatial), or the spatial size alone.
    batch : int
        Examples at a time.
    threads : int, optional
        Threads to use; all that OpenMP offers if not given.
    runtime : str
        ``"lowrank"``, ``"torch"`` or ``"torch channels-last"``.

    Returns
    -------
    Prediction

    Raises
    ------
    ValueError
        If there are no rates for `runtime`, or the shape does not fit.

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
    return current().predict(f, input_shape, batch=batch, threads=threads, runtime=runtime)


@functools.lru_cache(4)
def _kept(file: Path, changed: int) -> Machine:
    """What `file` held when it was `changed`."""
    return _read(file)


def _read(file: Path) -> Machine:
    found = Machine.from_json(file.read_text())
    here = calibration.cpu(), _core.default_isa()
    if (found.cpu, found.isa) != here:
        raise ValueError(f"made on {found.cpu}, {found.isa}, not on {', '.join(here)}")
    return found


@functools.cache
def _shipped() -> Machine:
    text = resources.files("lowrank").joinpath("data/machine.json").read_text()
    return replace(Machine.from_json(text), calibrated=False)
