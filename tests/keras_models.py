"""Keras models for tests; skips the tests where Keras or PyTorch is missing."""

from importlib.util import find_spec

import numpy as np
import pytest

if not (find_spec("keras") and find_spec("torch")):
    pytest.skip("Keras on PyTorch is not installed", allow_module_level=True)

from lowrank.interop.keras.files import library

keras = library()
L = keras.layers


def planar():
    """Return a functional 2-D model with branches, a shared layer and a nested model."""
    x = inp = keras.Input((17, 19, 3), name="inp")
    x = L.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="c1")(x)
    x = L.BatchNormalization(name="bn1")(x)
    x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=2, use_bias=False, name="dw")(x)
    shared = L.Conv2D(16, (3, 5), padding="same", name="shared")
    a = shared(x)
    b = shared(a)
    s = L.SeparableConv2D(16, 3, padding="same", name="sep")(x)
    x = L.Dropout(0.5)(L.Concatenate()([b, s, a]))
    z = L.Conv2D(12, 3, dilation_rate=2, padding="same", name="dil")(x)
    x = L.Add()([z, L.Conv2D(12, 1, activation="relu", name="one")(x)])
    x = L.Conv2DTranspose(6, 3, strides=2, padding="same", name="up")(x)
    x = L.Conv2DTranspose(6, 5, strides=(3, 2), activation="tanh", name="up2")(x)
    y = inner = keras.Input(x.shape[1:])
    y = L.Conv2D(6, (3, 2), groups=2, name="g")(y)
    y = L.BatchNormalization(epsilon=0.01, name="bn2")(y)
    left = L.Conv2D(8, (5, 4), strides=2, padding="same", name="h", activation="relu")(y)
    right = L.Conv2D(8, 3, strides=2, padding="same", name="k")(y)
    x = keras.Model(inner, L.Add()([left, right]), name="inner")(x)
    x = L.GlobalAveragePooling2D()(x)
    return keras.Model(inp, L.Dense(5, name="fc")(x), name="net")


def linear():
    """Return a Sequential 1-D model."""
    return keras.Sequential(
        [
            keras.Input((40, 3), name="inp"),
            L.Conv1D(8, 5, padding="causal", dilation_rate=2, name="a"),
            L.SeparableConv1D(8, 3, depth_multiplier=2, name="s"),
            L.DepthwiseConv1D(3, strides=2, padding="same", name="d"),
            L.Conv1DTranspose(6, 5, strides=2, name="t"),
            L.Conv1D(8, 4, strides=3, padding="same", use_bias=False, activation="relu", name="b"),
            L.Dense(7, activation="relu", name="mix"),
            L.Flatten(),
            L.Dense(4, use_bias=False, name="out"),
        ],
        name="line",
    )


def solid():
    """Return a Sequential 3-D model."""
    return keras.Sequential(
        [
            keras.Input((7, 6, 5, 2), name="inp"),
            L.Conv3D(6, 3, padding="same", strides=2, name="a"),
            L.Conv3DTranspose(4, 3, strides=2, name="t"),
            L.MaxPooling3D(2),
            L.Conv3D(4, (2, 3, 2), activation="relu", name="b"),
        ],
        name="solid",
    )


def first():
    """Return a model with channels first."""
    first = {"data_format": "channels_first"}
    x = inp = keras.Input((3, 12, 10), name="inp")
    x = L.Conv2D(8, 3, padding="same", strides=2, name="a", **first)(x)
    x = L.BatchNormalization(axis=1)(x)
    x = L.DepthwiseConv2D(3, padding="same", name="d", **first)(x)
    x = L.Conv2DTranspose(6, 3, strides=2, padding="same", name="t", **first)(x)
    x = L.Conv2D(8, (3, 5), name="b", **first)(x)
    return keras.Model(inp, 2 * x)  # an operation


def attention():
    """Return a model of vectors: EinsumDense layers of several equations, and attention."""
    x = inp = keras.Input((6, 8), name="inp")
    x = L.EinsumDense("abc,cde->abde", (6, 4, 3), bias_axes="de", name="heads")(x)
    x = L.EinsumDense("abde,dec->abc", (6, 8), bias_axes="c", name="join")(x)
    x = L.EinsumDense("...x,xy->...y", 10, activation="relu", bias_axes="y", name="wide")(x)
    x = L.EinsumDense("ab...,bd->ad...", 9, bias_axes="d", name="mixed")(x)
    x = L.EinsumDense("abc,cde->adbe", (5, 9, 2), bias_axes="de", name="heads first")(x)
    x = L.Reshape((9, 10))(x)
    x = L.EinsumDense("abc,bcd->abd", (9, 8), name="separate")(x)
    x = L.MultiHeadAttention(2, 4, name="att")(x, x)
    return keras.Model(inp, L.Dense(5, name="fc")(x))


def video():
    """Return a model with TimeDistributed layers, one of which has a model in it."""
    x = inp = keras.Input((4, 12, 10, 3), name="inp")
    x = L.TimeDistributed(L.Conv2D(8, 3, activation="relu", name="conv"), name="each")(x)
    inner = [keras.Input((10, 8, 8)), L.Conv2D(6, 3, name="c"), L.GlobalMaxPooling2D()]
    x = L.TimeDistributed(keras.Sequential(inner, name="net"), name="frames")(x)
    return keras.Model(inp, L.TimeDistributed(L.Dense(5, name="fc"), name="last")(x))


MODELS = {f.__name__: f for f in (planar, linear, solid, first, attention, video)}


def make(which, rng):
    """Return a model of `MODELS` with random weights, and three inputs."""
    keras.utils.clear_session()
    model = MODELS[which]()
    for variable in model.variables:
        if "seed" in variable.path:
            continue
        value = rng.standard_normal(variable.shape) * 0.3
        variable.assign(abs(value) + 0.5 if "variance" in variable.path else value)
    return model, rng.standard_normal((3, *model.inputs[0].shape[1:])).astype(np.float32)


def full(family, f, **options):
    """Return the chain of the first exact rank."""
    weight = f.stages[0].weight
    for rank in range(1, 10_000):
        found = family(f, rank, **options)
        if found.error(weight) < 1e-6:
            return found
    raise AssertionError("no rank is exact")
