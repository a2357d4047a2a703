"""The compiled engine on every instruction set, against plain NumPy."""

import itertools
import multiprocessing
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank._kernels import _core, profiling, spec
from lowrank._kernels.spec import StageSpec
from lowrank.core.stage import abstract_weight

# A sum of n products in precision eps is off by at most about n * eps times the sum of their
# magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, eq. 3.5); a chain
# adds its stages' bounds up, and 4 leaves room for that and for the reference's own rounding.
BOUND_FACTOR = 4


def plain(stages, x, border=None, fill=0.0):
    """Run the chain by slices and einsum; also return magnitudes and products per sum."""
    big, terms = np.abs(x), 0
    for k, s in enumerate(stages):
        if border is not None and k == 0:
            x, big = (bordered(a, border, f) for a, f in ((x, fill), (big, abs(fill))))
            pads = [(0, 0)] * 3
        else:
            pads = list(zip(s.before, s.after))
        x, big = (padded(a, pads) for a in (x, big))
        if s.permutation is not None:
            x, big = x[:, s.permutation], big[:, s.permutation]
        x, big = correlated(s, s.weight, x), correlated(s, np.abs(s.weight), big)
        terms += np.prod(s.weight.shape[1:]) + 1
        if s.bias is not None:
            b = s.bias[:, None, None, None]
            x, big = x + b, big + np.abs(b)
        if s.activation != "none":  # which makes differences no larger
            x = np.clip(x, 0, 6 if s.activation == "relu6" else None)
    return x, big, terms


def padded(x, pads):
    x = np.pad(x, [(0, 0), (0, 0), *((max(b, 0), max(a, 0)) for b, a in pads)])
    crop = (slice(max(-b, 0), n - max(-a, 0)) for (b, a), n in zip(pads, x.shape[2:]))
    return x[(..., *crop)]


def bordered(x, border, fill):
    for axis, table in enumerate(border, start=2):
        if table is not None:
            x = np.concatenate([x, np.full_like(x.take([0], axis), fill)], axis).take(table, axis)
    return x


