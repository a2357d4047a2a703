"""Output errors of fits in metrics: none (weights only), factored by modes, and full.

Layers of the digit network on its training images and, with LOWRANK_DATA and PyTorch, of ResNet-20
on calibration images.  Chains at a third of the MACs; the error is the relative RMS error of the
layer's output on other images.
"""

import sys
from dataclasses import replace

import numpy as np
import tables
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lowrank.families import FAMILIES
from lowrank.families.weighted import MetricFit
from lowrank.metric import Moments

CURVES = ("channel_svd output", "spatial_svd", "tucker")
SHARE = 1 / 3


def digits():
    """Yield (name, convolution, size, calibration inputs, test inputs)."""
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
    """Yield the same for every second 3 x 3 layer of ResNet-20."""
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


def metric_of(conv, x, **options):
    moments = Moments(conv, centred=False)
    moments.add(x)
    return moments.metric(**options)


def rows():
    for cases in (digits(), resnet()):
        for name, conv, size, fit, test in cases:
            conv = replace(conv, bias=None)
            metric = metric_of(conv, fit)
            judge = MetricFit(conv, metric_of(conv, test, damping=0.0))
            metrics = {"none": None, "factored": replace(metric, input_moment=None), "full": metric}
            for curve in CURVES:
                (f,) = tables.fits_within(conv, size, curve, [SHARE])
                for label, m in metrics.items():
                    g = FAMILIES[f.family].fit(conv, f.rank, f.variant, metric=m) if m else f
                    yield (name, curve, label, f"{metric.distance:.4f}",
                           f"{g.error(conv.to_dense()):.4f}",
                           f"{judge.error(g.stages):.4f}")  # fmt: skip


def main(target):
    header = ["layer", "family", "metric", "distance", "kernel_error", "output_error"]
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
