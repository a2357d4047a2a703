"""Tabulate accuracy against measured latency, of ours and of baselines by name.

    LOWRANK_DATA=... python -m asv_benchmarks.accuracy [--net NAME ...] [--runtime NAME ...]
        [--batch N ...] [--seeds N] [--budgets SHARE ...] [--shares SHARE ...] [--threads N]
        [--fits FOLDER] [--json FILE]

All methods get the same calibration images per seed and run on the same runtime, without training.
"Ours, by time" has a budget in seconds on that runtime, batch size and number of threads; "ours, by
MACs" and the baselines (`asv_benchmarks/baselines.py`) have shares of the MACs.

Scores are means over calibration seeds.  The score against the original, with its 95 % interval, is
paired over all test images that are there: for the CIFAR-10 networks the 500 lossless ones and the
3,000 JPEG ones together, since JPEG images serve for differences only.  Times of one runtime and
batch size are measured in one alternation of all networks, as relative to the original's, with an
interval of at least 95 %.  See `asv_benchmarks/intervals.py`.

A point dominates another one by more than the intervals if it is faster and more accurate, and
neither interval reaches equality.  The number of dominated points on medians alone is larger.

With --fits, fits and scores are kept in a folder: a second run measures times only.  Delete it
after a change to fits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch

from asv_benchmarks.baselines import UNIFORM, Chains, Method, Setting, baselines
from asv_benchmarks.benchmarks import net_data, nets, whole
from asv_benchmarks.intervals import Interval, Score, score_difference, time_ratio
from lowrank import compress, io
from lowrank.interop.torch import TorchModel
from lowrank.interop.torch.batches import run_model
from lowrank.interop.torch.runtimes import network_call
from lowrank.perfmodel.timing import time_calls

BLOCKS = 9  # of an alternation; the second and eighth ratio are an interval of 96 %
SAMPLE = 0.02  # seconds per network and round: as in a loop of its own, not after forty others
NETS = ("resnet20_cifar10", "caffe_cifar10_full")
RUNTIMES = ("lowrank", "onnxruntime")
BUDGETS = (0.8, 0.65, 0.55, 0.45)
SHARES = (0.67, 0.5, 0.4, 0.33, 0.25)
RELAXATIONS = (0.4, 0.6, 0.8, 1.0)
BY_TIME = "ours, by time"
JPEG = "test_jpeg_3000"


class Evaluation:
    """Test images of a network, and the value of each for a compressed network.

    Parameters
    ----------
    case : Case
        Trained network with its data.

    Attributes
    ----------
    sets : dict of str to (inputs, reference)
        Images by name of the set, and their labels, or the original's outputs.
    """

    def __init__(self, case: nets.Case) -> None:
        self.case = case
        _, self.peak = net_data.DRAWN.get(case.name, (None, None))
        inputs, labels = case.test()
        name = "test" if labels is None else "lossless"
        if labels is None:
            labels = nets.outputs(case.model, inputs)
            labels = labels if self.peak else labels.argmax(1)
        self.sets = {name: (inputs, labels)}
        if name == "lossless" and (net_data.folder() / "cifar10" / f"{JPEG}.npz").exists():
            self.sets["JPEG"] = net_data.cifar(case.name, JPEG)

    def values(self, model: torch.nn.Module) -> dict[str, np.ndarray]:
        """Return the value of each image by set: its share of correct labels, or squared error."""
        found = {}
        for name, (inputs, reference) in self.sets.items():
            out = nets.outputs(model, inputs)
            each = (out - reference).double() ** 2 if self.peak else out.argmax(1) == reference
            found[name] = each.double().reshape(len(inputs), -1).mean(1).numpy()
        return found

    @property
    def score(self) -> Score:
        """Score of a mean value: percent, or PSNR in dB."""
        if self.peak is None:
            return lambda mean: 100 * mean
        return lambda mean: 10 * np.log10(self.peak**2 / mean)


@dataclass
class Point:
    """A method at one value of its parameter, on all calibration seeds.

    Attributes
    ----------
    method, parameter : str
        Names.
    value : float
        Value of the parameter.
    chains : list of dict of str to Factorization
        Chains by layer, per seed.
    values : dict of str to ndarray, shape (seeds, images)
        Values of the test images by set.
    error : str
        Reason if the method cannot; empty otherwise.
    """

    method: str
    parameter: str
    value: float
    chains: list[Chains] = field(default_factory=list)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    error: str = ""

    @property
    def label(self) -> str:
        """Method and value."""
        return f"{self.method}, {self.parameter} {self.value:g}"


class Study:
    """Fits and scores of one network.

    Parameters
    ----------
    case : Case
        Trained network with its data.
    seeds : int
        Number of calibration seeds.
    folder : Path or None
        Folder in which fits are kept.
    """

    def __init__(self, case: nets.Case, seeds: int, folder: Path | None) -> None:
        self.case, self.folder, self.test = case, folder, Evaluation(case)
        self.settings = [
            Setting(TorchModel(case.model, case.calibration(s)), s) for s in range(seeds)
        ]
        self.layers = self.settings[0].net.layers
        self.dense = Point("original", "", 1.0)
        self._add(self.dense, [{}] * seeds, [self.test.values(case.model)] * seeds)

    def module(self, chains: Chains) -> torch.nn.Module:
        """Return the network with some layers replaced."""
        return self.settings[0].net.replaced(chains).eval()

    def macs_share(self, chains: Chains) -> float:
        """Return the MACs of a network relative to the original's."""

        def macs(kernels: Chains) -> int:
            convs = ((x, kernels.get(x.name, x.conv)) for x in self.layers)
            return sum(x.times * f.cost(x.input_size).macs for x, f in convs)

        return macs(chains) / macs({})

    def points(self, method: Method) -> list[Point]:
        """Return a method's points, fitted or read from the folder."""
        found = []
        for value in method.values:
            point = Point(method.name, method.parameter, value)
            chains, values = [], []
            for setting in self.settings:
                if chains and not method.uses_data:
                    chains.append(chains[0])
                    values.append(values[0])
                    continue
                print(f"  {self.case.name}: {point.label}, seed {setting.seed}", file=sys.stderr)
                try:
                    one = self._fit(method, value, setting)
                except ValueError as why:
                    point.error = str(why)
                    break
                chains.append(one[0])
                values.append(one[1])
            if not point.error:
                self._add(point, chains, values)
            found.append(point)
        return found

    def _add(self, point: Point, chains: list[Chains], values: list[dict[str, np.ndarray]]) -> None:
        point.chains = chains
        point.values = {name: np.stack([v[name] for v in values]) for name in self.test.sets}

    def _fit(
        self, method: Method, value: float, setting: Setting
    ) -> tuple[Chains, dict[str, np.ndarray]]:
        """Return chains and values of the test images; ValueError if the method cannot."""
        if self.folder is None:
            chains = dict(method.fit(setting, value))
            return chains, self.test.values(self.module(chains))
        words = f"{self.case.name} {method.name} {value:g} seed {setting.seed}"
        stem = self.folder / re.sub(r"[^\w.=]+", "-", words)
        fitted, scored = (Path(f"{stem}.{end}") for end in ("safetensors", "npz"))
        failed = Path(f"{stem}.txt")
        if failed.exists():
            raise ValueError(failed.read_text())
        if not fitted.exists():
            try:
                io.save(fitted, dict(method.fit(setting, value)))
            except ValueError as why:
                failed.write_text(str(why))
                raise
        chains = io.load(fitted)
        if not scored.exists():
            with io.atomic_write(scored) as part, open(part, "wb") as file:
                np.savez(file, **self.test.values(self.module(chains)))
        with np.load(scored) as stored:
            return chains, dict(stored)

    def difference(self, a: Point, b: Point, only: str = "") -> Interval:
        """Return the score of `b` minus that of `a`, over all images or those of one set."""
        names = [only] if only else list(self.test.sets)
        both = (np.hstack([p.values[name] for name in names]) for p in (a, b))
        return score_difference(*both, self.test.score, self.test.peak is None)

    def times(
        self, points: Sequence[Point], runtime: str, batch: int, threads: int, seconds: float
    ) -> list[np.ndarray]:
        """Return the seconds of points in every block: means over the seeds.

        Networks of equal families and ranks are measured once.
        """
        x, calls = whole.inputs(self.case, batch), {}
        for chains in (c for p in points for c in p.chains):
            key = _architecture(chains)
            if key not in calls:
                call = network_call(self.module(chains), x, runtime, threads, run_model)
                if call is None:
                    raise ValueError(f"{self.case.name} does not run on {runtime} as a whole")
                calls[key] = call
        every = list(calls.values())
        blocks = [time_calls(every, seconds, sample=SAMPLE) for _ in range(BLOCKS)]
        of = {key: np.array([b[i].seconds for b in blocks]) for i, key in enumerate(calls)}
        return [np.mean([of[_architecture(c)] for c in p.chains], 0) for p in points]


