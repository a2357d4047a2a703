"""Runtimes of chains: calls, times in networks, measurements on disk."""

import json
import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

import lowrank as lr
from lowrank import perfmodel
from lowrank._kernels import _core
from lowrank.core import reference
from lowrank.core.stage import Epilogue, abstract_weight
from lowrank.engine import onnx, pytorch
from lowrank.perfmodel import measurement, runtimes
from lowrank.perfmodel import onnx as features_of_onnxruntime
from lowrank.perfmodel.measurement import Measurements
from lowrank.perfmodel.runtimes import bind_call, bind_profile, is_installed
from lowrank.perfmodel.timing import BUSY, CallTime

OTHERS = ("onnxruntime", "torch", "torch-channels-last")


def installed(*names):
    """Return parameters that are skipped where a runtime is not installed."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(not is_installed(name), reason="not installed"))
        for name in names
    ]


def stage(shape, ndim=2, groups=1, outer=1, inner=1, shuffle=(1, 1), transposed=False, **geometry):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    g = lr.Geometry.of(ndim, **geometry)
    return lr.Stage(weight, g, groups, outer, inner, shuffle, transposed)


#: Chains by what they have, and the input channels and axes that they take.
CHAINS = {
    "plain": [stage((6, 4, 3, 1), padding=[1, 0]), stage((5, 6, 1, 3), padding=[0, 1])],
    "blocks": [stage((32, 16, 3, 3), padding=1), stage((16, 32, 1, 1))],
    "thin": [stage((4, 32, 1, 1)), stage((32, 4, 3, 3), padding=1)],
    "strided": [stage((6, 4, 3, 3), stride=2, padding=1), stage((4, 6, 1, 1), stride=[2, 1])],
    "dilated": [stage((6, 4, 3, 3), dilation=[2, 3], padding=2)],
    "uneven padding": [stage((6, 4, 3, 2), padding=[1, (0, 1)])],
    "depthwise": [stage((32, 1, 3, 3), groups=32, padding=1), stage((8, 4, 3, 3), groups=8)],
    "grouped": [stage((32, 16, 3, 3), groups=2, padding=1)],
    "transposed": [stage((4, 6, 3, 3), transposed=True, stride=2, padding=1, output_padding=1)],
    "outer copies": [stage((6, 2, 3, 3), outer=3, padding=1)],
    "inner copies": [stage((6, 2, 3, 3), inner=3, padding=1), stage((4, 6, 1, 3), inner=3)],
    "transposed copies": [stage((4, 6, 3, 2), outer=2, inner=2, transposed=True, stride=2)],
    "shuffled": [stage((6, 1, 3, 3), groups=6, shuffle=(2, 3)),
                 stage((6, 1, 3, 3), groups=6, shuffle=(2, 3), transposed=True)],
    "one axis": [stage((6, 4, 5), 1, padding=2), stage((8, 6, 1), 1), stage((4, 2, 3), 1, inner=4)],
    "three axes": [stage((6, 4, 3, 1, 3), 3, padding=[1, 0, 1]),
                   stage((4, 3, 1, 1, 1), 3, inner=2)],
    "reflect": [stage((6, 4, 3, 3), padding=1, padding_mode="reflect")],
    "replicate": [stage((6, 4, 3, 3), padding=1, padding_mode="replicate")],
    "circular": [stage((6, 4, 3, 3), padding=1, padding_mode="circular")],
    "symmetric": [stage((6, 4, 3, 3), padding=1, padding_mode="symmetric")],
    "constant": [stage((6, 4, 3, 3), padding=1, padding_mode="constant", value=2.0)],
}  # fmt: skip
#: Chains for which a runtime has no operators.
MISSING = {
    "onnxruntime": {"symmetric"},
    "torch": {"symmetric", "constant"},
    "torch-channels-last": {"symmetric", "constant"},
}


def input_of(chain, batch=2):
    size = (9, 10, 8)[: chain[0].geometry.ndim]
    shape = batch, chain[0].in_channels, *size
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("runtime", installed("lowrank", *OTHERS))
def test_calls_compute_the_chain(runtime, name):
    chain = CHAINS[name]
    x = input_of(chain)
    if name in MISSING.get(runtime, ()):
        with pytest.raises(NotImplementedError, match=name):
            bind_call(runtime, chain, x, 1)()
        return
    expected = reference.run_chain(chain, x)
    # Sums of products of order 1 in float32; the least digits depend on their order.
    terms = math.prod(math.prod(s.weight.shape[1:]) for s in chain)
    close = {"rtol": 1e-5, "atol": 2e-6 * terms}
    with runtimes.threads_of(runtime, 1):
        found = bind_call(runtime, chain, x, 1)
        y = found()
    if runtime == "lowrank":
        y = found.args[1]
    np.testing.assert_allclose(np.asarray(y), expected, **close)


@pytest.mark.parametrize("runtime", installed(*OTHERS))
def test_biases_and_activations(runtime):
    chain = CHAINS["plain"]
    x = input_of(chain)
    rng = np.random.default_rng(2)
    ends = [Epilogue(rng.standard_normal(s.out_channels).astype(np.float32), activation)
            for s, activation in zip(chain, ("relu", "relu6"))]  # fmt: skip
    expected = x
    for s, end in zip(chain, ends):
        expected = reference.apply_epilogue(reference.run_stage(s, expected), end)
    if runtime == "onnxruntime":
        found = onnx.bind_call(chain, ends, x, 1)()
    else:
        found = pytorch.bind_call(chain, ends, x, runtime == "torch-channels-last")()
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["blocks", "thin", "one axis"])
@pytest.mark.skipif(not is_installed("onnxruntime"), reason="not installed")
def test_onnxruntime_puts_chains_between_neighbours(name):
    chain = CHAINS[name]
    x = input_of(chain)
    ends = [Epilogue()] * len(chain)
    # The neighbours halve their input; products with powers of two are exact.
    expected = onnx.bind_call(chain, ends, x, 1)() / 4
    np.testing.assert_allclose(onnx.bind_call(chain, ends, x, 1, in_network=True)(), expected,
                               rtol=1e-5, atol=1e-4)  # fmt: skip
    np.testing.assert_array_equal(onnx.bind_call((), (), x, 1, in_network=True)(), x / 4)


@pytest.mark.parametrize("name", ["blocks", "constant"], ids=["program", "planes"])
def test_profiles_time_the_stages_alone(name):
    chain = CHAINS[name]
    for threads in (1, 2):
        assert 0 < bind_profile(chain, input_of(chain), threads)() < 10


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"runtime 'onnxruntime' needs onnxruntime and onnx: pip install 'lowrank\[onnx\]'"
    with pytest.raises(ImportError, match=message):
        Measurements("onnxruntime")
    with pytest.raises(ImportError, match=message):
        perfmodel.calibrate(runtimes=["onnxruntime"])
    conv = lr.dense(np.ones((8, 8, 3, 3), np.float32))
    assert perfmodel.predict(conv, (20, 20), runtime="onnxruntime").seconds > 0


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", [(16, 32), (32, 16), (64, 8), (128, 14)])
def test_chains_cost_less_in_a_network(size, batch):
    channels, length = size
    shape = channels, length, length
    conv = lr.dense(np.ones((channels, channels, 3, 3), np.float32), padding=1)
    half = [stage((channels // 2, channels, 3, 1), padding=[1, 0]),
            stage((channels, channels // 2, 1, 3), padding=[0, 1])]  # fmt: skip
    here, compared = perfmodel.current(), 0
    for stages in (conv.stages, half):
        alone, inside = (
            here.predict_stages(stages, shape, batch, 1, in_network=n) for n in (False, True)
        )
        assert "call" not in inside.parts
        assert "move" not in inside.parts  # nothing is packed or unpacked
        assert "step" in inside.parts  # a program, even if planes are faster alone
        if "step" in alone.parts:
            assert inside.seconds < alone.seconds
            compared += 1
    assert compared > 0


def test_planes_run_what_no_program_runs():
    chain = CHAINS["constant"]
    here = perfmodel.current()
    alone, inside = (here.predict_stages(chain, (4, 9, 10), in_network=n) for n in (False, True))
    assert inside == alone


#: Chains whose operations in onnxruntime depend on the number of their channels.
LAYOUTS = {
    **{name: chain for name, chain in CHAINS.items() if name != "symmetric"},
    **{f"rank {n}": [stage((n, 32, 3, 1), padding=[1, 0]), stage((32, n, 1, 3), padding=[0, 1])]
       for n in (1, 6, 8, 15, 16, 18, 20, 33)},
    **{f"{n} depthwise": [stage((n, 16, 1, 1)), stage((n, 1, 3, 3), groups=n)]
       for n in (2, 6, 8, 17, 20)},
    "3 channels": [stage((16, 3, 3, 3))],
    "5 to 7": [stage((7, 5, 1, 1))],
    "groups": [stage((48, 24, 3, 3), groups=2), stage((32, 24, 3, 3), groups=2)],
    "multiplier": [stage((64, 1, 3, 3), groups=32)],
}  # fmt: skip


@pytest.mark.skipif(not is_installed("onnxruntime"), reason="not installed")
@pytest.mark.parametrize("in_network", [False, True], ids=["alone", "in a network"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_those_of_the_optimised_graph(name, in_network, tmp_path):
    from onnx import load
    from onnxruntime import InferenceSession, SessionOptions

    chain = LAYOUTS[name]
    x = input_of(chain)
    options = SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    model = onnx.chain_model(chain, [Epilogue()] * len(chain), x, in_network)
    InferenceSession(model, options, providers=["CPUExecutionProvider"])
    graph = load(options.optimized_model_filepath).graph
    found = sum(node.op_type.startswith("Reorder") for node in graph.node)
    if in_network:  # the neighbours reorder the input and the output
        blocked = [n % 4 == 0 for n in (chain[0].in_channels, chain[-1].out_channels)]
        found -= sum(blocked) if x.ndim == 4 else 0
    lanes = _core.plane_limits("float32", _core.ISAS[0]).lanes
    block = features_of_onnxruntime.block_size(_core.ISAS[0], 4)
    nodes = features_of_onnxruntime.nodes(chain, x.shape[1:], len(x), lanes, block, in_network)
    assert sum("reordered" in node.counts for node in nodes) == found


@pytest.mark.parametrize("in_network", [False, True], ids=["alone", "in a network"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_features_of_onnxruntime_grow_with_the_batch(name, in_network):
    chain = LAYOUTS[name]
    shape = input_of(chain).shape[1:]
    count = perfmodel.coefficients.RUNTIMES["onnxruntime"]
    one, two = (
        count(perfmodel.coefficients.Work(chain, shape, n, 1, in_network=in_network), 2)
        for n in (1, 2)
    )
    fixed = {"op", "call", "parallel region"}
    traffic = {"L2", "L3", "L3, all threads", "memory", "memory, all threads"}
    for feature in one.keys() - fixed - traffic:
        assert two[feature] == 2 * one[feature]
    assert all(two[feature] == one[feature] for feature in fixed)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Provide an empty cache folder, and forget the warnings of this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measurement, "_warnings", set())
    return tmp_path


@pytest.fixture
def timed(folder, monkeypatch):
    """Provide the numbers of calls of each measurement, whose times grow by 1 from call to call."""
    numbers = []

    def time_calls(calls, **_):
        for call in calls:
            call()
        numbers.append(len(calls))
        return [CallTime(float(len(numbers) * (n + 1)), 0.0) for n in range(len(calls))]

    monkeypatch.setattr(measurement, "time_calls", time_calls)
    return numbers


DENSE = [stage((16, 16, 3, 3), padding=1)]
LOW_RANK = [
    [stage((r, 16, 3, 1), padding=[1, 0]), stage((16, r, 1, 3), padding=[0, 1])] for r in (4, 8)
]
SHAPE = 16, 12, 12


@pytest.mark.parametrize("in_network", [False, True])
@pytest.mark.parametrize("runtime", installed("lowrank", *OTHERS))
def test_chains_are_measured(folder, runtime, in_network):
    seen = []
    found = Measurements(runtime, 2, 1, in_network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a busy machine
        dense, chains = found.seconds(DENSE, LOW_RANK, SHAPE, seen.append)
    assert 0 < dense < 10
    assert len(chains) == 2
    assert all(0 < t < 10 for t in chains)
    assert seen == sorted(seen)
    assert seen[-1] == 1
    assert found.seconds(DENSE, LOW_RANK[::-1], SHAPE) == (dense, chains[::-1])


def test_answers_are_kept_on_disk(timed):
    abstract = [[replace(s, weight=abstract_weight(s.weight.shape)) for s in chain]
                for chain in (DENSE, *LOW_RANK)]  # fmt: skip
    first = Measurements("lowrank", threads=1)
    assert first.seconds(DENSE, LOW_RANK[:1], SHAPE) == (1, [2])
    again = Measurements("lowrank", threads=1)
    assert again.seconds(abstract[0], abstract[1:2], SHAPE) == (1, [2])
    assert timed == [2]
    # The machine is half as fast now: the other chain is scaled by the kept dense stage.
    assert again.seconds(DENSE, LOW_RANK, SHAPE) == (1, [2, 2])
    assert timed == [2, 2]
    assert first.file.parent == perfmodel.path().parent
    assert len(json.loads(first.file.read_text())) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"batch": 2}, {"threads": 2}, {"in_network": False},
        pytest.param({"runtime": "torch"}, marks=pytest.mark.skipif(
            not is_installed("torch"), reason="not installed")),
    ],
)  # fmt: skip
def test_another_question_is_measured(timed, other):
    if other.get("threads", 1) > _core.max_threads():
        pytest.skip("one thread")
    given = {"runtime": "lowrank", "batch": 1, "threads": 1, "in_network": True}
    Measurements(**given).seconds(DENSE, [], SHAPE)
    Measurements(**{**given, **other}).seconds(DENSE, [], SHAPE)
    Measurements(**given).seconds(DENSE, [], (16, 12, 13))
    assert timed == [1, 1, 1]


def test_geometry_is_part_of_the_question(timed):
    found = Measurements("lowrank", threads=1)
    for options in ({}, {"stride": 2}, {"dilation": 2}, {"padding": [1, (0, 1)]},
                    {"padding": 1, "padding_mode": "reflect"}, {"transposed": True},
                    {"shuffle": (2, 3)}, {"groups": 2}):  # fmt: skip
        groups = options.get("groups", 1)
        found.seconds([stage((6, 6 // groups, 3, 3), **options)], [], (6, 12, 12))
    assert len(timed) == 8
    found.seconds([stage((6, 3, 3, 3), groups=2)], [], (6, 12, 12))
    assert len(timed) == 8


def test_results_of_other_processes_are_kept(timed):
    one, other = Measurements("lowrank", threads=1), Measurements("lowrank", threads=1)
    one.seconds(DENSE, LOW_RANK[:1], SHAPE)
    other.seconds(DENSE, LOW_RANK[1:], SHAPE)
    assert len(json.loads(one.file.read_text())) == 3


def test_oldest_results_are_dropped(timed, monkeypatch):
    monkeypatch.setattr(measurement, "MAX_ENTRIES", 2)
    found = Measurements("lowrank", threads=1)
    found.seconds(DENSE, LOW_RANK, SHAPE)
    keys = list(json.loads(found.file.read_text()))
    assert ["8,16,3,1" in key for key in keys] == [False, True]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": -1.0}', '{"a": "b"}', '{"a": NaN}'])
def test_damaged_files_are_replaced(timed, text):
    file = Measurements("lowrank", threads=1).file
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    with pytest.warns(UserWarning, match="is not a file of measured times"):
        found = Measurements("lowrank", threads=1)
    assert found.seconds(DENSE, [], SHAPE) == (1, [])
    assert list(json.loads(file.read_text()).values()) == [1]


def test_results_last_in_memory_without_a_folder(timed, folder):
    found = Measurements("lowrank", threads=1)
    found.file.parent.parent.mkdir(parents=True, exist_ok=True)
    found.file.parent.write_text("a file, not a folder")
    with pytest.warns(UserWarning, match="measured times are not kept"):
        assert found.seconds(DENSE, [], SHAPE) == (1, [])
    assert found.seconds(DENSE, [], SHAPE) == (1, [])
    assert timed == [1]


def test_busy_machines_are_reported_once(folder, monkeypatch):
    def time_calls(calls, **_):
        return [CallTime(1.0, 2 * BUSY) for _ in calls]

    monkeypatch.setattr(measurement, "time_calls", time_calls)
    found = Measurements("lowrank", threads=1)
    with pytest.warns(UserWarning, match="the machine is busy: .* 30%"):
        found.seconds(DENSE, [], SHAPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.seconds(DENSE, LOW_RANK, SHAPE)


@pytest.mark.skipif(not is_installed("onnxruntime"), reason="not installed")
def test_ends_of_a_network_are_subtracted(timed):
    found = Measurements("onnxruntime", threads=1)
    wider = [stage((32, 16, 3, 3), padding=1)]
    # Calls: the stage and its chain, the ends at the input, those at the wider output.
    assert found.seconds(wider, [[*LOW_RANK[0], stage((32, 16, 1, 1))]], SHAPE) == (
        measurement.LEAST, [measurement.LEAST],
    )  # fmt: skip
    assert timed == [4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runtime": "warp"}, r"runtime must be one of lowrank, .* got 'warp'"),
        ({"runtime": "lowrank", "batch": 0}, "batch must be at least 1, got 0"),
        ({"runtime": "lowrank", "threads": 0}, "threads must be between 1 and 2147483647, got 0"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        Measurements(**given)


@pytest.mark.skipif(not is_installed("onnxruntime"), reason="not installed")
def test_stages_that_a_runtime_lacks(folder):
    with pytest.raises(NotImplementedError, match="symmetric"):
        Measurements("onnxruntime").seconds(CHAINS["symmetric"], [], (4, 9, 10))
