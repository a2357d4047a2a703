"""Cost coefficients of a machine: seconds per feature, and their measured error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lowrank._kernels import _core
from lowrank._typing import Ints
from lowrank.core import tables
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Stage
from lowrank.engine.machine import VERSION, WaitPolicy, read_latencies, wait_policy
from lowrank.factorization import Factorization
from lowrank.perfmodel import features
from lowrank.perfmodel.features import Features, Work

FORK_JOIN = "fork/join"  # the feature whose coefficient is measured, not fitted
#: Function that counts the features of each runtime.
RUNTIMES = {
    "lowrank": features.lowrank,
    "torch": features.torch,
    "torch channels-last": features.torch,
    "cuda": features.cuda,
}


class Prediction(NamedTuple):
    """Predicted run time, and the error of such predictions.

    Attributes
    ----------
    seconds : float
        Seconds for the whole batch.
    error : float
        Median relative error of the model on workloads that its coefficients were not fitted
        to.  NaN with the coefficients of another machine.
    parts : mapping of str to float
        Seconds per feature; they add up to `seconds`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> conv = lowrank.dense(np.ones((8, 8, 3, 3), np.float32), padding=1)
    >>> p = lowrank.perfmodel.predict(conv, (56, 56))
    >>> bool(abs(sum(p.parts.values()) - p.seconds) < 1e-9)
    True
    """

    seconds: float
    error: float
    parts: Mapping[str, float]

    def __str__(self) -> str:
        return f"{tables.format_seconds(self.seconds)} ({tables.model(self.error)})"


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Cost coefficients of one runtime: seconds per feature.

    Attributes
    ----------
    seconds : mapping of str to float
        Seconds per unit, by the name of the feature.
    error, spread : float
        Median and 90th percentile of the relative error on workloads left out of the fit.
    """

    seconds: Mapping[str, float]
    error: float
    spread: float

    def predict(self, counts: Features) -> Prediction:
        """Predict the seconds of counted features.

        Parameters
        ----------
        counts : dict of str to float
            Features from :mod:`lowrank.perfmodel.features`; those without a coefficient cost
            nothing.

        Returns
        -------
        Prediction

        Examples
        --------
        >>> from lowrank.perfmodel import Coefficients
        >>> Coefficients({"call": 2e-6}, error=0.1, spread=0.2).predict({"call": 3}).seconds
        6e-06
        """
        parts = {name: n * self.seconds.get(name, 0.0) for name, n in counts.items()}
        nonzero = {k: v for k, v in parts.items() if v > 0}
        return Prediction(sum(nonzero.values()), self.error, MappingProxyType(nonzero))


