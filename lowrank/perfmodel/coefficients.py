"""A machine as the time model sees it: seconds for each thing that it counts, and how well."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lowrank._kernels import _core
from lowrank._typing import Ints
from lowrank.core import tables
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization
from lowrank.perfmodel import features
from lowrank.perfmodel.features import Counts, Work

VERSION = 2  # of what is counted: rates of another version mean nothing

#: Counts that are seconds already.
SECONDS = {"wake": 1.0}
#: What is counted for each way to run a chain.
RUNTIMES = {
    "lowrank": features.runtime,
    "torch": features.torch,
    "torch channels-last": features.torch,
    "cuda": features.cuda,
}


class Prediction(NamedTuple):
    """Seconds that a run is going to take, and how far such predictions are off.

    Attributes
    ----------
    seconds : float
        For the whole batch.
    error : float
        Median relative error of the model on work that its rates were not fitted to; half of
        the predictions are nearer.  NaN with rates of another machine.
    parts : mapping of str to float
        The seconds by what they are spent on; they add up.

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
class Rates:
    """Seconds of each count for one way to run chains.

    Attributes
    ----------
    seconds : mapping of str to float
        By the name of the count.
    error, spread : float
        Median and 90th percentile of the relative error, on work that was left out of the fit.
    """

    seconds: Mapping[str, float]
    error: float
    spread: float

    def predict(self, counted: Counts) -> Prediction:
        """Seconds of what was counted.

        Parameters
        ----------
        counted : dict of str to float
            From :mod:`lowrank.perfmodel.features`; what has no rate takes no time.

        Returns
        -------
        Prediction

        Examples
        --------
        >>> from lowrank.perfmodel import Rates
        >>> Rates({"call": 2e-6}, error=0.1, spread=0.2).predict({"call": 3}).seconds
        6e-06
        """
        parts = {k: v * (SECONDS.get(k) or self.seconds.get(k, 0.0)) for k, v in counted.items()}
        kept = {k: v for k, v in parts.items() if v > 0}
        return Prediction(sum(kept.values()), self.error, MappingProxyType(kept))


