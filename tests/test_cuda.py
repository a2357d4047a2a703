"""Chains on a GPU, or on an emulated one that runs the kernels compiled for the CPU."""

import sys
import types
import warnings

import fake_cupy
import numpy as np
import pytest

import lowrank
from lowrank import Geometry, Stage, filters
from lowrank.core import reference
from lowrank.engine.cuda import steps
from lowrank.families import FAMILIES, NotApplicable, als

ROUNDING = {"float32": 2.0**-24, "float64": 2.0**-53, "float16": 2.0**-11}


@pytest.fixture
def emulated():
    """Install the emulated CuPy, which records launches."""
    with fake_cupy.installed() as module:
        yield module


@pytest.fixture(params=["emulated", "realgpu"])
def cupy(request):
    """Provide the emulated CuPy, and CuPy itself if there is a GPU."""
    if request.param == "emulated":
        yield request.getfixturevalue("emulated")
        return
    module = pytest.importorskip("cupy", exc_type=ImportError)
    if not module.cuda.is_available():
        pytest.skip("there is no GPU")
    yield module


def assert_close(found, wanted, terms, dtype="float32", stages=1):
    """Check sums of `terms` products in any order, each stage rounded to its storage type."""
    found = found.get().astype(np.float64)
    assert found.shape == wanted.shape
    eps = ROUNDING["float64" if dtype == "float64" else "float32"] * terms
    scale = np.abs(wanted).max(initial=1e-30)
    bound = 8 * (eps + stages * ROUNDING[dtype]) * scale
    assert np.abs(found - wanted).max(initial=0) <= bound


def chains(transposed=False, ndim=2):
    rng = np.random.default_rng(0)
    conv = lowrank.dense(
        rng.standard_normal((6, 4, *(3,) * ndim)), rng.standard_normal(4 if transposed else 6),
        stride=2 if transposed else 1, padding=1, transposed=transposed,
    )  # fmt: skip
    for name, family in FAMILIES.items():
        try:
            variant = family.variants(conv)[0]
        except NotApplicable:
            continue
        point = next(iter(family.sweep(conv, variant)))
        yield name, family.fit(conv, point.rank, variant)


@pytest.mark.parametrize(("transposed", "ndim"), [(False, 2), (True, 2), (False, 1), (False, 3)])
def test_every_family_matches_the_cpu(transposed, ndim, cupy, rng):
    for name, f in chains(transposed, ndim):
        x = rng.standard_normal((2, f.in_channels, *(7, 6, 5)[:ndim])).astype(np.float32)
        g = f.astype(np.float32).to("cuda")
        assert (g.device, f.device) == ("cuda:0", "cpu")
        y = g(cupy.asarray(x))
        assert isinstance(y, cupy.ndarray), name
        assert y.dtype == np.float32
        wanted = reference.run_chain(f.stages, x.astype(np.float64), f.bias)
        assert_close(y, wanted, 200)


@pytest.mark.parametrize("mode", ["zeros", "constant", "replicate", "reflect", "circular"])
def test_padding_strides_and_dilations(mode, cupy, rng):
    for groups, per in ((4, 1), (2, 2), (1, 4)):
        for stride, dilation, padding in ((1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 3)):
            f = lowrank.dense(
                rng.standard_normal((8, per, 3, 3)), groups=groups, stride=stride, padding=padding,
                dilation=dilation, padding_mode=mode, value=0.5,
            )  # fmt: skip
            x = rng.standard_normal((2, 4, 9, 7)).astype(np.float32)
            y = f.astype(np.float32).to("cuda")(cupy.asarray(x))
            assert_close(y, f(x.astype(np.float64)), 36)


