"""Runtimes of chains: whether they are installed, their versions, and calls on them."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version as version_of_package
from typing import Any

import numpy as np

from lowrank import engine
from lowrank._kernels import _core
from lowrank._typing import Array
from lowrank.core.cost import chain_shapes
from lowrank.core.geometry import as_integers
from lowrank.core.stage import Epilogue, Stage
from lowrank.core.threads import as_threads
from lowrank.engine import channels_last, onnx, pytorch
from lowrank.engine.program import Unsupported

#: Packages that each runtime on the CPU imports, and the extra of this one that installs them.
PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "lowrank": ((), ""),
    "onnxruntime": (("onnxruntime", "onnx"), "onnx"),
    "torch": (("torch",), "torch"),
    "torch-channels-last": (("torch",), "torch"),
}


def is_installed(runtime: str) -> bool:
    """Return whether the packages of a runtime are installed."""
    packages, _ = PACKAGES.get(runtime, ((), ""))
    return all(importlib.util.find_spec(name) for name in packages)


def check_installed(runtime: str) -> None:
    """Raise an ImportError that says what to install unless a runtime is installed."""
    if not is_installed(runtime):
        packages, extra = PACKAGES[runtime]
        names = " and ".join(packages)
        raise ImportError(f"runtime {runtime!r} needs {names}: pip install 'lowrank[{extra}]'")


@functools.cache
def version(runtime: str) -> str:
    """Return the version of the package that runs chains."""
    packages, _ = PACKAGES[runtime]
    return version_of_package(packages[0] if packages else "lowrank")


def available_threads(threads: int | None) -> int:
    """Return the number of threads of a run: at most what OpenMP offers."""
    available = _core.max_threads()
    return min(as_threads(threads) or available, available)


def check_batch(batch: int) -> int:
    """Return a batch size, which must be an integer and at least 1."""
    (batch,) = as_integers("batch", batch, 1)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return batch


@contextmanager
def threads_of(runtime: str, threads: int) -> Iterator[None]:
    """Set PyTorch's number of threads, which is global, and set it back at the end."""
    if "torch" not in runtime:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bind_call(
    runtime: str, stages: Sequence[Stage], x: Array, threads: int, out: Array | None = None
) -> Callable[[], Any]:
    """Return a call of stages on an input; those of PyTorch run within :func:`threads_of`.

    Raises
    ------
    NotImplementedError
        If the runtime has no operator for a stage.
    """
    epilogues = [Epilogue()] * len(stages)
    if runtime == "onnxruntime":
        return onnx.bind_call(stages, epilogues, x, threads)
    if "torch" in runtime:
        return pytorch.bind_call(stages, epilogues, x, runtime == "torch-channels-last")
    run = engine.plan(stages, x.shape[1:], np.float32, epilogues, threads, algorithm="auto")
    if out is None:
        out = np.empty((len(x), *chain_shapes(stages, x.shape[1:])[-1]), np.float32)
    return partial(run, x, out)


def bind_profile(stages: Sequence[Stage], x: Array, threads: int) -> Callable[[], float]:
    """Return a call that runs a chain as a network of this engine does, and returns its seconds.

    The packing of the input and the unpacking of the output, which are operations of the ends of
    a network, do not count.  A chain that no program runs is timed as a whole.
    """
    links = [(stage, Epilogue()) for stage in stages]
    try:
        builder = channels_last.program_builder(links, x.shape[1:], np.float32)
    except Unsupported:
        call = bind_call("lowrank", stages, x, threads)

        def run() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return run
    program = builder.build(fork_join=0.0)  # the threads of a network do not wait for each chain
    out = np.empty((len(x), *chain_shapes(stages, x.shape[1:])[-1]), np.float32)
    arrays = [channels_last.with_three_axes(a) for a in (x, out)]
    counted = [i for i, op in enumerate(program.operations) if op.kind not in ("pack", "unpack")]

    def profile() -> float:
        seconds = program.core.profile(arrays, threads)
        return sum(seconds[i] for i in counted)

    return profile
