"""Damaged and hostile files: one sentence that names the file, never another error."""

import json
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

import lowrank as lr
from lowrank import demo, io
from lowrank.compress import CompressionPlan, compress_model, make_plan
from lowrank.interop import files
from lowrank.interop.weights import WeightsModel, read_weights

#: Mutations per format in a usual run; `--full` makes 500.
MUTATIONS = 20
FULL_MUTATIONS = 500


def _header(path, text, body=b""):
    data = text.encode()
    path.write_bytes(struct.pack("<Q", len(data)) + data + body)
    return path


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f'{{"a":{ENTRY},"a":{ENTRY}}}', "'a' twice"),
        ('{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', "'shape' twice"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "entry of tensor 'a'"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[false,4]}}', "entry of tensor 'a'"),
        ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "entry of tensor 'a'"),
        ('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "dtype"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=["tensor twice", "key twice", "true", "false", "float", "dtype", "deep"],
)
def test_headers_of_safetensors_that_are_refused(tmp_path, text, why):
    path = _header(tmp_path / "a.safetensors", text, b"\0" * 4)
    with pytest.raises(ValueError, match=f"a.safetensors: .*{why}"):
        io.read_tensors(path)


@pytest.mark.parametrize("shape", [[0, 10**30], [0] + [1] * 100])
def test_shapes_without_values_that_no_array_has(tmp_path, shape):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    path = _header(tmp_path / "a.safetensors", json.dumps({"a": entry}))
    with pytest.raises(ValueError, match=r"a\.safetensors: tensor 'a'"):
        io.read_tensors(path)


@pytest.mark.parametrize("record", ["[" * 100_000, '{"format":1,"format":1,"layers":{}}'])
def test_metadata_of_chains_that_are_refused(tmp_path, record):
    path = tmp_path / "a.safetensors"
    io.write_tensors(path, {"a": np.ones(1)}, {"lowrank": record})
    with pytest.raises(ValueError, match=r"a\.safetensors: the metadata of the chains is damaged"):
        lr.load(path)


def test_an_encrypted_archive_and_a_cut_header_are_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.ones(3))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    data[6] |= 1  # the flag of encryption, in the member's header and in the directory's
    data[start + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npz: .*encrypted"):
        read_weights(path)
    path = tmp_path / "a.npy"
    np.save(path, np.ones(3))
    data = path.read_bytes().replace(b"'shape': (3,), }", b"'shape': (3,,( ,")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.npy: not a valid \.npy file"):
        read_weights(path)


@pytest.fixture(scope="module")
def plan():
    return make_plan(WeightsModel(demo.WEIGHTS), macs=0.5, families=["spatial_svd"]).to_json()


@pytest.mark.parametrize("key", ["batch", "threads", "runtime", "seed"])
def test_a_plan_without_a_key_says_so(plan, key):
    damaged = json.loads(plan)
    del damaged["about"][key]
    with pytest.raises(ValueError, match=f"not a plan: '{key}' is missing"):
        CompressionPlan.from_json(json.dumps(damaged))


@pytest.mark.parametrize(
    ("key", "value"), [("batch", None), ("batch", 1.5), ("factored", []), ("wide", "all")]
)
def test_a_plan_with_a_wrong_value_says_so(plan, key, value):
    damaged = json.loads(plan)
    damaged["about"][key] = value
    with pytest.raises(ValueError, match="not a plan: "):
        CompressionPlan.from_json(json.dumps(damaged))


@pytest.mark.parametrize("threads", [2**31, 2**63, 2**64])
def test_more_threads_than_c_counts(threads):
    conv = lr.dense(np.ones((2, 2, 3, 3), np.float32), padding=1)
    with pytest.raises(ValueError, match=f"threads must be between 1 and .* got {threads}"):
        conv.compile((2, 8, 8), threads=threads)


def _mutate(rng, data):
    """Return data with some bytes flipped, cut, repeated or filled, at the head more often."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(data), 400) if rng.random() < 0.7 else len(data))
        kind = rng.randrange(4)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 40)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 40)] or b"x"
        else:
            data[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, b'"true,[{', b"99999999"])
        if not data:
            return b""
    return bytes(data)


def _read_plan(path):
    plan = CompressionPlan.from_json(path.read_text("utf-8"))
    compress_model(WeightsModel(demo.WEIGHTS), plan)


READERS = {
    "chains.safetensors": lr.load,
    "weights.safetensors": read_weights,
    "weights.npz": read_weights,
    "weights.npy": read_weights,
    "net.onnx": files.open_model,
    "plan.json": _read_plan,
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory, plan):
    """Return the bytes of one valid file per format."""
    folder = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(0)
    conv = lr.dense(rng.standard_normal((4, 3, 3, 3)).astype("f4"), padding=1)
    lr.save(
        folder / "chains.safetensors", {"a": lr.spatial_svd(conv, 2), "b": lr.tucker(conv, (2, 2))}
    )
    WeightsModel(demo.WEIGHTS).replaced({}).save(folder / "weights.safetensors")
    WeightsModel(demo.WEIGHTS).replaced({}).save(folder / "weights.npz")
    np.save(folder / "weights.npy", np.ones((4, 3, 3, 3)))
    (folder / "plan.json").write_text(plan)
    onnx = pytest.importorskip("onnx")
    graph = onnx.parser.parse_graph(
        "g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y) {y = Conv<pads = [1, 1, 1, 1]>(x, w)}"
    )
    weight = onnx.numpy_helper.from_array(conv.stages[0].weight[...], "w")
    graph.initializer.append(weight)
    onnx.save(onnx.helper.make_model(graph), folder / "net.onnx")
    return {name: (folder / name).read_bytes() for name in READERS}


def _fuzz(name, originals, folder, count):
    rng, refused = random.Random(name), 0
    for i in range(count):
        path = Path(folder, f"{i}-{name}")
        path.write_bytes(_mutate(rng, originals[name]))
        try:
            READERS[name](path)
        except (ValueError, OSError) as why:
            refused += 1
            message = str(why)
            assert message
            assert len(message) < 1500
            assert name in message or name == "plan.json", message
        path.unlink()
    assert refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(READERS))
def test_mutated_files_raise_nothing_but_named_errors(name, originals, tmp_path):
    _fuzz(name, originals, tmp_path, MUTATIONS)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(READERS))
def test_many_mutated_files_raise_nothing_but_named_errors(name, originals, tmp_path):
    _fuzz(name, originals, tmp_path, FULL_MUTATIONS)
