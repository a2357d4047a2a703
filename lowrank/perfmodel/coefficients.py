"""Cost coefficients of a machine: seconds per feature, and their measured error."""

from __future__ import annotations

import functools
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
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Stage, abstract_weight
from lowrank.engine.machine import (
    VERSION,
    WaitPolicy,
    least_saving,
    read_latencies,
    shipped_calibration,
    wait_policy,
)
from lowrank.factorization import Factorization
from lowrank.perfmodel import features
from lowrank.perfmodel.features import Work
from lowrank.perfmodel.runtimes import available_threads, check_batch

FORK_JOIN = "fork/join"  # the feature whose coefficient is measured, not fitted
#: Function that counts the features of each runtime.
RUNTIMES = {
    "lowrank": features.lowrank,
    "onnxruntime": features.onnxruntime,
    "torch": features.torch,
    "torch-channels-last": features.torch,
    "cuda": features.cuda,
}
CACHED = 1 << 16  # chains whose features are kept; a plan asks for the same ones repeatedly

# A stage without its weight: shape, geometry, groups, outer, inner, shuffle, transposed.
StageShape = tuple[Ints, Geometry, int, int, int, tuple[int, int], bool]


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
    is_quick : bool
        Whether they were fitted to few workloads, by a calibration of seconds.
    """

    seconds: Mapping[str, float]
    error: float
    spread: float
    is_quick: bool = False

    def predict(self, counts: Mapping[str, float]) -> Prediction:
        """Predict the seconds of counted features.

        Parameters
        ----------
        counts : mapping of str to float
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
        Coefficients by runtime, of ``"lowrank"``, ``"fft"``, ``"onnxruntime"``, ``"torch"``,
        ``"torch-channels-last"`` and ``"cuda"``.  Those that this machine lacks are taken from the
        model that was shipped with the package, without an error.
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
        in_network: bool = False,
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
            Runtime: ``"lowrank"``, ``"onnxruntime"``, ``"torch"`` (PyTorch's convolutions in its
            default layout), ``"torch-channels-last"`` or ``"cuda"``.
        in_network : bool
            Whether the chain is part of a network of the runtime: its neighbours have the
            runtime's own layout, so that the chain does not change it at its ends.

        Returns
        -------
        Prediction
            Time in float32 of a plan that has run before.

        Raises
        ------
        ValueError
            If the runtime is unknown or has no coefficients, or the shape does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((64, 64, 3, 3), np.float32), padding=1)
        >>> here = lowrank.perfmodel.current()
        >>> here.predict(conv, (56, 56)).seconds > here.predict(conv, (28, 28)).seconds
        True
        """
        if not isinstance(f, Factorization):
            raise TypeError(f"f must be a Factorization, got {type(f).__qualname__}")
        shape = f.input_shape(input_shape)
        return self.predict_stages(f.stages, shape, batch, threads, runtime, in_network=in_network)

    def predict_stages(
        self,
        stages: Sequence[Stage],
        shape: Ints,
        batch: int = 1,
        threads: int | None = None,
        runtime: str = "lowrank",
        itemsize: int = 4,
        interleaved: int = 1,
        in_network: bool = False,
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
        in_network : bool
            Whether the chain is part of a network, as for :meth:`predict`.

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
        if runtime not in RUNTIMES:
            raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
        counts = _count(
            runtime, tuple(map(_stage_shape, stages)), tuple(shape), check_batch(batch),
            available_threads(threads), itemsize, interleaved, in_network, self.threads,
            least_saving() if threads != 1 else 0.0, _core.default_isa(),
        )  # fmt: skip
        return self._predict(runtime, counts)

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
        threads = available_threads(threads)
        return self._predict(
            "fft", features.fft(taps, spatial, block, threads, self.threads, itemsize)
        )

    def _predict(self, runtime: str, counts: Mapping[str, float]) -> Prediction:
        model = self if runtime in self.coefficients else shipped()
        if runtime not in model.coefficients:
            raise ValueError(
                f"runtime {runtime!r} has no cost coefficients: 'lowrank calibrate --device cuda' "
                "measures them"
            )
        prediction = model.coefficients[runtime].predict(counts)
        if regions := counts.get(FORK_JOIN, 0.0):
            latency = regions * model.fork_join[wait_policy()]
            parts = MappingProxyType({**prediction.parts, FORK_JOIN: latency})
            prediction = prediction._replace(seconds=prediction.seconds + latency, parts=parts)
        return prediction if model.calibrated else prediction._replace(error=math.nan)

    def to_json(self) -> str:
        """Return the model as JSON.

        Returns
        -------
        str
            Text for :meth:`from_json`.
        """
        machine = {"version": VERSION, "cpu": self.cpu, "isa": self.isa, "threads": self.threads}
        coefficients = {
            name: {
                "error": c.error,
                "spread": c.spread,
                "is_quick": c.is_quick,
                "seconds": dict(c.seconds),
            }
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
            if not coefficients or not set(coefficients) <= {"fft", *RUNTIMES}:
                raise ValueError(f"runtimes must be some of fft, {', '.join(RUNTIMES)}")
            products = {"product", "fast product", "plane product"}
            if "lowrank" in coefficients and not products & set(coefficients["lowrank"].seconds):
                raise ValueError("the coefficients of MACs are missing")
            if int(data["threads"]) < 1:
                raise ValueError(f"threads must be at least 1, got {data['threads']}")
            machine = str(data["cpu"]), str(data["isa"]), int(data["threads"])
            latencies = read_latencies(data["fork_join"])
            return cls(*machine, MappingProxyType(coefficients), MappingProxyType(latencies))
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a calibration: {error!r}") from None


@functools.cache
def shipped() -> PerformanceModel:
    """Return the model of the machine on which the package was made."""
    return replace(PerformanceModel.from_json(shipped_calibration()), calibrated=False)


def _stage_shape(s: Stage) -> StageShape:
    return s.weight.shape, s.geometry, s.groups, s.outer, s.inner, s.shuffle, s.transposed


@functools.lru_cache(CACHED)
def _count(
    runtime: str,
    stages: tuple[StageShape, ...],
    shape: Ints,
    batch: int,
    threads: int,
    itemsize: int,
    interleaved: int,
    in_network: bool,
    max_threads: int,
    *state: object,
) -> Mapping[str, float]:
    """Count the features of a chain; `state` is what the engine's choices also depend on."""
    abstract = [
        Stage(abstract_weight(size), geometry, groups, outer, inner, shuffle, transposed)
        for size, geometry, groups, outer, inner, shuffle, transposed in stages
    ]
    work = Work(abstract, shape, batch, threads, itemsize, interleaved, in_network)
    return MappingProxyType(RUNTIMES[runtime](work, max_threads))


def _read_coefficients(entry: Mapping[str, Any]) -> Coefficients:
    seconds = {str(k): float(v) for k, v in entry["seconds"].items()}
    values = [*seconds.values(), entry["error"], entry["spread"]]
    if not all(0 <= v < np.inf for v in values) or not seconds:
        raise ValueError("a coefficient is negative or not a number")
    error, spread = float(entry["error"]), float(entry["spread"])
    return Coefficients(MappingProxyType(seconds), error, spread, bool(entry["is_quick"]))
