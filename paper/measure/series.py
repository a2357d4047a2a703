"""Accuracy and time of a series classifier, trained here and compressed.

Eight kinds of synthetic series (slow and fast waves, rising and falling chirps, square waves,
sawtooths, steps and bursts) of 128 samples with random phases and frequencies, at a
signal-to-noise ratio of 1; four 1-D convolutions and a linear layer, trained in NumPy.  Methods
without fine-tuning: `uniform`, a channel SVD of every layer at one share of the full rank;
`weights`, families and ranks optimised by `lowrank.compress` for the weights only; `inputs`, with
calibration series; `gradients`, with gradients as well.  `thinner` networks have fewer channels
and are trained from scratch.

`accuracy` is top-1 on unseen series; times are of the whole network on a batch, medians of
interleaved runs, one thread, float32.
"""

import csv
import sys
import time

import numpy as np
import tables
from threadpoolctl import threadpool_limits

import lowrank
from asv_benchmarks.benchmarks.timing import Seconds
from lowrank import compress

LENGTH, KINDS = 128, 8
#: channels out, taps, stride
LAYERS = ((32, 9, 1), (64, 7, 2), (64, 5, 2), (64, 5, 1))
EPOCHS, BATCH, RATE = 10, 64, 2e-3
TRAIN, CALIBRATION, TEST, NOISE = 3000, 384, 2000, 1.0
SHARES = (0.6, 0.4, 0.25, 0.16, 0.1, 0.06)
THINNER = (0.25, 0.1, 0.06)
REPEATS = 15


def series(number, rng):
    """Return series of shape (number, 1, LENGTH) and their classes."""
    kinds = rng.integers(0, KINDS, number)
    t = np.linspace(0, 1, LENGTH)
    found = np.empty((number, 1, LENGTH), np.float32)
    for x, kind in zip(found, kinds):
        turns, phase = rng.uniform(3, 6), rng.random()
        at = turns * t + phase  # phase in periods
        x[0] = np.sqrt(2) * (
            np.sin(2 * np.pi * at) if kind == 0
            else np.sin(2 * np.pi * (2 * turns * t + phase)) if kind == 1
            else np.sin(2 * np.pi * (turns * t * (0.5 + t) + phase)) if kind == 2
            else np.sin(2 * np.pi * (turns * t * (2 - t) + phase)) if kind == 3
            else np.sign(at % 1 - 0.5) / np.sqrt(2) if kind == 4
            else (2 * (at % 1) - 1) * np.sqrt(1.5) if kind == 5
            else np.sign(t - rng.uniform(0.2, 0.8)) / np.sqrt(2) if kind == 6
            else 2 * np.exp(-(((t - rng.uniform(0.3, 0.7)) / 0.1) ** 2)) * np.sin(4 * np.pi * at)
        )  # fmt: skip
    found += NOISE * rng.standard_normal(found.shape, np.float32)
    return found, kinds


