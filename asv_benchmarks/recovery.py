"""Recover compressed networks without labels, and print their scores.

    LOWRANK_DATA=... python -m asv_benchmarks.recovery [--net WORD] [--minutes M] [--threads N]

Networks and data are in the folder LOWRANK_DATA.  A row is a network and a share of its MACs: the
scores of the original, of the compressed and of the trained network, and the report of the
training with default settings.  ResNet-20 and cifar10_full train on 2,000 images; a second line
has their accuracy on 3,000 JPEG images, which is lower but less noisy.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from asv_benchmarks.benchmarks import nets
from asv_benchmarks.benchmarks.net_data import DRAWN, cifar
from lowrank.interop.torch import compress, distill

CASES = (
    ("resnet20_cifar10", 1 / 3),
    ("resnet20_cifar10", 1 / 5),
    ("caffe_cifar10_full", 1 / 3),
    ("kws_cnn_l", 1 / 3),
    ("crepe_tiny_1d", 1 / 2),
    ("faststyle_udnie", 1 / 2),
)
#: Largest permitted loss in points, by network and inverse share.
TARGETS = {("resnet20_cifar10", 3): 0.5, ("resnet20_cifar10", 5): 2.5}
SEEDS = 8  # of drawn inputs


def unlabelled(case: nets.Case) -> list[Any]:
    """Return the training inputs of a network."""
    if case.name in DRAWN:
        drawn = torch.cat([x for seed in range(SEEDS) for x in case.calibration(seed)])
        return list(drawn.unique(dim=0).split(64))
    return list(cifar(case.name, "calibration_lossless_2000")[0].split(64))


def row(case: nets.Case, share: float, minutes: float) -> list[str]:
    """Return the lines of a network at a share of its MACs."""
    model = case.model.requires_grad_(True)
    small = compress(model, case.calibration(0), macs=share).model
    result = distill(small, model, unlabelled(case), minutes=minutes)
    three = model, small, result.model
    original, before, after = (case.score(m) for m in three)
    line = (
        f"{case.name:20} {share:4.0%} {original:8.2f} {before:8.2f} {after:8.2f} {case.unit:16} "
        f"{result}"
    )
    target = TARGETS.get((case.name, round(1 / share)))
    if target is not None:
        met = "met" if original - after <= target else "MISSED"
        line += f" (at most {target} points below the original: {met})"
    lines = [line]
    if case.name not in DRAWN:
        images, labels = cifar(case.name, "test_jpeg_3000")
        scores = " ".join(f"{nets.top1(m, images, labels):8.2f}" for m in three)
        lines.append(f"{'':25} {scores} % top-1, 3,000 JPEG images")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="", help="part of a name")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, share in CASES:
        if given.net in name:
            for case in nets.cases(name):
                print(*row(case, share, given.minutes), sep="\n", flush=True)


if __name__ == "__main__":
    main()
