"""Programs of several operations: equal to their operations, on threads, and bad arguments."""

import itertools
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from test_channels_last import (
    ONES,
    ZEROS,
    activated,
    builder,
    call,
    cast,
    convolved,
    every_kernel,
    reference,
    sizes,
    stage,
)

import lowrank
from lowrank._kernels import _core
from lowrank._kernels.spec import KINDS, MODES, StageSpec
from lowrank.core.reference import apply_epilogue, run_stage
from lowrank.core.stage import Epilogue
from lowrank.engine import schedule
from lowrank.engine.padding import padded_indices
from lowrank.engine.program import ProgramBuilder, Unsupported


@every_kernel
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_concatenated_values_feed_later_operations(isa, dtype, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    kinds = st.sampled_from(["input", "convolution", "depthwise", "permutation"])
    parts = data.draw(st.lists(st.tuples(kinds, st.integers(1, 20)), min_size=1, max_size=4))
    inputs = [rng.standard_normal((2, c, 1, 5, 7)).astype(dtype) for _, c in parts]
    b, *values = builder(isa, dtype, *(x.shape[1:] for x in inputs))
    arrays, stages, results = [], [], []
    for (kind, c), x, value in zip(parts, inputs, values):
        if kind == "permutation":
            order = rng.permutation(c)
            value, x = b.permute(value, order), x[:, order]
        elif kind != "input":
            shape = (c, c, 1, 1, 1) if kind == "convolution" else (c, 1, 1, 1, 1)
            s = stage(rng.standard_normal(shape).astype(dtype), groups=c // shape[1])
            value, x = b.convolve(value, s), convolved(isa, s, x)[0]
        arrays.append((x, value))
        if data.draw(st.booleans()):  # a halo before the value moves
            stages.append((stage(rng.standard_normal((3, c, 1, 3, 3)).astype(dtype), 1), x))
            results.append(b.convolve(value, stages[-1][0]))
    order = data.draw(st.permutations(range(len(parts)))) + data.draw(st.sampled_from([[], [0]]))
    expected = np.concatenate([arrays[i][0] for i in order], 1)
    whole = b.concatenate([arrays[i][1] for i in order])
    s = stage(rng.standard_normal((5, expected.shape[1], 1, 3, 3)).astype(dtype), 1)
    for value in (whole, b.convolve(whole, s), *results):
        b.output(value)
    actual, *outputs = call(b.build(), inputs)
    np.testing.assert_array_equal(actual, expected)
    for out, (each, x) in zip(outputs, [(s, expected), *stages], strict=True):
        y, bound = reference(each, x)
        assert (np.abs(out - y) <= bound).all()


class Network:
    """Operations that `data` draws, each a function of a builder and values, by their numbers."""

    def __init__(self, data, rng, shape):
        self.draw, self.rng = data.draw, rng
        self.shapes, self.operations = [shape], []
        for _ in range(self.draw(st.integers(2, 9))):
            self.add()

    def add(self):
        recent = len(self.shapes) - 1
        i = self.draw(st.sampled_from([recent, recent, *range(recent)]))
        c, *size = self.shapes[i]
        alike = [j for j, s in enumerate(self.shapes) if list(s[1:]) == size]
        kinds = "convolution depthwise residual pool add scale upsample concatenate permutation"
        kind = self.draw(
            st.sampled_from([*kinds.split(), "pad", "transposed", "activation", "normalize"])
        )
        operands = [i]
        if kind in ("convolution", "depthwise", "residual"):
            stride, c_out = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 20))
            if kind == "residual":
                operands.append(self.draw(st.sampled_from(alike)))
                stride, c_out = 1, self.shapes[operands[1]][0]
            kernel = (1, *self.draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 5)])))
            pads = tuple(k // 2 for k in kernel)
            shape = (c, 1, *kernel) if kind == "depthwise" else (c_out, c, *kernel)
            weight = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            s = StageSpec(
                weight, 1, c if kind == "depthwise" else 1, 1, (1, stride, stride), ONES, pads,
                pads, bias=self.rng.standard_normal(shape[0]), activation="leaky_relu",
            )  # fmt: skip
            size = [(n - 1) // k + 1 for n, k in zip(size, s.stride)]
            c = shape[0]

            def apply(b, value, *residual):
                return b.convolve(value, cast(s, b.dtype), *residual, alpha=0.25)
        elif kind == "pool":
            before, n = (0, 1, 1), [size[0], *((m + 1) // 2 for m in size[1:])]
            pool = self.draw(st.sampled_from(["max pool", "mean pool"]))
            size = n

            def apply(b, value):
                return b.pool(value, pool, tuple(n), (1, 3, 3), (1, 2, 2), before)
        elif kind == "normalize":
            weight, shift = self.rng.standard_normal((2, c))

            def apply(b, value):
                return b.normalize(value, weight, shift, 1e-3)
        elif kind == "scale":

            def apply(b, value):
                mean = b.pool(value, "mean pool", ONES, value.size, ONES, ZEROS)
                return b.combine(value, mean, "multiply")
        elif kind == "upsample":
            index = np.arange(2 * size[1], dtype=np.int32) // 2
            size = [size[0], 2 * size[1], size[2]]

            def apply(b, value):
                return b.combine(value, index=(None, index, None), size=tuple(size))
        elif kind in ("add", "concatenate"):
            same = [j for j in alike if self.shapes[j][0] == c]
            operands.append(self.draw(st.sampled_from(same if kind == "add" else alike)))
            if kind == "concatenate":
                c += self.shapes[operands[1]][0]

            def apply(b, *values):
                return b.combine(*values, "add") if kind == "add" else b.concatenate(values)
        elif kind == "permutation":
            permutation = self.rng.permutation(c)

            def apply(b, value):
                return b.permute(value, permutation)
        elif kind == "pad":
            index = padded_indices(size[2], 1, 2, "replicate", 1)
            size = [*size[:2], size[2] + 3]

            def apply(b, value):
                return b.pad(value, (0, 0, 1), (0, 0, 2), (None, None, index))
        elif kind == "transposed":
            weight = self.rng.standard_normal((c, 6, 1, 2, 3))
            geometry = lowrank.Geometry.of(3, stride=(1, 2, 1), padding=(0, 0, 1))
            link = (lowrank.Stage(weight, geometry, transposed=True), Epilogue())
            c, size = 6, [size[0], 2 * size[1], size[2]]

            def apply(b, value):
                return b.chain(value, [link])
        else:

            def apply(b, value):
                return b.combine(value, activation="hard_swish")

        self.operations.append((apply, operands))
        self.shapes.append((c, *size))


def choose_where_possible(s, value, result):
    """Return F(4 x 4, 3 x 3) where it is an algorithm, and its error."""
    return ((0, 2, 2) if s.kernel == (1, 3, 3) and s.stride == ONES else ZEROS), 0.0


@every_kernel
@given(data=st.data(), batch=st.integers(1, 4), threads=sizes, group=sizes)
@settings(max_examples=60, deadline=None)
def test_networks_equal_their_operations(isa, dtype, data, batch, threads, group):
    shape = (data.draw(st.integers(1, 20)), 1, data.draw(st.integers(1, 12)), 13)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    network = Network(data, rng, shape)
    arrays = [rng.standard_normal((batch, *shape)).astype(dtype)]
    choice = data.draw(st.sampled_from([lambda *_: (ZEROS, 0.0), choose_where_possible]))
    for apply, operands in network.operations:
        inputs = [arrays[i] for i in operands]
        b, *values = builder(isa, dtype, *(x.shape[1:] for x in inputs))
        b._choose_algorithm = choice
        b.output(apply(b, *values))
        arrays += call(b.build(), inputs)
    assert [x.shape[1:] for x in arrays] == network.shapes
    chosen = data.draw(st.sets(st.sampled_from(range(1, len(arrays)))))
    chosen = sorted(chosen | {len(arrays) - 1})
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):  # as if the caches were too small for whole buffers
            patch.setattr(schedule, "BAND_BYTES", 2000 / _core.caches()[1])
            patch.setattr(schedule, "BAND_WEIGHTS", np.inf)
        b, *values = builder(isa, dtype, shape)
        b._choose_algorithm = choice
        for apply, operands in network.operations:
            values.append(apply(b, *(values[i] for i in operands)))
        for i in chosen:
            b.output(values[i])
        made = b.build(group)
    for i, out in zip(chosen, call(made, arrays[:1], threads), strict=True):
        np.testing.assert_array_equal(out, arrays[i])


@st.composite
def links(draw, ndim, channels):
    """Draw a stage of a chain for some input channels, and its epilogue."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    transposed = draw(st.booleans())
    kernel, dilation = ([draw(sizes) for _ in range(ndim)] for _ in range(2))
    stride = [draw(st.integers(1, 4)) for _ in range(ndim)]
    most = [(k - 1) * d for k, d in zip(kernel, dilation)]
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "reflect", "circular"]))
    padding = [(draw(st.integers(0, min(2, m))), draw(st.integers(0, min(2, m)))) for m in most]
    groups, c_out = draw(st.sampled_from([1, 1, channels])), draw(st.integers(1, 9))
    copies = [c for c in (1, 2) if channels // groups % c == 0]
    outer = draw(st.sampled_from(copies))
    c_in = channels // groups // outer
    rows, columns = (c_in, c_out) if transposed else (c_out, c_in)
    weight = rng.standard_normal((groups * rows, columns, *kernel))
    a = draw(st.sampled_from([n for n in (1, 2, 3) if channels % n == 0]))
    geometry = lowrank.Geometry.of(
        ndim, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    )
    made = lowrank.Stage(
        weight, geometry, groups, outer, shuffle=(1, 1) if transposed else (a, channels // a),
        transposed=transposed,
    )  # fmt: skip
    bias = rng.standard_normal(made.out_channels) if draw(st.booleans()) else None
    return made, Epilogue(bias, draw(st.sampled_from(["none", "relu6"])))


@every_kernel
@given(data=st.data(), ndim=sizes)
@settings(max_examples=80, deadline=None)
def test_chains_match_their_reference(isa, dtype, data, ndim):
    shape = [data.draw(st.integers(1, 12)), *(data.draw(st.integers(7, 9)) for _ in range(ndim))]
    rng = np.random.default_rng(shape[0])
    x = rng.standard_normal((2, *shape)).astype(dtype)
    expected, magnitude, terms, chain = x.astype(np.float64), np.abs(x), 1, []
    for _ in range(data.draw(st.integers(1, 2))):
        each, epilogue = data.draw(links(ndim, expected.shape[1]))
        chain.append((each, epilogue))
        try:
            assume(np.prod(each.output_shape(expected.shape[1:])) < 50_000)
        except ValueError:  # a kernel that does not fit
            reject()
        expected = run_stage(each, expected)
        magnitude = run_stage(replace(each, weight=np.abs(each.weight)), magnitude)
        linear = expected = apply_epilogue(expected, Epilogue(epilogue.bias))
        if epilogue.bias is not None:
            magnitude = apply_epilogue(magnitude, Epilogue(np.abs(epilogue.bias)))
        expected = activated(linear, epilogue.activation)
        terms += each.weight.size // each.groups + 2
    free = (1,) * (3 - ndim)
    inputs = [x.reshape(2, shape[0], *free, *shape[1:])]
    if data.draw(st.booleans()):
        residual = rng.standard_normal(expected.shape).astype(dtype)
        expected = activated(linear + residual, epilogue.activation)
        magnitude = magnitude + np.abs(residual)
        inputs.append(residual.reshape(2, expected.shape[1], *free, *expected.shape[2:]))
    b, *values = builder(isa, dtype, *(i.shape[1:] for i in inputs))
    b.output(b.chain(values[0], chain, *values[1:]))
    (actual,) = call(b.build(), inputs)
    bound = terms * np.finfo(dtype).eps * magnitude
    assert (np.abs(actual.reshape(expected.shape) - expected) <= bound).all()


def tail(b, value, rng):
    """Return a network after `value`: fast, direct and depthwise stages, and a mean."""
    dtype, (c, *_) = b.dtype, value.shape
    first = b.convolve(value, cast(stage(rng.standard_normal((40, c, 1, 3, 3)), 1), dtype))
    each = b.convolve(first, cast(stage(rng.standard_normal((40, 1, 1, 3, 3)), 1, 40), dtype))
    both = b.combine(first, each, "add", "relu")
    wide = b.convolve(both, cast(stage(rng.standard_normal((200, 40, 1, 1, 1))), dtype))
    return wide, b.pool(wide, "mean pool", ONES, wide.size, ONES, ZEROS)


@every_kernel
def test_bits_do_not_depend_on_threads_or_position(isa, dtype, rng):
    x = rng.standard_normal((6, 3, 1, 9, 11)).astype(dtype)
    alone = None
    for group in (1, 2):
        b, value = builder(isa, dtype, x.shape[1:])
        b._choose_algorithm = choose_where_possible
        for result in tail(b, value, np.random.default_rng(0)):
            b.output(result)
        made = b.build(group)
        if alone is None:
            each = [call(made, [x[i : i + 1]]) for i in range(len(x))]
            alone = [np.concatenate(results) for results in zip(*each)]
        # Single threads take images where there are as many; later calls share memory of earlier.
        for batch, threads in itertools.product((6, 1, 4, 2, 5, 3), (1, 2, 4, 3)):
            for out, expected in zip(call(made, [x[:batch]], threads), alone, strict=True):
                np.testing.assert_array_equal(out, expected[:batch])


def test_bits_do_not_depend_on_more_threads_than_cores():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "threads_or_position"],
        env=os.environ | {"OMP_NUM_THREADS": "4"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


def test_python_threads_share_a_program(rng):
    xs = rng.standard_normal((4, 3, 5, 1, 9, 11)).astype("f4")
    b, value = builder(None, "float32", xs.shape[2:], algorithm="auto")
    b.output(tail(b, value, rng)[0])
    made = b.build()
    expected = [call(made, [x]) for x in xs]
    outs = [np.empty_like(e[0]) for e in expected]

    def work(x, out):
        for _ in range(20):
            made([x], [out], 2)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(xs, outs)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for out, (e,) in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, e)


@pytest.fixture
def small(rng):
    """A program of a stage of 3x3, and its input and output."""
    b, value = builder(None, "float32", (4, 1, 5, 6))
    b.output(b.convolve(value, stage(rng.standard_normal((3, 4, 1, 3, 3)).astype("f4"), 1)))
    return (
        b.build(),
        rng.standard_normal((2, 4, 1, 5, 6)).astype("f4"),
        np.empty((2, 3, 1, 5, 6), "f4"),
    )


def unaligned(shape):
    return np.frombuffer(bytearray(4 * int(np.prod(shape)) + 1), "f4", offset=1).reshape(shape)


@pytest.mark.parametrize(
    ("inputs", "outputs", "error", "message"),
    [
        ([np.zeros((2, 4, 1, 5, 6))], None, TypeError, "array 0 must be a float32 array in native"),
        ([np.zeros((2, 4, 1, 5, 6), ">f4")], None, TypeError, "array 0 must be a float32 array in"),
        (None, [np.zeros((2, 3, 1, 5, 6), "f8")], TypeError, "array 1 must be a float32 array"),
        ([np.zeros((2, 3, 1, 5, 6), "f4")], None, ValueError, r"array 0 must have shape \(batch"),
        ([np.zeros((4, 1, 5, 6), "f4")], None, ValueError, "array 0 must have shape"),
        (None, [np.zeros((1, 3, 1, 5, 6), "f4")], ValueError, r"array 1.*got \(1, 3, 1, 5, 6\)"),
        ([], None, ValueError, "arrays must be 2, at most 16, got 1"),
        ([unaligned((2, 4, 1, 5, 6))], None, ValueError, "array 0 must be aligned to 4 bytes"),
    ],
)
def test_errors_name_the_array(small, inputs, outputs, error, message):
    made, x, out = small
    with pytest.raises(error, match=message):
        made([x] if inputs is None else inputs, [out] if outputs is None else outputs, 1)


def test_errors_name_the_array_as_its_caller_does(small):
    b, value = builder(None, "float32", (4, 1, 5, 6))
    b.output(value)
    _, x, _ = small
    split = np.lib.stride_tricks.as_strided(x, (*x.shape[:4], 2), (*x.strides[:4], 6))
    with pytest.raises(ValueError, match=r"picture must have shape \(batch"):
        b.build(names=("picture", "result"))([split], [x], 1)
    b, value = builder(None, "float32", (4, 1, 5, 2))
    b.output(value)
    with pytest.raises(ValueError, match="strides of picture must be multiples of 4 bytes"):
        b.build(names=("picture", "result"))([split], [np.empty(split.shape, "f4")], 1)


def test_builder_rejects_bad_arguments(rng):
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got int32"):
        ProgramBuilder("int32")
    with pytest.raises(ValueError, match="isa must be one of"):
        ProgramBuilder("float32", isa="mmx")
    b, value, other = builder(None, "float32", (4, 1, 5, 6), (4, 1, 5, 7))
    with pytest.raises(ValueError, match=r"operand of shape \(4, 1, 5, 7\) does not fit a result"):
        b.combine(value, other, "add")
    with pytest.raises(ValueError, match=r"operand of shape \(4, 1, 5, 7\) does not fit a result"):
        b.convolve(value, stage(np.ones((4, 4, 1, 1, 1), "f4")), other)
    weight = rng.standard_normal((4, 4, 3))
    ones = lowrank.Geometry.of(1, padding=1, padding_mode="constant", value=1.0)
    with pytest.raises(Unsupported, match="padding with a constant other than zero"):
        b.chain(value, [(lowrank.Stage(weight, ones), Epilogue())])
    shuffled = lowrank.Stage(weight, lowrank.Geometry.of(1), shuffle=(2, 2), transposed=True)
    with pytest.raises(Unsupported, match="a transposed convolution with a channel shuffle"):
        b.chain(value, [(shuffled, Epilogue())])


def test_rejects_an_output_that_is_read_only_or_overlaps(rng):
    memory = rng.standard_normal((3, 4, 1, 5, 6)).astype("f4")
    b, value = builder(None, "float32", (4, 1, 5, 6))
    b.output(value)
    b.output(b.combine(value, activation="relu"))
    made, (x, y, z) = b.build(), memory[:, None]
    for outputs in ([x, y], [y, x], [y, y], [y[..., ::-1], y]):
        with pytest.raises(ValueError, match=r"array \d must not overlap array \d"):
            made([x], outputs, 1)
    y.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        made([x], [y, z], 1)
    x.flags.writeable = False
    y.flags.writeable = True
    made([x], [y, z], 1)
    np.testing.assert_array_equal(y, x)


def test_empty_batch_gives_an_empty_result(small):
    made, x, out = small
    made([x[:0]], [out[:0]], 2)
    (expected,) = call(made, [x])
    made([x], [out], 2)
    np.testing.assert_array_equal(out, expected)


def test_profile_gives_the_seconds_of_every_operation(small):
    made, x, out = small
    (expected,) = call(made, [x])
    out[:] = 0
    seconds = made.core.profile([x, out], 1)
    assert len(seconds) == len(made.operations)
    assert min(seconds) > 0
    assert sum(seconds) < 1
    np.testing.assert_array_equal(out, expected)


def test_more_arrays_than_a_call_takes_are_an_error():
    b, value = builder(None, "float32", (1, 1, 1, 2))
    for _ in range(16):
        b.output(value)
    x = np.zeros((1, 1, 1, 1, 2), "f4")
    with pytest.raises(ValueError, match="at most 16, got 17"):
        b.build()([x], [x.copy() for _ in range(16)], 1)


@pytest.mark.parametrize("log_samples", [55, 58])  # 2^64 bytes are 0 of a 64-bit size
def test_too_large_buffers_are_a_memory_error(monkeypatch, log_samples):
    monkeypatch.setattr(schedule, "BAND_WEIGHTS", -1)  # no table of bands, which are too many
    shape = (1, 1, 1, 1, 1 << log_samples)  # samples that nobody has, of arrays that repeat one
    b, value = builder("avx512" if "avx512" in _core.ISAS else None, "float32", shape[1:])
    b.output(value)
    x = np.broadcast_to(np.float32(0), shape)
    out = np.lib.stride_tricks.as_strided(np.zeros(1, "f4"), shape, (0,) * 5)
    with pytest.raises(MemoryError, match=r"not enough memory for [1-9]\d+ bytes of buffers"):
        b.build()([x], [out], 1)


LIMITED = """
import resource
import numpy as np
from lowrank.engine.program import ProgramBuilder
b = ProgramBuilder("float32")
b.output(b.input((1, 1, 1500, 1500)))
made = b.build()  # of 8 to 16 times the bytes of its input
x, out = np.ones((2, 1, 1, 1, 1500, 1500), "f4")
pages = int(open("/proc/self/statm").read().split()[0])
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), hard))
try:
    made([x], [out], 1)
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
out[:] = 0
made([x], [out], 1)
print((out == 1).all())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_program_runs_after_it_lacked_memory():
    run = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert re.fullmatch(r"not enough memory for \d+ bytes of buffers .*\nTrue\n", run.stdout), run


def test_distances_beyond_32_bits(rng, tmp_path):
    far = (1 << 31) + 5  # elements between images and between channels, of a file of holes
    memory = np.memmap(tmp_path / "holes", "f4", "w+", shape=(8 * far,))
    x, out = (
        np.lib.stride_tricks.as_strided(memory[at:], (2, 2, 1, 1, 9), (8 * far, 4 * far, 4, 4, 4))
        for at in (0, 4 * far)
    )
    x[:] = rng.standard_normal(x.shape)
    b, value = builder(None, "float32", x.shape[1:])
    b.output(value)
    b.build()([x], [out], 2)
    np.testing.assert_array_equal(out, x)


def test_kinds_and_modes_are_numbered_as_in_c():
    path = Path(__file__).parents[1] / "lowrank" / "_kernels" / "program.h"
    text = path.read_text()
    enums = re.findall(
        r"enum \{(.*?)\}", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL), re.DOTALL
    )
    kinds, modes = ([n.strip()[3:].lower().replace("_", " ") for n in e.split(",")] for e in enums)
    assert kinds == [*KINDS, "kinds"]
    assert modes == [*MODES]
