"""What a fit gains from the second moments of its inputs: none, factored by modes, and whole.

Layers of the digit network on the images that it was trained on, and of ResNet-20 on calibration
images where LOWRANK_DATA and PyTorch are there.  Chains at a third of the multiply-adds; the
error is that of the layer's outputs on other images, relative and in the root mean square.
"""

import sys
from dataclasses import replace

import numpy as np
import tables
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lowrank
from lowrank.families import FAMILIES
from lowrank.families.weighted import Weighted
from lowrank.metric import Moments

CHAINS = ("channel_svd", "spatial_svd", "tucker")
SHARE = 1 / 3


def digits():
    """(name, convolution, size, inputs to fit to, others)"""
    images = (load_digits().data / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    found = {x.name: x for x in tables.digits()}
    seen = []
    for x in train_test_split(images, test_size=0.25, random_state=0):
        x = np.maximum(found["conv1"].conv(x), 0)
        y = np.maximum(found["conv2"].conv(x), 0)
        n, c, h, w = y.shape
        seen.append({"conv2": x, "conv3": y.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))})
    for name in seen[0]:
        layer = found[name]
        yield f"digits {name}", layer.conv, layer.input_size, *(s[name] for s in seen)


def resnet():
    """The same, of every second 3 x 3 layer."""
    if tables.folder() is None:
        return
    try:
        from asv_benchmarks.benchmarks import nets
        from lowrank.interop.torch import TorchModel
    except ImportError:
        print("metrics: PyTorch is missing (pip install --group bench); ResNet-20 is left out")
        return
    (case,) = nets.cases("resnet20")
    batches = [TorchModel(case.model, case.calibration(seed)) for seed in (0, 1)]
    for layer in batches[0].layers[2:-1:2]:
        if layer.conv.ndim == 2:
            seen = [
                np.concatenate(
                    [x for batch in net.inputs([layer.name], {}) for x in batch[layer.name]]
                )
                for net in batches
            ]
            yield f"ResNet-20 {layer.name}", layer.conv, layer.input_size, *seen


def moments(conv, x, **options):
    found = Moments(conv, centred=False)
    found.add(x)
    return found.metric(**options)


def rows():
    for cases in (digits(), resnet()):
        for name, conv, size, fit, test in cases:
            conv = replace(conv, bias=None)
            seen, judge = moments(conv, fit), moments(conv, test, ridge=0.0)
            for family in CHAINS:
                plain = lowrank.approximate(conv, size, macs=SHARE, families=[family])
                there = Weighted(conv, seen, family, plain.variant)
                apart = Weighted(conv, replace(seen, inputs=None), family, plain.variant)
                ways = {
                    "none": plain.stages,
                    "factored": apart.at(plain.rank),
                    "whole": there.refined(there.at(plain.rank))[0],
                }
                for way, stages in ways.items():
                    f = replace(plain, stages=stages)
                    error = Weighted(conv, judge, family, plain.variant).error(stages)
                    yield (name, family, way, f"{seen.distance:.4f}",
                           f"{f.error(conv.to_dense()):.4f}", f"{error:.4f}")  # fmt: skip


def main(target):
    assert set(CHAINS) <= set(FAMILIES)
    header = ["layer", "family", "metric", "distance", "kernel_error", "output_error"]
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
