"""Whether a commit is slower than another, told from noise; exit status 1 if it is.

    python -m asv_benchmarks.gate [--base REV] [--head REV] [--only WORD] [--step PERCENT] [-v]
    python -m asv_benchmarks.gate --self-test [--runs N] [--only WORD]

HEAD is compared with main, or with the commit before where HEAD is main.  Both are built from what
is committed, into asv_benchmarks/.asv/gate, and kept there.  The work is that of the suites in
asv_benchmarks/benchmarks as they lie in the working tree, alike for both.

Times are ratios only: two processes, one of each build, take turns at the same work, one thread
each, in samples of some ten milliseconds, first one ahead and then the other, so that whatever
else the machine does hits both.  A sample is the least processor time of its parts: who is not
running is not charged.  (What waits without working is not seen.)  Such a pair of processes gives
the median of its rounds.

Two processes of the same build can differ, by where their memory happens to lie.  So one pair
accuses only: what is slower there by half a step is measured by new pairs, ten at most, and is
slower if all of them but two say so by a whole step.  That is the lower 94.5 % limit of the median
over pairs being above the step; were a pair wrong in one of five cases, one work in 10 000 would
make a false alarm.

Errors, costs and bytes do not depend on the machine; they are compared as they are.

`--self-test` compares HEAD with another build of itself, which must pass, and with one whose calls
of plans were made 15 % slower, which must fail.  With eight pairs and one of them spared, on two
cores that ran four to six other busy processes: no false alarm in three runs of 55 works and 34
figures; 22 of 22 slowed works found in one run, one of two in another, which is why two of ten are
spared now; and of a kernel in C that did a sixth more, all ten works that use it and neither of
the two others (1.13 to 1.16 times as long).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "asv_benchmarks" / ".asv" / "gate"
KEPT = 6  # builds
SOURCES = ("lowrank", "setup.py", "pyproject.toml", "README.md", "LICENSE")
PEERS = ("torch", "tltorch", "onnx", "onnxruntime", "cv2")  # not imported: only ours is measured

STEP = 0.05  # a smaller one is not looked for
PAIRS, SPARED = 10, 2  # pairs that must agree, and how many of them may not
PART, SAMPLE, BUDGET = 1e-3, 8e-3, 0.4  # seconds of a part, of a sample, of a case in a pair
ROUNDS = (5, 21)
SLOWER = 1.15  # the calls of the self-test

#: How far tracked values may be off by rounding: a share of the value, and an amount, by suite.
ROUNDING = {"memory": (0.02, 0.0), "models": (1e-3, 0.005)}  # 0.005: two digits of 450

Key = tuple[str, str]  # suite and name


# --- one process of a build ---------------------------------------------------------------------


class Hidden:
    """Finds nothing of the peers, as if they were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in PEERS:
            raise ModuleNotFoundError(name)


def from_the_path() -> None:
    """Leave an editable install out, which would fill in modules that a build has not."""
    sys.meta_path[:] = [
        f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")
    ]


def used() -> float:
    """Seconds of processor of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def sample(call: Callable[[], object], calls: int, parts: int) -> float:
    """The least seconds a call of a few parts."""
    found = []
    for _ in range(parts):
        start = used()
        for _ in range(calls):
            call()
        found.append((used() - start) / calls)
    return min(found)


def serve() -> None:
    """Answer questions, a line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever work prints is no answer
    from_the_path()
    sys.meta_path.insert(0, Hidden())
    call: Callable[[], object] = lambda: None  # noqa: E731
    for line in sys.stdin:
        asked = json.loads(line)
        answer: Any = None
        try:
            if "make" in asked:
                suite, name = asked["make"]
                call = of_suite(suite, "WORK")[name]()
                answer = sample(call, 1, 1)
                if answer < SAMPLE:  # the first call was most of it
                    answer = sample(call, 1, 2)
            elif "track" in asked:
                suite, name = asked["track"]
                answer = float(of_suite(suite, "TRACKED")[name]())
            elif "sample" in asked:
                answer = sample(call, *asked["sample"])
            else:
                answer = importlib.import_module("lowrank").__file__
            said = {"is": answer}
        except Exception as why:
            said = {"failed": f"{type(why).__name__}: {why}"}
        print(json.dumps(said), file=answers, flush=True)


def of_suite(suite: str, what: str) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = getattr(
        importlib.import_module(f"asv_benchmarks.benchmarks.{suite}"), what, {}
    )
    return found


class Failed(Exception):
    """What a worker could not do."""


