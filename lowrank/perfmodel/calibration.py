"""Measuring a machine: work of every kind, run and counted, and rates fitted to it."""

from __future__ import annotations

import importlib
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from lowrank import engine
from lowrank._kernels import _core
from lowrank._typing import Array, Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import fourier, pytorch
from lowrank.perfmodel import features
from lowrank.perfmodel.coefficients import RUNTIMES, SECONDS, Machine, Rates
from lowrank.perfmodel.features import Counts, Work
from lowrank.perfmodel.workloads import filterings, workloads

#: Seconds that each is measured for, beside making plans and first calls.
BUDGETS = {"fft": 6.0, "lowrank": 11.0, "torch": 7.0, "torch channels-last": 7.0, "cuda": 10.0}
ON_CPU = tuple(name for name in BUDGETS if name != "cuda")  # what is measured unless asked for
EXAMPLES = 32  # of a GPU's batch for one of the CPU's, as far as memory goes
PASSES = 2  # over all work, at least, in turns: what disturbs one pass does not disturb them all
LARGE = 1 << 18  # samples that PyTorch is not asked to filter
LONG = 0.02  # seconds of a call that are too many
SAMPLE = 1.2e-3  # seconds of a sample, at least
FOLDS = 5  # of the work, each left out of one fit that is tested on it
NEAR = 0.05  # relative error below which a sample has its full weight
ROUNDS = 30  # of weighting anew


def measure(
    progress: Callable[[str, float], object] | None = None, engines: Sequence[str] | None = None
) -> Machine:
    """Measure this machine; see :func:`lowrank.perfmodel.calibrate`."""
    most = _core.max_threads()
    found = {}
    for name in ON_CPU if engines is None else engines:
        torch = _torch() if "torch" in name else None
        if "torch" in name and torch is None:
            continue
        given = torch and torch.get_num_threads()
        tasks = _transforms(most) if name == "fft" else _chains(name, most)
        try:
            times = _measured(tasks, name, progress)
        finally:
            if torch is not None:
                torch.set_num_threads(given)
        kept = [(task, t) for task, t in zip(tasks, times) if t is not None]
        found[name] = fitted(
            [task.counts for task, _ in kept],
            [t for _, t in kept],
            [task.group for task, _ in kept],
        )
    return Machine(cpu(), _core.default_isa(), most, MappingProxyType(found))


class Task(NamedTuple):
    """A call to measure, what it counts, and the workload that it is one of."""

    call: Callable[[], object]
    counts: Counts
    threads: int
    group: int


