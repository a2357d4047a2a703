"""Builders of Keras files for tests, and an interpreter of their configurations.

Keras is not needed: the files are written in its formats, and run by an interpreter that shares
no code with lowrank.
"""

import io
import json
import re
import zipfile

import h5py
import numpy as np


def layer(kind, name, *inbound, **config):
    """Return a layer; `inbound` has one list of (layer, call) per call."""
    return {"kind": kind, "name": name, "inbound": inbound, "config": config}


def conv(kind, name, *inbound, size, weights, **config):
    """Return a convolution with Keras's defaults written out, as in its files."""
    n = int(re.search(r"(\d)D", kind)[1])
    config = {
        "kernel_size": [size] * n if isinstance(size, int) else list(size),
        "strides": [1] * n, "padding": "valid", "data_format": "channels_last",
        "dilation_rate": [1] * n, "activation": "linear", "use_bias": True, **config,
    }  # fmt: skip
    return layer(kind, name, *inbound, **config) | {"weights": weights}


def planar(rng):
    """Return a functional 2-D model, with its layers in Keras's order."""

    def w(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    one = [("dw", 0)]
    inner = {
        "sequential": True,
        "name": "inner",
        "layers": [
            layer("InputLayer", "in2", batch_shape=[None, 18, 20, 6]),
            conv("Conv2D", "g", size=(3, 2), groups=2, filters=6, weights=[w(3, 2, 3, 6), w(6)]),
            layer("BatchNormalization", "bn2", axis=-1, epsilon=0.01)
            | {"weights": [w(6), w(6), w(6), 1 + w(6) ** 2]},
            conv("Conv2D", "h", size=(5, 4), strides=[2, 2], padding="same", filters=8,
                 activation="relu", weights=[w(5, 4, 6, 8), w(8)]),
        ],
    }  # fmt: skip
    return {
        "name": "net",
        "input": ["inp"],
        "output": ["fc"],
        "layers": [
            layer("InputLayer", "inp", batch_shape=[None, 17, 19, 3]),
            conv("Conv2D", "c1", [("inp", 0)], size=3, strides=[2, 2], padding="same", filters=8,
                 activation="relu", weights=[w(3, 3, 3, 8), w(8)]),
            conv("DepthwiseConv2D", "dw", [("c1", 0)], size=3, padding="same", depth_multiplier=2,
                 use_bias=False, weights=[w(3, 3, 8, 2)]),
            conv("Conv2D", "shared", one, [("shared", 0)], size=(3, 5), padding="same",
                 filters=16, weights=[w(3, 5, 16, 16), w(16)]),
            conv("SeparableConv2D", "sep", one, size=3, padding="same", filters=16,
                 depth_multiplier=1, weights=[w(3, 3, 16, 1), w(1, 1, 16, 16), w(16)]),
            layer("Concatenate", "cat", [("shared", 1), ("sep", 0)], axis=-1),
            layer("Dropout", "drop", [("cat", 0)], rate=0.5),
            conv("Conv2D", "dil", [("drop", 0)], size=3, dilation_rate=[2, 2], padding="same",
                 filters=12, weights=[w(3, 3, 32, 12), w(12)]),
            conv("Conv2D", "one", [("cat", 0)], size=1, filters=12, activation="relu",
                 weights=[w(1, 1, 32, 12), w(12)]),
            layer("Add", "add", [("dil", 0), ("one", 0)]),
            conv("Conv2DTranspose", "up", [("add", 0)], size=3, strides=[2, 2], padding="same",
                 filters=6, output_padding=None, weights=[w(3, 3, 6, 12), w(6)]),
            inner | {"inbound": ([("up", 0)],)},
            layer("GlobalAveragePooling2D", "gap", [("inner", 0)], data_format="channels_last",
                  keepdims=False),
            layer("Dense", "fc", [("gap", 0)], units=5, activation="linear", use_bias=True)
            | {"weights": [w(8, 5), w(5)]},
        ],
    }  # fmt: skip


def linear(rng):
    """Return a Sequential 1-D model."""

    def w(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    return {
        "sequential": True,
        "name": "line",
        "layers": [
            layer("InputLayer", "inp", batch_shape=[None, 40, 3]),
            conv("Conv1D", "a", size=5, padding="causal", dilation_rate=[2], filters=8,
                 weights=[w(5, 3, 8), w(8)]),
            conv("SeparableConv1D", "s", size=3, filters=8, depth_multiplier=2,
                 weights=[w(3, 8, 2), w(1, 16, 8), w(8)]),
            conv("DepthwiseConv1D", "d", size=3, strides=[2], padding="same", depth_multiplier=1,
                 weights=[w(3, 8, 1), w(8)]),
            conv("Conv1DTranspose", "t", size=5, strides=[2], filters=6, output_padding=None,
                 weights=[w(5, 6, 8), w(6)]),
            conv("Conv1D", "b", size=4, strides=[3], padding="same", filters=8, use_bias=False,
                 activation="relu", weights=[w(4, 6, 8)]),
            layer("Dense", "mix", units=7, activation="relu", use_bias=True)
            | {"weights": [w(8, 7), w(7)]},
            layer("Flatten", "flat", data_format="channels_last"),
            layer("Dense", "out", units=4, activation="linear", use_bias=False)
            | {"weights": [w(98, 4)]},
        ],
    }  # fmt: skip


def solid(rng):
    """Return a Sequential 3-D model."""

    def w(*shape):
        return (rng.standard_normal(shape) * 0.4).astype(np.float32)

    return {
        "sequential": True,
        "name": "solid",
        "layers": [
            layer("InputLayer", "inp", batch_shape=[None, 7, 6, 5, 2]),
            conv("Conv3D", "a", size=3, padding="same", strides=[2, 2, 2], filters=6,
                 weights=[w(3, 3, 3, 2, 6), w(6)]),
            conv("Conv3DTranspose", "t", size=3, strides=[2, 2, 2], filters=4,
                 output_padding=None, weights=[w(3, 3, 3, 4, 6), w(4)]),
            layer("MaxPooling3D", "pool", pool_size=[2, 2, 2], strides=[2, 2, 2],
                  padding="valid", data_format="channels_last"),
            conv("Conv3D", "b", size=(2, 3, 2), filters=4, activation="relu",
                 weights=[w(2, 3, 2, 4, 4), w(4)]),
        ],
    }  # fmt: skip


SHAPES = {"planar": (17, 19, 3), "linear": (40, 3), "solid": (7, 6, 5, 2)}
MODELS = {"planar": planar, "linear": linear, "solid": solid}


def config_of(model, form):
    """Return the configuration of a model in the format of Keras 3 or 2."""
    sequential = model.get("sequential", False)
    entries = []
    for x in model["layers"]:
        if "layers" in x:
            entry = config_of(x, form)
        else:
            own = dict(x["config"])
            if form == 2 and "batch_shape" in own:
                own["batch_input_shape"] = own.pop("batch_shape")
            entry = {"class_name": x["kind"], "config": {"name": x["name"], **own}}
            if form == 3:
                entry |= {"module": "keras.layers", "registered_name": None, "build_config": {}}
        if not sequential:
            entry["name"] = x["name"]
            entry["inbound_nodes"] = [node_of(call, form) for call in x["inbound"]]
        entries.append(entry)
    if form == 2 and sequential and entries[0]["class_name"] == "InputLayer":
        first = entries.pop(0)  # Keras 2 has the shape in the first layer that does something
        entries[0]["config"]["batch_input_shape"] = first["config"]["batch_input_shape"]
    config = {"name": model["name"], "layers": entries}
    if not sequential:
        config["input_layers"] = [[n, 0, 0] for n in model["input"]]
        config["output_layers"] = [[n, 0, 0] for n in model["output"]]
    kind = "Sequential" if sequential else "Functional"
    return {"class_name": kind, "config": config} | ({"module": "keras"} if form == 3 else {})


def node_of(call, form):
    if form == 2:
        return [[name, n, 0, {}] for name, n in call]
    tensors = [
        {"class_name": "__keras_tensor__",
         "config": {"shape": None, "dtype": "float32", "keras_history": [name, n, 0]}}
        for name, n in call
    ]  # fmt: skip
    return {"args": [tensors if len(tensors) > 1 else tensors[0]], "kwargs": {}}


KINDS = {"BatchNormalization": ["gamma", "beta", "moving_mean", "moving_variance"]}


def named_weights(x, prefix=""):
    """Return the pairs (name, array) of a layer, in the order of an ``.h5`` file."""
    if "layers" in x:
        found = [pair for y in x["layers"] for pair in named_weights(y)]
        moving = [p for p in found if "/moving" in p[0]]
        return [p for p in found if "/moving" not in p[0]] + moving
    arrays = x.get("weights", [])
    kinds = KINDS.get(x["kind"], ["kernel", "pointwise", "more"][: len(arrays)])
    if x["config"].get("use_bias") and arrays:
        kinds = [*kinds[: len(arrays) - 1], "bias"]
    return [(f"{x['name']}/{kind}:0", a) for kind, a in zip(kinds, arrays, strict=True)]


def put_vars(group, model, word):
    counts = {}
    for x in model["layers"]:
        kind = "Sequential" if "layers" in x else x["kind"]
        snake = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind))
        n = counts[snake] = counts.get(snake, -1) + 1
        inside = group.require_group(word).create_group(snake.lower() + (f"_{n}" if n else ""))
        inside.create_group("vars").attrs["name"] = x["name"]
        for i, array in enumerate(x.get("weights", [])):
            inside["vars"][str(i)] = array
        if "layers" in x:
            put_vars(inside, x, word)


