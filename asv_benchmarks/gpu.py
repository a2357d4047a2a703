"""Check and time the GPU kernels: the first run on a GPU.

    python -m asv_benchmarks.gpu [--seconds S] [--output FILE] [--only WORD]
    python -m asv_benchmarks.gpu --dry-run
    python -m asv_benchmarks.gpu --overhead

Every kernel is compared with the reference first, then the tests of the GPU run, then rows are
timed in order of importance until the deadline, and three kernels are profiled in the end, where
ncu or nsys is installed.  Each result is one line of JSON in the output file, written at once.  A
row that fails is one more line: the rows after it run in a new process, as CUDA's errors persist.

Times are of the GPU: medians over replays of a CUDA graph, which holds one call per set of arrays;
the sets exceed the L2 cache twice.  Peers that cannot be captured are timed call by call, which the
row says.  Targets: filters 3 times cupyx.scipy.ndimage; blocks and chains 1.3 times PyTorch, of
strict float32 only chains; kernels that are bound by memory 70 % of the copy rate.

``--dry-run`` does all of it on the emulated CuPy of the tests, with small arrays, and one row that
fails on purpose; nothing that it prints is a time of a GPU.  ``--overhead`` prints the host's time
per call, with launches that do nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import lowrank as lr
from asv_benchmarks.benchmarks import gpu as rows_of
from asv_benchmarks.benchmarks.cases import random, weight
from asv_benchmarks.benchmarks.gpu import Call, Case, Scale, Work, block, depthwise
from lowrank import engine, filters
from lowrank.core import reference

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
CHECK_SECONDS = 20.0
TEST_SECONDS = 240.0
PROFILE_SECONDS = 90.0
ROW_SECONDS = 0.2  # of samples per call; a peer that is slow takes longer
#: Unit roundoff of the storage types; TF32 has 10 bits, as float16.
ROUNDING = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11, "TF32": 2.0**-11}
PROFILED = "planes|fused|depthwise_last"  # kernels of kernels.cu


def checked_chains() -> Iterator[tuple[str, lr.Factorization, tuple[int, ...]]]:
    """Yield chains that run every kernel, with odd sizes: name, chain, spatial sizes."""
    rng = np.random.default_rng(0)
    blur = filters.separate(filters.gauss(1.5))
    yield "filter", blur, (45, 67)
    yield "depthwise + pointwise", block(24, 40, 1), (19, 21)
    yield "depthwise", depthwise(12, 3, 1), (19, 21)
    yield "matrix product", lr.dense(weight(40, 12, 3, 3), rng.random(40), padding=1), (19, 21)
    yield (
        "pointwise + depthwise + pointwise",
        rows_of.family_chain(40, [(16, 40, 1, 1), (16, 1, 3, 3), (40, 16, 1, 1)]),
        (19, 21),
    )
    yield "filter of rank 3", filters.separate(rng.random((7, 7)), rank=3), (45, 67)
    yield "depthwise, stride 2", depthwise(12, 5, 2), (19, 21)
    yield "volume", filters.separate(filters.gauss([1.0, 1.0, 1.0])), (20, 21, 22)
    yield "transposed", lr.dense(weight(8, 12, 3, 3), stride=2, transposed=True), (9, 10)
    yield "dilated", lr.dense(weight(12, 1, 3, 3), groups=12, padding=2, dilation=2), (19, 21)


def check(seconds: float, most: int | None) -> Iterator[dict[str, Any]]:
    """Yield the error of every kernel in every precision, until `seconds` are over."""
    import cupy

    begin = time.perf_counter()
    precisions = ("float32", "TF32", "float16", "float64")
    todo = [(word, *chain) for word in precisions for chain in checked_chains()][:most]
    for number, (word, name, f, size) in enumerate(todo):
        if time.perf_counter() - begin > seconds:
            yield {"check": "deadline", "ok": False, "error": f"{len(todo) - number} checks left"}
            return
        dtype = "float32" if word == "TF32" else word
        os.environ["CUPY_TF32"] = str(int(word == "TF32"))
        found: dict[str, Any] = {"check": f"{name}, {word}"}
        try:
            x = random(2, f.in_channels, *size).astype(dtype)
            weights = [s.weight.astype(dtype).astype(np.float64) for s in f.stages]  # rounded
            stages = [replace(s, weight=w) for s, w in zip(f.stages, weights)]
            wanted = reference.run_chain(stages, x.astype(np.float64), f.bias)
            run = f.to("cuda").compile(size, dtype)
            y = run(cupy.asarray(x)).get().astype(np.float64)
            terms = max(math.prod(s.weight.shape[1:]) for s in f.stages)
            scale = float(np.abs(wanted).max())
            bound = 8 * len(f.stages) * (ROUNDING[word] + terms * ROUNDING["float32"]) * scale
            if dtype == "float64":
                bound = 8 * len(f.stages) * terms * ROUNDING["float64"] * scale
            error = float(np.abs(y - wanted).max())
            found |= {"ok": error <= bound, "error": error, "bound": bound}
            found["steps"] = [step.name for step in run.steps]
        except Exception as error:
            found |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        yield found


def capture(calls: list[Call], is_torch: bool) -> Callable[[], object] | None:
    """Return a replay of a graph of all calls, or None if they cannot be captured."""
    import cupy

    cupy.cuda.Device().synchronize()  # the arrays were made on another stream
    try:
        if is_torch:
            import torch

            for call in calls * 2:  # cuDNN chooses its algorithms
                call()
            torch.cuda.synchronize()
            torch_graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(torch_graph):
                for call in calls:
                    call()
            return torch_graph.replay
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for call in calls * 2:  # compiles, and allocates the buffers of this stream
                call()
            stream.synchronize()
            stream.begin_capture()
            try:
                for call in calls:
                    call()
            finally:
                graph = stream.end_capture()
        return lambda: graph.launch()
    except RuntimeError:
        cupy.cuda.Device().synchronize()
        return None


def measure(groups: dict[str, list[Call]], graphs: bool = True) -> dict[str, tuple[float, bool]]:
    """Return the median seconds per call of the GPU, by name, and whether it was a graph."""
    import cupy

    replays: dict[str, Callable[[], object]] = {}
    found, is_graph = {}, {}
    for name, calls in groups.items():
        replay = capture(calls, name.startswith("torch")) if graphs else None
        is_graph[name] = replay is not None
        replays[name] = replay or (lambda calls=calls: [call() for call in calls])
        replays[name]()
    times: dict[str, list[float]] = {name: [] for name in groups}
    cupy.cuda.Device().synchronize()
    begin = time.perf_counter()
    while len(times[next(iter(times))]) < 5 or (
        time.perf_counter() - begin < ROW_SECONDS * len(groups)
    ):
        for name, replay in replays.items():  # in turns: clocks and temperature are shared
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            replay()
            end.record()
            end.synchronize()
            elapsed = cupy.cuda.get_elapsed_time(start, end) * 1e-3
            times[name].append(max(elapsed, 1e-9) / len(groups[name]))
    for name, samples in times.items():
        found[name] = statistics.median(samples), is_graph[name]
    return found


def device(scale: Scale) -> dict[str, Any]:
    """Return the device's name, versions and copy rate (bytes read and written)."""
    import cupy

    facts = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    a = cupy.zeros(min(1 << 28, scale.largest << 16), cupy.float32)  # 1 GiB: larger than caches
    b = cupy.empty_like(a)
    seconds, _ = measure({"copy": [lambda: cupy.copyto(b, a)]}, graphs=False)["copy"]
    return {
        "device": facts["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        "copy_gbs": 2 * a.nbytes / seconds * 1e-9,
    }


def row_of(case: Case, copy_gbs: float) -> dict[str, Any]:
    """Measure a case; return its times, targets, and whether they are met."""
    work: Work = case.make()
    times = measure({"lowrank": work.ours} | work.peers)
    ours, _ = times.pop("lowrank")
    best = min(times, key=lambda name: times[name][0]) if times else None
    row: dict[str, Any] = {
        "row": case.name, "us": ours * 1e6, "gflops": work.flops / ours * 1e-9,
        "copy_share": work.bytes / ours * 1e-9 / copy_gbs, "copy_target": case.copy,
        "speedup": times[best][0] / ours if best else None, "target": case.target, "peer": best,
        "peers_us": {name: seconds * 1e6 for name, (seconds, _) in times.items()},
        "not_graphs": [name for name, (_, is_graph) in times.items() if not is_graph],
    }  # fmt: skip
    for figure, target in (("speedup", "target"), ("copy_share", "copy_target")):
        if row[target] is not None and row[figure] is not None:
            met = "met" if row[figure] >= row[target] else "MISSED"
            row["verdict"] = f"{row.get('verdict', '')} {figure} {met}".strip()
    return row


def print_row(row: dict[str, Any]) -> None:
    """Print a line of the output file."""
    if "row" not in row or "failed" in row:
        print(json.dumps(row), flush=True)
        return
    speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f} x {row['peer']}"
    goals = [f"{row['target']} x"] if row["target"] else []
    goals += [f"{row['copy_target']:.0%} of copy"] if row["copy_target"] else []
    print(
        f"{row['row']:72} {row['us']:9.1f} us  {speedup:26} {row['copy_share']:5.0%} of copy, "
        f"target {' and '.join(goals) or 'none'}: {row.get('verdict', 'reported')}",
        flush=True,
    )


