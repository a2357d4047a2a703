"""Shared code of the measurement scripts: tables, layers of trained networks, fits.

Third-party weights are read from the folder that the environment variable LOWRANK_DATA names.  A
script that cannot measure on this machine prints the reason and keeps the committed table.
"""

import csv
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

# Spinning threads would take the cores of the library that is timed next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import lowrank
from lowrank import demo
from lowrank.families import NotApplicable
from lowrank.interop.weights import layers

#: File names of third-party networks by label, in the order of the figures.
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
    """Write a table row by row, so that finished rows are visible during the measurement."""
    with open(target, "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        for row in rows:
            table.writerow(row)
            file.flush()


def spread(*times):
    """Return the largest half-width of the times' intervals, relative to the medians, as text."""
    return f"{max(t.spread for t in times if t):.3f}"


def skip(reason):
    """Print the reason and exit; the committed table stays."""
    name = Path(sys.argv[0]).stem
    print(f"{name}: not measured, {reason}; the table data/{name}.csv stays as it is")
    sys.exit()


def folder():
    """Return the folder with third-party weights and data, or None."""
    path = os.environ.get("LOWRANK_DATA")
    return Path(path) if path else None


def required_folder():
    """Return the folder with third-party data; skip the script without it."""
    return folder() or skip("LOWRANK_DATA names no folder with the trained networks")


def digits():
    """Return the layers of the shipped digit network."""
    return layers(demo.WEIGHTS)


def trained(name, only=None):
    """Return the layers of a network of NETS or of the digit network; none without data."""
    if name == "digits":
        return [x for x in digits() if only in (None, x.name)]
    path = folder() / "weights" / f"{NETS[name]}.safetensors" if folder() else None
    if path is None or not path.exists():
        where = f"there is no {path}" if path else "LOWRANK_DATA names no folder"
        print(f"{Path(sys.argv[0]).stem}: rows of {name} are left out, {where}")
        return []
    return layers(path, only=only)


def calibrated():
    """Return this machine's performance model; skip the script if it is not calibrated."""
    machine = lowrank.perfmodel.current()
    return (
        machine
        if machine.calibrated
        else skip("this machine is not calibrated (lowrank calibrate)")
    )


def uniform(layers, family, share):
    """Return chains at one share of MACs (at stride 1) for every layer but the first.

    This is common practice: one rank share for all layers, weights only.
    """
    return {x.name: _cut(x.conv, family, share) for x in layers[1:] if x.conv.ndim == 2}


def _cut(conv, family, share):
    t, s, *taps = conv.to_dense().shape
    dense = share * t * s * math.prod(taps)
    if family == "spatial_svd":
        return lowrank.spatial_svd(conv, max(1, round(dense / (s * taps[0] + t * taps[1]))), "h-w")
    # Equal shares of both channel ranks solve a quadratic equation.
    a, b = t * s * math.prod(taps), s * s + t * t
    rank_share = (math.sqrt(b * b + 4 * a * dense) - b) / (2 * a)
    return lowrank.tucker(conv, (max(1, round(rank_share * t)), max(1, round(rank_share * s))))


def require_torch():
    """Return PyTorch; skip the script if it is missing."""
    try:
        import torch
    except ImportError:
        skip("PyTorch is missing (pip install --group bench)")
    return torch


def fits_within(conv, size, curve, shares):
    """Return the chains with the smallest errors within shares of the MACs, without repeats.

    `curve` is a family, or a family and a variant: ``"channel_svd output"``.
    """
    name, _, variant = curve.partition(" ")
    limits = [share * conv.cost(size).macs for share in shares]
    try:
        if not variant:
            front = lowrank.frontier(conv, size, [name], axis="macs")
            picks = dict.fromkeys(front.affordable(x) for x in limits if front[0].cost.macs <= x)
            return [c.build() for c in picks if c.family == name]
        family = lowrank.FAMILIES[name]
        points = list(family.sweep(conv, variant)) if variant in family.variants(conv) else []
    except NotApplicable:
        return []
    macs = {p.rank: replace(conv, stages=p.stages).cost(size).macs for p in points}
    within = [[p for p in points if macs[p.rank] <= x] for x in limits]
    ranks = dict.fromkeys(min(some, key=lambda p: p.error).rank for some in within if some)
    return [family.fit(conv, rank, variant) for rank in ranks]