@dataclass(frozen=True, slots=True)
class PerformanceModel:
    """Cost coefficients of one machine; :func:`lowrank.perfmodel.current` returns this one's.

    Attributes
    ----------
    cpu, isa : str
        Name of the processor, and the instruction set that the engine runs on.
    threads : int
        Number of threads of the parallel measurements.
    coefficients : mapping of str to Coefficients
        Coefficients by runtime: ``"lowrank"``, ``"fft"``, and with PyTorch ``"torch"`` and
        ``"torch channels-last"``.
    fork_join : mapping of str to float
        Fork/join latency of a parallel region on all threads, in seconds, by the wait policy of
        OpenMP: ``"passive"`` or ``"active"``.
    calibrated : bool
        Whether they were measured on this machine; False for those shipped with the package.
    """

    cpu: str
    isa: str
    threads: int
    coefficients: Mapping[str, Coefficients]
    fork_join: Mapping[WaitPolicy, float]
    calibrated: bool = True

    def predict(
        self,
        f: Factorization,
        input_shape: Sequence[int],
        *,
        batch: int = 1,
        threads: int | None = None,
        runtime: str = "lowrank",
    ) -> Prediction:
        """Predict the run time of a chain.

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
            Runtime: ``"lowrank"``, ``"torch"`` (PyTorch's convolutions in its default layout) or
            ``"torch channels-last"``.

        Returns
        -------
        Prediction
            Time in float32 of a plan that has run before.

        Raises
        ------
        ValueError
            If there are no coefficients for `runtime`, or the shape does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((64, 64, 3, 3), np.float32), padding=1)
        >>> here = lowrank.perfmodel.current()
        >>> here.predict(conv, (56, 56)).seconds > here.predict(conv, (28, 28)).seconds
        True
        """
        if runtime not in self.coefficients or runtime not in RUNTIMES:
            known = ", ".join(name for name in RUNTIMES if name in self.coefficients)
            raise ValueError(f"runtime must be one of {known}, got {runtime!r}" + _hint(runtime))
        if not isinstance(f, Factorization):
            raise TypeError(f"f must be a Factorization, got {type(f).__qualname__}")
        return self.predict_stages(f.stages, f.input_shape(input_shape), batch, threads, runtime)

    def predict_stages(
        self,
        stages: Sequence[Stage],
        shape: Ints,
        batch: int = 1,
        threads: int | None = None,
        runtime: str = "lowrank",
        itemsize: int = 4,
        interleaved: int = 1,
    ) -> Prediction:
        """Predict the run time of stages; their weights may be abstract.

        Parameters
        ----------
        stages : sequence of Stage
            Stages of a chain.
        shape : tuple of int
            Size of the input, (channels, \\*spatial).
        batch : int
            Number of examples.
        threads : int, optional
            Number of threads; default: all that OpenMP offers.
        runtime : str
            Runtime, as for :meth:`predict`.
        itemsize : int
            Bytes per value: 4 or 8.
        interleaved : int
            Values per sample, such as the colours of a pixel.

        Returns
        -------
        Prediction

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.cp(lowrank.dense(np.ones((8, 8, 3, 3), np.float32)), rank=1)
        >>> here = lowrank.perfmodel.current()
        >>> here.predict_stages(f.stages, (8, 64, 64)).seconds == here.predict(f, (64, 64)).seconds
        True
        """
        (batch,) = as_integers("batch", batch, 1)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        work = Work(stages, shape, batch, _available_threads(threads), itemsize, interleaved)
        return self._predict(runtime, RUNTIMES[runtime](work, self.threads))

    def predict_fft(
        self,
        taps: Ints,
        spatial: Ints,
        block: Ints,
        threads: int | None = None,
        itemsize: int = 4,
    ) -> Prediction:
        """Predict the run time of a filter by Fourier transforms of blocks.

        Parameters
        ----------
        taps, spatial, block : tuple of int
            Sizes of the kernel, of the image and of a transform, along each axis.
        threads : int, optional
            Number of threads; default: all that OpenMP offers.
        itemsize : int
            Bytes per value: 4 or 8.

        Returns
        -------
        Prediction

        Examples
        --------
        >>> import lowrank
        >>> here = lowrank.perfmodel.current()
        >>> here.predict_fft((31, 31), (1024, 1024), (288, 288)).seconds > 0
        True
        """
        threads = _available_threads(threads)
        return self._predict(
            "fft", features.fft(taps, spatial, block, threads, self.threads, itemsize)
        )

    def _predict(self, runtime: str, counts: Features) -> Prediction:
        coefficients = self.coefficients[runtime]
        seconds = {**coefficients.seconds, FORK_JOIN: self.fork_join[wait_policy()]}
        prediction = replace(coefficients, seconds=seconds).predict(counts)
        return prediction if self.calibrated else prediction._replace(error=math.nan)

    def to_json(self) -> str:
        """Return the model as JSON.

        Returns
        -------
        str
            Text for :meth:`from_json`.
        """
        machine = {"version": VERSION, "cpu": self.cpu, "isa": self.isa, "threads": self.threads}
        coefficients = {
            name: {"error": c.error, "spread": c.spread, "seconds": dict(c.seconds)}
            for name, c in self.coefficients.items()
        }
        latencies = {"fork_join": dict(self.fork_join)}
        return json.dumps({**machine, **latencies, "coefficients": coefficients}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PerformanceModel:
        """Read the result of :meth:`to_json`.

        Parameters
        ----------
        text : str
            JSON text.

        Returns
        -------
        PerformanceModel

        Raises
        ------
        ValueError
            If the text is not a calibration of this version, or a coefficient is not a number.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise ValueError("written by another version of lowrank")
            coefficients = {
                name: _read_coefficients(entry) for name, entry in data["coefficients"].items()
            }
            if not {"lowrank", "fft"} <= set(coefficients):
                raise ValueError("coefficients of 'lowrank' or 'fft' are missing")
            if not {"product", "plane product"} & set(coefficients["lowrank"].seconds):
                raise ValueError("the coefficients of MACs are missing")
            if int(data["threads"]) < 1:
                raise ValueError(f"threads must be at least 1, got {data['threads']}")
            machine = str(data["cpu"]), str(data["isa"]), int(data["threads"])
            latencies = read_latencies(data["fork_join"])
            return cls(*machine, MappingProxyType(coefficients), MappingProxyType(latencies))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a calibration: {error!r}") from None


def _hint(runtime: str) -> str:
    if "torch" in runtime:
        return ": 'lowrank calibrate' with PyTorch installed adds it"
    return ": 'lowrank calibrate --device cuda' adds it" if runtime == "cuda" else ""


def _available_threads(threads: int | None) -> int:
    """Return the number of threads of a run: at most what OpenMP offers."""
    available = _core.max_threads()
    if threads is None:
        return available
    (threads,) = as_integers("threads", threads, 1)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return min(threads, available)


def _read_coefficients(entry: Mapping[str, Any]) -> Coefficients:
    seconds = {str(k): float(v) for k, v in entry["seconds"].items()}
    values = [*seconds.values(), entry["error"], entry["spread"]]
    if not all(0 <= v < np.inf for v in values) or not seconds:
        raise ValueError("a coefficient is negative or not a number")
    return Coefficients(MappingProxyType(seconds), float(entry["error"]), float(entry["spread"]))