def append(path: Path, row: dict[str, Any]) -> None:
    """Print a result and write it to the disk."""
    print_row(row)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def fail() -> Work:
    raise RuntimeError("this row of a dry run fails on purpose")


def work_through(given: argparse.Namespace) -> int:
    """Do one phase in this process: the checks, or rows from one on; 3 if a row failed."""
    import cupy

    dry, end = given.dry_run, time.time() + given.seconds
    facts = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    one_set = dry or given.phase == "profile"
    scale = Scale(16 if dry else 1 << 30, 1 if one_set else facts["l2CacheSize"])
    if given.phase == "check":
        for row in check(min(CHECK_SECONDS, given.seconds), 2 if dry else None):
            append(given.output, row)
        return 0
    if given.phase == "profile":
        for kind, word in (("filter", "5x5"), ("block", "float16"), ("depthwise", "float16")):
            chosen = (c for c in rows_of.cases(scale) if c.name.startswith(kind) and word in c.name)
            next(chosen).make().ours[0]()
        cupy.cuda.Device().synchronize()
        return 0
    about = device(scale)
    if given.first == 0:
        append(given.output, {"machine": about})
    rows = [case for case in rows_of.cases(scale) if given.only in case.name]
    if dry:
        rows = [*rows[:3], Case("dry run: a failure", fail), *rows[3:8]]
    for number in range(given.first, len(rows)):
        if time.time() > end:
            append(given.output, {"rows left at the deadline": len(rows) - number})
            return 0
        try:
            append(given.output, row_of(rows[number], about["copy_gbs"]))
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            append(given.output, {"row": rows[number].name, "number": number, "failed": text})
            return 3
    return 0


