"""Compare all kinds of workloads with other libraries.

    python -m asv_benchmarks.compare [--quick] [--only WORD] [--threads N] [--json]
    python -m asv_benchmarks.compare --device cuda [--quick] [--only WORD] [--json]

The libraries of a row run interleaved in one process on N threads (default 2; SciPy has one); times
are medians.  Peers that are not installed are omitted.  The target refers to the fastest peer, with
PyTorch in the better of its two layouts; onnxruntime and TensorLy-Torch (chains of PyTorch
convolutions) have separate columns.  The roofline is the time of the arithmetic at the measured
peak or of the compulsory traffic at the measured copy rate, whichever is longer.  Waiting threads
sleep (OMP_WAIT_POLICY=passive), since spinning ones would occupy the other libraries' cores.

On a GPU the peers are cupyx.scipy.ndimage and PyTorch (cuDNN).  float32 is without TF32 on both
sides; TF32 and float16 have separate rows.  The share is relative to the device's copy rate.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from asv_benchmarks.benchmarks.cases import KINDS
from asv_benchmarks.benchmarks.libraries import set_threads
from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank._kernels import _core

#: Peers with separate columns, which do not count for the target.
SEPARATE = ("onnxruntime", "TensorLy-Torch")


def cpu() -> str:
    """Return the processor's name, family and model."""
    try:
        with open("/proc/cpuinfo") as about:
            facts = dict(line.split(":", 1) for line in about if ":" in line)
    except OSError:
        return platform.processor() or platform.machine()
    name, family, model = (
        next((v.strip() for k, v in facts.items() if k.strip() == word), "?")
        for word in ("model name", "cpu family", "model")
    )
    return f"{name} (family {family}, model {model})"