def _chains(runtime: str, most: int) -> list[Task]:
    found, shared = [], _Shared()
    if runtime == "cuda":
        most = 1
    for threads in sorted({1, most}):  # PyTorch has one number of threads for all calls
        for number, load in enumerate(workloads()):
            if "torch" in runtime and math.prod(load.shape) > LARGE:
                continue
            stages = tuple(replace(s, weight=shared.array(s.weight.shape)) for s in load.stages)
            batch = load.batch
            if runtime == "cuda":
                widest = max(map(math.prod, chain_shapes(stages, load.shape)))
                batch = max(1, min(EXAMPLES * batch, shared.numbers.size // widest))
            x = shared.array((batch, *load.shape))
            counted = RUNTIMES[runtime](Work(load.stages, load.shape, batch, threads), most)
            call = _call(runtime, stages, x, threads, shared)
            found.append(Task(call, counted, threads, number))
    return found


def _transforms(most: int) -> list[Task]:
    found, shared = [], _Shared()
    for threads in sorted({1, most}):
        for number, (taps, spatial, block) in enumerate(filterings()):
            run = fourier.plan(shared.array(taps), spatial, threads=threads, block=block)
            x = shared.array((1, 1, *spatial))
            counted = features.fft(taps, spatial, block, threads, most)
            call = partial(run, x, shared.result(x.shape))
            found.append(Task(call, counted, threads, number))
    return found


class _Shared:
    """Random numbers and room for results, the same for all tasks: they run one at a time."""

    def __init__(self) -> None:
        size = 1 << 24
        self.numbers = np.random.default_rng(0).random(size, np.float32) - np.float32(0.5)
        self.room = np.zeros(size, np.float32)
        self._there: tuple[Any, Any] | None = None

    def array(self, shape: Ints) -> Array:
        return self.numbers[: math.prod(shape)].reshape(shape)

    def on_gpu(self) -> tuple[Any, Any]:
        """The same on the GPU, once for all tasks."""
        if self._there is None:
            self._there = engine.moved(self.numbers, "cuda"), engine.moved(self.room, "cuda")
        return self._there

    def result(self, shape: Ints) -> Array:
        return self.room[: math.prod(shape)].reshape(shape)


def _measured(
    tasks: Sequence[Task], runtime: str, progress: Callable[[str, float], object] | None
) -> list[float | None]:
    """Median seconds of every task; None for those that take too long."""
    each: list[float | None] = []
    for task in tasks:
        seconds = _seconds(task, 1, runtime)
        if seconds <= 10 * LONG:  # the first call is not like others
            seconds = min(seconds, _seconds(task, 1, runtime))
        each.append(seconds if seconds <= LONG else None)
    repeats = [0 if s is None else max(1, math.ceil(SAMPLE / max(s, 1e-7))) for s in each]
    times: list[list[float]] = [[] for _ in tasks]
    begin, done, passes = time.perf_counter(), 0.0, 0
    while passes < PASSES or done < 1:
        for task, n, seen in zip(tasks, repeats, times):
            if n:
                _seconds(task, 1, runtime)  # finds the caches full of other work
                seen.append(_seconds(task, n, runtime))
        passes, done = passes + 1, (time.perf_counter() - begin) / BUDGETS[runtime]
        if progress is not None:
            progress(runtime, min(done, 1.0))
    return [statistics.median(t) if t else None for t in times]


def _call(
    runtime: str, stages: Sequence[Stage], x: Array, threads: int, shared: _Shared
) -> Callable[[], object]:
    ends = [Epilogue()] * len(stages)
    if runtime == "lowrank":
        run = engine.plan(stages, x.shape[1:], np.float32, ends, threads)
        return partial(run, x, shared.result((len(x), *chain_shapes(stages, x.shape[1:])[-1])))
    if runtime == "cuda":
        there = [replace(s, weight=engine.moved(s.weight, "cuda")) for s in stages]
        run = engine.plan(there, x.shape[1:], np.float32, ends)
        given, room = shared.on_gpu()
        shape = (len(x), *chain_shapes(stages, x.shape[1:])[-1])
        return partial(
            run, given[: x.size].reshape(x.shape), room[: math.prod(shape)].reshape(shape)
        )
    return pytorch.call(stages, ends, x, "last" in runtime)


def _seconds(task: Task, n: int, runtime: str) -> float:
    if "torch" in runtime:
        torch = _torch()
        if torch.get_num_threads() != task.threads:
            torch.set_num_threads(task.threads)
    wait = _cuda().Device().synchronize if runtime == "cuda" else None
    if wait is not None:
        wait()
    start = time.perf_counter()
    for _ in range(n):
        task.call()
    if wait is not None:
        wait()
    return (time.perf_counter() - start) / n


def _cuda() -> Any:
    return importlib.import_module("cupy").cuda


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        return None
    return torch


def fitted(counted: Sequence[Counts], times: Sequence[float], groups: Sequence[int]) -> Rates:
    """Rates that explain times by counts, and their errors on what was left out.

    Rates are not negative, and relative errors are what is made small: least squares, weighted
    anew until a few odd samples no longer decide (a norm between the squares and the absolute).
    """
    names = sorted({name for c in counted for name in c if name not in SECONDS})
    table = np.array([[c.get(name, 0.0) for name in names] for c in counted])
    known = np.array([sum(rate * c.get(k, 0.0) for k, rate in SECONDS.items()) for c in counted])
    seconds = np.asarray(times)
    errors = np.empty(len(times))
    fold = np.asarray(groups) % FOLDS
    for i in range(FOLDS):
        here = fold == i
        rates = _solved(table[~here], seconds[~here], known[~here])
        errors[here] = np.abs((table[here] @ rates + known[here]) / seconds[here] - 1)
    rates = _solved(table, seconds, known)
    kept = {name: float(rate) for name, rate in zip(names, rates) if rate > 0}
    return Rates(MappingProxyType(kept), float(np.median(errors)), float(np.quantile(errors, 0.9)))


def _solved(table: Array, seconds: Array, known: Array) -> Array:
    """Rates with table @ rates + known near to the seconds, relatively."""
    size, left = table.max(axis=0), 1 - known / seconds
    scaled = table / np.where(size > 0, size, 1) / seconds[:, None]
    weights, found = np.ones(len(seconds)), np.zeros(len(size))
    for _ in range(ROUNDS):
        found, _ = nnls(scaled * weights[:, None], weights * left, maxiter=100 * len(size))
        weights = 1 / np.sqrt(np.maximum(np.abs(scaled @ found - left), NEAR))
    return np.asarray(found / np.where(size > 0, size, 1))


def cpu() -> str:
    """Name of the processor with its family and model, where the system tells."""
    try:
        with open("/proc/cpuinfo") as about:
            facts: dict[str, str] = {}
            for line in about:
                name, _, value = line.partition(":")
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']}, family {facts.get('cpu family')}, model {facts.get('model')}"
