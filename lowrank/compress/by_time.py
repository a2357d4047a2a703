"""Allocation by measured time: layers are measured where they decide, networks at the end."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lowrank.compress.latency import Latency, NetworkClock, Timing, layer_latency
from lowrank.compress.model import CompressibleModel, Layer
from lowrank.compress.optimise import Allocation, allocate
from lowrank.compress.statistics import Progress
from lowrank.core.tables import format_seconds
from lowrank.perfmodel.measurement import Measurements
from lowrank.perfmodel.timing import CallTime
from lowrank.selection.budget import Budget, InfeasibleBudgetError
from lowrank.selection.candidates import Candidate
from lowrank.selection.measured import Key, candidate_key, with_measurements
from lowrank.selection.pareto import pareto_front

TOLERANCE = 0.02  # by which a network may exceed its budget: what the clock resolves
UNUSED = 0.03  # of a budget that may stay unused
NETWORKS = 5  # that are timed, each with its limit corrected by the error of the one before
ROUNDS = 6  # of measuring what was chosen and choosing again, per network

Options = dict[str, list[Candidate]]


class TimedChoice(NamedTuple):
    """Choice within a budget of time.

    Attributes
    ----------
    allocation : Allocation
        One candidate per layer.
    options : dict of str to list of Candidate
        Options with the seconds that the choice was made by.
    latency : Latency
        Seconds of the original and of the chosen network.
    limit : float
        Budget, in seconds per call.
    """

    allocation: Allocation
    options: Options
    latency: Latency
    limit: float


def drop_slower(options: Mapping[str, Sequence[Candidate]]) -> Options:
    """Return the options without those that take longer than the dense layer."""
    return {
        name: [found[0], *(c for c in found[1:] if c.seconds < found[0].seconds)]
        for name, found in options.items()
    }


def allocate_by_prediction(
    options: Options, limits: Mapping[str, float], budget: Budget, timing: Timing
) -> TimedChoice:
    """Choose by predicted seconds alone.

    Parameters
    ----------
    options : dict of str to list of Candidate
        Options by layer, the dense layer first.
    limits : mapping of str to float
        Limits on other costs.
    budget : Budget
        Budget of seconds per call, over the layers.
    timing : Timing
        Call that seconds are for.

    Returns
    -------
    TimedChoice

    Raises
    ------
    InfeasibleBudgetError
        If the budget is below the least predicted time.
    """
    faster = drop_slower(options)
    dense = {name: found[0] for name, found in options.items()}
    limit = budget.amount(math.fsum(c.seconds for c in dense.values()))
    allocation = allocate(faster, {**limits, "seconds": limit})
    latency = layer_latency(allocation.candidates, dense, timing)
    return TimedChoice(allocation, options, latency, limit)


def allocate_by_time(
    model: CompressibleModel,
    layers: Mapping[str, Layer],
    options: Options,
    limits: Mapping[str, float],
    budget: Budget,
    clock: NetworkClock,
    progress: Progress | None = None,
) -> TimedChoice:
    """Choose within a budget of time that the clock confirms.

    Parameters
    ----------
    model : CompressibleModel
        Trained model.
    layers : mapping of str to Layer
        Layers of the options.
    options : dict of str to list of Candidate
        Options by layer, the dense layer first, with fitted weights and predicted seconds.
    limits : mapping of str to float
        Limits on other costs.
    budget : Budget
        Budget of seconds per call: of the network, or of its layers if the runtime does not run it
        as a whole.
    clock : NetworkClock
        Clock of the network on the runtime.
    progress : callable, optional
        Called with ``"measuring"`` and the share that is done, at most.

    Returns
    -------
    TimedChoice

    Raises
    ------
    InfeasibleBudgetError
        If the fastest network that was found exceeds the budget; the message states its time.
    ImportError
        If the runtime is not installed.

    Notes
    -----
    The choice by predicted seconds is measured, layer by layer, with the options next to it; the
    seconds of the other options of a layer are corrected by the same quotients, and the choice is
    repeated until all of it was measured.  Then the network is timed beside the original.  What it
    takes more or less than its layers promise - sums, activations and changes of layout between
    them - corrects the limit for the next choice.  Of the networks within the budget the one with
    the least loss is returned.  All times are kept on disk: the same question gets the same answer.
    """
    return _TimedSearch(model, layers, options, limits, budget, clock, progress).run()


class _TimedSearch:
    """Search for the network with the least loss within a budget of time."""

    def __init__(
        self,
        model: CompressibleModel,
        layers: Mapping[str, Layer],
        options: Options,
        limits: Mapping[str, float],
        budget: Budget,
        clock: NetworkClock,
        progress: Progress | None,
    ) -> None:
        self.measurements = Measurements(*clock.timing.on, in_network=True)
        self.clock, self.timing = clock, clock.timing
        self.layers, self.limits, self.progress = layers, limits, progress
        self.options = options
        self.predicted = {name: list(found) for name, found in options.items()}
        self.measured: dict[str, dict[Key, float]] = {name: {} for name in options}
        self._done = 0.0
        self._model_key = model.fingerprint()
        self.target = self._target(budget)

    def run(self) -> TimedChoice:
        best: tuple[float, Allocation, Latency] | None = None
        self._measure({name: found[:1] for name, found in self.options.items()})
        rest = self.clock_before - self._sum_of(found[0] for found in self.options.values())
        limit = self.target - rest
        seen: set[str] = set()
        for _ in range(NETWORKS):
            allocation = self._settle(limit)
            key = _picks(allocation)
            if key in seen:
                break
            seen.add(key)
            latency = self._latency(allocation)
            excess = latency.after - self.target
            if excess <= TOLERANCE * self.target and (best is None or allocation.loss < best[0]):
                best = allocation.loss, allocation, latency
            if -UNUSED * self.target <= excess <= TOLERANCE * self.target:
                break
            if excess < 0 and not any(not c.is_dense for c in allocation.candidates.values()):
                break
            limit -= excess
        if best is None:
            best = self._fastest()
        return TimedChoice(best[1], self.options, best[2], self.target)

    def _target(self, budget: Budget) -> float:
        if not self.clock.is_possible:
            self._measure({name: found[:1] for name, found in self.options.items()})
            self.clock_before = self._sum_of(found[0] for found in self.options.values())
        else:
            self.clock_before = self._keep("", lambda: self.clock.before).seconds
        return budget.amount(self.clock_before)

    def _settle(self, limit: float) -> Allocation:
        """Return the choice within a limit on the layers' seconds, once all of it is measured."""
        for number in range(ROUNDS):
            faster = drop_slower(self.options)
            least = self._sum_of(min(found, key=_seconds) for found in faster.values())
            within = max(limit, least * (1 + 1e-9))
            allocation = allocate(faster, {**self.limits, "seconds": within})
            wanted = {
                name: _near(c, faster[name]) if number == 0 else [c]
                for name, c in allocation.candidates.items()
            }
            if not self._measure(wanted):
                break
        return allocation

    def _measure(self, wanted: Mapping[str, Sequence[Candidate]]) -> bool:
        """Measure candidates; return whether one had not been measured yet."""
        fresh = {
            name: [c for c in some if not c.is_measured and not c.is_dense]
            for name, some in wanted.items()
        }
        pending = [n for n, some in fresh.items() if some or not self.options[n][0].is_measured]
        for name in pending:
            layer, dense = self.layers[name], self.options[name][0]
            try:
                seconds = self._seconds_of(layer, dense, fresh[name])
            except NotImplementedError:  # the runtime has no operator for a stage
                each = [self._seconds_of_one(layer, dense, c) for c in fresh[name]]
                seconds = [*self._seconds_of(layer, dense, []), *each]
            keys = map(candidate_key, (dense, *fresh[name]))
            self.measured[name] |= zip(keys, seconds)
            self.options[name] = with_measurements(self.predicted[name], self.measured[name])
            self._step(1 / (4 * len(self.options)))
        return any(fresh[name] for name in pending)

    def _seconds_of(self, layer: Layer, dense: Candidate, some: Sequence[Candidate]) -> list[float]:
        """Return the measured seconds of a dense layer and of chains, per call of the network."""
        shape = layer.conv.input_shape(layer.input_size)
        first, others = self.measurements.seconds(dense.stages, [c.stages for c in some], shape)
        return [layer.passes * t for t in (first, *others)]

    def _seconds_of_one(self, layer: Layer, dense: Candidate, c: Candidate) -> float:
        try:
            return self._seconds_of(layer, dense, [c])[1]
        except NotImplementedError:
            return math.inf

    def _latency(self, allocation: Allocation) -> Latency:
        """Return the latency of a choice: of its network, or of its layers."""
        picks = allocation.candidates
        changed = {name: c for name, c in picks.items() if not c.is_dense}
        if not self.clock.is_possible or not changed:
            dense = {name: found[0] for name, found in self.options.items()}
            latency = layer_latency(picks, dense, self.timing, 0.0)
            rest = self.clock_before - latency.before
            return latency._replace(
                before=self.clock_before, after=latency.after + rest,
                is_network=self.clock.is_possible,
            )  # fmt: skip

        def share() -> CallTime:
            timed = self.clock.measure({name: c.build() for name, c in changed.items()})
            assert timed is not None
            return CallTime(timed.after / timed.before, timed.spread)

        ratio = self._keep(_picks(allocation), share)
        self._step(1 / (2 * NETWORKS))
        runtime, batch, threads = self.timing.on
        before = self.clock_before
        after = ratio.seconds * before
        return Latency(before, after, runtime, batch, threads, ratio.spread, True)

    def _fastest(self) -> tuple[float, Allocation, Latency]:
        """Return the fastest network; raise if it exceeds the budget."""
        if self.limits:
            raise InfeasibleBudgetError(
                f"a time of {format_seconds(self.target)} was not reached within the other "
                "budgets: raise one of them"
            )
        allocation = self._settle(0.0)
        latency = self._latency(allocation)
        if latency.after > (1 + TOLERANCE) * self.target:
            raise InfeasibleBudgetError(
                f"a time of {format_seconds(self.target)} is infeasible in {latency.runtime}: the "
                f"fastest network that was found takes {format_seconds(latency.after)}, "
                f"{latency.after / latency.before:.1%} of the original's time"
            )
        return allocation.loss, allocation, latency

    def _keep(self, subject: str, measure: Callable[[], CallTime]) -> CallTime:
        return self.measurements.keep(f"network {self._model_key} {subject}", measure)

    def _step(self, share: float) -> None:
        self._done = min(self._done + share, 1.0)
        if self.progress is not None:
            self.progress("measuring", self._done)

    @staticmethod
    def _sum_of(some: Iterable[Candidate]) -> float:
        return math.fsum(c.seconds for c in some)


def _seconds(c: Candidate) -> float:
    return c.seconds


def _near(c: Candidate, found: Sequence[Candidate]) -> list[Candidate]:
    """Return a candidate and its neighbours on the front of seconds and loss."""
    front = [found[i] for i in pareto_front([[x.seconds] for x in found], [x.loss for x in found])]
    at = next((i for i, x in enumerate(front) if x is c), None)
    return [c] if at is None else front[max(at - 1, 0) : at + 2]


def _picks(allocation: Allocation) -> str:
    text = repr([(name, *candidate_key(c)) for name, c in allocation.candidates.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