def _architecture(chains: Chains) -> tuple[Any, ...]:
    """Return what the time of a network depends on."""
    return tuple(
        (name, f.family, f.variant, f.rank, f.bias is None) for name, f in sorted(chains.items())
    )


def ours(runtime: str, batch: int, threads: int, budgets: Sequence[float]) -> Method:
    """Return our method with a budget of time on a runtime.

    Parameters
    ----------
    runtime : str
        Library that runs the network.
    batch, threads : int
        Examples per call and number of threads.
    budgets : sequence of float
        Shares of the original's time.

    Returns
    -------
    Method
    """

    def fit(setting: Setting, budget: float) -> Chains:
        return compress.compress_model(
            setting.net, seconds=budget, runtime=runtime, batch=batch, threads=threads,
            statistics=setting.statistics,
        ).chains  # fmt: skip

    name = f"{BY_TIME} on {runtime}, N = {batch}, threads = {threads}"
    return Method(name, "", "budget", tuple(budgets), fit)


def ours_by_macs(shares: Sequence[float]) -> Method:
    """Return our method with a budget of MACs."""

    def fit(setting: Setting, share: float) -> Chains:
        return compress.compress_model(
            setting.net, macs=share, statistics=setting.statistics
        ).chains

    return Method("ours, by MACs", "", "share", tuple(shares), fit)


