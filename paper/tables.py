"""What the measuring scripts share: how a table is written, whose layers, and how calls are timed.

Weights of others lie in the folder that the environment variable LOWRANK_DATA names. A script
that cannot measure here says why and leaves the committed table as it is.
"""

import csv
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin take each other's cores

import lowrank
from lowrank import demo
from lowrank.interop.weights import layers

#: Nets of others by the name that figures give them, in the order in which they stand there.
NETS = {
    "ResNet-20": "resnet20_cifar10",
    "cifar10_full": "caffe_cifar10_full",
    "style": "faststyle_udnie",
    "SRCNN": "srcnn_955",
    "ESPCN": "espcn_x3",
    "CNN-L": "kws_cnn_l",
    "CREPE (1-D)": "crepe_tiny_1d",
    "MeshNet (3-D)": "meshnet3d_model20chan3cls",
}


def write(target, header, rows):
    """A table, row by row: what is there already is seen while the rest is measured."""
    with open(target, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        for row in rows:
            table.writerow(row)
            file.flush()


def skip(why):
    """Leave the table as it was committed."""
    name = Path(sys.argv[0]).stem
    print(f"{name}: not measured, {why}; the table data/{name}.csv stays as it is")
    sys.exit()


def folder():
    """Where weights and data of others are, or None."""
    found = os.environ.get("LOWRANK_DATA")
    return Path(found) if found else None


def needed_folder():
    return folder() or skip("LOWRANK_DATA names no folder with the trained networks")


def digits():
    """Layers of the network that comes with the library."""
    return layers(demo.WEIGHTS)


def trained(name, only=None):
    """Layers of a net of NETS, or of the digit network; none, and a word, without data."""
    if name == "digits":
        return [x for x in digits() if only in (None, x.name)]
    path = folder() / "weights" / f"{NETS[name]}.safetensors" if folder() else None
    if path is None or not path.exists():
        where = f"there is no {path}" if path else "LOWRANK_DATA names no folder"
        print(f"{Path(sys.argv[0]).stem}: rows of {name} are left out, {where}")
        return []
    return layers(path, only=only)


def calibrated():
    """The machine, if its rates were measured."""
    here = lowrank.perfmodel.current()
    return here if here.calibrated else skip("this machine is not calibrated (lowrank calibrate)")


def uniform(layers, family, share):
    """What is commonly done: one share of rank for every layer but the first, by kernels alone.

    The share of a layer's multiply-adds that it takes, were the stride 1.
    """
    return {x.name: _cut(x.conv, family, share) for x in layers[1:] if x.conv.ndim == 2}


def _cut(conv, family, share):
    t, s, *taps = conv.to_dense().shape
    dense = share * t * s * math.prod(taps)
    if family == "spatial_svd":
        return lowrank.spatial_svd(conv, max(1, round(dense / (s * taps[0] + t * taps[1]))), "h-w")
    # Tucker's ranks at one share of both channels: a quadratic equation
    a, b = t * s * math.prod(taps), s * s + t * t
    part = (math.sqrt(b * b + 4 * a * dense) - b) / (2 * a)
    return lowrank.tucker(conv, (max(1, round(part * t)), max(1, round(part * s))))


def peers():
    """PyTorch, or the word that it is missing."""
    try:
        import torch
    except ImportError:
        skip("PyTorch is missing (pip install --group bench)")
    return torch
