"""Recover compressed networks without labels, and print their scores.

    LOWRANK_DATA=... python -m asv_benchmarks.recovery [--net WORD] [--budget WORD] [--minutes M]
        [--threads N]

Networks and data are in the folder LOWRANK_DATA.  A row is a network and its budget, of MACs or of
time: the scores of the original, of the compressed and of the trained network, and the report of
the training with default settings.  ResNet-20 and cifar10_full train on 2,000 images; a second line
has their accuracy on 3,000 JPEG images, which is lower but less noisy.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from asv_benchmarks.benchmarks import nets
from asv_benchmarks.benchmarks.net_data import DRAWN, cifar
from lowrank.interop.torch import compress, distill

#: Networks and their budgets.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("resnet20_cifar10", {"macs": 1 / 3}),
    ("resnet20_cifar10", {"macs": 1 / 5}),
    ("resnet20_cifar10", {"seconds": 0.65, "runtime": "onnxruntime", "threads": 1}),
    ("resnet20_cifar10", {"seconds": 0.7, "runtime": "lowrank", "threads": 1}),
    ("caffe_cifar10_full", {"macs": 1 / 3}),
    ("kws_cnn_l", {"macs": 1 / 3}),
    ("crepe_tiny_1d", {"macs": 1 / 2}),
    ("faststyle_udnie", {"macs": 1 / 2}),
)
#: Largest permitted loss in points, by network and budget.
TARGETS = {
    ("resnet20_cifar10", "33% of the macs"): 0.5,
    ("resnet20_cifar10", "20% of the macs"): 2.5,
    ("resnet20_cifar10", "65% of the seconds in onnxruntime"): 0.5,
    ("resnet20_cifar10", "70% of the seconds in lowrank"): 0.5,
}
SEEDS = 8  # of drawn inputs


def unlabelled(case: nets.Case) -> list[Any]:
    """Return the training inputs of a network."""
    if case.name in DRAWN:
        drawn = torch.cat([x for seed in range(SEEDS) for x in case.calibration(seed)])
        return list(drawn.unique(dim=0).split(64))
    return list(cifar(case.name, "calibration_lossless_2000")[0].split(64))


def budget_text(budget: dict[str, Any]) -> str:
    """Return a budget as text."""
    axis, share = next(iter(budget.items()))
    where = f" in {budget['runtime']}" if "runtime" in budget else ""
    return f"{share:.0%} of the {axis}{where}"


def row(case: nets.Case, budget: dict[str, Any], minutes: float) -> list[str]:
    """Return the lines of a network within a budget."""
    model = case.model.requires_grad_(True)
    small = compress(model, case.calibration(0), **budget).model
    result = distill(small, model, unlabelled(case), minutes=minutes)
    three = model, small, result.model
    original, before, after = (case.score(m) for m in three)
    text = budget_text(budget)
    scores = f"{original:8.2f} {before:8.2f} {after:8.2f} {case.unit}"
    lines = [f"{case.name}, {text}: {result}", f"{'':25} {scores}"]
    target = TARGETS.get((case.name, text))
    if target is not None:
        met = "met" if original - after <= target else "MISSED"
        lines[-1] += f" (at most {target} points below the original: {met})"
    if case.name not in DRAWN:
        images, labels = cifar(case.name, "test_jpeg_3000")
        scores = " ".join(f"{nets.top1(m, images, labels):8.2f}" for m in three)
        lines.append(f"{'':25} {scores} % top-1, 3,000 JPEG images")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="", help="part of a name")
    parser.add_argument("--budget", default="", help="part of a budget, such as 'seconds'")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, budget in CASES:
        if given.net in name and given.budget in budget_text(budget):
            for case in nets.cases(name):
                print(*row(case, budget, given.minutes), sep="\n", flush=True)


if __name__ == "__main__":
    main()
