"""Which layers of ResNet-20 bear separation: one at a time, the others left as they are.

Each 3 x 3 layer is replaced by its best two passes within a third of its multiply-adds, by its
kernel alone. Top-1 on 500 images, and the error of the kernel and of the network's outputs,
relative in the root mean square; in float32, where the change of single answers counts 0.2
points.
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

    whole = outputs(case.model)
    energy = np.square(whole - whole.mean(0)).sum()
    right = 100 * np.mean(whole.argmax(1) == labels)
    for i, x in enumerate(x for x in net.layers if x.conv.ndim == 2):
        f = lowrank.approximate(x.conv, x.input_size, macs=1 / 3, families=["spatial_svd"])
        found = outputs(net.replaced({x.name: f}))
        off = np.sqrt(np.square(found - whole).sum() / energy)
        lost = right - 100 * np.mean(found.argmax(1) == labels)
        yield i, x.name, f"{f.error(x.conv.to_dense()):.4f}", f"{off:.4f}", f"{lost:.1f}"


def main(target):
    tables.needed_folder()
    tables.peers().set_num_threads(1)
    from asv_benchmarks.benchmarks import nets

    (case,) = nets.cases("resnet20")
    tables.write(target, ["number", "layer", "kernel_error", "output_error", "lost"], rows(case))


if __name__ == "__main__":
    main(sys.argv[1])