def write(path, model, form=None, word="layers"):
    """Write a model in the format of the ending."""
    if path.suffix == ".keras":
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.create_group("vars")
            put_vars(file, model, word)
            file.create_group("optimizer/vars")["0"] = np.int64(7)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("metadata.json", '{"keras_version": "3.15.1"}')
            archive.writestr("config.json", json.dumps(config_of(model, form or 3)))
            archive.writestr("model.weights.h5", buffer.getvalue())
            archive.writestr("assets/words.txt", "a b c")
    else:
        with h5py.File(path, "w") as file:
            file.attrs["keras_version"] = "2.15.0"
            file.attrs["model_config"] = json.dumps(config_of(model, form or 2))
            top = file.create_group("model_weights")
            kept = [x for x in model["layers"] if x.get("kind") != "InputLayer"]
            top.attrs["layer_names"] = np.array([x["name"].encode() for x in kept], "S")
            for x in kept:
                group = top.create_group(x["name"])
                pairs = named_weights(x)
                group.attrs["weight_names"] = np.array([n.encode() for n, _ in pairs], "S")
                for name, array in pairs:
                    group[name] = array
            file.create_group("optimizer_weights")["iteration"] = np.int64(7)


def load(path):
    """Return the configuration and the weights by layer, found by names and not by order."""
    found = {}
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            file = h5py.File(io.BytesIO(archive.read("model.weights.h5")))

        def visit(name, item):
            if name.endswith("vars") and "name" in item.attrs:
                found[item.attrs["name"]] = [item[str(i)][()] for i in range(len(item))]

        file.visititems(visit)
        return config, found
    with h5py.File(path) as file:
        config = json.loads(file.attrs["model_config"])
        top = file["model_weights"]
        for name in top.attrs["layer_names"]:
            group = top[name.decode()]
            for weight in group.attrs["weight_names"]:
                owner = weight.decode().split("/")[-2]
                found.setdefault(owner, []).append(group[weight.decode()][()])
    return config, found


