"""Calibration: run the calibration workloads and fit cost coefficients to their times."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lowrank import engine
from lowrank._kernels import _core
from lowrank._typing import Array, Ints
from lowrank.core.cost import chain_shapes
from lowrank.core.stage import Epilogue, Stage
from lowrank.engine import fourier, machine
from lowrank.perfmodel import features
from lowrank.perfmodel.coefficients import (
    FORK_JOIN,
    RUNTIMES,
    Coefficients,
    PerformanceModel,
)
from lowrank.perfmodel.features import Features, Work
from lowrank.perfmodel.runtimes import bind_call, is_installed, threads_of
from lowrank.perfmodel.workloads import fft_workloads, workloads

#: Seconds of measurement per runtime, beside planning and first calls.
BUDGETS = {
    "fft": 4.0,
    "lowrank": 7.0,
    "onnxruntime": 6.0,
    "torch": 5.0,
    "torch-channels-last": 5.0,
    "cuda": 10.0,
}
CPU_RUNTIMES = tuple(name for name in BUDGETS if name != "cuda")  # measured by default
OTHERS = ("onnxruntime", "torch", "torch-channels-last")
QUICK_WORKLOADS = 5  # of so many, a quick calibration measures one; these have all features
QUICK_BUDGET = 0.15  # of the seconds of measurement
GPU_BATCH_FACTOR = 32  # GPU batch over CPU batch, as far as memory allows
LATENCY_PROCESSES = 3
# Seconds of a fork and join at most: sleeping cores take 90 us.  Where other processes want the
# cores, threads wait for time slices of milliseconds, and plans would never use several threads.
MAX_FORK_JOIN = 2e-4
MIN_PASSES = 2  # over all workloads in turn: a disturbance of one pass does not affect all
MAX_SAMPLES = 1 << 18  # larger inputs are filters, which only this engine is measured on
MAX_CALL = 0.02  # seconds: slower workloads are left out
MIN_SAMPLE = 1.2e-3  # seconds per timing: short calls repeat
FOLDS = 5  # of the cross-validation
FULL_WEIGHT_ERROR = 0.05  # relative error below which a sample has its full weight
REWEIGHTINGS = 30


def measure(
    progress: Callable[[str, float], object] | None = None,
    runtimes: Sequence[str] | None = None,
    quick: bool = False,
) -> PerformanceModel:
    """Measure this machine; see :func:`lowrank.perfmodel.calibrate`."""
    max_threads = _core.max_threads()
    processes = 1 if quick else LATENCY_PROCESSES
    fork_join = {p: _fork_join_seconds(p, processes) for p in machine.WAIT_POLICIES}
    coefficients = {}
    for name in filter(is_installed, CPU_RUNTIMES) if runtimes is None else runtimes:
        step = QUICK_WORKLOADS if quick else 1
        budget = BUDGETS[name] * (QUICK_BUDGET if quick else 1)
        with threads_of(name, max_threads):
            make = _fft_tasks if name == "fft" else partial(_chain_tasks, name)
            tasks = make(max_threads, step)
            times = _time_tasks(tasks, name, budget, progress)
        timed = [(task, t) for task, t in zip(tasks, times) if t is not None]
        found = fit(
            [task.features for task, _ in timed],
            [t for _, t in timed],
            [task.workload for task, _ in timed],
            {FORK_JOIN: fork_join[machine.wait_policy()]},
        )
        coefficients[name] = replace(found, is_quick=quick)
    return PerformanceModel(
        machine.cpu(), _core.default_isa(), max_threads, MappingProxyType(coefficients),
        MappingProxyType(fork_join),
    )  # fmt: skip


def _fork_join_seconds(policy: machine.WaitPolicy, processes: int) -> float:
    """Measure the fork/join latency in a process of the wait policy, which is fixed at its start.

    The median of several processes: a thread may start on a core that is busy or asleep.
    """
    code = "from lowrank._kernels import _core; print(_core.measure_fork_join())"
    env = {**os.environ, "OMP_WAIT_POLICY": policy}
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        for _ in range(processes)
    ]
    return min(MAX_FORK_JOIN, statistics.median(float(run.stdout) for run in runs))


class Task(NamedTuple):
    """A call to time, its features, and the number of its workload."""

    call: Callable[[], object]
    features: Features
    threads: int
    workload: int


def _chain_tasks(runtime: str, max_threads: int, step: int) -> list[Task]:
    """Return calls of one in `step` workloads."""
    tasks, arrays = [], _SharedArrays()
    if runtime == "cuda":
        max_threads = 1
    for threads in sorted({1, max_threads}):  # PyTorch's number of threads is global
        for number, load in enumerate(itertools.islice(workloads(), 0, None, step)):
            if runtime in OTHERS and math.prod(load.shape) > MAX_SAMPLES:
                continue
            stages = tuple(replace(s, weight=arrays.random(s.weight.shape)) for s in load.stages)
            batch = load.batch
            if runtime == "cuda":
                widest = max(map(math.prod, chain_shapes(stages, load.shape)))
                fitting = arrays.values.size // widest
                batch = max(1, min(GPU_BATCH_FACTOR * batch, fitting))
            x = arrays.random((batch, *load.shape))
            work = Work(load.stages, load.shape, batch, threads)
            counts = RUNTIMES[runtime](work, max_threads)
            call = _bind_call(runtime, stages, x, threads, arrays)
            tasks.append(Task(call, counts, threads, number))
    return tasks


def _fft_tasks(max_threads: int, step: int) -> list[Task]:
    tasks, arrays = [], _SharedArrays()
    for threads in sorted({1, max_threads}):
        for number, (taps, spatial, block) in enumerate(
            itertools.islice(fft_workloads(), 0, None, step)
        ):
            run = fourier.plan(arrays.random(taps), spatial, threads=threads, block=block)
            x = arrays.random((1, 1, *spatial))
            counts = features.fft(taps, spatial, block, threads, max_threads)
            call = partial(run, x, arrays.result(x.shape))
            tasks.append(Task(call, counts, threads, number))
    return tasks


class _SharedArrays:
    """Random inputs and room for results, shared by all tasks: they run one at a time."""

    def __init__(self) -> None:
        size = 1 << 24
        self.values = np.random.default_rng(0).random(size, np.float32) - np.float32(0.5)
        self.results = np.zeros(size, np.float32)
        self._gpu_copies: tuple[Any, Any] | None = None

    def random(self, shape: Ints) -> Array:
        return self.values[: math.prod(shape)].reshape(shape)

    def result(self, shape: Ints) -> Array:
        return self.results[: math.prod(shape)].reshape(shape)

    def on_gpu(self) -> tuple[Any, Any]:
        """Return both arrays on the GPU, copied once for all tasks."""
        if self._gpu_copies is None:
            self._gpu_copies = (
                engine.to_device(self.values, "cuda"),
                engine.to_device(self.results, "cuda"),
            )
        return self._gpu_copies


def _time_tasks(
    tasks: Sequence[Task],
    runtime: str,
    budget: float,
    progress: Callable[[str, float], object] | None,
) -> list[float | None]:
    """Return the least seconds of every task over all passes; None for slow ones.

    Disturbances only add to times: with twelve processes on two cores, the median error of a quick
    calibration was 49 % with medians, and 23 % with the least.
    """
    first_times: list[float | None] = []
    for task in tasks:
        seconds = _time(task, 1, runtime)
        if seconds <= 10 * MAX_CALL:  # the first call includes one-time costs
            seconds = min(seconds, _time(task, 1, runtime))
        first_times.append(seconds if seconds <= MAX_CALL else None)
    repeats = [
        0 if s is None else max(1, math.ceil(MIN_SAMPLE / max(s, 1e-7))) for s in first_times
    ]
    times: list[list[float]] = [[] for _ in tasks]
    begin, done, passes = time.perf_counter(), 0.0, 0
    while passes < MIN_PASSES or done < 1:
        for task, n, samples in zip(tasks, repeats, times):
            if n:
                _time(task, 1, runtime)  # warm the caches, which hold data of other tasks
                samples.append(_time(task, n, runtime))
        passes, done = passes + 1, (time.perf_counter() - begin) / budget
        if progress is not None:
            progress(runtime, min(done, 1.0))
    return [min(t, default=None) for t in times]


def _bind_call(
    runtime: str, stages: Sequence[Stage], x: Array, threads: int, arrays: _SharedArrays
) -> Callable[[], object]:
    out_shape = (len(x), *chain_shapes(stages, x.shape[1:])[-1])
    if runtime != "cuda":
        return bind_call(runtime, stages, x, threads, arrays.result(out_shape))
    on_gpu = [replace(s, weight=engine.to_device(s.weight, "cuda")) for s in stages]
    run = engine.plan(on_gpu, x.shape[1:], np.float32, [Epilogue()] * len(stages))
    values, results = arrays.on_gpu()
    return partial(
        run,
        values[: x.size].reshape(x.shape),
        results[: math.prod(out_shape)].reshape(out_shape),
    )


def _time(task: Task, n: int, runtime: str) -> float:
    """Return the mean seconds of `n` calls."""
    if "torch" in runtime:
        torch = importlib.import_module("torch")
        if torch.get_num_threads() != task.threads:
            torch.set_num_threads(task.threads)
    synchronize = None
    if runtime == "cuda":
        synchronize = importlib.import_module("cupy").cuda.Device().synchronize
        synchronize()
    start = time.perf_counter()
    for _ in range(n):
        task.call()
    if synchronize is not None:
        synchronize()
    return (time.perf_counter() - start) / n


def fit(
    counts: Sequence[Features],
    times: Sequence[float],
    workload_numbers: Sequence[int],
    measured: Mapping[str, float] = MappingProxyType({}),
) -> Coefficients:
    """Fit non-negative coefficients to times; estimate their errors by cross-validation.

    Relative errors are minimised in a norm between L1 and L2, by iteratively reweighted least
    squares: a few outliers do not decide.  Features in `measured` have known coefficients.
    """
    names = sorted({name for c in counts for name in c if name not in measured})
    table = np.array([[c.get(name, 0.0) for name in names] for c in counts])
    known = np.array([sum(v * c.get(k, 0.0) for k, v in measured.items()) for c in counts])
    seconds = np.asarray(times)
    errors = np.empty(len(times))
    fold = np.asarray(workload_numbers) % FOLDS
    for i in range(FOLDS):
        is_test = fold == i
        costs = _solve(table[~is_test], seconds[~is_test], known[~is_test])
        predicted = table[is_test] @ costs + known[is_test]
        errors[is_test] = np.abs(predicted / seconds[is_test] - 1)
    costs = _solve(table, seconds, known)
    positive = {name: float(cost) for name, cost in zip(names, costs) if cost > 0}
    return Coefficients(
        MappingProxyType(positive), float(np.median(errors)), float(np.quantile(errors, 0.9))
    )


def _solve(table: Array, seconds: Array, known: Array) -> Array:
    """Return costs with table @ costs + known close to the seconds, relatively."""
    from scipy.optimize import nnls  # slow to import, and only calibration needs it

    scale = table.max(axis=0)
    scale = np.where(scale > 0, scale, 1)
    remaining = 1 - known / seconds
    scaled = table / scale / seconds[:, None]
    weights, solution = np.ones(len(seconds)), np.zeros(len(scale))
    for _ in range(REWEIGHTINGS):
        solution, _ = nnls(scaled * weights[:, None], weights * remaining, maxiter=100 * len(scale))
        residuals = np.abs(scaled @ solution - remaining)
        weights = 1 / np.sqrt(np.maximum(residuals, FULL_WEIGHT_ERROR))
    return np.asarray(solution / scale)
