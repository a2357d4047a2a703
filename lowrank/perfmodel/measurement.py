"""Measured times of chains on a runtime, kept on disk."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from lowrank._typing import Array, Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.files import atomic_write
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import machine, onnx
from lowrank.perfmodel.runtimes import (
    PACKAGES,
    available_threads,
    bind_call,
    bind_profile,
    check_batch,
    check_installed,
    threads_of,
    version,
)
from lowrank.perfmodel.timing import BUSY, CallTime, time_calls

MAX_ENTRIES = 10_000  # of the file, some 3 MB; the oldest are dropped
LEAST = 1e-7  # seconds of a chain: differences below the resolution of the clock are noise
BLOCKED_AXES = 2  # of the convolutions that onnxruntime computes in a blocked layout

_warnings: set[str] = set()  # given by this process


class Measurements:
    """Measured seconds of chains on one runtime; a question is measured once per machine.

    Parameters
    ----------
    runtime : str
        ``"lowrank"``, ``"onnxruntime"``, ``"torch"`` or ``"torch-channels-last"``.
    batch : int
        Number of examples.
    threads : int, optional
        Number of threads; default: all that OpenMP offers.
    in_network : bool
        Whether chains are measured as in a network of the runtime, without the change of layout
        at its ends.

    Attributes
    ----------
    file : Path
        JSON file of the results, beside the calibration file of this machine.

    Raises
    ------
    ValueError
        If the runtime is unknown, or `batch` or `threads` is less than 1.
    ImportError
        If the runtime is not installed.

    Notes
    -----
    The key of a result is the runtime and its version, the input, batch and threads, and the
    shapes and geometry of the stages.  A damaged file is replaced, with a warning; if the folder
    cannot be written to, results last as long as the object.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.perfmodel.measurement import Measurements
    >>> conv = lowrank.dense(np.ones((8, 8, 3, 3), np.float32), padding=1)
    >>> measured = Measurements("lowrank", threads=1)
    >>> dense, chains = measured.seconds(conv.stages, [], (8, 20, 20))
    >>> dense > 0, chains
    (True, [])
    """

    def __init__(
        self, runtime: str, batch: int = 1, threads: int | None = None, in_network: bool = True
    ) -> None:
        if runtime not in PACKAGES:
            raise ValueError(f"runtime must be one of {', '.join(PACKAGES)}, got {runtime!r}")
        check_installed(runtime)
        self.runtime = runtime
        self.batch = check_batch(batch)
        self.threads = available_threads(threads)
        self.in_network = in_network
        calibration = machine.calibration_file()
        self.file = calibration.with_name(calibration.name.replace("machine", "measured", 1))
        self._known = _read(self.file)

    def seconds(
        self,
        dense: Sequence[Stage],
        chains: Sequence[Sequence[Stage]],
        shape: Ints,
        progress: Callable[[float], object] | None = None,
    ) -> tuple[float, list[float]]:
        """Return the seconds of a dense stage and of chains, measured in alternation.

        Parameters
        ----------
        dense : sequence of Stage
            The one stage of the convolution that the chains replace.
        chains : sequence of sequence of Stage
            Chains; weights may be abstract, as random ones run.
        shape : tuple of int
            (channels, \\*spatial) of the input.
        progress : callable, optional
            Function called with the completed share of a measurement.

        Returns
        -------
        dense : float
            Seconds of the dense stage, for the whole batch.
        chains : list of float
            Seconds of each chain.

        Raises
        ------
        NotImplementedError
            If the runtime has no operator for a stage.

        Notes
        -----
        The first measurement of a dense stage is kept.  Chains that are measured later are scaled
        by its kept time over its time in the same alternation, so that a machine that has become
        slower does not favour the chains that were measured before.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> from lowrank.perfmodel.measurement import Measurements
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3), np.float32), padding=1)
        >>> f = lowrank.channel_svd(conv, 1)
        >>> measured = Measurements("lowrank", threads=1)
        >>> dense, chains = measured.seconds(conv.stages, [f.stages], (8, 20, 20))
        >>> measured.seconds(conv.stages, [f.stages], (8, 20, 20)) == (dense, chains)
        True
        """
        keys = [self._key(stages, shape) for stages in (dense, *chains)]
        missing = {k: s for k, s in zip(keys, (dense, *chains)) if k not in self._known}
        if missing:
            missing = {keys[0]: dense, **missing}
            times = self.measure(list(missing.values()), shape, progress)
            scale = self._known.get(keys[0], times[0].seconds) / times[0].seconds
            found = {k: scale * t.seconds for k, t in zip(missing, times)}
            self._known |= found
            if max(t.spread for t in times) < BUSY:  # a disturbed time would decide for ever
                _add(self.file, found)
        first, *others = (self._known[k] for k in keys)
        return first, others

    def keep(self, subject: str, measure: Callable[[], CallTime]) -> CallTime:
        """Return a time that is measured once per machine, such as that of a network.

        Parameters
        ----------
        subject : str
            What is measured, beside the runtime, its version, batch and threads.
        measure : callable
            Function that measures it, called if it is not known.

        Returns
        -------
        CallTime
            Kept on disk unless its spread shows that the machine was busy.

        Examples
        --------
        >>> from lowrank.perfmodel.measurement import Measurements
        >>> from lowrank.perfmodel.timing import CallTime
        >>> measured = Measurements("lowrank", threads=1)
        >>> first = measured.keep("an example", lambda: CallTime(2.0, 0.01))
        >>> measured.keep("an example", lambda: CallTime(3.0, 0.01)).seconds
        2.0
        """
        key = f"{self._run_text(str(self.batch))}: {subject}"
        names = (key, f"{key} spread")
        if not all(n in self._known for n in names):
            time = measure()
            _warn_if_busy([time])
            found = dict(zip(names, (time.seconds, max(time.spread, LEAST))))
            self._known |= found
            if time.spread < BUSY:
                _add(self.file, found)
        seconds, spread = (self._known[n] for n in names)
        return CallTime(seconds, spread)

    def measure(
        self,
        chains: Sequence[Sequence[Stage]],
        shape: Ints,
        progress: Callable[[float], object] | None = None,
    ) -> list[CallTime]:
        """Measure chains in one alternation; nothing is kept.

        Parameters
        ----------
        chains : sequence of sequence of Stage
            Chains; weights may be abstract, as random ones run.
        shape : tuple of int
            (channels, \\*spatial) of the input.
        progress : callable, optional
            Function called with the completed share.

        Returns
        -------
        list of CallTime
            Time of each chain, for the whole batch.

        Raises
        ------
        NotImplementedError
            If the runtime has no operator for a stage.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> from lowrank.perfmodel.measurement import Measurements
        >>> conv = lowrank.dense(np.ones((8, 8, 3, 3), np.float32), padding=1)
        >>> (time,) = Measurements("lowrank", threads=1).measure([conv.stages], (8, 20, 20))
        >>> time.seconds > 0, len(time.samples) >= 3
        (True, True)
        """
        rng = np.random.default_rng(0)
        x = _random(rng, (self.batch, *shape))
        calls: list[Callable[[], Any]] = []
        for n, stages in enumerate(chains):
            calls.append(self._bind([_with_weight(rng, s) for s in stages], x))
            if progress is not None:
                progress((n + 1) / (len(chains) + 1))
        ends: dict[Ints, int] = {}
        if self._has_ends(shape):
            for size in (shape, *(chain_shapes(stages, shape)[-1] for stages in chains)):
                if size not in ends:
                    ends[size] = len(calls)
                    x_end = _random(rng, (self.batch, *size))
                    calls.append(onnx.bind_call((), (), x_end, self.threads, in_network=True))
        is_profiled = self.runtime == "lowrank" and self.in_network
        with threads_of(self.runtime, self.threads):
            times = time_calls(calls, clock=_reported) if is_profiled else time_calls(calls)
        _warn_if_busy(times)
        if progress is not None:
            progress(1.0)
        found = []
        for stages, time in zip(chains, times):
            off = 0.0
            if ends:  # half of the two ends at the input, and of those at the output
                around = (shape, chain_shapes(stages, shape)[-1])
                off = fmean(times[ends[size]].seconds for size in around)
            seconds, *samples = (max(t - off, LEAST) for t in (time.seconds, *time.samples))
            found.append(CallTime(seconds, time.spread, tuple(samples)))
        return found

    def _key(self, stages: Sequence[Stage], shape: Ints) -> str:
        place = "in a network" if self.in_network else "alone"
        size = "x".join(map(str, shape))
        run = self._run_text(f"{self.batch}x{size}")
        return f"{run} {place}: {' > '.join(map(describe_stage, stages))}"

    def _run_text(self, size: str) -> str:
        """Return what all times depend on, beside what is run."""
        run = f"{self.runtime} {version(self.runtime)} {size} {self.threads} threads"
        return run if self.threads == 1 else f"{run}, {machine.wait_policy()}"

    def _bind(self, stages: Sequence[Stage], x: Array) -> Callable[[], Any]:
        if self.in_network and self.runtime == "lowrank":
            return bind_profile(stages, x, self.threads)
        with threads_of(self.runtime, self.threads):
            if self._has_ends(x.shape[1:]):
                none = [Epilogue()] * len(stages)
                return onnx.bind_call(stages, none, x, self.threads, in_network=True)
            return bind_call(self.runtime, stages, x, self.threads)

    def _has_ends(self, shape: Ints) -> bool:
        """Return whether chains are measured between neighbours in onnxruntime's blocked layout."""
        is_blocked = len(shape) == 1 + BLOCKED_AXES
        return self.in_network and self.runtime == "onnxruntime" and is_blocked


