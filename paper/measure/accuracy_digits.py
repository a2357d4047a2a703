"""Top-1 accuracy of the digit network against its MACs and its measured time.

Methods with the same budgets, without fine-tuning: a uniform rank share per layer (spatial SVD or
Tucker-2, weights only); families and ranks optimised over all layers, weights only; and optimised
and fitted layer by layer on the training images.  Times are of the whole network on 64 images,
one thread, interleaved with the dense network.
"""

import sys

import numpy as np
import tables
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from asv_benchmarks.benchmarks.timing import measure_seconds
from lowrank import compress, demo
from lowrank.compress import Layer
from lowrank.interop.weights import WeightsModel, read_weights

SHARES = (0.67, 0.5, 0.33, 0.25, 0.17, 0.1)
UNIFORM = ("spatial_svd", "tucker")
SECONDS, BATCH = 0.4, 64


class DigitNet:
    """The digit network with its training images, as a model for :mod:`lowrank.compress`."""

    def __init__(self, images, weights):
        self.images, self.weights, self.batches = images, weights, 1
        self.dense = {x.name: x for x in tables.digits()}
        self.layers = tuple(Layer(x.name, x.conv, x.input_size) for x in self.dense.values())

    def with_chains(self, chains):
        return {x.name: x.conv for x in self.dense.values()} | dict(chains)

    def inputs(self, names, chains):
        f, x, seen = self.with_chains(chains), self.images, {"conv1": (self.images,)}
        x = np.maximum(f["conv1"](x), 0)
        seen["conv2"] = (x,)
        x = np.maximum(f["conv2"](x), 0)
        n, c, h, w = x.shape
        seen["conv3"] = (x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5)),)
        yield {name: seen[name] for name in names}

    def gradients(self, names, seed):
        return None

    def outputs(self, chains):
        yield (demo.forward(self.with_chains(chains), self.weights, self.images),)

    def replaced(self, chains):
        return DigitNet(self.images, self.weights)


def runner(chains, x, weights):
    """Return a call of the whole network with ReLUs fused into the convolutions."""
    size = {"conv1": (8, 8), "conv2": (8, 8), "conv3": (4, 4)}
    first, second, third = (
        chains[name].compile((chains[name].in_channels, *n), np.float32, threads=1,
                             activation="relu")
        for name, n in size.items()
    )  # fmt: skip

    def call():
        y = second(first(x))
        rows = np.maximum(y[..., ::2, :], y[..., 1::2, :])
        y = third(np.maximum(rows[..., ::2], rows[..., 1::2]))
        return y.mean((2, 3)) @ weights["linear.weight"].T + weights["linear.bias"]

    return call


def rows():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    fit, x, _, y = train_test_split(images, labels, test_size=0.25, random_state=0)
    weights = read_weights(demo.WEIGHTS)
    net, blind = DigitNet(fit, weights), WeightsModel(demo.WEIGHTS)
    dense = net.with_chains({})
    total = sum(layer.cost.macs for layer in net.layers)
    statistics, weights_only = compress.LayerStatistics(net), compress.LayerStatistics(blind)
    methods = {
        f"uniform {f}": lambda share, f=f: tables.uniform(net.layers, f, share) for f in UNIFORM
    }
    methods["optimised, weights only"] = lambda share: (
        compress.compress_model(blind, macs=share, statistics=weights_only).chains
    )
    methods["optimised, on data"] = lambda share: (
        compress.compress_model(net, macs=share, statistics=statistics).chains
    )
    few = x[:BATCH]
    dense_call = runner(dense, few, weights)
    yield "dense", "1.0000", f"{demo.accuracy(dense, weights, x, y):.4f}", "1.000", "0"
    for method, compressed in methods.items():
        for share in SHARES:
            try:
                chains = net.with_chains(compressed(share))
            except ValueError:  # budget infeasible
                continue
            macs = sum(chains[k.name].cost(k.input_size).macs for k in net.layers)
            accuracy = demo.accuracy(chains, weights, x, y)
            seconds, dense_seconds = measure_seconds(
                [runner(chains, few, weights), dense_call], SECONDS
            )
            spread = tables.spread(seconds, dense_seconds)
            time = f"{seconds / dense_seconds:.3f}"
            yield method, f"{macs / total:.4f}", f"{accuracy:.4f}", time, spread


def main(target):
    tables.write(target, ["method", "macs", "accuracy", "seconds", "spread"], rows())


if __name__ == "__main__":
    main(sys.argv[1])