def test_steps_are_profiled_and_described(cupy, rng):
    f = lowrank.dense(rng.standard_normal((48, 6, 3, 3)), padding=1, stride=2)
    run = f.astype(np.float32).to("cuda").compile((9, 8))
    x = rng.integers(0, 200, (3, 6, 9, 8))
    assert_close(run(cupy.asarray(x.astype(np.float32))), f(x.astype(np.float64)), 54)
    steps_of = run.breakdown(cupy.asarray(x.astype(np.uint8)))
    kinds = ["channels last", "matrix product", "channels first", "rest"]
    assert [s.step for s in steps_of] == kinds
    assert steps_of[1].macs == 3 * 48 * 6 * 9 * 20
    title, _, *lines = run.describe(cupy.asarray(x.astype(np.float32))).splitlines()
    assert title == "cuda:0, float32"
    assert all(kind in line for kind, line in zip(kinds, lines))
    assert lines[-1].split()[0] == "total"
    assert "matrix product" in run.describe()
    with pytest.raises(TypeError, match="float16 cannot represent all values of uint16"):
        f.to("cuda").compile((9, 8), "float16")(cupy.asarray(x.astype(np.uint16)))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_every_kind_of_step_applies_its_epilogue(activation, cupy, rng):
    g = Geometry.of(2, padding=1)
    wide = lowrank.dense(rng.standard_normal((48, 4, 3, 3)), rng.standard_normal(48))
    narrow = lowrank.dense(rng.standard_normal((5, 4, 3, 3)), rng.standard_normal(5))
    depthwise = lowrank.dense(rng.standard_normal((4, 1, 3, 3)), rng.standard_normal(4), groups=4)
    pair = lowrank.chain(
        [Stage(rng.standard_normal((8, 1, 3, 3)), g, groups=4),
         Stage(rng.standard_normal((6, 8, 1, 1)), Geometry.of(2))],
        rng.standard_normal(6),
    )  # fmt: skip
    x = rng.standard_normal((2, 4, 6, 7)).astype(np.float32)
    for f in (wide, narrow, depthwise, pair):
        wanted = f(x.astype(np.float64))
        if activation != "none":
            wanted = np.clip(wanted, 0, 6 if activation == "relu6" else None)
        f = f.astype(np.float32).to("cuda")
        assert_close(f.compile((6, 7), activation=activation)(cupy.asarray(x)), wanted, 72)


def test_colour_images_and_integers_match_the_cpu(cupy, rng):
    picture = rng.integers(0, 256, (20, 23, 3)).astype(np.uint8)
    for kernel in (filters.gauss(1.0), rng.random((3, 3)) / 9):
        found = lowrank.filter_image(cupy.asarray(picture), kernel)
        assert found.dtype == np.uint8
        wanted = lowrank.filter_image(picture, kernel)
        # a sum halfway between two levels may round either way
        assert np.abs(found.get().astype(int) - wanted.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"mode": ("wrap", "constant"), "cval": 2.0}, {"padding": "full"}, {"padding": "valid"},
        {"dtype": np.float64}, {"dtype": np.int16}, {"dtype": bool}, {"mode": "constant",
        "cval": np.nan, "padding": "same"}, {"axes": (2, 1), "origin": -1},
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32, np.complex64])
def test_filter_arguments_match_the_cpu(options, dtype, cupy, rng):
    if dtype == np.complex64 and "dtype" in options:
        options = {"dtype": np.complex128}
    image = rng.integers(0, 3 if dtype is bool else 100, (12, 13, 4)).astype(dtype)
    kernels = filters.sobel(), rng.integers(0, 2, (3, 3)) + 1.0, np.ones((2, 1, 2, 2))[:, 0]
    for kernel in (*kernels, kernels[1] + 2j):
        some = options if np.ndim(kernel) == 2 else {**options, "axes": None}
        if np.ndim(kernel) == 3 and not isinstance(options.get("mode", ""), str):
            some = {**some, "mode": ("wrap", "constant", "mirror")}
        if np.iscomplexobj(kernel) and np.dtype(some.get("dtype", complex)).kind != "c":
            continue
        wanted = filters.correlate(image, kernel, **some)
        found = filters.correlate(cupy.asarray(image), kernel, **some)
        assert (found.dtype, type(found)) == (wanted.dtype, cupy.ndarray)
        out = cupy.empty(wanted.shape, np.complex64)
        assert (
            filters.correlate(cupy.asarray(image), kernel, **{**some, "dtype": None}, out=out)
            is out
        )
        for result in (found, out):
            if wanted.dtype.kind in "fc" or result is found:  # exact: sums of small integers
                np.testing.assert_array_equal(result.get(), wanted)


