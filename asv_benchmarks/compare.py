"""Compare all kinds of workloads with other libraries.

    python -m asv_benchmarks.compare [--quick] [--only WORD] [--threads N ...] [--json]
    python -m asv_benchmarks.compare --only network: [...]

The libraries of a row run interleaved in one process, on one and on two threads unless told
otherwise (SciPy has one); times are medians.  Peers that are not installed are omitted.  Speed-ups
and targets refer to the fastest peer, with PyTorch in the better of its two layouts; TensorLy-Torch
(chains of PyTorch convolutions) is compared separately.  Whole networks are dense and compressed to
a half and a third of their MACs; the trained ones are in the folder LOWRANK_DATA.  The roofline is
the time of the arithmetic at the measured peak or of the compulsory traffic at the measured copy
rate, whichever is longer; a fast algorithm can exceed it.  Waiting threads sleep
(OMP_WAIT_POLICY=passive), since spinning ones would occupy the other libraries' cores.
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

from asv_benchmarks.benchmarks import networks
from asv_benchmarks.benchmarks.cases import KINDS, Case
from asv_benchmarks.benchmarks.libraries import set_threads
from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank._kernels import _core

#: Peer that does not count for the targets.
SEPARATE = "TensorLy-Torch"
#: Largest share of rows of a kind in which a peer may be faster.
SLOWER = {"chain": 0.05}
#: Target share of the copy rate for short filters of large images.
COPY = 0.75


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


def rows(
    counts: tuple[int, ...], quick: bool, only: str, about: dict[int, dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """Measure the selected cases; yield one list per line: one row per number of threads."""
    for kind, cases in KINDS.items():
        lines: dict[str, list[tuple[int, Case]]] = {}
        for n in counts:
            for case in cases(n, quick):
                if only in f"{kind}: {case.name}":
                    lines.setdefault(case.name, []).append((n, case))
        for line in lines.values():
            yield [_measure(kind, case, n, quick, about[n]) for n, case in line]
    for measured in networks.measure(counts, quick, only):
        yield [_row(**row) for row in measured]


def _measure(
    kind: str, case: Case, threads: int, quick: bool, about: dict[str, Any]
) -> dict[str, Any]:
    """Return the row of one case."""
    set_threads(threads)
    work = case.make()
    ours, *others = measure_seconds([work.ours, *work.peers.values()], 0.15 if quick else 0.6)
    peers, target = dict(zip(work.peers, others)), case.target
    separate = {name: peers.pop(name) for name in list(peers) if name == SEPARATE}
    if not peers and kind == "call":  # compared with a limit instead of a peer
        peers, target = {"limit": case.target}, 1.0
    least = max(work.flops / (about["peak_gflops"] * 1e9), work.bytes / (about["copy_gbs"] * 1e9))
    return _row(kind, case.name, threads, ours, peers, target, case.least, separate) | {
        "roofline_share": least / ours,
        "gflops": work.flops / ours * 1e-9,
    }


def _row(
    kind: str,
    name: str,
    threads: int,
    ours: float,
    peers: dict[str, float],
    target: float,
    least: float | None = None,
    others: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Return a row; `others` are times that do not count for the target."""
    others = others or {}
    best = min(peers, key=peers.__getitem__) if peers else None
    return {
        "kind": kind,
        "name": name,
        "threads": threads,
        "ours_s": ours,
        "peer": best,
        "peer_s": None if best is None else peers[best],
        "speedup": None if best is None else peers[best] / ours,
        "target": target,
        "least": least,
        "tensorly_torch_speedup": others[SEPARATE] / ours if SEPARATE in others else None,
        "roofline_share": None,
        "gflops": None,
        "peers_s": peers | others,
    }


def verdicts(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield geometric means by kind and number of threads, with targets and the least row."""
    for kind, threads in dict.fromkeys((r["kind"], r["threads"]) for r in found):
        these = [r for r in found if (r["kind"], r["threads"]) == (kind, threads)]
        title = f"{kind:10} {threads:2}"
        of = [r for r in these if r["speedup"] is not None]
        if of:
            goal = statistics.geometric_mean(r["target"] for r in of)
            floor = next((r["least"] for r in of if r["least"]), None)
            yield _verdict(f"{title} best peer", goal, floor, of, "speedup")
            slower = sum(r["speedup"] < 1 for r in of) / len(of)
            if kind in SLOWER:
                word = "met" if slower <= SLOWER[kind] else "MISSED"
                yield f"{title} slower in {slower:.1%} of the rows, of {SLOWER[kind]:.0%} {word}"
        of = [r for r in these if r["tensorly_torch_speedup"] is not None]
        if of:
            yield _verdict(f"{title} {SEPARATE}", None, 1.0, of, "tensorly_torch_speedup")
        large = [r for r in these if r["name"].startswith(("filter 3x3 of", "filter 5x5 of"))]
        large = [r for r in large if "4096x4096" in r["name"]]
        if large:
            yield _verdict(f"{title} of copy, 4096", COPY, COPY, large, "roofline_share")


def _verdict(
    title: str, wanted: float | None, least: float | None, of: list[dict[str, Any]], key: str
) -> str:
    mean, low = statistics.geometric_mean(r[key] for r in of), min(of, key=lambda r: r[key])
    goal = ""
    if wanted is not None:
        goal = f"of {wanted:5.2f} {'met' if mean >= wanted else 'MISSED'}"
    line = f"{title:28} {mean:6.2f} {goal:15} {len(of):3} rows"
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
    parser.add_argument("--threads", type=int, nargs="+", default=[1, min(2, _core.max_threads())])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    counts = tuple(dict.fromkeys(given.threads))
    about = {n: machine(n) for n in counts}
    found = []
    if not given.json:
        for m in about.values():
            print(
                f"{m['cpu']}, {m['isa']}, {m['threads']} threads, "
                f"peak {m['peak_gflops']:.0f} GFLOP/s, copy {m['copy_gbs']:.0f} GB/s"
            )
        head = f"{'ours us':>10} {'best peer':>18} {'speed-up':>8} {'roofline':>8}"
        print(f"{'work':72} {'target':>6}" + "".join(f" | {n} threads {head}" for n in counts))
    for line in rows(counts, given.quick, given.only, about):
        found += line
        if not given.json:
            by_threads = {row["threads"]: row for row in line}
            cells = [_cells(by_threads.get(n)) for n in counts]
            print(f"{line[0]['name']:72} {line[0]['target']:6.2f}", *cells, sep=" | ", flush=True)
    if not found:
        sys.exit(f"no row has {given.only!r} in its kind and name")
    if given.json:
        json.dump({"machine": list(about.values()), "rows": found}, sys.stdout, indent=1)
        print()
        return
    print("\ngeometric means, by kind and number of threads")
    for verdict in verdicts(found):
        print(verdict)


def _cells(row: dict[str, Any] | None) -> str:
    """Return the columns of one number of threads."""
    if row is None:
        return " " * 57
    return (
        f"{row['ours_s'] * 1e6:20.1f} {row['peer'] or '-':>18} {_number(row['speedup']):>8} "
        f"{_number(row['roofline_share']):>8}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
