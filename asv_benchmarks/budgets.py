"""Compress networks to a share of their time on a runtime, and print what the clock says.

    LOWRANK_DATA=... python -m asv_benchmarks.budgets [--time 0.65] [--runtime onnxruntime]
        [--net WORD] [--threads 1]

A row is a network: the share of its time that was measured, and by how much it misses the budget;
its share of the MACs; its score before and after; and the seconds of the whole compression.  A
budget below the fastest network prints that network's time.
"""

from __future__ import annotations

import argparse
import time

from asv_benchmarks.benchmarks import nets
from lowrank.compress import InfeasibleBudgetError
from lowrank.interop.torch import compress

CLOSE = 0.05  # share of the budget that may be missed


def row(case: nets.Case, budget: float, runtime: str, threads: int) -> str:
    """Return the line of a network."""
    start = time.perf_counter()
    try:
        done = compress(
            case.model, case.calibration(0), seconds=budget, runtime=runtime, threads=threads
        )
    except InfeasibleBudgetError as why:
        return f"{case.name:28} {why}"
    seconds = time.perf_counter() - start
    latency, (after, before) = done.plan.latency, done.plan.total("macs")
    share = latency.after / latency.before
    miss = share / budget - 1
    word = "" if abs(miss) <= CLOSE else "  not within 5%"
    scores = f"{case.score(case.model):8.2f} {case.score(done.model):8.2f} {case.unit:18}"
    return (
        f"{case.name:28} {share:6.3f} {miss:+7.1%} {after / before:6.1%} {scores} "
        f"{seconds:6.1f} s{word}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", type=float, default=0.65, help="share of the original's time")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--net", default="", help="part of a name")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    print(f"{'network':28} {'time':>6} {'miss':>7} {'MACs':>6} {'before':>8} {'after':>8}")
    for case in nets.cases(given.net):
        print(row(case, given.time, given.runtime, given.threads), flush=True)


if __name__ == "__main__":
    main()
