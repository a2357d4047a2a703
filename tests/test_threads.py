"""Numbers of threads: every public function that takes one checks it alike."""

import importlib
import inspect
import re

import numpy as np
import pytest

import lowrank as lr
from lowrank import blocks, compress, demo, filters, perfmodel, selection
from lowrank.core.threads import MOST_THREADS, as_threads
from lowrank.engine import dask as chunked
from lowrank.engine import fourier
from lowrank.interop.weights import WeightsModel

IMAGE = np.ones((12, 10), np.float32)
TAPS = np.ones(3)
CONV = lr.dense(np.ones((4, 2, 3, 3), np.float32), padding=1)
MODULES = (
    "lowrank", "lowrank.blocks", "lowrank.compress", "lowrank.engine.dask",
    "lowrank.engine.fourier", "lowrank.filters", "lowrank.interop.onnx", "lowrank.interop.torch",
    "lowrank.ndimage", "lowrank.perfmodel", "lowrank.report", "lowrank.selection",
)  # fmt: skip


def _dask(threads):
    x = pytest.importorskip("dask.array").ones((1, 2, 8, 8))
    return chunked.run(CONV, x, threads=threads)


def _torch(call):
    def run(threads):
        torch = pytest.importorskip("torch")
        from lowrank.interop import torch as interop

        return call(torch, interop, threads)

    return run


def _onnx(threads):
    parser = pytest.importorskip("onnx").parser
    pytest.importorskip("onnxruntime")
    from lowrank.interop.onnx import on_engine

    head = '<ir_version: 8, opset_import: ["" : 17]>'
    model = parser.parse_model(head + "n (float[1, 4] x) => (float[1, 4] y) {y = Relu(x)}")
    return on_engine(model, threads=threads)


def _report(threads):
    from lowrank import report

    model = WeightsModel(demo.WEIGHTS)
    plan = compress.make_plan(model, macs=0.5)
    return report.compare(model, compress.compress_model(model, plan), threads=threads)


ENTRIES = {
    "lowrank.approximate": lambda t: lr.approximate(CONV, (8, 8), macs=0.9, threads=t),
    "lowrank.frontier": lambda t: lr.frontier(CONV, (8, 8), ["spatial_svd"], threads=t),
    "lowrank.filter_image": lambda t: lr.filter_image(IMAGE, np.eye(3), threads=t),
    "lowrank.plan_filter": lambda t: lr.plan_filter(np.eye(3), (12, 10), threads=t),
    "lowrank.Factorization.compile": lambda t: CONV.compile((8, 8), threads=t),
    "lowrank.blocks.Block.compile": lambda t: blocks.mobilenet_v1(
        np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1))
    ).compile((3, 8, 8), threads=t),
    "lowrank.compress.make_plan": lambda t: compress.make_plan(
        WeightsModel(demo.WEIGHTS), macs=0.5, threads=t
    ),
    "lowrank.engine.dask.run": _dask,
    "lowrank.engine.fourier.plan": lambda t: fourier.plan(TAPS, [12], np.float32, threads=t),
    "lowrank.filters.convolve": lambda t: filters.convolve(IMAGE, TAPS, axes=0, threads=t),
    "lowrank.filters.correlate": lambda t: filters.correlate(IMAGE, TAPS, axes=0, threads=t),
    "lowrank.filters.correlate_bank": lambda t: filters.correlate_bank(
        IMAGE, [np.eye(3), np.ones((3, 3))], threads=t
    ),
    "lowrank.filters.gaussian_derivatives": lambda t: filters.gaussian_derivatives(
        IMAGE, 1.0, [(1, 0)], threads=t
    ),
    "lowrank.filters.gaussian_laplace": lambda t: filters.gaussian_laplace(IMAGE, 1.0, threads=t),
    "lowrank.filters.gradient": lambda t: filters.gradient(IMAGE, 1.0, threads=t),
    "lowrank.filters.gradient_magnitude": lambda t: filters.gradient_magnitude(
        IMAGE, 1.0, threads=t
    ),
    "lowrank.filters.hessian": lambda t: filters.hessian(IMAGE, 1.0, threads=t),
    "lowrank.filters.normalised_correlate": lambda t: filters.normalised_correlate(
        IMAGE, TAPS, weights=IMAGE > 0, axes=0, threads=t
    ),
    "lowrank.filters.separable_correlate": lambda t: filters.separable_correlate(
        IMAGE, [TAPS, TAPS], threads=t
    ),
    "lowrank.filters.structure_tensor": lambda t: filters.structure_tensor(
        IMAGE, 1.0, 1.0, threads=t
    ),
    "lowrank.interop.onnx.on_engine": _onnx,
    "lowrank.interop.torch.EngineModule": _torch(
        lambda torch, interop, t: interop.EngineModule([(CONV, "none")], t)
    ),
    "lowrank.interop.torch.on_engine": _torch(
        lambda torch, interop, t: interop.on_engine(torch.nn.Conv2d(2, 3, 3), threads=t)
    ),
    "lowrank.perfmodel.PerformanceModel.predict": lambda t: perfmodel.current().predict(
        CONV, (8, 8), threads=t
    ),
    "lowrank.perfmodel.PerformanceModel.predict_fft": lambda t: perfmodel.current().predict_fft(
        (3,), (12,), (16,), threads=t
    ),
    "lowrank.perfmodel.PerformanceModel.predict_stages": lambda t: (
        perfmodel.current().predict_stages(CONV.stages, (2, 8, 8), threads=t)
    ),
    "lowrank.perfmodel.predict": lambda t: perfmodel.predict(CONV, (8, 8), threads=t),
    "lowrank.report.compare": _report,
    "lowrank.selection.choose": lambda t: selection.choose(CONV, (8, 8), macs=0.9, threads=t),
}  # fmt: skip


def _public_entries():
    """Return the names of public functions and methods with an optional `threads`."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in getattr(module, "__all__", dir(module)):
            value = getattr(module, attribute)
            if attribute.startswith("_") or inspect.ismodule(value):
                continue
            if not getattr(value, "__module__", "").startswith("lowrank"):
                continue
            functions = {"": value}
            if inspect.isclass(value):
                functions = {f".{k}": v for k, v in vars(value).items() if not k.startswith("_")}
            for suffix, f in functions.items():
                threads = inspect.isfunction(f) and inspect.signature(f).parameters.get("threads")
                if threads and threads.default is None:
                    found.setdefault(f, f"{name}.{attribute}{suffix}")
    return set(found.values())


def test_every_public_entry_is_tried():
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    assert _public_entries() == set(ENTRIES) - {"lowrank.interop.torch.EngineModule"}  # a class


@pytest.mark.parametrize("threads", [0, -1, 2**31, 2**63, 2**64, -(2**63)])
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_number_out_of_range_is_named(entry, threads):
    with pytest.raises(
        ValueError, match=f"^threads must be between 1 and 2147483647, got {threads}$"
    ):
        ENTRIES[entry](threads)


@pytest.mark.parametrize("threads", [1.5, True, "2", (2,)])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_integer(entry, threads):
    sentence = re.escape(f"threads must be an integer, got {threads!r}")
    with pytest.raises(TypeError, match=f"^{sentence}$"):
        ENTRIES[entry](threads)


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_largest_number_is_taken(entry):
    ENTRIES[entry](MOST_THREADS)


def test_numpy_integers_and_none():
    assert as_threads(np.int64(3)) == 3
    assert as_threads(None) is None