def test_kernels_of_many_axes_match_the_cpu(cupy, rng):
    image = rng.random((5, 4, 6, 5))
    for kernel in (rng.random((2, 1, 3, 2)), rng.random((2, 3, 2, 2)), np.ones((2, 3, 2, 3))):
        found = filters.correlate(cupy.asarray(image), kernel, mode="constant", cval=1.0)
        wanted = filters.correlate(image, kernel, mode="constant", cval=1.0)
        assert_close(found, wanted, kernel.size, "float64", 2)


def test_replications_and_shuffles_match_the_cpu(cupy, rng):
    g = Geometry.of(2, padding=1)
    for options in ({"outer": 2}, {"inner": 3}, {"outer": 2, "inner": 2, "shuffle": (2, 2)}):
        for shape, groups in (((8, 1, 3, 3), 4), ((6, 2, 3, 3), 2), ((40, 2, 1, 1), 1)):
            g = Geometry.of(2, padding=shape[2] // 2)
            stage = Stage(rng.standard_normal(shape), g, groups=groups, **options)
            x = rng.standard_normal((2, stage.in_channels, 6, 5)).astype(np.float32)
            f = lowrank.chain([stage])
            assert_close(
                f.astype(np.float32).to("cuda")(cupy.asarray(x)), f(x.astype(np.float64)), 36
            )


def test_half_precision_is_stored_and_summed_in_float32(cupy, rng):
    f = lowrank.dense(
        rng.standard_normal((4, 1, 3, 3)), rng.standard_normal(4), groups=4, padding=1
    )
    f = f.astype(np.float32)
    x = rng.standard_normal((2, 4, 8, 8)).astype(np.float16)
    y = f.to("cuda")(cupy.asarray(x))
    assert y.dtype == np.float16
    rounded = lowrank.dense(
        f.stages[0].weight.astype(np.float16), f.bias, groups=4, padding=1
    )  # weights are rounded, too
    assert_close(y, rounded(x.astype(np.float32)), 9, "float16")


def test_results_go_to_out(cupy, rng):
    f = lowrank.dense(rng.standard_normal((4, 3, 3, 3)).astype(np.float32)).to("cuda")
    x = cupy.asarray(rng.standard_normal((2, 3, 6, 6)).astype(np.float32))
    run = f.compile((6, 6))
    out = cupy.empty((2, 4, 4, 4), np.float32)
    assert run(x, out) is out
    assert (out.get() == run(x).get()).all()
    small = cupy.empty((2, 4, 4, 4), np.int8)
    run(x, small)
    assert (small.get() == np.clip(np.rint(out.get()), -128, 127)).all()
    assert run(x[:0]).shape == (0, 4, 4, 4)
    strided = cupy.asarray(np.repeat(x.get(), 2, axis=3))[:, :, :, ::2]
    assert (run(strided).get() == out.get()).all()


def several_steps(family, rng):
    """Return a plan of several launches, and its input and output on the GPU."""
    import cupy

    conv = lowrank.dense(rng.standard_normal((48, 40, 3, 3)).astype(np.float32), padding=1)
    rank = {"network_decoupling": 2, "tucker": (40, 40), "spatial_svd": 40}[family]
    run = FAMILIES[family].fit(conv, rank, None).to("cuda").compile((6, 6))
    x = rng.standard_normal((2, 40, 6, 6)).astype(np.float32)
    return run, cupy.asarray(x), cupy.empty((2, 48, 6, 6), np.float32)


def test_each_stream_has_its_own_buffers(cupy, rng):
    run, x, _ = several_steps("tucker", rng)
    first = run(x).get()
    many = len(run.buffers)
    with cupy.cuda.Stream(non_blocking=True):  # it waits for the weights, which another uploads
        second = run(x).get()
    assert (first == second).all()
    assert (run(x).get() == first).all()
    assert len(run.buffers) == many + 1
    for batch in range(1, 12):
        run(cupy.asarray(np.zeros((batch, 40, 6, 6), np.float32)))
    assert len(run.buffers) <= 8


@pytest.mark.parametrize("family", ["tucker", "spatial_svd"])
def test_repeated_runs_replay_a_graph(family, emulated, rng):
    run, x, out = several_steps(family, rng)
    run(x, out)
    (buffers,) = run.buffers.values()
    fake_cupy.hooks.allocations = 0  # none is allowed from here on
    for _ in range(3):  # captured, replayed
        fake_cupy.hooks.launches.clear()
        values = rng.standard_normal(x.shape).astype(np.float32)
        x.set(values)
        run(x, out)
        assert list(buffers.graphs.values()) != [None]
        found = out.get()
        fake_cupy.hooks.allocations = None
        assert (run(emulated.asarray(values)).get() == found).all()
        fake_cupy.hooks.allocations = 0
    fake_cupy.hooks.allocations = None
    outs = [run(x) for _ in range(6)]  # each has another address
    assert len(buffers.graphs) == 4
    assert all((y.get() == outs[0].get()).all() for y in outs)


@pytest.mark.parametrize("family", ["tucker", "spatial_svd", "network_decoupling"])
def test_channels_last_arrays_are_used_in_place(family, emulated, rng):
    run, x, out = several_steps(family, rng)
    wanted = run(x, out).get()
    memory = emulated.ascontiguousarray(x.transpose(0, 2, 3, 1))
    x_last = memory.transpose(0, 3, 1, 2)
    out_last = emulated.empty((2, 6, 6, 48), np.float32).transpose(0, 3, 1, 2)
    cases = (x, out, 2), (x_last, out, 1), (x, out_last, 1), (x_last, out_last, 0)
    for given, to, count in cases:
        for _ in range(3):  # launched, captured into a graph, replayed
            fake_cupy.hooks.launches.clear()
            to.fill(0)
            assert run(given, to) is to
            np.testing.assert_array_equal(to.get(), wanted)
            names = [launch.name.partition("<")[0] for launch in fake_cupy.hooks.launches]
            assert names.count("transpose") == count
    assert (run(x_last).get() == wanted).all()
    assert len(run.breakdown(x_last, out_last)) == len(run.steps) + 1


def test_plans_that_cannot_be_captured_run_step_by_step(emulated, rng):
    run, x, out = several_steps("tucker", rng)
    wanted = run(x, out).get()
    fake_cupy.hooks.capture_error = 900
    with pytest.warns(RuntimeWarning, match="cannot be captured into a CUDA graph"):
        run(x, out)
    out.fill(0)
    assert (run(x, out).get() == wanted).all()  # without another warning


@pytest.mark.parametrize("family", ["network_decoupling", "tucker", "spatial_svd"])
def test_the_caller_can_capture_a_graph_after_a_run(family, cupy, rng):
    run, x, out = several_steps(family, rng)
    x.get()  # waits for the copy
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match="run the plan once on this stream with 2 examples"):
            run(x, out)
        stream.end_capture()
        wanted = run(x, out).get()
        stream.begin_capture()
        with pytest.raises(ValueError, match="while a graph is captured"):
            run(x)
        run(x, out)
        graph = stream.end_capture()
        out.fill(0)
        graph.launch()
        assert (out.get() == wanted).all()
        (captured,) = (key for key, buffers in run.buffers.items() if buffers.is_captured)
        for batch in range(3, 20):
            run(cupy.asarray(np.zeros((batch, 40, 6, 6), np.float32)))
    assert captured in run.buffers  # the graph refers to its addresses