class Pair(NamedTuple):
    """Comparison of two points.

    Attributes
    ----------
    better, worse : str
        Labels.
    time : Interval
        Time of the first relative to that of the second.
    score : Interval
        Score of the first minus that of the second.
    is_certain : bool
        Whether neither interval reaches equality.
    """

    better: str
    worse: str
    time: Interval
    score: Interval
    is_certain: bool


def dominating(
    study: Study, first: Sequence[Point], second: Sequence[Point], times: Mapping[str, np.ndarray]
) -> Iterator[Pair]:
    """Yield the pairs in which a point of `first` dominates one of `second` on medians.

    Parameters
    ----------
    study : Study
        Scores.
    first, second : sequence of Point
        Points that are compared, each with each.
    times : mapping of str to ndarray
        Seconds in every block by label.

    Yields
    ------
    Pair
    """
    for a in first:
        for b in second:
            ratio = time_ratio(times[b.label], times[a.label])
            if ratio.value < 1 and (score := study.difference(b, a)).value > 0:
                yield Pair(a.label, b.label, ratio, score, ratio.high < 1 and score.low > 0)


def table(
    study: Study, points: Sequence[Point], runtime: str, batch: int, threads: int, seconds: float
) -> dict[str, Any]:
    """Return the rows and verdicts of one runtime and batch size, as plain values."""
    usable = [study.dense, *(p for p in points if not p.error)]
    measured = study.times(usable, runtime, batch, threads, seconds)
    times = {p.label: t for p, t in zip(usable, measured, strict=True)}
    rows = [
        {"method": p.method, "value": p.value, "error": p.error}
        if p.error
        else row(study, p, times[p.label], times[study.dense.label])
        for p in (study.dense, *points)
    ]
    mine = [p for p in usable if p.method.startswith(BY_TIME)]
    theirs = [p for p in usable[1:] if not p.method.startswith("ours")]
    uniform = [p for p in theirs if p.method == UNIFORM]
    return {
        "net": study.case.name, "unit": study.case.unit, "runtime": runtime, "batch": batch,
        "threads": threads, "seeds": len(study.settings), "budgets": len(mine), "rows": rows,
        "baselines dominate ours": [p._asdict() for p in dominating(study, theirs, mine, times)],
        "ours dominates uniform": [p._asdict() for p in dominating(study, mine, uniform, times)],
    }  # fmt: skip


