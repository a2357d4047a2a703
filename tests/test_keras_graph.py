"""Graphs of Keras models: shapes of tensors, unknown layers, and invalid graphs."""

import numpy as np
import pytest

import lowrank as lr

pytest.importorskip("h5py")

from keras_models import layer, linear, load, planar, write

from lowrank.interop.keras import KerasModel


def test_layers_of_unknown_input_size_are_left_out(tmp_path, rng):
    model = linear(rng)
    model["layers"] = model["layers"][:6]
    model["layers"][0]["config"]["batch_shape"] = [None, None, 3]
    path, out = tmp_path / "in.keras", tmp_path / "out.keras"
    write(path, model)
    assert KerasModel(path).layers == ()
    assert "size" in KerasModel(path).left_out["a"]
    net = KerasModel(path, input_shape=(40, 3))
    assert [x.input_size for x in net.layers] == [(40,), (38,), (19,), (41,)]
    net.replaced({"b": lr.channel_svd(net.layers[-1].conv, 2)}).save(out)
    config = load(out)[0]["config"]["layers"]
    assert config[-2]["config"]["padding"] == "same"  # for any size


def test_code_of_lambda_layers_is_not_run(tmp_path, rng):
    model = linear(rng)
    code = {"class_name": "__lambda__", "config": {"code": "4wEAAAAAAAAA", "defaults": None}}
    model["layers"].insert(3, layer("Lambda", "evil", function=code))
    path = tmp_path / "in.keras"
    write(path, model)
    net = KerasModel(path)
    assert [x.name for x in net.layers] == ["a"]
    assert {"d", "t", "b"} <= net.left_out.keys()


def test_layers_with_invalid_weights_are_left_out(tmp_path, rng):
    model = linear(rng)
    model["layers"][1]["weights"][0] = np.zeros((5, 4, 8), np.float32)  # four channels, not three
    model["layers"][4]["weights"][0] = np.full((5, 6, 8), np.nan, np.float32)
    write(tmp_path / "odd.h5", model)
    net = KerasModel(tmp_path / "odd.h5")
    assert "channels" in net.left_out["a"]
    assert "NaN" in net.left_out["t"]
    assert [x.name for x in net.layers] == ["d", "b", "mix", "out"]


def test_cyclic_graph_is_refused(tmp_path, rng):
    model = planar(rng)
    model["layers"][1]["inbound"] = ([("dil", 0)],)
    write(tmp_path / "round.keras", model)
    with pytest.raises(ValueError, match=r"round\.keras.*cycle"):
        KerasModel(tmp_path / "round.keras")