def test_arrays_on_another_device_are_rejected(emulated, rng):
    f = lowrank.dense(rng.standard_normal((4, 3, 3, 3)).astype(np.float32))
    x = rng.standard_normal((1, 3, 6, 6)).astype(np.float32)
    with pytest.raises(TypeError, match=r"x is a cupy array but the weights are numpy arrays"):
        f(emulated.asarray(x))
    with pytest.raises(TypeError, match=r"x is a numpy array but the weights are cupy arrays"):
        f.to("cuda")(x)
    other = f.to("cuda:1")
    assert other.device == "cuda:1"
    with pytest.raises(ValueError, match="x is on cuda:0 but the weights are on cuda:1"):
        other(emulated.asarray(x))
    run = f.to("cuda").compile((6, 6))
    with emulated.cuda.Device(1):
        x_on_1 = emulated.asarray(x)
    with pytest.raises(ValueError, match="x is on cuda:1 but the weights are on cuda:0"):
        run(x_on_1)
    with pytest.raises(TypeError, match="x must be a CuPy array"):
        run(x)
    assert_close(other(x_on_1), f(x.astype(np.float32)).astype(np.float64), 27)
    with pytest.raises(ValueError, match="there is no cuda:7: this machine has 2 GPUs"):
        f.to("cuda:7")
    with pytest.raises(ValueError, match="device must be"):
        f.to("gpu")