def in_process(given: argparse.Namespace, phase: str, seconds: float, first: int = 0) -> int:
    """Run a phase in a process of its own, as an error of CUDA would spoil the next ones."""
    command = [sys.executable, "-m", "asv_benchmarks.gpu", "--phase", phase, "--first", str(first)]
    command += ["--seconds", str(seconds), "--output", str(given.output), "--only", given.only]
    command += ["--dry-run"] * given.dry_run
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds + 60, check=False).returncode
    except subprocess.TimeoutExpired:
        append(given.output, {"phase": phase, "failed": f"killed after {seconds + 60:.0f} s"})
        return 1


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the results of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_all(given: argparse.Namespace) -> int:
    """Check, test, time and profile; return 1 if something was wrong or failed."""
    if not given.dry_run:
        try:
            engine.check_gpu()
        except (ImportError, engine.NoGPU) as error:
            sys.exit(str(error))
    end = time.time() + given.seconds
    before = len(lines(given.output))
    if in_process(given, "check", CHECK_SECONDS):
        append(given.output, {"phase": "check", "failed": "the process ended early"})
    tests = ["-k", "realgpu or pytorch_tensors"]
    if given.dry_run:
        tests = ["-k", "missing_parts or old_versions"]
    limit = min(TEST_SECONDS, end - time.time())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    try:
        status = subprocess.run(
            [*command, TESTS / "test_cuda.py"], cwd=ROOT, timeout=limit, check=False
        ).returncode
        append(given.output, {"tests": "passed" if status == 0 else "failed", "status": status})
    except subprocess.TimeoutExpired:
        append(given.output, {"tests": "failed", "status": f"killed after {limit:.0f} s"})
    first, crashes = 0, 0
    while time.time() < end and crashes < 2:  # two in turn without a row: more would not help
        had = len(lines(given.output))
        status = in_process(given, "rows", max(1.0, end - time.time()), first)
        done = sum("row" in line for line in lines(given.output)[had:])
        if status == 0:
            break
        first, crashes = first + done, 0 if done else crashes + 1
        if status != 3:
            text = f"the process ended with {status}"
            append(given.output, {"row": f"number {first}", "failed": text})
            first += 1
    profile(given)
    found = lines(given.output)[before:]
    wrong = [
        r for r in found if r.get("ok") is False or "failed" in r or r.get("tests") == "failed"
    ]
    print(f"{len(found)} lines in {given.output}, {len(wrong)} of them failures")
    return int(bool(wrong))


