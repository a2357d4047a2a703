"""Worker processes of the gate: each imports one build and runs workloads on request.

python -m asv_benchmarks.worker      answers requests on stdin (one line of JSON each)
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("torch", "tltorch", "onnx", "onnxruntime", "cv2")
SAMPLE = 8e-3  # seconds per sample


class PeerBlocker:
    """Import hook that hides the peers: only our own calls are timed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in PEERS:
            raise ModuleNotFoundError(name)


def disable_editable_installs() -> None:
    """Remove editable installs from the import path: they would add modules to a build."""
    sys.meta_path[:] = [
        f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
    ]


def cpu_seconds() -> float:
    """Return the processor time of this process and of the children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def sample(call: Callable[[], object], calls: int, parts: int) -> float:
    """Return the smallest processor time per call over the parts."""
    times = []
    for _ in range(parts):
        start = cpu_seconds()
        for _ in range(calls):
            call()
        times.append((cpu_seconds() - start) / calls)
    return min(times)


def serve() -> None:
    """Answer requests, one line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the workloads must not mix with answers
    disable_editable_installs()
    sys.meta_path.insert(0, PeerBlocker())
    call: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = None
        try:
            if "make" in request:
                suite, name = request["make"]
                call = read_suite(suite, "WORK")[name]()
                answer = sample(call, 1, 1)
                if answer < SAMPLE:  # the first call dominates
                    answer = sample(call, 1, 2)
            elif "track" in request:
                suite, name = request["track"]
                answer = float(read_suite(suite, "TRACKED")[name]())
            elif "sample" in request:
                answer = sample(call, *request["sample"])
            else:
                answer = importlib.import_module("lowrank").__file__
            reply = {"value": answer}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


def read_suite(suite: str, attribute: str) -> dict[str, Callable[[], Any]]:
    """Return WORK or TRACKED of a suite."""
    entries: dict[str, Callable[[], Any]] = getattr(
        importlib.import_module(f"asv_benchmarks.benchmarks.{suite}"), attribute, {}
    )
    return entries


class WorkerError(Exception):
    """Error of a workload in a worker."""


class Worker:
    """A process that imports lowrank from one folder."""

    def __init__(self, folder: Path) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }
        # Python searches the working directory first.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "asv_benchmarks.worker"],
            cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        where = self.ask(where=None)
        if not Path(where).is_relative_to(folder):
            raise RuntimeError(f"lowrank came from {where}, not from {folder}")

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker exited on request {request}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def pair(folders: tuple[Path, Path], swapped: bool = False) -> Iterator[tuple[Worker, Worker]]:
    """Start workers of (base, head); `swapped` reverses the order of their start."""
    workers: list[Worker] = []
    try:
        for folder in reversed(folders) if swapped else folders:
            workers.append(Worker(folder))
        base, head = reversed(workers) if swapped else workers
        yield base, head
    finally:
        for worker in workers:
            worker.close()


if __name__ == "__main__":
    serve()
