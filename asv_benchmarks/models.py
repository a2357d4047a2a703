"""Compress trained networks within budgets: accuracy, time to compress, speed.

    LOWRANK_DATA=... python -m asv_benchmarks.models [--net WORD] [--seeds N] [--json] [--no-speed]

Networks and data are in the folder LOWRANK_DATA.  Default settings for all, no fine-tuning.  A row
is a network and a share of its MACs: the score of the original and the median over calibration
seeds; for classifiers also the paired difference on the test images with its 95 % interval, for the
median seed.  Then times of the whole forward pass, medians of interleaved runs with folded batch
norms: the dense and the compressed network in PyTorch's better layout and on lowrank's engine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from asv_benchmarks.benchmarks import nets, whole
from lowrank.compress import NothingToCompressError
from lowrank.interop.torch import compress

SHARES = (1 / 2, 1 / 3)
#: Largest permitted loss in points, by network and inverse share.
TARGETS = {
    ("resnet20_cifar10", 2): 1.5,
    ("resnet20_cifar10", 3): 3.0,
    ("caffe_cifar10_full", 2): 1.0,
    ("caffe_cifar10_full", 3): 3.5,
}
#: Timed networks and batch sizes.
TIMED = {"resnet20_cifar10": (1, 64), "faststyle_udnie": (1,)}
MINUTE = 60.0  # limit of the time to compress ResNet-20, in seconds
FASTER = 1.6  # target speed-up over PyTorch's dense network at half the MACs


def correct_predictions(model: torch.nn.Module, case: nets.Case) -> torch.Tensor | None:
    """Return 1 per correctly classified test image, else 0; None without labels."""
    images, labels = case.test()
    if labels is None:
        return None
    with torch.inference_mode():
        found = torch.cat([model(x).argmax(1) for x in images.split(250)])
    return (found == torch.as_tensor(labels)).float()


def paired(case: nets.Case, small: torch.nn.Module) -> tuple[float, float] | None:
    """Return the change in points and half the width of its 95 % interval."""
    before, after = correct_predictions(case.model, case), correct_predictions(small, case)
    if before is None or after is None:
        return None
    change = 100 * (after - before)
    return float(change.mean()), 1.96 * float(change.std()) / math.sqrt(len(change))


def row(
    case: nets.Case, share: float, seeds: int, threads: int, speed: bool, **options: Any
) -> dict[str, Any]:
    found = []
    for seed in range(seeds):
        begin = time.perf_counter()
        try:
            small = compress(case.model, case.calibration(seed), macs=share, seed=seed, **options)
        except (NothingToCompressError, ValueError) as error:
            return {"net": case.name, "asked": share, "share": share, "error": str(error)}
        took = time.perf_counter() - begin
        found.append((case.score(small.model), took, small))
    found.sort(key=lambda f: f[0])
    score, _, small = found[(len(found) - 1) // 2]
    macs, dense_macs = small.plan.total("macs")
    result = {
        "net": case.name,
        "unit": case.unit,
        "asked": share,
        "share": macs / dense_macs,
        "original": case.score(case.model),
        "score": score,
        "scores": [f[0] for f in found],
        "paired": paired(case, small.model),
        "took": statistics.median(f[1] for f in found),
        "families": sorted({e.family for e in small.plan.layers.values()}),
    }
    if speed:
        for batch in TIMED.get(case.name, ()):
            both, x = {"dense": case.model, "compressed": small.model}, whole.inputs(case, batch)
            result[f"seconds, N = {batch}"] = whole.timings(both, x, threads)
    return result


def lines_of(r: dict[str, Any]) -> Iterator[str]:
    if "error" in r:
        yield f"{r['net']:26} {r['share']:5.0%}  {r['error']}"
        return
    line = (
        f"{r['net']:26} {r['share']:5.0%} {r['original']:8.2f} {r['score']:8.2f} {r['unit']:18} "
        f"{r['took']:6.1f} s"
    )
    if r["paired"]:
        line += f"  {r['paired'][0]:+.2f} +- {r['paired'][1]:.2f} points"
        target = TARGETS.get((r["net"], round(1 / r["asked"])))
        if target is not None:
            lost = r["original"] - r["score"]
            line += f" (at most {target} lost: {'met' if lost <= target else 'MISSED'})"
    if r["net"] == "resnet20_cifar10":
        line += f" (at most {MINUTE:.0f} s: {'met' if r['took'] <= MINUTE else 'MISSED'})"
    yield line
    for key, times in r.items():
        if key.startswith("seconds"):
            best = min(t for name, t in times.items() if name.startswith("torch dense"))
            each = ", ".join(f"{name} {1e3 * t:.2f}" for name, t in times.items())
            gain = best / times["engine compressed"]
            line = f"{'':10}{key[9:]}: {each} ms; {gain:.2f} x PyTorch's dense"
            if round(1 / r["asked"]) == 2:
                line += f" ({FASTER}: {'met' if gain >= FASTER else 'MISSED'})"
            yield line


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="", help="part of a name")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--loss", default="projections", help="projections or labels")
    parser.add_argument("--no-gradients", action="store_true")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--families", help="comma-separated names")
    parser.add_argument("--seconds", type=float, help="also a share of the predicted time")
    parser.add_argument("--batch", type=int, default=1, help="batch size of predicted times")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = {
        "loss": given.loss,
        "gradients": not given.no_gradients,
        "refit": given.refit,
        "passes": given.passes,
    }
    if given.families:
        options["families"] = given.families.split(",")
    if given.seconds:
        options |= {"seconds": given.seconds, "batch": given.batch, "threads": given.threads}
    found = []
    for case in nets.cases(given.net):
        for share in SHARES:
            r = row(case, share, given.seeds, given.threads, not given.no_speed, **options)
            found.append(r)
            if not given.json:
                for line in lines_of(r):
                    print(line, flush=True)
    if given.json:
        json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
