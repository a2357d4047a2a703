"""Latency of networks in several runtimes, each in a process of its own.

``python -m lowrank.cli.latency`` is such a process: it reads a job from the first line of stdin,
and measures one sample per further line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from lowrank._typing import Ints
from lowrank.cli.scripts import load_function
from lowrank.interop.common import one_line

#: Runtimes and the distributions that they need.
PACKAGES = {"lowrank": "lowrank", "onnxruntime": "onnxruntime", "PyTorch": "torch"}
SAMPLE = 0.1  # seconds of a sample, at least
CALLS = 3  # of a sample, at least
TRIAL = 5  # calls that decide between PyTorch's layouts
# Threads spin after their last task: for less than 5 ms where OMP_WAIT_POLICY is not set.
SETTLE = 0.02  # seconds between samples of different processes

Call = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """One network in one runtime.

    Attributes
    ----------
    label : str
        "dense" or "compressed".
    runtime : str
        One of :data:`PACKAGES`.
    network : str
        ``.onnx`` file, or SCRIPT.py:FUNCTION.
    threads : int
        Number of threads.
    algorithm : str
        "auto" or "direct", for lowrank.
    batch : int or None
        Batch size of a PyTorch module; that of its example if None.
    inputs : sequence of (str, str, shape)
        Names, data types and shapes of the inputs of an ``.onnx`` file.
    """

    label: str
    runtime: str
    network: str
    threads: int
    algorithm: str
    batch: int | None = None
    inputs: Sequence[tuple[str, str, Ints]] = ()


@dataclass
class Latency:
    """Times of one job.

    Attributes
    ----------
    job : Job
        Network and runtime.
    version : str
        Version of the runtime.
    layout : str
        PyTorch's faster layout, if it is not the default one.
    shapes : str
        Shapes of the inputs, such as "1x3x32x32".
    times : list of float
        Seconds per call, one median per round.
    missing : str
        Why there are no times.
    """

    job: Job
    version: str = ""
    layout: str = ""
    shapes: str = ""
    times: list[float] = field(default_factory=list)
    missing: str = ""

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile over the rounds, in seconds."""
        first, third = np.quantile(self.times, (0.25, 0.75))
        return float(first), float(third)


def measure(jobs: Sequence[Job], rounds: int, step: Callable[[str, float], None]) -> list[Latency]:
    """Measure all jobs in alternation, so that a change of the machine's speed affects all alike.

    Parameters
    ----------
    jobs : sequence of Job
        Jobs; each runs in a process of its own.
    rounds : int
        Number of samples per job.
    step : callable
        Called with a name and the share that is done.

    Returns
    -------
    list of Latency
        One per job.

    Raises
    ------
    ValueError
        If the jobs' inputs have different shapes.
    WorkerError
        If a process ends between two samples.
    """
    found = [Latency(job) for job in jobs]
    workers: list[tuple[_Worker, Latency]] = []
    with ExitStack() as stack:
        for k, latency in enumerate(found):
            step("preparing", k / len(found))
            package = PACKAGES[latency.job.runtime]
            if importlib.util.find_spec(package) is None:
                latency.missing = "not installed"
                continue
            worker = stack.enter_context(_Worker(latency.job))
            try:
                ready = worker.ask(json.dumps(asdict(latency.job)))
            except WorkerError as error:
                latency.missing = str(error)
                continue
            latency.version, latency.layout = ready["version"], ready["layout"]
            latency.shapes = ready["shapes"]
            workers.append((worker, latency))
        networks = {latency.shapes: latency.job.network for _, latency in workers}
        if len(networks) > 1:
            which = ", ".join(f"{shapes} ({network})" for shapes, network in networks.items())
            raise ValueError(f"both networks must take inputs of equal shapes, got {which}")
        step("preparing", 1.0)
        for n in range(rounds):
            for worker, latency in workers:
                time.sleep(SETTLE)
                latency.times.append(worker.ask("")["seconds"])
            step("measuring", (n + 1) / rounds)
    return found


class WorkerError(ValueError):
    """Error in a worker."""


class _Worker:
    """A process that measures one job."""

    def __init__(self, job: Job) -> None:
        # A user's OMP_WAIT_POLICY is dropped: with "active", threads would disturb the other
        # processes; with "passive", every call would pay for their wake-up.
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            env[name] = str(job.threads)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lowrank.cli.latency"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True,
        )  # fmt: skip

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, line: str) -> dict[str, Any]:
        """Send one line; return the answer, or raise the worker's error."""
        assert self.process.stdin is not None  # both are pipes
        assert self.process.stdout is not None
        answer = ""
        try:
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            pass
        if not answer:
            raise WorkerError(f"the process ended with code {self.process.wait()}")
        reply: dict[str, Any] = json.loads(answer)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply


def serve() -> None:
    """Answer the lines of stdin, one JSON object each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of a user's script must not mix with answers
    job = Job(**json.loads(sys.stdin.readline()))
    try:
        calls, shapes = _PREPARE[job.runtime](job)
        layout = min(calls, key=lambda name: _trial(calls[name]))
        reply = {
            "version": version(PACKAGES[job.runtime]).split("+")[0],
            "layout": layout,
            "shapes": shapes,
        }
    except Exception as error:  # user code and runtimes may raise anything
        reply = {"error": one_line(error) or type(error).__name__}
    print(json.dumps(reply), file=answers, flush=True)
    if "error" in reply:
        return
    for _ in sys.stdin:
        seconds = statistics.median(_sample(calls[layout]))
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def _trial(call: Call) -> float:
    call()
    return min(_seconds(call) for _ in range(TRIAL))


def _sample(call: Call) -> list[float]:
    """Return the seconds of each call, after one that is not counted."""
    call()
    times: list[float] = []
    while len(times) < CALLS or sum(times) < SAMPLE:
        times.append(_seconds(call))
    return times


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


Prepared = tuple[dict[str, Call], str]  # calls by layout, and the shapes of the inputs


def _prepare_lowrank(job: Job) -> Prepared:
    options: Any = {"threads": job.threads, "algorithm": job.algorithm}
    if job.inputs:
        from lowrank.interop import onnx

        run, feeds = onnx.on_engine(job.network, **options), _random_feeds(job)
        return {"": lambda: run(feeds)}, _shape_text(feeds.values())
    from lowrank.interop.torch import on_engine, runtimes

    module, x = load_module(job)
    engine = on_engine(module, x, **options)
    return {"": runtimes.inference_call(engine, x, job.threads)}, _shape_text([x])


def _prepare_onnxruntime(job: Job) -> Prepared:
    from lowrank.interop.onnx.runtime import session_call

    source: Any = job.network
    if job.inputs:
        feeds = _random_feeds(job)
    else:
        from lowrank.interop.torch.runtimes import export_onnx, fold_batch_norms

        module, x = load_module(job)
        source, feeds = export_onnx(fold_batch_norms(module), x), {"x": x.numpy()}
    return {"": session_call(source, feeds, job.threads)}, _shape_text(feeds.values())


def _prepare_pytorch(job: Job) -> Prepared:
    from lowrank.interop.torch.runtimes import fold_batch_norms, in_channels_last, inference_call

    module, x = load_module(job)
    module = fold_batch_norms(module)
    calls = {"": inference_call(module, x, job.threads)}
    if (other := in_channels_last(module, x)) is not None:
        calls["channels-last"] = inference_call(*other, job.threads)
    return calls, _shape_text([x])


_PREPARE = {
    "lowrank": _prepare_lowrank,
    "onnxruntime": _prepare_onnxruntime,
    "PyTorch": _prepare_pytorch,
}


def _random_feeds(job: Job) -> dict[str, Any]:
    """Return normal numbers, or zeros for integers, which may be indices."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape).astype(dtype)
        if np.issubdtype(dtype, np.floating)
        else np.zeros(shape, dtype)
        for name, dtype, shape in job.inputs
    }


def _shape_text(arrays: Any) -> str:
    return ", ".join("x".join(map(str, a.shape)) for a in arrays)


def load_module(job: Job) -> tuple[Any, Any]:
    """Return the PyTorch module of a script and its input, of the batch size that is asked for."""
    import torch

    torch.manual_seed(0)  # random weights are equal in all processes
    given = load_function("MODEL", job.network)()
    if not (
        isinstance(given, tuple)
        and len(given) == 2
        and isinstance(given[0], torch.nn.Module)
        and isinstance(given[1], torch.Tensor)
        and given[1].ndim > 1
        and given[1].numel()
    ):
        raise ValueError(
            f"{job.network} must return (torch.nn.Module, example input with a batch axis), "
            f"got {type(given).__name__}"
        )
    module, x = given
    if job.batch is not None:
        x = x.repeat(-(-job.batch // len(x)), *[1] * (x.ndim - 1))[: job.batch]
    return module.eval().requires_grad_(False), x.detach().contiguous()


if __name__ == "__main__":
    serve()