def correlated(s, weight, x):
    (rows, c), kernel = weight.shape[:2], weight.shape[2:]
    out = [
        (n - d * (k - 1) - 1) // st + 1
        for n, d, k, st in zip(x.shape[2:], s.dilation, kernel, s.stride)
    ]
    x = x.reshape(len(x), s.outer, s.groups, c, s.inner, *x.shape[2:])
    w = weight.reshape(s.groups, rows // s.groups, c, *kernel)
    y = np.zeros((len(x), s.outer, s.groups, rows // s.groups, s.inner, *out), x.dtype)
    for tap in itertools.product(*map(range, kernel)):
        at = [
            slice(t * d, t * d + st * (n - 1) + 1, st)
            for t, d, st, n in zip(tap, s.dilation, s.stride, out)
        ]
        y += np.einsum("goc,nlgcrxyz->nlgorxyz", w[(..., *tap)], x[(..., *at)])
    return y.reshape(len(x), -1, *out)


@st.composite
def problems(draw):
    """Draw a chain, its input, border, fill value and tile."""
    small = st.integers(1, 3)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    long = draw(st.sampled_from([(1, 1, 200), (1, 12, 60), (5, 7, 9), (4, 1, 33)]))
    size = [draw(st.integers(1, n)) for n in long]
    channels = None
    stages, left = [], draw(st.integers(1, 3))
    at = list(size)
    for k in range(left):
        groups, right = draw(small), draw(small)
        tie = draw(small)
        cin = draw(st.integers(1, 5))
        if channels is None:
            channels = tie * groups * cin * right
        elif channels % (tie * groups * right):
            tie, groups, right = 1, 1, 1
            cin = channels
        else:
            cin = channels // (tie * groups * right)
        kernel = [draw(st.integers(1, 4)) if n > 1 else 1 for n in long]
        dilation = [draw(small) for _ in range(3)]
        stride = [draw(small) for _ in range(3)]
        before = [draw(st.integers(-1, 4)) for _ in range(3)]
        need = [d * (n - 1) + 1 for d, n in zip(dilation, kernel)]
        before = [max(b, -(n // 2)) for b, n in zip(before, at)]
        after = [draw(st.integers(0, 3)) + max(0, e - n - b) for e, n, b in zip(need, at, before)]
        rows = groups * draw(st.integers(1, 10))
        source = rng.permutation(channels).astype(np.int32) if draw(st.booleans()) else None
        weight = rng.standard_normal((rows, cin, *kernel)).astype(dtype)
        if k == 0:
            inputs = channels
        out = tie * rows * right
        bias = rng.standard_normal(out).astype(dtype) if draw(st.booleans()) else None
        activation = draw(st.sampled_from(["none", "relu", "relu6"]))
        stages.append(
            StageSpec(
                weight, tie, groups, right, stride, dilation, before, after, source,
                bias=bias, activation=activation,
            )
        )  # fmt: skip
        at = [(n + b + a - e) // s + 1 for n, b, a, e, s in zip(at, before, after, need, stride)]
        channels = tie * rows * right
    border, fill = None, 0.0
    if draw(st.booleans()):
        fill = draw(st.sampled_from([0.0, 2.5]))
        s = stages[0]
        border = []
        for axis, n in enumerate(size):
            b, a = max(s.before[axis], 0), max(s.after[axis], 0)
            s.before[axis], s.after[axis] = b, a
            need = s.dilation[axis] * (s.weight.shape[2 + axis] - 1) + 1
            s.after[axis] = a = max(a, need - n - b)
            around = rng.integers(-1, n, n + a + b).astype(np.int32)
            around[b : b + n] = np.arange(n)  # only what stands outside is free
            border.append(around)
        at = list(size)
        for s in stages:
            need = [d * (k - 1) + 1 for d, k in zip(s.dilation, s.weight.shape[2:])]
            for axis in range(3):  # the first stage may give more now: never less
                spare = at[axis] + s.before[axis] + s.after[axis] - need[axis]
                at[axis] = spare // s.stride[axis] + 1
    x = rng.standard_normal((draw(st.integers(1, 2)), inputs, *size)).astype(dtype)
    tile = [draw(st.integers(1, max(1, n))) for n in at]
    return stages, x, border, fill, tile


def run(isa, stages, x, border=None, fill=0.0, tile=None, threads=1):
    plan = _core.KernelPlan(
        stages, x.shape[1:], dtype=x.dtype.name, border=border, fill=fill, tile=tile, isa=isa
    )  # fmt: skip
    shape = (len(x), *plan.out_shape)
    n, guard = np.prod(shape, dtype=int), 512  # elements, more than any run of a kernel
    around = np.full(n + 2 * guard, np.nan, x.dtype)
    around[:guard] = around[guard + n :] = 7
    out = around[guard : guard + n].reshape(shape)
    plan(x, out, threads)
    assert (around[:guard] == 7).all()
    assert (around[guard + n :] == 7).all()
    return out


@pytest.mark.parametrize("isa", _core.ISAS)
@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_chains_match_numpy(isa, problem):
    stages, x, border, fill, _ = problem
    expected, magnitude, terms = plain(stages, x, border, fill)
    actual = run(isa, *problem)
    assert actual.shape == expected.shape
    bound = BOUND_FACTOR * terms * np.finfo(x.dtype).eps * magnitude
    assert (np.abs(actual - expected) <= bound).all()


@pytest.mark.parametrize("isa", _core.ISAS)
@given(problem=problems(), threads=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_results_do_not_depend_on_tiles_threads_or_strides(isa, problem, threads):
    stages, x, border, fill, tile = problem
    alone = run(isa, stages, x, border, fill)
    np.testing.assert_array_equal(run(isa, *problem, threads), alone)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)  # channels last
    np.testing.assert_array_equal(run(isa, stages, last, border, fill, tile), alone)
    plan = _core.KernelPlan(
        stages, x.shape[1:], dtype=x.dtype.name, border=border, fill=fill, tile=tile, isa=isa
    )  # fmt: skip
    wide = np.full((*alone.shape[:-1], 2 * alone.shape[-1]), 7, x.dtype)
    plan(x, wide[..., ::2], threads)
    np.testing.assert_array_equal(wide[..., ::2], alone)
    assert (wide[..., 1::2] == 7).all()


def stage(weight, padding=0, groups=1, stride=1):
    three = (0, *(p if n > 1 else 0 for p, n in zip((padding,) * 2, weight.shape[3:])))
    return StageSpec(weight, 1, groups, 1, (1, stride, stride), (1, 1, 1), three, three)


@pytest.mark.parametrize("isa", _core.ISAS)
@given(
    data=st.data(),
    dtype=st.sampled_from([np.float32, np.float64]),
    size=st.tuples(st.integers(1, 17), st.integers(1, 33)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    channels=st.integers(16, 40),
)
@settings(max_examples=100, deadline=None)
def test_channels_last_kernels_match_single_channels(
    isa, data, dtype, size, kernel, stride, dilation, channels
):
    need = [d * (k - 1) + 1 for d, k in zip(dilation, kernel)]
    before = [data.draw(st.integers(0, n)) for n in need]
    after = [
        max(0, e - n - b) + data.draw(st.integers(0, 2)) for e, n, b in zip(need, size, before)
    ]
    tied = data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight = rng.standard_normal((1 if tied else channels, 1, 1, *kernel)).astype(dtype)
    bias = rng.standard_normal(channels).astype(dtype)
    x = rng.standard_normal((2, channels, data.draw(st.integers(1, 3)), *size)).astype(dtype)

    def some(of):
        return StageSpec(
            weight if tied else weight[of], len(bias[of]) if tied else 1,
            1 if tied else len(bias[of]), 1, (1, *stride), (1, *dilation), (0, *before),
            (0, *after), bias=bias[of], activation="relu",
        )  # fmt: skip

    whole = run(isa, [some(slice(None))], x)
    for c in range(channels):  # too few for a vector of channels
        of = slice(c, c + 1)
        np.testing.assert_array_equal(run(isa, [some(of)], x[:, of]), whole[:, of])
    plan = _core.KernelPlan([some(slice(None))], x.shape[1:], dtype=x.dtype.name, isa=isa)
    wide = np.zeros((*whole.shape[:-1], 2 * whole.shape[-1]), dtype)
    plan(x, wide[..., ::2])
    np.testing.assert_array_equal(wide[..., ::2], whole)


@pytest.mark.parametrize("isa", _core.ISAS)
@given(
    data=st.data(),
    dtype=st.sampled_from([np.float32, np.float64]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    out=st.tuples(st.integers(1, 2), st.integers(4, 11), st.integers(1, 150)),
    along=st.tuples(st.integers(1, 2), st.integers(1, 2)),  # stride and dilation of rows
)
@settings(max_examples=100, deadline=None)
def test_depthwise_rows_do_not_depend_on_the_tile(isa, data, dtype, kernel, out, along):
    stride, dilation = along
    need = [n + k - 1 for n, k in zip(out, kernel)]
    need[2] = (out[2] - 1) * stride + dilation * (kernel[2] - 1) + 1
    before = [data.draw(st.integers(0, k - 1)) for k in kernel]
    after = [max(0, b - n + 1) for b, n in zip(before, need)]
    size = [n + a - b for n, a, b in zip(need, after, before)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weight = rng.standard_normal((2, 1, *kernel)).astype(dtype)
    bias = rng.standard_normal(2).astype(dtype)
    x = rng.standard_normal((1, 2, *size)).astype(dtype)
    stages = [
        StageSpec(
            weight, 1, 2, 1, (1, 1, stride), (1, 1, dilation), before, after, bias=bias,
            activation="relu6",
        )
    ]  # fmt: skip
    expected, magnitude, terms = plain(stages, x)
    actual = run(isa, stages, x)
    bound = BOUND_FACTOR * terms * np.finfo(dtype).eps * magnitude
    assert (np.abs(actual - expected) <= bound).all()
    for rows in (1, 3, 6):
        tile = (out[0], rows, actual.shape[-1])
        np.testing.assert_array_equal(run(isa, stages, x, tile=tile), actual)


@pytest.fixture
def pair(rng):
    """Two stages of 3x3 and a matching input."""
    w = [rng.standard_normal(s).astype("f4") for s in [(6, 4, 1, 3, 3), (5, 6, 1, 3, 3)]]
    return [stage(a, 1) for a in w], rng.standard_normal((3, 4, 1, 20, 21)).astype("f4")


def test_read_only_input_is_accepted_and_unchanged(pair):
    stages, x = pair
    kept = x.copy()
    x.flags.writeable = False
    run(None, stages, x)
    np.testing.assert_array_equal(x, kept)


def test_empty_batch_gives_an_empty_result(pair):
    stages, x = pair
    assert run(None, stages, x[:0]).shape == (0, 5, 1, 20, 21)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activations_propagate_nan(pair, activation):
    stages, x = pair
    x[0, 0, 0, 5, 5] = np.nan
    out = run(None, [s._replace(activation=activation) for s in stages], x)
    assert np.isnan(out[0, :, 0, 5, 5]).all()
    assert (out[1:] >= 0).all()
    if activation == "relu6":
        assert out[1:].max() == 6


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("work", [np.float32, np.float64])
def test_integers_are_read_exactly_and_written_rounded_and_saturated(rng, isa, dtype, work):
    limits = np.iinfo(dtype)
    x = rng.integers(limits.min, limits.max, (2, 3, 1, 9, 70), endpoint=True).astype(dtype)
    for weight, groups in (
        (rng.standard_normal((4, 3, 1, 3, 3)), 1),
        (np.full((3, 1, 1, 1, 1), 0.5), 3),
    ):
        stages = [stage(weight.astype(work), 1, groups, s) for s in (1, 2)]
        stages = stages[:1] if groups == 1 else stages
        exact = run(isa, stages, x.astype(work))
        assert exact.min() < limits.min or groups == 3  # there is something to saturate
        plan = _core.KernelPlan(
            stages, x.shape[1:], dtype=np.dtype(work).name, isa=isa, tile=(1, 4, 33)
        )
        wide = np.zeros((*exact.shape[:-1], 2 * exact.shape[-1]), dtype)
        for out in (wide[..., : exact.shape[-1]], wide[..., ::2]):
            plan(x, out, 2)
            np.testing.assert_array_equal(out, np.clip(np.rint(exact), limits.min, limits.max))


def test_python_threads_share_a_plan(pair):
    stages, x = pair
    plan = _core.KernelPlan(stages, x.shape[1:], dtype="float32")
    outs = [np.empty((3, *plan.out_shape), "f4") for _ in range(8)]
    workers = [
        threading.Thread(target=lambda o=o: [plan(x, o, 2) for _ in range(20)]) for o in outs
    ]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for out in outs[1:]:
        np.testing.assert_array_equal(out, outs[0])


def _in_child(queue, stages, x):
    queue.put(run(None, stages, x, threads=2))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_runs_after_its_parent_used_openmp(pair):
    stages, x = pair
    expected = run(None, stages, x, tile=(1, 5, 21), threads=2)
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    child = fork.Process(target=_in_child, args=(queue, stages, x))
    child.start()
    actual = queue.get(timeout=60)  # GNU's OpenMP would hang here
    child.join(60)
    np.testing.assert_array_equal(actual, expected)


def test_too_large_workspace_is_a_memory_error(rng):
    weight = rng.standard_normal((1, 1, 1, 1, 3)).astype("f4")
    wide = StageSpec(weight, 1, 1, 1, (1, 1, 1), (1, 1, 1), (0, 0, 1), (0, 0, 1))
    n = 1 << 55  # samples that nobody has, of an array that repeats one
    plan = _core.KernelPlan([wide], (1, 1, 1, n), dtype="float32")
    x = np.broadcast_to(np.float32(0), (1, 1, 1, 1, n))
    out = np.lib.stride_tricks.as_strided(np.zeros(1, "f4"), (1, 1, 1, 1, n), (0,) * 5)
    with pytest.raises(MemoryError, match="not enough memory for a workspace"):
        plan(x, out)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": np.zeros((1, 4, 1, 20, 21))}, TypeError, "x must be a float32 array"),
        ({"x": np.zeros((1, 3, 1, 20, 21), "f4")}, ValueError, r"x must have shape \(batch, 4"),
        ({"out": np.zeros((2, 5, 1, 20, 21), "f4")}, ValueError, "out must have shape"),
        ({"isa": "mmx"}, ValueError, "isa must be one of"),
        ({"dtype": "int32"}, TypeError, "dtype must be float32 or float64, got int32"),
        ({"shape": (3, 1, 20, 21)}, ValueError, "stage 0.*4 channels, got 3"),
        ({"shape": (4, 1, 0, 21)}, ValueError, "does not fit an input"),
        ({"bias": np.zeros(3, "f4")}, ValueError, r"bias must have shape \(5,\)"),
        ({"out": np.zeros((1, 5, 1, 20, 21), "i4")}, TypeError, "or of 8- or 16-bit integers"),
    ],
)
def test_errors_name_the_argument(pair, change, error, message):
    stages, _ = pair
    if "bias" in change:
        stages[-1] = stages[-1]._replace(bias=change.pop("bias"))
    shape = change.pop("shape", (4, 1, 20, 21))
    x = change.pop("x", np.zeros((1, 4, 1, 20, 21), "f4"))
    out = change.pop("out", np.zeros((1, 5, 1, 20, 21), "f4"))
    with pytest.raises(error, match=message):
        _core.KernelPlan(stages, shape, **{"dtype": "float32", **change})(x, out)


def test_rejects_an_output_that_overlaps_the_input(rng):
    same = stage(rng.standard_normal((4, 4, 1, 3, 3)).astype("f4"), 1)
    x = rng.standard_normal((1, 4, 1, 9, 9)).astype("f4")
    with pytest.raises(ValueError, match="out must not overlap x"):
        _core.KernelPlan([same], x.shape[1:], dtype="float32")(x, x)


def test_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("LOWRANK_ISA", _core.ISAS[-1])
    assert _core.default_isa() == _core.ISAS[-1]
    monkeypatch.setenv("LOWRANK_ISA", "mmx")
    with pytest.raises(ValueError, match="LOWRANK_ISA must be one of"):
        _core.default_isa()


SOURCES = Path(__file__).parents[1] / "lowrank" / "_kernels"


def c_enum(prefix, first, header="lr.h"):
    """Return the names of the enum of a header that begins with a name, in order, lower-case."""
    text = re.sub(r"/\*.*?\*/", "", (SOURCES / header).read_text(), flags=re.DOTALL)
    (names,) = re.findall(rf"enum {{\s*({prefix}{first}\b[^}}=]*)\s*}}", text)
    return [n.strip().removeprefix(prefix).lower() for n in names.split(",")]


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float64", 8)])
def test_limits_are_those_of_the_instruction_set(isa, dtype, itemsize):
    limits = _core.plane_limits(dtype, isa)
    assert limits.lanes * itemsize == {"avx512": 64, "avx2": 32, "baseline": 16}[isa]
    assert limits.block_rows == (8 if isa == "avx512" else 4)
    # A first stage that is computed channels-last packs a vector of channels.
    assert limits.packed_channels >= limits.lanes
    spec = stage(abstract_weight((1, 1, 1, 1, 1)))
    assert len(_core.stage_paths([spec] * limits.max_stages, (1, 1, 1, 1))) == limits.max_stages
    with pytest.raises(ValueError, match=f"must number 1 to {limits.max_stages}, got"):
        _core.stage_paths([spec] * (limits.max_stages + 1), (1, 1, 1, 1))


@pytest.mark.parametrize("isa", _core.ISAS)
@pytest.mark.parametrize(
    ("shape", "weights", "expected"),
    [
        # (padding, groups, weight shape) of each stage, and its input and kernel
        ((4, 1, 40, 40), [(0, 1, (8, 4, 1, 1, 1))], [("in place", "dense flat")]),
        ((16, 1, 40, 41), [(1, 1, (8, 16, 1, 3, 3))], [("packed", "dense scatter")]),
        ((16, 1, 40, 128), [(1, 1, (8, 16, 1, 3, 3))], [("packed", "dense rows")]),
        ((4, 1, 40, 40), [(1, 4, (4, 1, 1, 3, 3))], [("packed by channels", "depthwise rows")]),
        ((3, 40, 2, 40), [(0, 3, (3, 1, 3, 1, 1))], [("in place", "depthwise planes")]),
        ((1, 1, 9, 2000), [(0, 1, (1, 1, 1, 1, 1025))], [("packed by channels", "dense scatter")]),
        (
            (4, 1, 40, 40),
            [(0, 1, (8, 4, 1, 1, 1)), (1, 8, (8, 1, 1, 3, 3))],
            [("in place", "dense rows"), ("buffer", "depthwise rows")],
        ),
    ],
)
def test_paths_follow_from_sizes_alone(isa, shape, weights, expected):
    stages = [stage(abstract_weight(w), padding, groups) for padding, groups, w in weights]
    found = _core.stage_paths(stages, shape, isa=isa)
    assert [(p.input, p.kernel) for p in found] == expected


@pytest.mark.parametrize("isa", _core.ISAS)
def test_only_rows_shorter_than_a_vector_are_transposed(isa):
    lanes = _core.plane_limits(isa=isa).lanes
    spec = stage(abstract_weight((lanes, 1, 1, 3, 3)), 1, lanes)
    for width, expected in ((lanes - 1, "transposed"), (lanes, "packed by channels")):
        (path,) = _core.stage_paths([spec], (lanes, 1, 3, width), isa=isa)
        assert path.input == expected


def test_a_halo_or_a_permutation_keeps_a_stage_from_reading_in_place():
    weight = abstract_weight((8, 4, 1, 3, 1))
    tall = StageSpec(weight, 1, 1, 1, (1,) * 3, (1,) * 3, (0, 1, 0), (0, 1, 0))
    shape = (4, 1, 90, 40)
    whole, inside = (_core.stage_paths([tall], shape, t)[0] for t in (None, (1, 8, 40)))
    assert (whole.input, inside.input) == ("packed", "in place")
    assert (whole.keeps_rows, inside.keeps_rows) == (True, True)
    permuted = tall._replace(permutation=np.arange(4, dtype=np.int32))
    (path,) = _core.stage_paths([permuted], shape, (1, 8, 40))
    assert path[::2] == ("packed", False)


def test_activations_and_steps_are_numbered_as_in_c():
    assert ["none", *c_enum("LR_", "LINEAR")[1:]] == [*spec.ACTIVATIONS]
    kinds = [name.replace("_", " ") for name in c_enum("LR_", "PACK", "program.h")[:-1]]
    assert kinds == [*spec.KINDS]
    assert c_enum("LR_", "COPY", "program.h") == [*spec.MODES]
    assert len(c_enum("LR_", "STEP_PACK")) - 1 == len(profiling.STEPS)
