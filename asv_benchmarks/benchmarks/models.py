"""The shipped digit network: plan, compress, run, score."""

from functools import cache

import numpy as np

from . import tables
from .compat import family_names, require, resolve
from .timing import measure_seconds

SHARES = (1 / 2, 1 / 4)
#: Families with a fast sweep.
FAMILIES = ["channel_svd", "spatial_svd"]


def make_plan():
    return resolve("compress:make_plan", "models:make_plan")


def compress():
    return resolve("compress:compress_model", "models:compress")


@cache
def net():
    open_model = resolve("interop.files:open_model", "interop.files:open_net")
    return open_model(resolve("demo:WEIGHTS"))


@cache
def compressed(share):
    """Return the network compressed to a share of its MACs by all families."""
    return compress()(net(), make_plan()(net(), macs=share, pinned=["conv1"]))


@cache
def images():
    """Return the test images of the digit network."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    given, labels = load_digits(return_X_y=True)
    _, x, _, y = train_test_split(given, labels, test_size=0.25, random_state=0)
    return (x / 16).astype(np.float32).reshape(-1, 1, 8, 8), y


def layers():
    read_layers = resolve("interop.weights:layers", "weights:layers")
    return read_layers(resolve("demo:WEIGHTS"))


def top1_error(share):
    """Return the top-1 error on the test images."""
    from lowrank import demo

    read_weights = resolve("interop.weights:read_weights", "weights:read_weights")
    chains = {layer.name: layer.conv for layer in layers()}
    if share < 1:
        chains |= compressed(share).chains
    return 1 - demo.accuracy(chains, read_weights(demo.WEIGHTS), *images())


def macs_share(share):
    macs, dense_macs = compressed(share).plan.total("macs")
    return macs / dense_macs


def loss(share):
    return compressed(share).plan.loss


TRACKED = {"top-1 error, dense": lambda: top1_error(1)}
for s in SHARES:
    TRACKED |= {
        f"top-1 error, {s:.0%} of the MACs": lambda s=s: top1_error(s),
        f"share of MACs, budget {s:.0%}": lambda s=s: macs_share(s),
        f"loss, {s:.0%} of the MACs": lambda s=s: loss(s),
    }


def planning():
    model, plan, families = net(), make_plan(), family_names(*FAMILIES)
    return lambda: plan(model, macs=0.5, pinned=["conv1"], families=families)


def compressing():
    plan, compress_net = planning()(), compress()
    return lambda: compress_net(net(), plan)


def running(share):
    """Return a recipe that runs the chains of all layers on a batch of eight."""

    def make():
        chains = {layer.name: layer.conv for layer in layers()}
        if share < 1:
            chains |= compressed(share).chains
        calls = []
        for layer in layers():
            f = chains[layer.name]
            x = np.ones((8, f.in_channels, *layer.input_size), np.float32)
            run = f.compile(x.shape[1:], np.float32, threads=1)
            calls.append((run, x, run(x)))

        def run_all():
            for run, x, out in calls:
                run(x, out)

        return run_all

    return make


WORK = {
    "make_plan, two families": planning,
    "compress, planned": compressing,
    "run, dense": running(1),
    "run, half of the MACs": running(0.5),
}


class Models(tables.Recipes):
    """Time of each step."""

    recipes = WORK
    params = (list(WORK),)
    param_names = ["step"]

    def time_step(self, name):
        self.call()


class Kept:
    """Accuracy and cost of compressed networks: machine-independent."""

    params = (list(TRACKED),)
    param_names = ["what"]
    timeout = 120

    def track_kept(self, name):
        return require(TRACKED[name])

    track_kept.unit = "shares"


class Predicted:
    """Errors of predicted times of dense and compressed layers."""

    params = (list(SHARES),)
    param_names = ["share of the MACs"]
    timeout = 120

    def setup(self, share):
        self.chains = require(lambda: compressed(share).chains)

    def track_predicted_off(self, share):
        """Return the largest of predicted / actual and its inverse over the layers, minus 1."""
        predict = resolve("perfmodel:predict", "machine:predict")
        off = []
        for layer in layers():
            f = self.chains.get(layer.name, layer.conv)
            x = np.ones((1, f.in_channels, *layer.input_size), np.float32)
            run = f.compile(x.shape[1:], np.float32, threads=1)
            out = run(x)
            (actual,) = measure_seconds([lambda run=run, x=x, out=out: run(x, out)], 0.2)
            predicted = predict(f, layer.input_size, threads=1).seconds
            off.append(max(predicted / actual, actual / predicted) - 1)
        return max(off)

    track_predicted_off.unit = (
        "of the time, worst layer; coefficients of this machine or the shipped ones"
    )

    def track_time_share(self, share):
        calls = [running(share)(), running(1)()]
        chains, dense = measure_seconds(calls, 0.5)
        return chains / dense

    track_time_share.unit = "share of the dense layers' time, eight images"