@dataclass(frozen=True, slots=True)
class Machine:
    """The rates of one machine; :func:`lowrank.perfmodel.current` gives those of this one.

    Attributes
    ----------
    cpu, isa : str
        Name of the processor, and the instruction set that the engine runs on.
    threads : int
        The most that rates were measured for.
    rates : mapping of str to Rates
        By engine: ``"lowrank"``, ``"fft"``, and with PyTorch ``"torch"`` and
        ``"torch channels-last"``.
    calibrated : bool
        Whether they were measured on this machine; False for those that come with the package.
    """

    cpu: str
    isa: str
    threads: int
    rates: Mapping[str, Rates]
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
        """How long a chain is going to take.

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
            ``"lowrank"``, ``"torch"`` (PyTorch's convolutions in its default layout) or
            ``"torch channels-last"``.

        Returns
        -------
        Prediction
            For float32 and a plan that has been made and run before.

        Raises
        ------
        ValueError
            If there are no rates for `runtime`, or the shape does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> conv = lowrank.dense(np.ones((64, 64, 3, 3), np.float32), padding=1)
        >>> here = lowrank.perfmodel.current()
        >>> here.predict(conv, (56, 56)).seconds > here.predict(conv, (28, 28)).seconds
        True
        """
        if runtime not in self.rates or runtime not in RUNTIMES:
            known = ", ".join(e for e in RUNTIMES if e in self.rates)
            raise ValueError(f"runtime must be one of {known}, got {runtime!r}" + _added(runtime))
        if not isinstance(f, Factorization):
            raise TypeError(f"f must be a Factorization, got {type(f).__qualname__}")
        return self.of_stages(f.stages, f.input_shape(input_shape), batch, threads, runtime)

    def of_stages(
        self,
        stages: Sequence[Stage],
        shape: Ints,
        batch: int = 1,
        threads: int | None = None,
        runtime: str = "lowrank",
        itemsize: int = 4,
        interleaved: int = 1,
    ) -> Prediction:
        """How long bare stages are going to take, blank ones too.

        Parameters
        ----------
        stages : sequence of Stage
            One after another.
        shape : tuple of int
            (channels, \\*spatial) of the input.
        batch : int
            Examples at a time.
        threads : int, optional
            Threads to use; all that OpenMP offers if not given.
        runtime : str
            As for :meth:`predict`.
        itemsize : int
            Bytes of a number: 4 or 8.
        interleaved : int
            Numbers side by side in a sample, such as the colours of a pixel.

        Returns
        -------
        Prediction

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank
        >>> f = lowrank.cp(lowrank.dense(np.ones((8, 8, 3, 3), np.float32)), rank=1)
        >>> here = lowrank.perfmodel.current()
        >>> here.of_stages(f.stages, (8, 64, 64)).seconds == here.predict(f, (64, 64)).seconds
        True
        """
        (batch,) = as_integers("batch", batch, 1)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        work = Work(stages, shape, batch, _threads(threads), itemsize, interleaved)
        return self._said(runtime, RUNTIMES[runtime](work, self.threads))

    def of_transforms(
        self,
        taps: Ints,
        spatial: Ints,
        block: Ints,
        threads: int | None = None,
        itemsize: int = 4,
    ) -> Prediction:
        """How long a filter is going to take by Fourier transforms of blocks.

        Parameters
        ----------
        taps, spatial, block : tuple of int
            Sizes of the kernel, of the image and of a transform, along each axis.
        threads : int, optional
            Threads to use; all that OpenMP offers if not given.
        itemsize : int
            Bytes of a number: 4 or 8.

        Returns
        -------
        Prediction

        Examples
        --------
        >>> import lowrank
        >>> here = lowrank.perfmodel.current()
        >>> here.of_transforms((31, 31), (1024, 1024), (288, 288)).seconds > 0
        True
        """
        counted = features.fft(taps, spatial, block, _threads(threads), self.threads, itemsize)
        return self._said("fft", counted)

    def _said(self, runtime: str, counted: Counts) -> Prediction:
        found = self.rates[runtime].predict(counted)
        return found if self.calibrated else found._replace(error=math.nan)

    def to_json(self) -> str:
        """As text.

        Returns
        -------
        str
            For :meth:`from_json`.
        """
        facts = {"version": VERSION, "cpu": self.cpu, "isa": self.isa, "threads": self.threads}
        rates = {
            name: {"error": r.error, "spread": r.spread, "seconds": dict(r.seconds)}
            for name, r in self.rates.items()
        }
        return json.dumps({**facts, "rates": rates}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """From what :meth:`to_json` gave.

        Parameters
        ----------
        text : str
            JSON.

        Returns
        -------
        Machine

        Raises
        ------
        ValueError
            If it is none, of another version, or a rate is no number.
        """
        try:
            read = json.loads(text)
            if read["version"] != VERSION:
                raise ValueError("written by another version of lowrank")
            rates = {name: _rates(given) for name, given in read["rates"].items()}
            if not {"lowrank", "fft"} <= set(rates):
                raise ValueError("the rates of the engine are missing")
            if not {"multiply", "load"} & set(rates["lowrank"].seconds):
                raise ValueError("the engine has no rate for multiply-adds")
            if int(read["threads"]) < 1:
                raise ValueError(f"{read['threads']} threads")
            facts = str(read["cpu"]), str(read["isa"]), int(read["threads"])
            return cls(*facts, MappingProxyType(rates))
        except (KeyError, TypeError, AttributeError) as why:
            raise ValueError(f"not a calibration: {why!r}") from None


def _added(runtime: str) -> str:
    if "torch" in runtime:
        return ": 'lowrank calibrate' with PyTorch installed adds it"
    return ": 'lowrank calibrate --device cuda' adds it" if runtime == "cuda" else ""


def _threads(threads: int | None) -> int:
    """Threads that a run gets: no more than OpenMP offers."""
    most = _core.max_threads()
    if threads is None:
        return most
    (threads,) = as_integers("threads", threads, 1)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return min(threads, most)


def _rates(given: Mapping[str, Any]) -> Rates:
    seconds = {str(k): float(v) for k, v in given["seconds"].items()}
    values = [*seconds.values(), given["error"], given["spread"]]
    if not all(0 <= v < np.inf for v in values) or not seconds:
        raise ValueError("a rate is negative or no number")
    return Rates(MappingProxyType(seconds), float(given["error"]), float(given["spread"]))
