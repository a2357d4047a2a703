"""Separability of trained layers by depth, in trained networks of other authors.

For every layer with taps along an axis: the share of the full rank that a relative error of 20 %
takes, for {si|tj} (spatial SVD; 2-D and 3-D layers) and {s|tij} (channel SVD), and the error of
one depthwise filter per channel (network decoupling at rank 1).  The `_noise` columns have the
values of an i.i.d. normal kernel of the same shape.
"""

import sys
from dataclasses import replace

import numpy as np
import tables

import lowrank
from lowrank.families import FAMILIES, NotApplicable

ERROR = 0.2


def needed(conv, family, variant=None):
    """Return the share of the full rank that ERROR takes; "" if the family does not apply."""
    try:
        variants = FAMILIES[family].variants(conv)
    except NotApplicable:
        return ""
    if variant not in (None, *variants):
        return ""
    points = list(FAMILIES[family].sweep(conv, variant or variants[0]))
    full = max(p.rank[0] for p in points)
    return f"{min(p.rank[0] for p in points if p.error <= ERROR or p.rank[0] == full) / full:.4f}"


def depthwise(conv):
    try:
        return f"{lowrank.network_decoupling(conv, 1).error(conv.to_dense()):.4f}"
    except (NotApplicable, ValueError):
        return ""


def noise(conv):
    """Return the layer with i.i.d. normal weights."""
    rng = np.random.default_rng(0)
    stage = conv.stages[0]
    weight = rng.standard_normal(stage.weight.shape).astype(np.float32)
    return replace(conv, stages=(replace(stage, weight=weight),))


def rows():
    for net in ("digits", *tables.NETS):
        some = [
            x
            for x in tables.trained(net)
            if max(x.conv.stages[0].kernel) > 1 and x.conv.groups == 1
        ]
        for i, layer in enumerate(some):
            conv = layer.conv
            random = noise(conv)
            depth = i / max(len(some) - 1, 1)
            taps = "x".join(map(str, conv.stages[0].kernel))
            yield (net, i, f"{depth:.4f}", layer.name, conv.out_channels, conv.in_channels, taps,
                   needed(conv, "spatial_svd"), needed(random, "spatial_svd"),
                   needed(conv, "channel_svd", "input"),
                   needed(random, "channel_svd", "input"),
                   depthwise(conv), depthwise(random))  # fmt: skip


def main(target):
    header = ["net", "number", "depth", "layer", "out", "in", "taps", "spatial", "spatial_noise",
              "channels", "channels_noise", "depthwise", "depthwise_noise"]  # fmt: skip
    tables.write(target, header, rows())


if __name__ == "__main__":
    main(sys.argv[1])
