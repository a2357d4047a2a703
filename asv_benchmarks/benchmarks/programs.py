"""Whole networks on the engine beside onnxruntime and PyTorch; one image, one thread.

The architectures have random weights.  At half of its MACs every 3x3 convolution is a spatial SVD,
3x1 and 1x3, whatever commit chooses other chains: the rows show what a user of a compressed network
gains over the same chains, and over the untouched network, in another library.
"""

import math

from . import architectures, tables, whole
from .compat import MISSING, family_function, resolve
from .libraries import set_threads, torch

#: Constructor and input size.
NETWORKS = {
    "ResNet-20": (architectures.ResNet20, (32, 32)),
    "MobileNet 0.25": (architectures.mobilenet, (96, 96)),
    "style transfer": (architectures.style, (128, 128)),
    "ResNet-18": (architectures.resnet18, (224, 224)),
}
NO_CHAINS = ("MobileNet 0.25",)  # its 3x3 convolutions are depthwise
PEERS = ["onnxruntime", "PyTorch", "exact network, onnxruntime", "exact network, PyTorch"]
LIBRARIES = {"engine": "lowrank", "onnxruntime": "onnxruntime", "torch": "PyTorch"}


def halved(name):
    return f"{name}, half of its MACs"


NAMES = [f(n) for n in NETWORKS for f in (str, halved) if f is str or n not in NO_CHAINS]


def compress(model, x):
    """Return the network with spatial SVDs at half of the MACs of its 3x3 convolutions."""
    net, chains = resolve("interop.torch:TorchModel", "interop.torch:TorchNet")(model, [x]), {}
    for layer in net.layers:
        outputs, inputs, *kernel = layer.conv.stages[0].weight.shape
        if kernel == [3, 3] and inputs > 3:
            # 9 C D MACs per output; a chain has 3 (C + D) per rank.
            rank = round(1.5 * outputs * inputs / (outputs + inputs))
            chains[layer.name] = family_function("spatial_svd")(layer.conv, rank)
    return net.replaced(chains).eval()


def measure_network(name):
    """Return rows of seconds by library, each in its faster layout, measured interleaved."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    versions, x = {"exact": make().eval().requires_grad_(False)}, torch.rand(1, 3, *size)
    if name not in NO_CHAINS:
        versions["half"] = compress(versions["exact"], x)
    rows = {version: {} for version in versions}
    for key, seconds in whole.timings(versions, x, 1, 1.0).items():
        library, version, *_ = key.split()
        row, who = rows[version], LIBRARIES[library]
        row[who] = min(float(seconds), row.get(who, math.inf))
    exact = rows.pop("exact")
    found = {name: exact}
    for row in rows.values():
        found[halved(name)] = row | {
            f"exact network, {who}": exact[who] for who in exact if who != "lowrank"
        }
    return found


class Programs(tables.PeerRatios):
    """Times relative to other libraries."""

    params = (NAMES, PEERS)
    param_names = ["network", "peer"]

    def setup_cache(self):
        set_threads(1)
        table = {}
        for name in NETWORKS if torch is not None else ():
            try:
                table |= measure_network(name)
            except (*MISSING, NotImplementedError):
                continue
        return table

    setup_cache.timeout = 300


class ProgramTimes(tables.OwnTimes):
    """Absolute times."""

    params = (NAMES,)
    param_names = ["network"]
    setup_cache = Programs.setup_cache
