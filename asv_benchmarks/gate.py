"""Detect whether a commit is slower than another; exit with status 1 if it is.

    python -m asv_benchmarks.gate [--base REV] [--head REV] [--only WORD] [--step PERCENT] [-v]
    python -m asv_benchmarks.gate --self-test [--runs N] [--only WORD]

HEAD is compared with main, or with its parent if HEAD is main.  Both are built from what is
committed.  The workloads are those of the suites in asv_benchmarks/benchmarks in the working tree.

Times are compared as ratios: two processes, one per build, run the same workload alternately, one
thread each, in samples of about ten milliseconds, so that other load on the machine affects both.
A sample is the minimum processor time of its parts; time spent waiting is not seen.  A pair of
processes yields the median ratio over its rounds.

Two processes of the same build can differ by their memory layout.  One pair therefore only raises
a suspicion (half a step); suspects are measured by up to ten new pairs and are reported if all but
two show a whole step.  This is the 94.5 % lower confidence limit of the median over pairs; if a
pair were wrong in one of five cases, the false-alarm rate would be 1 in 10 000 workloads.

Errors, costs and bytes are machine-independent and compared directly.

`--self-test` compares HEAD with another build of itself, which must pass, and with a build whose
plans were made 15 % slower, which must fail.  Measured with eight pairs of which one may disagree,
on two cores with four to six other busy processes: no false alarm in three runs of 55 workloads
and 34 numbers; 22 of 22 slowed workloads found in one run, one of two in another (hence two of
ten); and all ten workloads that use a C kernel with a sixth more work (1.13 to 1.16 times as
long), but neither of the two that do not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from asv_benchmarks.builds import SLOWDOWN, SOURCES, build_both, git, revisions, slow_copy
from asv_benchmarks.worker import SAMPLE, Worker, WorkerError, pair, read_suite

STEP = 0.05  # smallest relative slowdown that is looked for
PAIRS, OUTLIERS = 10, 2  # pairs of processes, and how many of them may disagree
PART, BUDGET = 1e-3, 0.4  # seconds per part of a sample, per workload in a pair
ROUNDS = (5, 21)

#: Tolerances of tracked numbers by suite: relative, absolute.
ROUNDING = {"memory": (0.02, 0.0), "models": (1e-3, 0.005)}  # 0.005: two digits of 450

Key = tuple[str, str]  # suite and name


def compare(workers: tuple[Worker, Worker], key: Key) -> tuple[float, float]:
    """Return seconds of the base and the median ratio head / base over interleaved rounds."""
    with ThreadPoolExecutor(2) as pool:
        once = min(pool.map(lambda worker: worker.ask(make=key), workers))
    calls = max(1, math.ceil(PART / max(once, 1e-7)))
    parts = max(1, min(8, round(SAMPLE / (calls * once))))
    took = 2 * parts * calls * once
    rounds = min(max(round(BUDGET / took), ROUNDS[0]), ROUNDS[1])
    ratios, base = [], []
    for k in range(rounds):
        times = [0.0, 0.0]
        for who in (0, 1) if k % 2 else (1, 0):
            times[who] = workers[who].ask(sample=(calls, parts))
        ratios.append(times[1] / times[0])
        base.append(times[0])
    return statistics.median(base), statistics.median(ratios)


def lower_limit(ratios: list[float]) -> float:
    """Return the 94.5 % lower confidence limit of the median over PAIRS ratios."""
    return sorted(ratios)[OUTLIERS]


def decide(ratios: list[float], step: float) -> bool | None:
    """Return whether the pairs show a step; None if more pairs are needed."""
    if sum(r <= 1 + step for r in ratios) > OUTLIERS:
        return False
    return True if len(ratios) >= PAIRS else None


def select(only: str, attribute: str = "WORK") -> list[Key]:
    from asv_benchmarks.benchmarks import SUITES

    keys = [(suite, name) for suite in SUITES for name in read_suite(suite, attribute)]
    return [key for key in keys if only in ": ".join(key)]


class Comparison:
    """Result: steps by name, values, and names that one build lacks."""

    def __init__(self) -> None:
        self.steps: dict[Key, str] = {}
        self.seen: dict[Key, float] = {}
        self.absent: list[Key] = []


def compare_times(
    folders: tuple[Path, Path], keys: Iterable[Key], step: float, verbose: bool
) -> Comparison:
    """Compare the times of all workloads; suspects of the first pair are measured by new pairs."""
    result = Comparison()
    suspects: dict[Key, list[float]] = {}
    with pair(folders) as workers:
        for key in keys:
            try:
                seconds, ratio = compare(workers, key)
            except WorkerError as error:
                record_failure(result, key, workers, error)
                continue
            result.seen[key] = ratio
            if ratio > 1 + step / 2:
                suspects[key] = []
            if verbose or abs(ratio - 1) > step:
                print(f"{': '.join(key):74} {seconds * 1e3:9.3f} ms {ratio:6.3f}", flush=True)
    more = 0
    while suspects:
        more += 1
        print(f"new processes for {len(suspects)} suspects", flush=True)
        with pair(folders, swapped=more % 2 == 1) as workers:
            for key, ratios in list(suspects.items()):
                ratios.append(compare(workers, key)[1])
                verdict = decide(ratios, step)
                if verdict is None:
                    continue
                del suspects[key]
                if verdict:
                    result.steps[key] = (
                        f"{statistics.median(ratios):.3f} times the base, at least "
                        f"{lower_limit(ratios):.3f} over {len(ratios)} pairs of processes"
                    )
    return result


def record_failure(
    result: Comparison, key: Key, workers: tuple[Worker, Worker], error: WorkerError
) -> None:
    """Record a workload that fails in one build: new, or broken."""
    runs = []
    for worker in workers:
        try:
            worker.ask(make=key)
            runs.append(True)
        except WorkerError:
            runs.append(False)
    if runs == [True, False]:
        result.steps[key] = f"fails in head: {error}"
    else:
        result.absent.append(key)


def worse(key: Key, base: float, head: float) -> bool:
    """Return whether a tracked value has grown by more than rounding."""
    share, amount = ROUNDING.get(key[0], (1e-3, 0.0))
    return head > base + share * abs(base) + amount


def compare_tracked(folders: tuple[Path, Path], keys: list[Key]) -> Comparison:
    """Compare the tracked numbers of both builds."""
    result = Comparison()
    with pair(folders) as workers, ThreadPoolExecutor(2) as pool:
        base, head = pool.map(lambda worker: values(worker, keys), workers)
    for key in keys:
        a, b = base[key], head[key]
        if isinstance(a, WorkerError):
            result.absent.append(key)
        elif isinstance(b, WorkerError):
            result.steps[key] = f"missing in head: {b}"
        elif worse(key, a, b):
            result.steps[key] = f"{a:.6g} -> {b:.6g}"
        elif a != b:
            result.seen[key] = b
            print(f"{': '.join(key):74} {a:.6g} -> {b:.6g}")
        else:
            result.seen[key] = b
    return result


def values(worker: Worker, keys: list[Key]) -> dict[Key, float | WorkerError]:
    got: dict[Key, float | WorkerError] = {}
    for key in keys:
        try:
            got[key] = worker.ask(track=key)
        except WorkerError as error:
            got[key] = error
    return got


def gate(folders: tuple[Path, Path], only: str, step: float, verbose: bool) -> Comparison:
    """Compare two builds and print the result."""
    begin = time.perf_counter()
    times = compare_times(folders, select(only), step, verbose)
    figures = compare_tracked(folders, select(only, "TRACKED"))
    times.steps |= figures.steps
    took = time.perf_counter() - begin
    for key in times.absent + figures.absent:
        print(f"{': '.join(key):74} not in both")
    mean = statistics.geometric_mean(times.seen.values()) if times.seen else math.nan
    print(
        f"{len(times.seen)} workloads, geometric mean {mean:.3f} times the base, and "
        f"{len(figures.seen)} tracked numbers, in {took:.0f} s"
    )
    for key, message in times.steps.items():
        print(f"STEP  {': '.join(key)}: {message}")
    return times


def self_test(commit: str, only: str, step: float, runs: int) -> bool:
    """Compare a commit with another build of itself and with a slowed build."""
    same, alarms = build_both(commit, commit), []
    for run in range(runs):
        print(f"\ncompared with itself, run {run + 1}", flush=True)
        alarms.append(len(gate(same, only, step, False).steps))
    print(f"\nplans {SLOWDOWN} times as slow")
    keys = [key for key in select(only) if key[0] in ("kernels", "chains")]
    slow = compare_times((same[0], slow_copy(same[1])), keys, step, False)
    print(
        f"\nfalse alarms: {sum(alarms)} in {runs} runs of {len(select(only))} workloads; "
        f"steps found: {len(slow.steps)} of {len(slow.seen)}"
    )
    for key in slow.seen.keys() - slow.steps.keys():
        print(f"not found: {': '.join(key)}, {slow.seen[key]:.3f} in the first pair")
    return not any(alarms) and len(slow.steps) >= 0.9 * len(slow.seen)


def main() -> None:
    """Compare two commits, or test the gate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", metavar="REV", help="main, or its parent")
    parser.add_argument("--head", metavar="REV", default="HEAD")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="workloads with this in 'SUITE: NAME'"
    )
    parser.add_argument("--step", type=float, default=100 * STEP, metavar="PERCENT")
    parser.add_argument("-v", "--verbose", action="store_true", help="every ratio")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--runs", type=int, default=3, help="runs of the self-test")
    given = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    base, head = revisions(given.base, given.head)
    step = given.step / 100
    if given.self_test:
        print(f"{head[:12]}, workloads with {given.only!r}" if given.only else head[:12])
        sys.exit(not self_test(head, given.only, step, given.runs))
    for word, commit in (("base", base), ("head", head)):
        print(f"{word}  {git('log', '-1', '--format=%h %s', commit)}")
    if git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES):
        print("uncommitted changes are not compared")
    if not git("diff", "--name-only", base, head, "--", "lowrank", "setup.py"):
        print("the package is equal in both commits")
        return
    result = gate(build_both(base, head), given.only, step, given.verbose)
    print("slower" if result.steps else f"no step of {given.step:g} % or more")
    sys.exit(bool(result.steps))


if __name__ == "__main__":
    main()