def machine(threads: int) -> dict[str, Any]:
    """Return the arithmetic peak (of one thread, times the threads) and the copy rate."""
    _core.peak(100_000)
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        done = _core.peak(1_000_000)
        rates.append(done / (time.perf_counter() - start))
    a, b = (np.zeros((threads, 32_000_000 // threads), np.float32) for _ in range(2))
    with ThreadPoolExecutor(threads) as pool:
        (copy,) = measure_seconds([lambda: list(pool.map(np.copyto, a, b))], 0.5)
    return {
        "cpu": cpu(),
        "isa": _core.default_isa(),
        "threads": threads,
        "peak_gflops": max(rates) * threads * 1e-9,
        "copy_gbs": 8 * a.size / copy * 1e-9,
    }


def rows(threads: int, quick: bool, only: str, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure the selected cases."""
    for kind, cases in KINDS.items():
        for case in cases(threads, quick):
            if only not in f"{kind}: {case.name}":
                continue
            work = case.make()
            names = list(work.peers)
            calls = [work.ours, *work.peers.values(), *work.dense.values()]
            ours, *others = measure_seconds(calls, 0.15 if quick else 0.6)
            seen = dict(zip([*names, *work.dense], others))
            rivals = [name for name in names if name not in SEPARATE]
            best = min(rivals, key=seen.__getitem__) if rivals else None
            limited = not names and kind == "call"  # compared with a limit instead of a peer
            if limited:
                best, seen["limit"] = "limit", case.target
                names = [best]
            least = max(
                work.flops / (about["peak_gflops"] * 1e9), work.bytes / (about["copy_gbs"] * 1e9)
            )
            dense = min((seen[name] for name in work.dense), default=None)
            nchw, onnx, tltorch = (seen.get(name) for name in ("torch NCHW", *SEPARATE))
            yield {
                "kind": kind,
                "name": case.name,
                "ours_s": ours,
                "peer": best,
                "peer_s": None if best is None else seen[best],
                "speedup": None if best is None else seen[best] / ours,
                "target": 1.0 if limited else case.target,
                "least": case.least,
                "nchw_speedup": None if nchw is None else nchw / ours,
                "nchw_target": case.nchw,
                "onnxruntime_speedup": None if onnx is None else onnx / ours,
                "tensorly_torch_speedup": None if tltorch is None else tltorch / ours,
                "realised": dense / ours / work.fewer if dense else None,
                "roofline_share": least / ours,
                "gflops": work.flops / ours * 1e-9,
                "peers_s": {name: seen[name] for name in names},
            }


#: Targets of speed-up / MAC ratio of chains: geometric mean, and every single one.
REALISED, NEVER_UNDER = 0.8, 0.5
#: Target share of the copy rate for short filters of large images.
COPY = 0.75


def verdicts(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield geometric means by kind with their targets, and rows under the minimum."""
    for kind in dict.fromkeys(r["kind"] for r in found):
        these = [r for r in found if r["kind"] == kind]
        layers = any(r["nchw_speedup"] is not None for r in these)
        targets = [r["target"] for r in these], [r["nchw_target"] for r in these]
        floor = next((r["least"] for r in these if r["least"]), None)
        for key, word, wanted, least in (
            ("speedup", "best peer", _mean(targets[0]), floor),
            ("nchw_speedup", "torch NCHW", _mean(targets[1]), 1.0 if layers else None),
            ("onnxruntime_speedup", "onnxruntime", None, 1.0),
            ("tensorly_torch_speedup", "TensorLy-Torch", None, 1.0),
            ("realised", "speed-up/MACs", REALISED, NEVER_UNDER),
        ):
            of = [r for r in these if r[key] is not None]
            if key == "nchw_speedup" and wanted is not None:
                of_mean = [r for r in of if r["nchw_target"] is not None]
            else:
                of_mean = of
            if of:
                mean = statistics.geometric_mean(r[key] for r in of_mean)
                yield _verdict(kind, word, mean, wanted, least, of, key)
    large = [r for r in found if r["name"].startswith(("filter 3x3 of", "filter 5x5 of"))]
    large = [r for r in large if "4096x4096" in r["name"]]
    if large:
        mean = statistics.geometric_mean(r["roofline_share"] for r in large)
        yield _verdict("image", "of copy, 4096", mean, COPY, COPY, large, "roofline_share")


def _mean(values: list[float | None]) -> float | None:
    given = [v for v in values if v is not None]
    return statistics.geometric_mean(given) if given else None


def _verdict(
    kind: str, word: str, mean: float, wanted: float | None, least: float | None,
    of: list[dict[str, Any]], key: str,
) -> str:  # fmt: skip
    low = min(of, key=lambda r: r[key])
    goal = ""
    if wanted is not None:
        goal = f"of {wanted:5.2f} {'met' if mean >= wanted else 'MISSED'}"
    line = f"{kind:10} {word:14} {mean:6.2f} {goal:15} {len(of):3} rows"
    under = sum(r[key] < least for r in of) if least is not None else 0
    if under:
        line += f", {under} UNDER {least:g}"
    return f"{line}, least {low[key]:.2f}: {low['name']}"


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter runs")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORD",
        help="rows with this in 'KIND: NAME', such as 'image:'",
    )
    parser.add_argument("--threads", type=int, default=min(2, _core.max_threads()))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.device == "cuda":
        compare_on_gpu(given.quick, given.only, given.json)
        return
    set_threads(given.threads)
    about = machine(given.threads)
    found = []
    if not given.json:
        print(
            f"{about['cpu']}, {about['isa']}, {about['threads']} threads, "
            f"peak {about['peak_gflops']:.0f} GFLOP/s, copy {about['copy_gbs']:.0f} GB/s"
        )
        head = f"{'work':72} {'ours us':>9} {'best peer':>24} {'speed-up':>8} {'target':>6}"
        print(
            head
            + f" {'NCHW':>6} {'ONNX':>6} {'TLT':>6} {'realised':>8} {'roofline':>8} {'GFLOP/s':>7}"
        )
    for row in rows(given.threads, given.quick, given.only, about):
        found.append(row)
        if not given.json:
            print(
                f"{row['name']:72} {row['ours_s'] * 1e6:9.1f} {row['peer'] or '-':>24} "
                f"{_number(row['speedup']):>8} {row['target']:6.2f} "
                f"{_number(row['nchw_speedup']):>6} {_number(row['onnxruntime_speedup']):>6} "
                f"{_number(row['tensorly_torch_speedup']):>6} "
                f"{_number(row['realised']):>8} "
                f"{row['roofline_share']:8.2f} {row['gflops']:7.1f}",
                flush=True,
            )
    if not found:
        sys.exit(f"no row has {given.only!r} in its kind and name")
    if given.json:
        json.dump({"machine": about, "rows": found}, sys.stdout, indent=1)
        print()
        return
    print("\ngeometric means")
    for line in verdicts(found):
        print(line)


def compare_on_gpu(quick: bool, only: str, as_json: bool) -> None:
    """Print the table of the GPU."""
    from asv_benchmarks.benchmarks import gpu
    from lowrank.engine.cuda import device as cuda

    try:
        cuda.check_device()
    except RuntimeError as error:
        sys.exit(str(error))
    about = gpu.device()
    found = []
    if not as_json:
        print(", ".join(f"{k} {v}" for k, v in about.items()))
        head = f"{'work':72} {'ours us':>9} {'best peer':>18} {'speed-up':>8} "
        print(head + f"{'of copy':>8} {'GFLOP/s':>8}")
    for row in gpu.rows(quick, only, about):
        found.append(row)
        if not as_json:
            print(
                f"{row['name']:72} {row['ours_s'] * 1e6:9.1f} {row['peer'] or '-':>18} "
                f"{_number(row['speedup']):>8} {row['copy_share']:8.2f} {row['gflops']:8.0f}",
                flush=True,
            )
    if as_json:
        json.dump({"machine": about, "rows": found}, sys.stdout, indent=1)
        print()
        return
    print("\ngeometric means")
    for line in gpu.verdicts(found):
        print(line)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
