"""Latency of a network on a runtime, before and after compression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lowrank.compress.model import Call, Chains, CompressibleModel
from lowrank.core.tables import format_seconds
from lowrank.perfmodel.runtimes import available_threads
from lowrank.perfmodel.timing import BUSY, CallTime, time_calls
from lowrank.selection.candidates import Candidate

MEASURED = 0.5  # seconds of a measurement of two networks, beside first calls


class Timing(NamedTuple):
    """Call that seconds are for.

    Attributes
    ----------
    batch : int
        Number of examples per call.
    threads : int or None
        Number of threads: at most, and if None, as many as OpenMP offers.
    runtime : str
        Library that runs the network; see :func:`lowrank.perfmodel.predict`.
    """

    batch: int = 1
    threads: int | None = None
    runtime: str = "lowrank"

    @property
    def on(self) -> tuple[str, int, int]:
        """Runtime, batch and number of threads."""
        return self.runtime, self.batch, available_threads(self.threads)


class Latency(NamedTuple):
    """Seconds of a call, before and after compression.

    Attributes
    ----------
    before, after : float
        Seconds per call.
    runtime : str
        Library that runs the network.
    batch, threads : int
        Number of examples per call, and of threads.
    spread : float
        Interquartile range of the measured times over their median, of the network that varies
        more; 0 for sums of measured layers, NaN if predicted.
    is_network : bool
        Whether the network was run as a whole; otherwise seconds are sums over its layers.

    Examples
    --------
    >>> from lowrank.compress import Latency
    >>> print(Latency(2e-3, 1e-3, "onnxruntime", 1, 2, 0.02, True))
    2 ms -> 1 ms (50.0%, 2.00x) in onnxruntime, batch 1, 2 threads: measured, spread 2%
    """

    before: float
    after: float
    runtime: str
    batch: int
    threads: int
    spread: float
    is_network: bool

    @property
    def is_measured(self) -> bool:
        """Whether the seconds were measured."""
        return self.spread == self.spread

    def __str__(self) -> str:
        share = self.after / self.before if self.before else 1.0
        how = "measured" if self.is_measured else "predicted"
        if self.spread > 0:
            how += f", spread {self.spread:.0%}"
        what = "" if self.is_network else ", layers alone"
        busy = "; the machine is busy" if self.is_measured and self.spread >= BUSY else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"{format_seconds(self.before)} -> {format_seconds(self.after)} "
            f"({share:.1%}, {1 / share:.2f}x) in {self.runtime}, batch {self.batch}, {threads}: "
            f"{how}{what}{busy}"
        )


class NetworkClock:
    """Clock for a network on a runtime: times compressed versions beside the original.

    Parameters
    ----------
    model : CompressibleModel
        Trained model.
    timing : Timing
        Runtime, batch and threads.
    """

    def __init__(self, model: CompressibleModel, timing: Timing) -> None:
        self.model, self.timing = model, timing
        runtime, batch, threads = timing.on
        self._dense: Call | None = model.call({}, runtime, batch, threads)
        self._before: CallTime | None = None

    @property
    def is_possible(self) -> bool:
        """Whether the runtime runs the network as a whole."""
        return self._dense is not None

    @property
    def before(self) -> CallTime:
        """Time of the original network, as first measured."""
        if self._before is None:
            assert self._dense is not None
            (self._before,) = time_calls([self._dense], MEASURED / 2)
        return self._before

    def measure(self, chains: Chains) -> Latency | None:
        """Return the latency with chains in place of layers; None if it cannot be measured.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chains by layer.

        Returns
        -------
        Latency or None
            The network after compression takes its share of the original in one alternation: a
            change of the machine's speed between two measurements does not matter.
        """
        runtime, batch, threads = self.timing.on
        if self._dense is None or not chains:
            return None
        small = self.model.call(chains, runtime, batch, threads)
        if small is None:
            return None
        dense, after = time_calls([self._dense, small], MEASURED)
        spread = max(dense.spread, after.spread)
        share = after.seconds / dense.seconds
        before = self.before.seconds
        return Latency(before, share * before, runtime, batch, threads, spread, is_network=True)


def layer_latency(
    layers: Mapping[str, Candidate],
    dense: Mapping[str, Candidate],
    timing: Timing,
    spread: float = float("nan"),
) -> Latency:
    """Return the latency of the layers alone, without what runs between them."""
    runtime, batch, threads = timing.on
    before, after = (sum(c.seconds for c in each.values()) for each in (dense, layers))
    return Latency(before, after, runtime, batch, threads, spread, is_network=False)