def test_chains_move_to_the_gpu_and_back(emulated, rng):
    f = lowrank.tucker(
        lowrank.dense(rng.standard_normal((8, 6, 3, 3)), rng.standard_normal(8)), (2, 3)
    )
    back = f.to("cuda").to("cpu")
    assert all((a.weight == b.weight).all() for a, b in zip(f.stages, back.stages))
    assert (back.bias == f.bias).all()
    g = f.to("cuda")
    assert g.to("cuda") is g
    assert g.to("cuda:1").device == "cuda:1"
    assert (g.params, g.cost((9, 9)).macs) == (f.params, f.cost((9, 9)).macs)
    assert "Factorization tucker" in repr(g)


def test_wrong_shapes_and_types_are_rejected(cupy):
    f = lowrank.dense(np.ones((4, 3, 3, 3), np.float32)).to("cuda")
    with pytest.raises(ValueError, match="must be"):
        f(cupy.asarray(np.ones((1, 2, 6, 6), np.float32)))
    run = f.compile((6, 6))
    with pytest.raises(ValueError, match=r"x must have shape \(batch"):
        run(cupy.asarray(np.ones((1, 3, 7, 6), np.float32)))
    with pytest.raises(TypeError, match="must be float32"):
        run(cupy.asarray(np.ones((1, 3, 6, 6))))
    with pytest.raises(TypeError, match="dtype must be one of float32, float64, float16, bfloat16"):
        f.compile((6, 6), np.int32)
    with pytest.raises(ValueError, match="out must have shape"):
        run(cupy.asarray(np.ones((1, 3, 6, 6), np.float32)), cupy.empty((1, 4, 5, 4), np.float32))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("count_error", 35, "driver is missing, or too old"),
        ("count_error", 100, "no GPU that CUDA can use"),
        ("count_error", 2, "does not start"),
        ("devices", 0, "no device"),
        ("missing", {"cublas"}, "CUDA's cublas cannot be loaded: .*cupy-cuda13x"),
        ("missing", {"nvrtc", "headers"}, "CUDA's nvrtc and headers cannot be loaded"),
    ],
)
def test_missing_parts_are_named(name, value, words, emulated):
    setattr(fake_cupy.hooks, name, value)
    with pytest.raises(lowrank.engine.NoGPU, match=words):
        lowrank.dense(np.ones((4, 3, 3, 3))).to("cuda")


def test_old_versions_of_cupy_are_refused(emulated, monkeypatch):
    monkeypatch.setattr(fake_cupy, "__version__", "13.6.0")
    with pytest.raises(lowrank.engine.NoGPU, match=r"CuPy must be 14 or newer, got 13\.6\.0"):
        lowrank.dense(np.ones((4, 3, 3, 3))).to("cuda")


def test_chains_run_in_array_code_without_a_compiler(emulated, rng):
    f = lowrank.tucker(
        lowrank.dense(rng.standard_normal((8, 6, 3, 3)), rng.standard_normal(8), padding=1), (2, 3)
    )
    x = rng.standard_normal((2, 6, 7, 7)).astype(np.float32)
    fake_cupy.hooks.compile_error = "no NVRTC"
    with pytest.warns(RuntimeWarning, match="could not be compiled"):
        run = f.astype(np.float32).to("cuda").compile((7, 7), activation="relu")
    assert_close(run(emulated.asarray(x)), np.maximum(f(x.astype(np.float64)), 0), 60)


def test_a_full_gpu_is_explained_and_stays_usable(emulated, rng):
    f = FAMILIES["tucker"].fit(lowrank.dense(rng.standard_normal((48, 40, 3, 3))), (20, 20), None)
    x = emulated.asarray(rng.standard_normal((1, 40, 6, 6)).astype(np.float32))
    wanted = f.astype(np.float32).to("cuda")(x).get()
    failures = 0
    while True:  # the first allocation fails, the second, and so on
        fake_cupy.hooks.allocations = failures
        try:
            found = f.astype(np.float32).to("cuda").compile((6, 6))(x).get()
        except MemoryError as error:
            assert "MiB free" in str(error)  # noqa: PT017
        else:
            break
        failures += 1
        assert (f.astype(np.float32).to("cuda")(x).get() == wanted).all()
    assert failures > 8
    assert (found == wanted).all()


