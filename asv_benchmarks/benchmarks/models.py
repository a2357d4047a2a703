"""The digit network that ships with the package, planned, compressed, run and scored."""

from functools import cache

import numpy as np

from . import measure

SHARES = (1 / 2, 1 / 4)
FAMILIES = [
    "channel_svd",
    "channel_svd",
    "spatial_svd",
]  # quick to fit; what a whole choice takes is in Whole


@cache
def net():
    from lowrank import demo
    from lowrank.interop import files

    return files.open_model(demo.WEIGHTS)


@cache
def small(share):
    """The network within a share of its multiply-adds, by all families."""
    from lowrank import compress

    return compress.compress_model(net(), compress.make_plan(net(), macs=share, pinned=["conv1"]))


@cache
def images():
    """The digits that the network was not trained on, as the demo has them."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    given, labels = load_digits(return_X_y=True)
    _, x, _, y = train_test_split(given, labels, test_size=0.25, random_state=0)
    return (x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y


def layers():
    from lowrank import demo
    from lowrank.interop import weights

    return weights.layers(demo.WEIGHTS)


def wrong(share):
    """Share of unseen digits that are read wrong."""
    from lowrank import demo
    from lowrank.interop.weights import read_weights

    chains = {layer.name: layer.conv for layer in layers()}
    if share < 1:
        chains |= small(share).chains
    return 1 - demo.accuracy(chains, read_weights(demo.WEIGHTS), *images())


def spent(share):
    now, before = small(share).plan.total("macs")
    return now / before


def loss(share):
    return small(share).plan.loss


TRACKED = {"digits read wrong, dense": lambda: wrong(1)}
for s in SHARES:
    TRACKED |= {
        f"digits read wrong, {s:.0%} of the work": lambda s=s: wrong(s),
        f"multiply-adds, {s:.0%} asked for": lambda s=s: spent(s),
        f"loss, {s:.0%} of the work": lambda s=s: loss(s),
    }


def planning():
    from lowrank import compress

    given = net()
    return lambda: compress.make_plan(given, macs=0.5, pinned=["conv1"], families=FAMILIES)


def compressing():
    from lowrank import compress

    plan = compress.make_plan(net(), macs=0.5, pinned=["conv1"], families=FAMILIES)
    return lambda: compress.compress_model(net(), plan)


def running(share):
    """The chains of all layers, one after another, on a batch of eight."""

    def make():
        chains = {layer.name: layer.conv for layer in layers()}
        if share < 1:
            chains |= small(share).chains
        calls = []
        for layer in layers():
            f = chains[layer.name]
            x = np.ones((8, f.in_channels, *layer.input_size), np.float32)
            run = f.compile(x.shape[1:], np.float32, threads=1)
            calls.append((run, x, run(x)))

        def go():
            for run, x, out in calls:
                run(x, out)

        return go

    return make


WORK = {
    "make_plan, three families": planning,
    "compress, planned": compressing,
    "run, dense": running(1),
    "run, half of the work": running(0.5),
}


class Models:
    """How long the steps take."""

    params = (list(WORK),)
    param_names = ["step"]
    timeout = 120

    def setup(self, name):
        self.call = measure.available(WORK[name])
        measure.available(self.call)

    def time_step(self, name):
        self.call()


class Kept:
    """What a compressed network keeps and what it costs: the same on every machine."""

    params = (list(TRACKED),)
    param_names = ["what"]
    timeout = 120

    def track_kept(self, name):
        return measure.available(TRACKED[name])

    track_kept.unit = "shares"


class Predicted:
    """How far predicted seconds are from those of the clock, for layers before and after."""

    params = (list(SHARES),)
    param_names = ["share of the multiply-adds"]
    timeout = 120

    def setup(self, share):
        self.chains = measure.available(lambda: small(share).chains)

    def track_predicted_off(self, share):
        """The worse of predicted / actual and its inverse, less 1."""
        from lowrank import perfmodel

        off = []
        for layer in layers():
            f = self.chains.get(layer.name, layer.conv)
            x = np.ones((1, f.in_channels, *layer.input_size), np.float32)
            run = f.compile(x.shape[1:], np.float32, threads=1)
            out = run(x)
            (actual,) = measure.measured([lambda run=run, x=x, out=out: run(x, out)], 0.2)
            predicted = perfmodel.predict(f, layer.input_size, threads=1).seconds
            off.append(max(predicted / actual, actual / predicted) - 1)
        return max(off)

    track_predicted_off.unit = "of the time, worst layer; rates of this machine or those that ship"

    def track_time_share(self, share):
        calls = [running(share)(), running(1)()]
        chains, dense = measure.measured(calls, 0.5)
        return chains / dense

    track_time_share.unit = "share of the dense layers' time, eight images"
