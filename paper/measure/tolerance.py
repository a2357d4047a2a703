"""Loss in top-1 from separating one layer of ResNet-20 at a time.

Each 3 x 3 layer is replaced by its best spatial SVD within a third of its MACs (weights only).
Top-1 on 500 images, where one image counts 0.2 percentage points, and the relative RMS errors of
the kernel and of the network output, in float32.
"""

import sys

import numpy as np
import tables

import lowrank


def rows(case):
    import torch

    from lowrank.interop.torch import TorchModel

    net = TorchModel(case.model, case.calibration(0))
    images, labels = case.test()
    labels = np.asarray(labels)

    def outputs(model):
        with torch.inference_mode():
            return np.concatenate([model(x).numpy() for x in images.split(250)])

    original = outputs(case.model)
    energy = np.square(original - original.mean(0)).sum()
    accuracy = 100 * np.mean(original.argmax(1) == labels)
    for i, x in enumerate(x for x in net.layers if x.conv.ndim == 2):
        f = lowrank.approximate(x.conv, x.input_size, macs=1 / 3, families=["spatial_svd"])
        found = outputs(net.replaced({x.name: f}))
        output_error = np.sqrt(np.square(found - original).sum() / energy)
        lost = accuracy - 100 * np.mean(found.argmax(1) == labels)
        yield i, x.name, f"{f.error(x.conv.to_dense()):.4f}", f"{output_error:.4f}", f"{lost:.1f}"


def main(target):
    tables.required_folder()
    tables.require_torch().set_num_threads(1)
    from asv_benchmarks.benchmarks import nets

    (case,) = nets.cases("resnet20")
    tables.write(target, ["number", "layer", "kernel_error", "output_error", "lost"], rows(case))


if __name__ == "__main__":
    main(sys.argv[1])