@pytest.mark.parametrize(
    ("kind", "status"), [("CUDARuntimeError", 2), ("CUDADriverError", 2), ("CUBLASError", 3)]
)
def test_errors_of_libraries_about_memory_are_explained(kind, status, emulated):
    from lowrank.engine.cuda import device

    def raised(status):
        return type(kind, (RuntimeError,), {"status": status})()

    with (
        pytest.raises(MemoryError, match="about 8 MiB more"),
        device.explain_out_of_memory(8 << 20),
    ):
        raise raised(status)
    with pytest.raises(RuntimeError), device.explain_out_of_memory(1):
        raise raised(700)


@pytest.mark.parametrize(
    ("limit", "words"),
    [("launch.MAX_THREADS", "at most 2000 threads, got 3584"),
     ("gemm.MAX_PIXELS", "at most 300 samples, got 420")],
)  # fmt: skip
def test_numbers_of_more_than_32_bits_are_refused(limit, words, emulated, monkeypatch):
    conv = lowrank.dense(np.ones((1, 3, 1, 1), np.float32), np.ones(1, np.float32))
    run = conv.to("cuda").compile((6, 35))
    x = emulated.zeros((2, 3, 6, 35), np.float32)
    run(x)
    monkeypatch.setattr(f"lowrank.engine.cuda.{limit}", int(words.split()[2]))
    run(x[:1])
    with pytest.raises(ValueError, match=words):
        run(x)


def test_dlpack_arrays_are_accepted(cupy, rng):
    f = lowrank.dense(rng.standard_normal((4, 3, 3, 3)).astype(np.float32)).to("cuda")
    x = rng.standard_normal((1, 3, 6, 6)).astype(np.float32)
    y = f(cupy.from_dlpack(cupy.asarray(x)))
    assert (cupy.from_dlpack(y).get() == y.get()).all()


def test_chains_are_partitioned_without_a_gpu():
    conv = lowrank.dense(np.ones((64, 64, 3, 3), np.float32), padding=1)
    f = lowrank.network_decoupling(conv, 1)
    fused, single = "depthwise + pointwise", ["depthwise, channels last", "matrix product"]
    for tensor_cores, kinds in ((True, [fused]), (False, single)):
        found = steps.partition(f.stages, (64, 28, 28), tensor_cores=tensor_cores)
        assert [s.kind for s in found] == ["channels last", *kinds, "channels first"]


