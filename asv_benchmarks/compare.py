"""Every kind of work that the engine does, beside the libraries that people use for it today.

    python -m asv_benchmarks.compare [--quick] [--only WORD] [--threads N] [--json]

Contestants of a row run in turns in one process, each on N threads (2 if not given; SciPy has one);
times are medians.  A peer that is not installed is left out.  The fastest one counts against the
target, PyTorch in the better of its two layouts; onnxruntime has a column of its own.  The
roofline is what arithmetic at the measured peak, or the bytes of input, weights and output at the
measured copy rate, would take.  A thread that waits sleeps (OMP_WAIT_POLICY=passive): teams
that spin take each other's cores.
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
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from asv_benchmarks.benchmarks.cases import KINDS, cv2, torch
from asv_benchmarks.benchmarks.measure import measured
from lowrank._kernels import _core


def cpu() -> str:
    """Its name, where the system tells."""
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
    """Peak of arithmetic and of copying, measured."""
    _core.peak(100_000)
    rates = []
    for _ in range(7):
        start = time.perf_counter()
        done = _core.peak(1_000_000)
        rates.append(done / (time.perf_counter() - start))
    a, b = np.zeros(32_000_000, np.float32), np.zeros(32_000_000, np.float32)
    (copy,) = measured([lambda: np.copyto(a, b)], 0.5)
    return {
        "cpu": cpu(),
        "isa": _core.default_isa(),
        "threads": threads,
        "peak_gflops": max(rates) * threads * 1e-9,
        "copy_gbs": 8 * a.size / copy * 1e-9,
    }


def rows(threads: int, quick: bool, only: str, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure every case."""
    for kind, cases in KINDS.items():
        for case in cases(threads, quick):
            if only not in f"{kind}: {case.name}":
                continue
            work = case.make()
            names = list(work.peers)
            calls = [work.ours, *work.peers.values(), *work.dense.values()]
            ours, *others = measured(calls, 0.15 if quick else 0.6)
            seen = dict(zip([*names, *work.dense], others))
            rivals = [name for name in names if name != "onnxruntime"]
            best = min(rivals, key=seen.__getitem__) if rivals else None
            limited = not names and kind in ("call", "fit")  # a limit in place of a peer
            if limited:
                best, seen["limit"] = "limit", case.target
                names = [best]
            least = max(
                work.flops / (about["peak_gflops"] * 1e9), work.bytes / (about["copy_gbs"] * 1e9)
            )
            dense = min((seen[name] for name in work.dense), default=None)
            nchw, onnx = seen.get("torch NCHW"), seen.get("onnxruntime")
            yield {
                "kind": kind,
                "name": case.name,
                "ours_s": ours,
                "peer": best,
                "peer_s": None if best is None else seen[best],
                "speedup": None if best is None else seen[best] / ours,
                "target": 1.0 if limited else case.target,
                "nchw_speedup": None if nchw is None else nchw / ours,
                "nchw_target": case.nchw,
                "onnxruntime_speedup": None if onnx is None else onnx / ours,
                "realised": dense / ours / work.fewer if dense else None,
                "roofline_share": least / ours,
                "gflops": work.flops / ours * 1e-9,
                "peers_s": {name: seen[name] for name in names},
            }


REALISED = 0.8  # share of the saved multiply-adds that chains are to make time of, in the mean


def verdicts(found: list[dict[str, Any]]) -> Iterator[str]:
    """Geometric means by kind against their targets."""
    for kind in dict.fromkeys(r["kind"] for r in found):
        these = [r for r in found if r["kind"] == kind]
        for key, target, word in (
            ("speedup", "target", "best peer"), ("nchw_speedup", "nchw_target", "torch NCHW"),
        ):  # fmt: skip
            of = [r for r in these if r[key] is not None and r[target] is not None]
            if of:
                mean = statistics.geometric_mean(r[key] for r in of)
                wanted = statistics.geometric_mean(r[target] for r in of)
                yield _verdict(kind, word, mean, wanted, of, key)
        of = [r for r in these if r["onnxruntime_speedup"] is not None]
        if of:
            mean = statistics.geometric_mean(r["onnxruntime_speedup"] for r in of)
            yield _verdict(kind, "onnxruntime", mean, None, of, "onnxruntime_speedup")
        real = [r for r in these if r["realised"] is not None]
        if real:
            mean = statistics.geometric_mean(r["realised"] for r in real)
            yield _verdict(kind, "realised share", mean, REALISED, real, "realised")


def _verdict(
    kind: str, word: str, mean: float, wanted: float | None, of: list[dict[str, Any]], key: str
) -> str:
    low = min(of, key=lambda r: r[key])
    goal = ""
    if wanted is not None:
        goal = f"of {wanted:5.2f} {'met' if mean >= wanted else 'MISSED'}"
    return (
        f"{kind:10} {word:14} {mean:6.2f} {goal:15} "
        f"{len(of):3} rows, least {low[key]:.2f}: {low['name']}"
    )


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
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if torch is not None:
        torch.set_num_threads(given.threads)
    if cv2 is not None:
        cv2.setNumThreads(given.threads)
    about = machine(given.threads)
    found = []
    if not given.json:
        print(
            f"{about['cpu']}, {about['isa']}, {about['threads']} threads, "
            f"peak {about['peak_gflops']:.0f} GFLOP/s, copy {about['copy_gbs']:.0f} GB/s"
        )
        head = f"{'work':72} {'ours us':>9} {'best peer':>24} {'speed-up':>8} {'target':>6}"
        print(head + f" {'NCHW':>6} {'ONNX':>6} {'realised':>8} {'roofline':>8} {'GFLOP/s':>7}")
    for row in rows(given.threads, given.quick, given.only, about):
        found.append(row)
        if not given.json:
            print(
                f"{row['name']:72} {row['ours_s'] * 1e6:9.1f} {row['peer'] or '-':>24} "
                f"{_number(row['speedup']):>8} {row['target']:6.2f} "
                f"{_number(row['nchw_speedup']):>6} {_number(row['onnxruntime_speedup']):>6} "
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