class Net:
    """The network, with forward and backward passes in NumPy, as a model for `lowrank.compress`."""

    def __init__(self, rng, width=1.0):
        self.shape = [(round(width * out), taps, stride) for out, taps, stride in LAYERS]
        self.data, self.weights, ins = None, [], 1
        for out, taps, _ in self.shape:
            scale = np.sqrt(2 / (ins * taps), dtype=np.float32)
            self.weights.append(scale * rng.standard_normal((out, ins, taps), np.float32))
            ins = out
        self.weights.append(rng.standard_normal((KINDS, ins), np.float32) / np.sqrt(ins))
        self.weights = [np.asarray(w, np.float32) for w in self.weights]
        self.biases = [np.zeros(len(w), np.float32) for w in self.weights]

    def forward(self, x):
        """Return the logits and the values that the backward pass needs."""
        kept = []
        for w, b, (_, taps, stride) in zip(self.weights, self.biases, self.shape):
            padded = np.pad(x, ((0, 0), (0, 0), (taps // 2, taps // 2)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, taps, 2)[:, :, ::stride]
            rows = windows.transpose(0, 2, 1, 3).reshape(-1, w[0].size)
            y = (rows @ w.reshape(len(w), -1).T + b).reshape(len(x), -1, len(w)).transpose(0, 2, 1)
            kept.append((x.shape, rows, y))
            x = np.maximum(y, 0)
        mean = x.mean(2)
        return mean @ self.weights[-1].T + self.biases[-1], (kept, mean)

    def backward(self, given, kept, of_outputs=False):
        """Return gradients of weights and biases, or of the convolution outputs (`of_outputs`)."""
        layers, mean = kept
        weights, biases = [given.T @ mean], [given.sum(0)]
        length = layers[-1][2].shape[2]
        g = np.repeat((given @ self.weights[-1])[:, :, None], length, 2) / np.float32(length)
        outputs = []
        for i in reversed(range(len(layers))):
            (shape, rows, y), w, (_, taps, stride) = layers[i], self.weights[i], self.shape[i]
            g = g * (y > 0)
            outputs.insert(0, g)
            flat = g.transpose(0, 2, 1).reshape(-1, len(w))
            if not of_outputs:
                weights.insert(0, (flat.T @ rows).reshape(w.shape))
                biases.insert(0, flat.sum(0))
            if i:
                spread = (flat @ w.reshape(len(w), -1)).reshape(shape[0], -1, shape[1], taps)
                x = np.zeros((*shape[:2], shape[2] + 2 * (taps // 2)), np.float32)
                for k in range(taps):
                    x[:, :, k : k + stride * y.shape[2] : stride] += spread[..., k].transpose(
                        0, 2, 1
                    )
                g = x[:, :, taps // 2 : taps // 2 + shape[2]]
        return outputs if of_outputs else (weights, biases)

    # Interface for lowrank.compress.

    @property
    def convs(self):
        found = {}
        for w, b, (_, taps, stride) in zip(self.weights, self.biases, self.shape):
            name = f"conv{len(found) + 1}"
            found[name] = lowrank.dense(w, b, stride=stride, padding=taps // 2)
        return found

    @property
    def layers(self):
        found, size = [], (LENGTH,)
        for name, conv in self.convs.items():
            found.append(compress.Layer(name, conv, size))
            size = conv.output_shape(size)[1:]
        return tuple(found)

    @property
    def batches(self):
        return 0 if self.data is None else len(self.data)

    def run(self, x, chains, seen=None):
        for name, conv in (self.convs | dict(chains)).items():
            if seen is not None:
                seen[name] = (x,)
            x = np.maximum(conv(x), 0)
        return x.mean(2) @ self.weights[-1].T + self.biases[-1]

    def inputs(self, names, chains):
        for x in self.data:
            seen = {}
            self.run(x, chains, seen)
            yield {name: seen[name] for name in names}

    def gradients(self, names, seed):
        rng = np.random.default_rng(seed)
        for x in self.data:
            y, kept = self.forward(x)
            found = self.backward(rng.standard_normal(y.shape, np.float32), kept, of_outputs=True)
            yield {name: (g,) for name, g in zip(self.convs, found) if name in names}

    def outputs(self, chains):
        for x in () if self.data is None else self.data:
            yield (self.run(x, chains),)

    def replaced(self, chains):
        return chains


def train(net, x, kinds, rng):
    """Train with Adam on the cross entropy; the learning rate decays to 0."""
    numbers = [*net.weights, *net.biases]
    first, second = ([np.zeros_like(a) for a in numbers] for _ in range(2))
    steps = EPOCHS * (len(x) // BATCH)
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            order = rng.permutation(len(x))
        some = order[step % (len(x) // BATCH) * BATCH :][:BATCH]
        y, kept = net.forward(x[some])
        shares = np.exp(y - y.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        shares[np.arange(len(some)), kinds[some]] -= 1
        weights, biases = net.backward(shares / np.float32(len(some)), kept)
        rate = RATE * np.cos(np.pi / 2 * step / steps) ** 2
        for a, g, m, v in zip(numbers, [*weights, *biases], first, second):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            unbiased = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            a -= (rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)).astype(np.float32)


def macs(net, chains):
    return sum(chains.get(x.name, x.conv).cost(x.input_size).macs for x in net.layers)


def uniform(net, limit):
    """Return channel SVDs at the largest common share of the full rank within `limit` MACs."""
    best = None
    for share in np.linspace(0.01, 1, 400):
        chains = {}
        for x in net.layers[1:]:  # the first has a single input channel
            w = x.conv.stages[0].weight
            rank = max(1, round(share * min(len(w), w[0].size)))
            f = lowrank.channel_svd(x.conv, rank, "output")
            if f.cost(x.input_size).macs < x.cost.macs:
                chains[x.name] = f
        if macs(net, chains) > limit:
            break
        best = chains
    return best


def compiled(net, chains, x):
    """Return a call of the whole compiled network."""
    runs, shape = [], x.shape[1:]
    for f in (net.convs | dict(chains)).values():
        runs.append(f.compile(shape, np.float32, threads=1, activation="relu"))
        shape = f.output_shape(shape)

    def call():
        y = x
        for run in runs:
            y = run(y)
        return y.mean(2) @ net.weights[-1].T + net.biases[-1]

    return call


def compressed(net, x):
    """Yield (method, share, chains)."""
    total = macs(net, {})
    for method in ("uniform", "weights", "inputs", "gradients"):
        net.data = np.split(x, 6) if method in ("inputs", "gradients") else None
        statistics = compress.LayerStatistics(net, gradients=method == "gradients")
        for share in SHARES:
            if method == "uniform":
                chains = uniform(net, share * total)
            else:
                plan = compress.make_plan(net, macs=share, statistics=statistics)
                chains = compress.compress_model(net, plan).chains
            yield method, share, chains


def main(target):
    rng = np.random.default_rng(0)
    x, kinds = series(TRAIN, rng)
    unseen, answers = series(TEST, rng)
    with threadpool_limits(1), open(target, "w", newline="") as file:
        net = Net(rng)
        start = time.perf_counter()
        train(net, x, kinds, rng)
        print(f"trained in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        found = [("dense", 1.0, net, {})]
        found += [
            (method, share, net, chains)
            for method, share, chains in compressed(net, x[:CALIBRATION])
        ]
        for share in THINNER:
            thin = Net(rng, np.sqrt(share))
            train(thin, x, kinds, rng)
            found.append(("thinner", share, thin, {}))
        calls = [compiled(n, chains, unseen[:BATCH]) for _, _, n, chains in found]
        times = [[] for _ in calls]
        for _ in range(REPEATS + 1):
            for call, took in zip(calls, times):
                start = time.perf_counter()
                call()
                took.append(time.perf_counter() - start)
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["method", "share", "macs", "params", "accuracy", "variants", "seconds", "spread"]
        )
        for (method, share, n, chains), took in zip(found, times):
            accuracy = (n.run(unseen, chains).argmax(1) == answers).mean()
            every = n.convs | dict(chains)
            variants = "; ".join(
                " ".join(filter(None, (f.family, f.variant, *map(str, f.rank))))
                for f in every.values()
            )
            rows.writerow(
                [method, share, f"{macs(n, chains) / macs(net, {}):.4f}",
                 sum(f.params for f in every.values()), f"{accuracy:.4f}", variants,
                 f"{Seconds(took[1:]):.4g}", tables.spread(Seconds(took[1:]))]
            )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