def row(study: Study, p: Point, seconds: np.ndarray, dense: np.ndarray) -> dict[str, Any]:
    """Return what is known of a point, with its times and the original's in every block."""
    first = next(iter(study.test.sets))
    median = float(np.median(seconds))
    found = {
        "method": p.method, "value": p.value,
        "macs": float(np.mean([study.macs_share(c) for c in p.chains])),
        "seconds": median,
        "spread": float(np.subtract(*np.quantile(seconds, (0.75, 0.25)))) / median,
        "time": time_ratio(dense, seconds),
    }  # fmt: skip
    if p is study.dense and study.test.peak:
        return found  # an infinite PSNR
    found["score"] = float(study.test.score(p.values[first].mean(1)).mean())
    if p is not study.dense and not study.test.peak:
        names = list(study.test.sets)
        each = [("", "all"), *((n, n) for n in names)] if len(names) > 1 else [("", names[0])]
        found |= {f"change, {n}": study.difference(study.dense, p, only) for only, n in each}
    return found


def lines_of(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a table: a head, one row per point, the verdicts."""
    yield (
        f"{found['net']} on {found['runtime']}, N = {found['batch']}, {found['threads']} thread(s),"
        f" {found['seeds']} seed(s); score: {found['unit']}"
    )
    yield (
        f"  {'method':24} {'value':>5} {'MACs':>5} {'ms':>8} {'spread':>6}  {'of the time':17} "
        f"{'score':>6}  change against the original"
    )
    for r in found["rows"]:
        method = BY_TIME if r["method"].startswith(BY_TIME) else r["method"]
        line = f"  {method:24} {r['value']:5.2f}"
        if "error" in r:
            yield f"{line} {r['error']}"
            continue
        line += f" {r['macs']:5.0%} {1e3 * r['seconds']:8.3f} {r['spread']:6.1%}"
        line += f"  {_text(r['time'], '.2f'):17} "
        line += f"{r['score']:6.2f}" if "score" in r else f"{'-':>6}"
        changes = [key for key in r if key.startswith("change")]
        line += "; ".join(f" {k.removeprefix('change, ')} {_text(r[k], '+.1f')}" for k in changes)
        yield line
    pairs = found["baselines dominate ours"]
    certain = [p for p in pairs if p["is_certain"]]
    yield (
        f"  pairs in which a baseline dominates ours, by more than the intervals: {len(certain)}; "
        f"on medians alone: {len(pairs)}"
    )
    for p in certain:
        yield (
            f"    {p['better']} dominates {p['worse']}: time {_text(p['time'], '.2f')}, "
            f"score {_text(p['score'], '+.1f')}"
        )
    counts = [
        len({p["better"] for p in found["ours dominates uniform"] if p["is_certain"] >= sure})
        for sure in (True, False)
    ]
    yield (
        f"  budgets at which ours dominates {UNIFORM}, by more than the intervals: {counts[0]} of "
        f"{found['budgets']}; on medians alone: {counts[1]}"
    )


def _text(interval: Interval, form: str) -> str:
    return f"{interval.value:{form}} ({interval.low:{form}}, {interval.high:{form}})"


def main() -> None:
    """Print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", nargs="+", default=NETS, help="names of networks, or parts")
    parser.add_argument("--runtime", nargs="+", default=RUNTIMES, help="runtimes")
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 64), help="batch sizes")
    parser.add_argument("--seeds", type=int, default=3, help="number of calibration seeds")
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS, help="shares of time")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="shares of MACs")
    parser.add_argument("--relaxations", nargs="+", type=float, default=RELAXATIONS, help="EVBMF")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one block of an alternation")
    parser.add_argument("--fits", type=Path, help="folder in which fits and scores are kept")
    parser.add_argument("--json", type=Path, help="file for the tables")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.fits:
        given.fits.mkdir(parents=True, exist_ok=True)
    methods = [ours_by_macs(given.shares), *baselines(given.shares, given.relaxations)]
    tables = []
    for case in (case for word in given.net for case in nets.cases(word)):
        study = Study(case, given.seeds, given.fits)
        points = [p for m in methods for p in study.points(m)]
        for runtime in given.runtime:
            for batch in given.batch:
                try:
                    mine = study.points(ours(runtime, batch, given.threads, given.budgets))
                    found = table(
                        study, [*mine, *points], runtime, batch, given.threads, given.seconds
                    )
                except (ImportError, ValueError) as why:  # not installed, or not on this network
                    print(f"{case.name} on {runtime}: {why}", flush=True)
                    continue
                tables.append(found)
                print("\n".join(lines_of(found)), flush=True)
                if given.json:
                    with io.atomic_write(given.json) as part:
                        part.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