def run(config, weights, x, seen=None):
    """Return a model's output for `x`, channels last; record inputs and outputs in `seen`."""
    entries = config["config"]["layers"]
    if "output_layers" not in config["config"]:
        for entry in entries:
            x = step(entry, weights, [x], seen)
        return x
    by_name = {e["name"]: e for e in entries}
    done = {}

    def value(name, call):
        if (name, call) not in done:
            entry = by_name[name]
            if entry["class_name"] == "InputLayer":
                return x
            text = json.dumps(entry["inbound_nodes"][call])
            pairs = re.findall(r'\["(\w+)", (\d+), 0', text)
            xs = [value(n, int(c)) for n, c in pairs]
            done[name, call] = step(entry, weights, xs, seen)
        return done[name, call]

    ((name, call, _),) = config["config"]["output_layers"]
    return value(name, call)


def step(entry, weights, xs, seen):
    if "layers" in entry["config"]:
        return run(entry, weights, *xs, seen)
    y = applied(entry, weights, xs)
    if seen is not None:
        seen[entry["config"]["name"]] = (xs[0], y, entry["config"].get("activation"))
    return y


def applied(entry, weights, xs):
    kind, c = entry["class_name"], entry["config"]
    own = [w.astype(float) for w in weights.get(c["name"], [])]
    x = xs[0]
    n = x.ndim - 2
    if kind in ("InputLayer", "Dropout"):
        return x
    if kind == "Add":
        return sum(xs)
    if kind == "Concatenate":
        return np.concatenate(xs, c["axis"])
    if kind == "Flatten":
        return x.reshape(len(x), -1)
    if kind.startswith("GlobalAverage"):
        return x.mean(tuple(range(1, n + 1)))
    if kind.startswith("MaxPooling"):
        axes = [v for m in x.shape[1:-1] for v in (m // 2, 2)]
        x = x[(slice(None), *(slice(m // 2 * 2) for m in x.shape[1:-1]))]
        return x.reshape(len(x), *axes, x.shape[-1]).max(tuple(range(2, 2 * n + 1, 2)))
    if kind == "BatchNormalization":
        gamma, beta, mean, variance = own
        return gamma * (x - mean) / np.sqrt(variance + c["epsilon"]) + beta
    if kind.startswith(("ZeroPadding", "Cropping")):
        pairs = c["padding" if kind.startswith("Zero") else "cropping"]
        pairs = [pairs] if n == 1 else pairs
        if kind.startswith("Zero"):
            return np.pad(x, [(0, 0), *pairs, (0, 0)])
        inside = [slice(a, m - b) for (a, b), m in zip(pairs, x.shape[1:])]
        return x[(slice(None), *inside)]
    bias = own.pop() if c["use_bias"] else 0
    if kind == "Dense":
        y = x @ own[0]
    elif kind.endswith("Transpose"):
        y = spread(x, own[0], c)
    elif kind.startswith("Conv"):
        y = grouped(x, own[0], c, c.get("groups", 1))
    else:
        depth = own[0].reshape(*own[0].shape[:n], 1, -1)
        y = grouped(x, depth, c, x.shape[-1])
        if kind.startswith("Separable"):
            y = y @ own[1].reshape(own[1].shape[-2:])
    y = y + bias
    return np.maximum(y, 0) if c["activation"] == "relu" else y


def windows(x, taps, c):
    """Yield each tap and the samples of the padded input that it multiplies."""
    sizes = []
    pads = []
    for m, k, s, d in zip(x.shape[1:], taps, c["strides"], c["dilation_rate"]):
        e = (k - 1) * d + 1
        if c["padding"] == "same":
            sizes.append(-(-m // s))
            total = max((sizes[-1] - 1) * s + e - m, 0)
            pads.append((total // 2, total - total // 2))
        else:
            pads.append((e - 1 if c["padding"] == "causal" else 0, 0))
            sizes.append((m + sum(pads[-1]) - e) // s + 1)
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    for tap in np.ndindex(*taps):
        at = [
            slice(t * d, t * d + (m - 1) * s + 1, s)
            for t, d, s, m in zip(tap, c["dilation_rate"], c["strides"], sizes)
        ]
        yield tap, x[(slice(None), *at)]


def grouped(x, kernel, c, groups):
    taps = kernel.shape[:-2]
    outs = np.split(kernel, groups, -1)
    total = 0
    for tap, seen in windows(x, taps, c):
        parts = np.split(seen, groups, -1)
        total = total + np.concatenate([p @ k[tap] for p, k in zip(parts, outs)], -1)
    return total


def spread(x, kernel, c):
    """Return a transposed convolution by TensorFlow's definition: the gradient of a convolution."""
    taps = kernel.shape[:-2]
    whole, inside = [], []
    more = c.get("output_padding") or [None] * len(taps)
    for m, k, s, d, o in zip(x.shape[1:], taps, c["strides"], c["dilation_rate"], more):
        e = (k - 1) * d + 1
        assert o is None or c["padding"] == "valid"  # all that is written
        size = m * s if c["padding"] == "same" else (m - 1) * s + max(e, s)
        size = size if o is None else (m - 1) * s + e + o
        before = max(e - s, 0) // 2 if c["padding"] == "same" else 0
        whole.append(max((m - 1) * s + e, before + size))
        inside.append(slice(before, before + size))
    y = np.zeros((len(x), *whole, kernel.shape[-2]))
    for tap in np.ndindex(*taps):
        at = [
            slice(t * d, t * d + (m - 1) * s + 1, s)
            for t, d, s, m in zip(tap, c["dilation_rate"], c["strides"], x.shape[1:])
        ]
        y[(slice(None), *at)] += x @ kernel[tap].T
    return y[(slice(None), *inside)]


def compare(before, after, x):
    """Return the largest difference of two models' outputs, relative to the largest output."""
    a, b = run(*load(before), x), run(*load(after), x)
    assert a.shape == b.shape
    return abs(a - b).max() / abs(a).max()


ROUNDING = 1e-5  # float32 weights of up to three stages, some ten layers deep


def full(family, f, **options):
    """Return the chain of the first exact rank."""
    weight = f.stages[0].weight
    for rank in range(1, 10_000):
        found = family(f, rank, **options)
        if found.error(weight) < 1e-6:
            return found
    raise AssertionError("no rank is exact")