class Worker:
    """A process that has imported lowrank from one folder."""

    def __init__(self, folder: Path) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
        }
        # Python looks for modules in the working directory first.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "asv_benchmarks.gate", "--worker"],
            cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        where = self.ask(where=None)
        if not Path(where).is_relative_to(folder):
            raise RuntimeError(f"lowrank came from {where}, not from {folder}")

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended when it was asked {question}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["is"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def pair(folders: tuple[Path, Path], swapped: bool = False) -> Iterator[tuple[Worker, Worker]]:
    """Workers of (base, head), the other one started first if swapped."""
    made: list[Worker] = []
    try:
        for folder in reversed(folders) if swapped else folders:
            made.append(Worker(folder))
        base, head = reversed(made) if swapped else made
        yield base, head
    finally:
        for worker in made:
            worker.close()


# --- what is measured, and what is made of it ----------------------------------------------------


def compared(workers: tuple[Worker, Worker], key: Key) -> tuple[float, float]:
    """Seconds of the base, and head / base: the median of rounds in turns."""
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
    """What the median over pairs is above, with 94.5 % of certainty when PAIRS are there."""
    return sorted(ratios)[SPARED]


def decided(ratios: list[float], step: float) -> bool | None:
    """Whether these pairs say that there is a step; None if it takes more of them."""
    if sum(r <= 1 + step for r in ratios) > SPARED:
        return False
    return True if len(ratios) >= PAIRS else None


def works(only: str, what: str = "WORK") -> list[Key]:
    from asv_benchmarks.benchmarks import SUITES

    keys = [(suite, name) for suite in SUITES for name in of_suite(suite, what)]
    return [key for key in keys if only in ": ".join(key)]


class Found:
    """What a comparison has seen: faults, and lines worth a look."""

    def __init__(self) -> None:
        self.steps: dict[Key, str] = {}
        self.seen: dict[Key, float] = {}
        self.absent: list[Key] = []


def timed(folders: tuple[Path, Path], keys: Iterable[Key], step: float, loud: bool) -> Found:
    """Times of every work: one pair for all, and more of them for what it accuses."""
    found = Found()
    suspects: dict[Key, list[float]] = {}
    with pair(folders) as workers:
        for key in keys:
            try:
                seconds, ratio = compared(workers, key)
            except Failed as why:
                fails(found, key, workers, why)
                continue
            found.seen[key] = ratio
            if ratio > 1 + step / 2:
                suspects[key] = []
            if loud or abs(ratio - 1) > step:
                print(f"{': '.join(key):74} {seconds * 1e3:9.3f} ms {ratio:6.3f}", flush=True)
    more = 0
    while suspects:
        more += 1
        print(f"again, new processes, {len(suspects)} of the works", flush=True)
        with pair(folders, swapped=more % 2 == 1) as workers:
            for key, ratios in list(suspects.items()):
                ratios.append(compared(workers, key)[1])
                verdict = decided(ratios, step)
                if verdict is None:
                    continue
                del suspects[key]
                if verdict:
                    found.steps[key] = (
                        f"{statistics.median(ratios):.3f} times the base's, at least "
                        f"{lower_limit(ratios):.3f} by {len(ratios)} pairs of processes"
                    )
    return found


def fails(found: Found, key: Key, workers: tuple[Worker, Worker], why: Failed) -> None:
    """Work that one of the two cannot do: new, or broken."""
    runs = []
    for worker in workers:
        try:
            worker.ask(make=key)
            runs.append(True)
        except Failed:
            runs.append(False)
    if runs == [True, False]:
        found.steps[key] = f"runs no more: {why}"
    else:
        found.absent.append(key)


def worse(key: Key, base: float, head: float) -> bool:
    """Whether a tracked value has grown by more than rounding."""
    share, amount = ROUNDING.get(key[0], (1e-3, 0.0))
    return head > base + share * abs(base) + amount


def tracked(folders: tuple[Path, Path], keys: list[Key]) -> Found:
    """Errors, costs, bytes of both."""
    found = Found()
    with pair(folders) as workers, ThreadPoolExecutor(2) as pool:
        base, head = pool.map(lambda worker: values(worker, keys), workers)
    for key in keys:
        a, b = base[key], head[key]
        if isinstance(a, Failed):
            found.absent.append(key)
        elif isinstance(b, Failed):
            found.steps[key] = f"is not there any more: {b}"
        elif worse(key, a, b):
            found.steps[key] = f"{a:.6g} -> {b:.6g}"
        elif a != b:
            found.seen[key] = b
            print(f"{': '.join(key):74} {a:.6g} -> {b:.6g}")
        else:
            found.seen[key] = b
    return found


def values(worker: Worker, keys: list[Key]) -> dict[Key, float | Failed]:
    got: dict[Key, float | Failed] = {}
    for key in keys:
        try:
            got[key] = worker.ask(track=key)
        except Failed as why:
            got[key] = why
    return got


# --- builds --------------------------------------------------------------------------------------


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def build(commit: str, copy: int = 0) -> Path:
    """A folder with a commit's package, its kernels built in place; the second copy is another."""
    folder = CACHE / f"{commit[:12]}-{copy}"
    stamp = folder / "built"
    if stamp.exists():
        stamp.touch()
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"building {commit[:12]} (a minute, once)", flush=True)
    words = git("ls-tree", "--name-only", commit).split()
    archive = folder / "source.tar"
    git("archive", "-o", str(archive), commit, *(s for s in SOURCES if s in words))
    shutil.unpack_archive(archive, folder, filter="data")
    archive.unlink()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout}{done.stderr}\n{commit[:12]} cannot be built")
    stamp.touch()
    return folder


