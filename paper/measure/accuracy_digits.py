"""Right answers of the digit network against its multiply-adds and its measured seconds.

Ways to spend the same budget, nothing trained after: one share of rank for every layer, of the
passes along the axes or of Tucker's form, fitted to the kernels alone; layers and families chosen
together, on the kernels alone; and chosen and fitted on the images that the network was trained
on, layer after layer. Seconds are those of the whole network on 64 images, one thread, in turns
with the dense one.
"""

import sys

import numpy as np
import tables
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from asv_benchmarks.benchmarks.measure import measured
from lowrank import compress, demo
from lowrank.compress import Layer
from lowrank.interop.weights import WeightsModel, read_weights

SHARES = (0.67, 0.5, 0.33, 0.25, 0.17, 0.1)
UNIFORM = ("spatial_svd", "tucker")
SECONDS, BATCH = 0.4, 64


class DigitNet:
    """The network with its training images: what `lowrank.compress` asks of a net."""

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
    """A call of the whole network, its convolutions planned with the ReLUs behind them."""
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
    whole = sum(layer.cost.macs for layer in net.layers)
    seen, unseen = compress.Measured(net), compress.Measured(blind)
    ways = {
        f"uniform {f}": lambda share, f=f: tables.uniform(net.layers, f, share) for f in UNIFORM
    }
    ways["chosen, kernels alone"] = lambda share: (
        compress.compress_model(blind, macs=share, measured=unseen).chains
    )
    ways["chosen, on data"] = lambda share: (
        compress.compress_model(net, macs=share, measured=seen).chains
    )
    few = x[:BATCH]
    before = runner(dense, few, weights)
    yield "dense", "1.0000", f"{demo.accuracy(dense, weights, x, y):.4f}", "1.000"
    for way, made in ways.items():
        for share in SHARES:
            try:
                chains = net.with_chains(made(share))
            except ValueError:  # nothing is so cheap
                continue
            macs = sum(chains[k.name].cost(k.input_size).macs for k in net.layers)
            right = demo.accuracy(chains, weights, x, y)
            now, then = measured([runner(chains, few, weights), before], SECONDS)
            yield way, f"{macs / whole:.4f}", f"{right:.4f}", f"{now / then:.3f}"


def main(target):
    tables.write(target, ["way", "macs", "accuracy", "seconds"], rows())


if __name__ == "__main__":
    main(sys.argv[1])