def test_gpu_predictions_need_a_calibration():
    conv = lowrank.dense(np.ones((8, 8, 3, 3), np.float32), padding=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lowrank.perfmodel.current()
    if "cuda" in model.coefficients:
        pytest.skip("this machine's GPU has been measured")
    with pytest.raises(ValueError, match="calibrate --device cuda"):
        model.predict(conv, (28, 28), runtime="cuda")


@pytest.fixture
def tensorly(cupy, monkeypatch):
    """Provide TensorLy with its CuPy backend, which is unloaded afterwards if emulated."""
    import sys
    import types

    import tensorly as tl

    if cupy is not fake_cupy:
        yield tl
        return
    for name in ("cupyx", "cupyx.scipy", "cupyx.scipy.special"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["cupyx"].scipy = sys.modules["cupyx.scipy"]
    sys.modules["cupyx.scipy"].special = sys.modules["cupyx.scipy.special"]
    monkeypatch.delitem(sys.modules, "tensorly.backend.cupy_backend", raising=False)
    manager = type(sys.modules["tensorly.backend"])
    loaded = dict(manager._loaded_backends)
    yield tl
    manager._loaded_backends.clear()
    manager._loaded_backends.update(loaded)
    sys.modules.pop("tensorly.backend.cupy_backend", None)


@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_are_decomposed_on_their_device(transposed, cupy, tensorly):
    for name, wanted in chains(transposed):
        conv = lowrank.dense(
            np.random.default_rng(0).standard_normal((6, 4, 3, 3)),
            stride=2 if transposed else 1, padding=1, transposed=transposed,
        )  # fmt: skip
        found = FAMILIES[name].fit(conv.to("cuda"), wanted.rank, wanted.variant)
        assert found.device == "cuda:0", name
        # Damped normal equations shrink each of up to four factors, and sums have another order.
        gap = np.abs(found.to_dense() - wanted.to_dense()).max()
        assert gap <= 4 * als.DAMPING * np.abs(wanted.to_dense()).max(), name


def test_approximate_chooses_the_same_on_gpu_and_cpu(cupy, tensorly, rng):
    conv = lowrank.dense(rng.standard_normal((12, 8, 3, 3)), padding=1)
    found, wanted = (lowrank.approximate(c, (8, 8), macs=0.4) for c in (conv.to("cuda"), conv))
    assert found.device == "cuda:0"
    assert (found.family, found.variant, found.rank) == (wanted.family, wanted.variant, wanted.rank)
    ours, theirs = (lowrank.certificate(conv, f) for f in (found, wanted))
    assert np.isclose(ours.error, theirs.error, rtol=1e-6)
    assert np.isclose(ours.sensitivity, theirs.sensitivity, rtol=1e-4)


@pytest.mark.parametrize("wide", [False, True])
def test_metrics_are_accumulated_on_the_gpu(wide, cupy, monkeypatch, rng):
    from lowrank import metric
    from lowrank.metric import moments

    if wide:
        monkeypatch.setattr(moments, "WIDEST", 10)
    conv = lowrank.dense(rng.standard_normal((5, 4, 3, 3)), padding=1)
    on_cpu, on_gpu = (metric.Moments(conv, paired=not wide, centred=True) for _ in range(2))
    for _ in range(2):
        x, x0 = rng.standard_normal((2, 3, 4, 7, 7)).astype(np.float32)
        g = rng.standard_normal((3, 5, 7, 7)).astype(np.float32)
        on_cpu.add(x, None if wide else x0)
        on_gpu.add(cupy.asarray(x), None if wide else cupy.asarray(x0))
        on_cpu.add_gradients(g)
        on_gpu.add_gradients(cupy.asarray(g))
    a, b = on_cpu.metric(), on_gpu.metric()
    for name in ("input_moment", "channel_factor", "gradient_moment", "target", "mean"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert isinstance(y, np.ndarray)
            assert np.abs(x - y).max() <= 1e-6 * np.abs(x).max()  # products in float32


def test_blocks_move_to_the_gpu(emulated, rng):
    block = lowrank.blocks.fused_separable(
        rng.standard_normal((8, 1, 3, 3)).astype(np.float32),
        rng.standard_normal((16, 8, 1, 1)).astype(np.float32),
        activation=["relu6", "relu"],
    )
    x = rng.standard_normal((2, 8, 9, 9)).astype(np.float32)
    wanted = block.compile((9, 9))(x)
    run = block.to("cuda").compile((9, 9))
    assert_close(run(emulated.asarray(x)), wanted.astype(np.float64), 80)


def test_infinities_do_not_spread_beyond_the_taps(cupy):
    image = np.zeros((20, 21))
    image[9, 10] = np.inf
    found = filters.correlate(cupy.asarray(image), np.ones((3, 5)) / 15, method="separable").get()
    assert (np.isinf(found)).sum() == 15
    assert not np.isnan(found).any()


def test_bfloat16_is_stored_and_summed_in_float32(cupy, rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    f = lowrank.dense(rng.standard_normal((40, 4, 3, 3)), rng.standard_normal(40), padding=1)
    f = f.astype(np.float32)
    x = rng.standard_normal((2, 4, 8, 8)).astype(ml_dtypes.bfloat16)
    run = f.to("cuda").compile((8, 8), "bfloat16")
    y = run(cupy.asarray(x))
    assert y.dtype == ml_dtypes.bfloat16
    weight = f.stages[0].weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    rounded = lowrank.dense(weight, f.bias, padding=1)
    wanted = rounded(x.astype(np.float64))
    gap = np.abs(y.get().astype(np.float64) - wanted).max()
    # Two roundings to 8 bits: the product is stored before the bias is added.
    assert gap <= 2.0**-7 * np.abs(wanted).max()


def test_weights_and_bias_must_share_a_device(emulated):
    f = lowrank.dense(np.ones((4, 3, 3, 3), np.float32), np.ones(4, np.float32))
    g = f.to("cuda")
    with pytest.raises(ValueError, match=r"weights and bias .* cpu and cuda:0"):
        lowrank.chain([*g.stages], f.bias)
    assert g.error(g.stages[0].weight) == 0


def test_results_stay_on_the_device_of_the_arrays(emulated, rng):
    from lowrank.metric import Moments

    conv = lowrank.dense(rng.standard_normal((6, 4, 3, 3)), padding=1)
    with emulated.cuda.Device(1):
        x = emulated.asarray(rng.standard_normal((2, 4, 6, 6)).astype(np.float32))
    other = conv.astype(np.float32).to("cuda:1")
    assert other(x).device.id == 1
    moments = Moments(conv)
    moments.add(x)
    assert np.isfinite(moments.metric().input_moment).all()
    assert filters.correlate(x[0, 0], filters.gauss(1.0)).device.id == 1
    for name in ("channel_svd", "tucker", "network_decoupling"):
        point = next(iter(FAMILIES[name].sweep(conv, FAMILIES[name].variants(conv)[0])))
        assert FAMILIES[name].fit(other, point.rank, None).device == "cuda:1"


def test_eigh_of_large_matrices(cupy, rng):
    from lowrank.core import chain_algebra

    a = rng.standard_normal((2, 40, 40))
    a = a @ a.swapaxes(1, 2)
    values, vectors = chain_algebra.eigh(cupy.asarray(a))
    back = (vectors * values[:, None]) @ vectors.swapaxes(1, 2)
    assert np.abs(back.get() - a).max() <= 1e-12 * np.abs(a).max()


def test_filters_keep_no_plan_of_another_array_module(emulated, monkeypatch, rng):
    from lowrank.filters import gpu

    image, kernel = emulated.asarray(rng.random((20, 21))), filters.gauss(1.0)
    filters.correlate(image, kernel)
    plans = gpu._compile.cache_info().misses
    filters.correlate(image, kernel)
    assert gpu._compile.cache_info().misses == plans
    other = types.ModuleType("cupy")
    vars(other).update(vars(fake_cupy))
    monkeypatch.setitem(sys.modules, "cupy", other)
    filters.correlate(image, kernel)
    assert gpu._compile.cache_info().misses == plans + 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_pytorch_runs_on_its_own_stream_and_memory(dtype, emulated, monkeypatch, rng):
    torch = pytest.importorskip("torch")
    from lowrank.interop.torch import engine

    current = types.SimpleNamespace(cuda_stream=64)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    f = lowrank.dense(rng.integers(-2, 3, (4, 3, 3, 3)).astype(np.float32))
    x = rng.integers(-2, 3, (2, 3, 6, 6)).astype(np.float32)  # exact in every type
    y = torch.empty((2, 4, 4, 4), dtype=getattr(torch, dtype))
    run = f.to("cuda").compile((6, 6), dtype)
    engine._run_on_gpu(run, torch.from_numpy(x).to(y.dtype), y)
    assert {launch.stream for launch in fake_cupy.hooks.launches} == {64}
    assert (y.float().numpy() == f(x)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_pytorch_tensors_of_a_gpu(dtype, rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("cupy", exc_type=ImportError)
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    from lowrank.interop.torch import on_engine

    conv = torch.nn.Conv2d(3, 40, 3, padding=1)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.from_numpy(rng.integers(-2, 3, parameter.shape)))
        x = torch.from_numpy(rng.integers(-2, 3, (2, 3, 9, 8))).float()
        wanted, model = conv(x), on_engine(torch.nn.Sequential(conv).eval())
        x = x.cuda().to(getattr(torch, dtype))
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)):
            part = given[..., :8]
            for _ in range(3):  # planned, captured into a graph, replayed
                assert (model(part).float().cpu() == wanted).all()
            with torch.cuda.stream(torch.cuda.Stream()):
                found = model(part).float().cpu()
            assert (found == wanted).all()