def builds(base: str, head: str) -> tuple[Path, Path]:
    """Folders of both, made side by side; older ones go."""
    with ThreadPoolExecutor(2) as pool:
        folders = tuple(pool.map(build, (base, head), (0, int(base == head))))
    old = [f for f in CACHE.iterdir() if f not in folders]
    old.sort(key=lambda f: (f / "built").stat().st_mtime if (f / "built").exists() else 0)
    for folder in old[: max(0, len(old) + len(folders) - KEPT)]:
        shutil.rmtree(folder)
    return folders[0], folders[1]


def slowed(folder: Path) -> Path:
    """A copy of a build whose plans take SLOWER times as long."""
    other = folder.with_name(f"{folder.name[:12]}-s")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    with (other / "lowrank" / "runtime" / "cpu.py").open("a") as file:
        file.write(
            f"""

def _slowed(self, x, out=None, run=Plan.__call__):
    start = time.process_time()
    y = run(self, x, out)
    end = time.process_time()
    end += {SLOWER - 1} * (end - start)
    while time.process_time() < end:
        pass
    return y


Plan.__call__ = _slowed
"""
        )
    return other


# --- the command ---------------------------------------------------------------------------------


def gate(folders: tuple[Path, Path], only: str, step: float, loud: bool) -> Found:
    """Compare two builds, and say so."""
    begin = time.perf_counter()
    times = timed(folders, works(only), step, loud)
    figures = tracked(folders, works(only, "TRACKED"))
    times.steps |= figures.steps
    took = time.perf_counter() - begin
    for key in times.absent + figures.absent:
        print(f"{': '.join(key):74} not in both")
    mean = statistics.geometric_mean(times.seen.values()) if times.seen else math.nan
    print(
        f"{len(times.seen)} works, in the mean {mean:.3f} times the base's time, and "
        f"{len(figures.seen)} figures, in {took:.0f} s"
    )
    for key, says in times.steps.items():
        print(f"STEP  {': '.join(key)}: {says}")
    return times


def self_test(commit: str, only: str, step: float, runs: int) -> bool:
    """A commit beside another build of itself, and beside one that is slower."""
    same, alarms = builds(commit, commit), []
    for run in range(runs):
        print(f"\nbeside itself, run {run + 1}", flush=True)
        alarms.append(len(gate(same, only, step, False).steps))
    print(f"\nits calls of plans {SLOWER} times as long")
    keys = [key for key in works(only) if key[0] in ("kernels", "chains")]
    slow = timed((same[0], slowed(same[1])), keys, step, False)
    print(
        f"\nfalse alarms: {sum(alarms)} in {runs} runs of {len(works(only))} works; steps found: "
        f"{len(slow.steps)} of {len(slow.seen)}"
    )
    for key in slow.seen.keys() - slow.steps.keys():
        print(f"not found: {': '.join(key)}, {slow.seen[key]:.3f} in the first pair")
    return not any(alarms) and len(slow.steps) >= 0.9 * len(slow.seen)


def revisions(base: str | None, head: str) -> tuple[str, str]:
    """Commits to compare; main with the one before itself."""
    new = git("rev-parse", f"{head}^{{commit}}")
    if base is None:
        base = "main"
        if git("rev-parse", "main^{commit}") == new:
            base = f"{head}~1"
    return git("rev-parse", f"{base}^{{commit}}"), new


def main() -> None:
    """Compare, or test the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", metavar="REV", help="main, or the commit before it")
    parser.add_argument("--head", metavar="REV", default="HEAD")
    parser.add_argument("--only", default="", metavar="WORD", help="works with this in SUITE: NAME")
    parser.add_argument("--step", type=float, default=100 * STEP, metavar="PERCENT")
    parser.add_argument("-v", "--verbose", action="store_true", help="every ratio")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--runs", type=int, default=3, help="of the self-test")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        serve()
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    base, head = revisions(given.base, given.head)
    step = given.step / 100
    if given.self_test:
        print(f"{head[:12]}, works with {given.only!r}" if given.only else head[:12])
        sys.exit(not self_test(head, given.only, step, given.runs))
    for word, commit in (("base", base), ("head", head)):
        print(f"{word}  {git('log', '-1', '--format=%h %s', commit)}")
    if git("status", "--porcelain", "--untracked-files=no", "--", *SOURCES):
        print("what is not committed is not in it")
    if not git("diff", "--name-only", base, head, "--", "lowrank", "setup.py"):
        print("the package is the same in both")
        return
    found = gate(builds(base, head), given.only, step, given.verbose)
    print("slower" if found.steps else f"no step of {given.step:g} % or more")
    sys.exit(bool(found.steps))


if __name__ == "__main__":
    main()