def describe_stage(s: Stage) -> str:
    """Return all that the time of a stage depends on, as text."""
    g = s.geometry
    padding = [f"{a}:{b}" for a, b in g.padding]
    parts = {
        "": s.weight.shape,
        "groups": [s.groups],
        "copies": [s.outer, s.inner],
        "shuffle": s.shuffle,
        "stride": g.stride,
        "dilation": g.dilation,
        "padding": padding,
        g.padding_mode: [g.value],
        "output padding": g.output_padding,
    }
    kind = "transposed " if s.transposed else ""
    return kind + " ".join(f"{k}{','.join(map(str, v))}" for k, v in parts.items())


def _random(rng: np.random.Generator, shape: Ints) -> Array:
    return rng.random(shape, np.float32) - np.float32(0.5)


def _with_weight(rng: np.random.Generator, stage: Stage) -> Stage:
    return replace(stage, weight=_random(rng, stage.weight.shape))


def _reported(call: Callable[[], float], n: int) -> float:
    """Return the mean of the seconds that calls return."""
    return fmean(call() for _ in range(n))


def _warn_if_busy(times: Sequence[CallTime]) -> None:
    spread = max(time.spread for time in times)
    if spread >= BUSY:
        _warn_once(
            "busy",
            f"the machine is busy: the middle half of repeated times spreads over {spread:.0%} of "
            "their median, so that measured times are not reliable",
        )


def _warn_once(subject: str, message: str) -> None:
    if subject not in _warnings:
        _warnings.add(subject)
        warnings.warn(message, stacklevel=2)


def _read(file: Path) -> dict[str, float]:
    """Return the results in a file; none, with a warning, if it is damaged."""
    try:
        found = json.loads(file.read_text("utf-8"))
        if not all(isinstance(v, float) and 0 < v < math.inf for v in found.values()):
            raise ValueError("times must be positive numbers")
    except OSError:  # not there, or not to be read: then it cannot be written, either
        return {}
    except (ValueError, AttributeError, RecursionError) as error:
        _warn_once("file", f"{file} is not a file of measured times ({error}): measuring anew")
        return {}
    return dict(found)


def _add(file: Path, found: dict[str, float]) -> None:
    """Add results to a file, which other processes may have extended meanwhile."""
    merged = {**_read(file), **found}
    newest = dict(list(merged.items())[-MAX_ENTRIES:])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part:
            part.write_text(json.dumps(newest, indent=0), "utf-8")
    except OSError as error:
        _warn_once("file", f"measured times are not kept: {error}")