def profile(given: argparse.Namespace) -> None:
    """Profile three kernels, where a profiler is installed, into a file beside the output."""
    report = given.output.with_suffix(".profile.txt")
    target = [sys.executable, "-m", "asv_benchmarks.gpu", "--phase", "profile"]
    if shutil.which("ncu") and not given.dry_run:
        command = ["ncu", "--clock-control", "none", "--set", "detailed", "-k", f"regex:{PROFILED}"]
        command += ["--launch-count", "5", *target]  # one, and two of each of the others
    elif shutil.which("nsys") and not given.dry_run:
        command = ["nsys", "profile", "--stats=true", "-o", str(report.with_suffix("")), *target]
    else:
        append(given.output, {"profile": "neither ncu nor nsys is used"})
        return
    try:
        with report.open("w") as file:
            status = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, timeout=PROFILE_SECONDS, check=False
            ).returncode
    except subprocess.TimeoutExpired:
        status = f"killed after {PROFILE_SECONDS:.0f} s"
    append(given.output, {"profile": str(report), "status": status})


def print_overhead() -> None:
    """Print the host's microseconds per call of a plan, with launches that do nothing."""
    import cupy

    plans = {
        "one step": (filters.separate(filters.gauss(1.0)), (64, 64)),
        "a graph of five steps": (lr.tucker(lr.dense(weight(64, 64, 3, 3)), (16, 16)), (28, 28)),
    }
    for name, (f, size) in plans.items():
        run = f.astype(np.float32).to("cuda").compile(size)
        x = cupy.zeros((1, f.in_channels, *size), np.float32)
        out = run(x)
        samples = []
        for _ in range(50):
            start = time.perf_counter()
            for _ in range(1000):
                run(x, out)
            samples.append((time.perf_counter() - start) * 1e3)
        print(f"{name:24} {min(samples):6.2f} us per call, target 4")


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="deadline of the whole run")
    parser.add_argument("--output", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--only", default="", help="word in the names of rows")
    parser.add_argument("--dry-run", action="store_true", help="on the emulated CuPy")
    parser.add_argument("--overhead", action="store_true", help="the host's time per call")
    parser.add_argument("--phase", choices=("check", "rows", "profile"), help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.output = given.output.resolve()
    if not (given.phase or given.overhead):
        return run_all(given)
    with ExitStack() as stack:
        if given.dry_run or given.overhead:
            sys.path.insert(0, str(TESTS))
            import fake_cupy

            stack.enter_context(fake_cupy.installed())
            fake_cupy.hooks.is_dry = given.overhead or given.phase != "check"
        if given.overhead:
            print_overhead()
            return 0
        return work_through(given)


if __name__ == "__main__":
    sys.exit(main())
