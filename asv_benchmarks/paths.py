"""Compare the two ways to run a chain, on planes and channels-last, with the engine's choice.

    python -m asv_benchmarks.paths [--only WORD]

One image, one thread.  The engine chooses by counts times default costs (`lowrank.engine.costs`);
a row is marked if the way that is chosen takes more than 1.1 times as long as the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from asv_benchmarks.benchmarks import cases
from lowrank.engine import channels_last

KINDS = ("dense", "depthwise", "mobilenet", "chain")
PEERS = ("torch_peers", "onnx_peer", "tensorly_torch_peer")
ROUNDS = 15
MARKED = 1.1
choose = channels_last.plan_if_faster


def on_planes(*_: Any) -> None:
    """Plan no program."""


def in_channels_last(links: Any, shape: Any, dtype: Any, threads: int, algorithm: Any) -> Any:
    """Plan a program, whatever it costs."""
    builder = channels_last.program_builder(links, shape, dtype, algorithm)
    with mock.patch.object(channels_last, "faster_program", return_value=builder):
        return choose(links, shape, dtype, threads, algorithm)


def call_of(case: cases.Case, way: Callable[..., Any]) -> Callable[[], object]:
    """Return our own call of a case, planned one way."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(channels_last, "plan_if_faster", way))
        for peer in PEERS:
            stack.enter_context(mock.patch.object(cases, peer, return_value={}))
        return case.make().ours


def chosen_ways(case: cases.Case) -> set[bool]:
    """Return whether the engine runs the chains of a case channels-last."""
    found = set()

    def record(*arguments: Any) -> Any:
        plan = choose(*arguments)
        found.add(plan is not None)
        return plan

    call_of(case, record)
    return found


def seconds(calls: list[Callable[[], object]]) -> list[float]:
    """Return the median seconds of calls in alternation, each after a call of its own."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, samples in zip(calls, times):
            call()
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in times]


def main() -> None:
    """Print a row per case, and the number of those that are marked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="cases with this word")
    given = parser.parse_args()
    found = [c for kind in KINDS for c in cases.KINDS[kind](1, False)]
    found = [c for c in found if given.only in c.name and "N=8" not in c.name]
    print(f"{'microseconds':72} {'planes':>8} {'channels-last':>13}  chosen")
    marked = 0
    for case in found:
        both = seconds([call_of(case, way) for way in (on_planes, in_channels_last)])
        ways = chosen_ways(case)
        # Of a block's chains some may run either way.
        worst = max(both[way] for way in ways) / min(both) if len(ways) == 1 else 1.0
        marked += worst > MARKED
        name = {False: "planes", True: "channels-last"}
        chosen = " and ".join(name[way] for way in sorted(ways))
        numbers = [1e6 * s for s in both]
        mark = f", {worst:.2f} times as long" if worst > MARKED else ""
        print(f"{case.name:72} {numbers[0]:8.0f} {numbers[1]:13.0f}  {chosen}{mark}", flush=True)
    print(
        f"{marked} of {len(found)} choices take more than {MARKED} times as long as the faster way"
    )


if __name__ == "__main__":
    main()
