"""Bounds on the rounding errors of direct sums and fast algorithms, and tables of plans."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

import lowrank as lr
from lowrank._kernels import toom_cook
from lowrank.certify import arithmetic, rounding_bound
from lowrank.core import reference
from lowrank.core.stage import Epilogue
from lowrank.engine import program
from lowrank.interop.weights import layers

#: Outputs and taps per axis: all that a plan may choose, up to the order of the axes.
SHAPES = [
    pytest.param((m,) * n, taps, id=f"F({m}, {'x'.join(map(str, taps))})")
    for m in (2, 4, 6)
    for n in (1, 2, 3)
    for taps in itertools.combinations_with_replacement((3, 5, 7), n)
    if all((m, r) in toom_cook.ALGORITHMS for r in taps)
]


@pytest.fixture
def run_by(monkeypatch):
    """Return a function that runs a stage on (batch, channels, *spatial) by F(outputs, taps)."""

    def run(stage, outputs, x):
        ndim = len(stage.kernel)
        pairs = zip(outputs, stage.kernel)
        numbers = [0 if r == 1 else 1 + toom_cook.ALGORITHMS.index((m, r)) for m, r in pairs]
        choice = (*(0,) * (3 - ndim), *numbers), 0.0
        monkeypatch.setattr(program, "choose_algorithm", lambda *_: choice)
        builder = program.ProgramBuilder(x.dtype)
        free = (1,) * (3 - ndim)
        value = builder.input((x.shape[1], *free, *x.shape[2:]))
        result = builder.chain(value, [(stage, Epilogue())])
        builder.output(result)
        made = builder.build()
        assert [op.kind for op in made.operations] == ["pack", "winograd", "unpack"]
        y = np.empty((len(x), *result.shape), x.dtype)
        made((x.reshape(len(x), x.shape[1], *free, *x.shape[2:]),), (y,), 1)
        return y.reshape(*y.shape[:2], *y.shape[5 - ndim :])

    return run


def exact(stage, x):
    """Return the result of a stage in extended precision."""
    weight = stage.weight.astype(np.longdouble)
    return reference.run_stage(replace(stage, weight=weight), x.astype(np.longdouble))


def signs(rng, shape, dtype):
    """Return inputs of magnitude one, for which rounding errors are large."""
    return (rng.choice([-1, 1], shape) * (1 - rng.random(shape) / 8)).astype(dtype)


def largest(error):
    """Return the largest magnitude per channel."""
    return np.abs(error).max(axis=(0, *range(2, error.ndim))).astype(float)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("outputs", "taps"), SHAPES)
def test_fast_algorithms_stay_within_their_bound(outputs, taps, dtype, rng, run_by):
    ndim = len(taps)
    weight = rng.standard_normal((6, 8, *taps)).astype(dtype)
    stage = lr.Stage(weight, lr.Geometry.of(ndim, padding=taps[0] // 2))
    x = signs(rng, (1, 8, *(8,) * ndim), dtype)
    error = largest(run_by(stage, outputs, x) - exact(stage, x))
    bound = rounding_bound(stage, dtype, outputs)
    assert (error <= bound).all()
    # The worst case has all roundings of one sign, and inputs that add up at every position of a
    # tile.  The observed ratio is 16 to 10,000, and grows with the number of products.
    assert (bound <= 2e4 * error).all()


def test_bound_of_a_fast_stage_with_replicas_groups_shuffle_and_dilation(rng, run_by):
    weight = rng.standard_normal((4, 3, 3, 3))
    geometry = lr.Geometry.of(2, padding=2, dilation=(1, 2))
    stage = lr.Stage(weight, geometry, outer=2, groups=2, inner=2, shuffle=(4, 6))
    sizes = 10.0 ** rng.integers(-3, 3, 24)
    x = (signs(rng, (2, 24, 11, 12), "float32") * sizes[:, None, None]).astype("float32")
    error = largest(run_by(stage, (4, 4), x) - exact(stage, x))
    bound = rounding_bound(stage, "float32", (4, 4), sizes)
    assert (error <= bound).all()
    assert (bound <= 3e3 * error).all()  # channel by channel: inputs differ by 1e5


def test_bound_of_a_transposed_stage_with_a_shuffle(rng):
    g = lr.Geometry.of(1)
    stage = lr.Stage(rng.standard_normal((6, 2, 3)), g, groups=3, shuffle=(2, 3), transposed=True)
    sizes = 10.0 ** rng.integers(-2, 2, 6)
    x = signs(rng, (2, 6, 50), "float32") * sizes[:, None].astype("float32")
    f = lr.chain([stage])
    error = largest(f.compile((50,), "float32", algorithm="direct")(x) - exact(stage, x))
    bound = rounding_bound(stage, "float32", None, sizes)
    assert (error <= bound).all()
    assert (bound <= 100 * error).all()


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"transposed": True, "stride": (2, 1)}])
def test_direct_sums_stay_within_their_bound(options, rng):
    f = lr.dense(rng.standard_normal((16, 12, 3, 5)), padding=1, **options)
    x = signs(rng, (2, f.in_channels, 20, 20), "float32")
    (stage,) = f.stages
    error = largest(f.compile((20, 20), "float32", algorithm="direct")(x) - exact(stage, x))
    bound = rounding_bound(stage)
    assert (error <= bound).all()
    assert (bound <= 500 * error).all()


def test_bound_does_not_depend_on_the_blocks_of_outputs(rng, monkeypatch):
    weight = rng.standard_normal((14, 3, 3, 3))
    stage = lr.Stage(weight, lr.Geometry.of(2), outer=2, groups=2, inner=3)
    whole = rounding_bound(stage, "float32", (4, 4))
    monkeypatch.setattr(arithmetic, "BLOCK", 2 * 2 * 3 * 36)  # of two of seven outputs per group
    np.testing.assert_allclose(rounding_bound(stage, "float32", (4, 4)), whole, rtol=1e-12)


@pytest.mark.parametrize("algorithm", ["auto", "direct"])
def test_sums_over_many_channels_of_few_outputs_stay_within_their_bound(algorithm, rng):
    f = lr.dense(rng.standard_normal((2, 256, 3, 3)).astype("float32"), padding=1)
    x = signs(rng, (1, 256, 16, 16), "float32")
    run = f.compile((16, 16), algorithm=algorithm)
    limits = lr.output_bound(f, f, (16, 16), run=run)
    error = np.abs(run(x) - reference.run_chain(f.stages, x.astype(float))).max()
    assert error <= limits.direct + limits.fast <= 1e4 * error


def test_bound_is_a_multiple_of_the_precision(rng):
    weight = rng.integers(-3, 4, (4, 3, 3, 3)).astype(float)
    stage = lr.Stage(weight, lr.Geometry.of(2))
    for outputs in (None, (2, 2), (6, 6)):
        single, double = (rounding_bound(stage, t, outputs) for t in ("float32", "float64"))
        np.testing.assert_allclose(single / double, 2.0**29, rtol=0.7)
    with pytest.raises(ValueError, match="outputs must be one number per axis, 2, got"):
        rounding_bound(stage, outputs=(4,))
    with pytest.raises(ValueError, match="outputs"):
        rounding_bound(stage, outputs=(9, 9))
    long = lr.Stage(np.ones((1, 3000, 1)), lr.Geometry.of(1))
    assert np.isinf(rounding_bound(long, "float16")).all()  # 3000 roundings of 2^-11


def planned(kind, rng):
    """Return a convolution, a chain for it, its spatial size and a plan with fast algorithms."""
    if kind == "transposed":
        conv = lr.dense(rng.standard_normal((32, 32, 6, 6)), padding=2, stride=2, transposed=True)
        return conv, conv, (24, 24), conv.compile((24, 24), "float32")
    conv = lr.dense(rng.standard_normal((48, 48, 3, 3)) / 20, padding=1)
    f = {
        "dense": lambda: conv,
        "spatial SVD": lambda: lr.spatial_svd(conv, 32),
        "channel SVD": lambda: lr.channel_svd(conv, 32),
    }[kind]()
    return conv, f, (32, 32), f.compile((32, 32), "float32")


@pytest.mark.parametrize("kind", ["dense", "spatial SVD", "channel SVD", "transposed"])
def test_output_bound_names_the_shares_of_the_arithmetic(kind, rng):
    conv, f, size, run = planned(kind, rng)
    bound = lr.output_bound(conv, f, size, run=run)
    assert bound.fast > 0
    assert (bound.direct > 0) == (kind == "channel SVD")
    x = signs(rng, (2, f.in_channels, *size), "float32")
    y = run(x)
    rounding = np.abs(y - reference.run_chain(f.stages, x.astype(float))).max() / np.abs(x).max()
    assert rounding <= bound.direct + bound.fast <= 1e4 * rounding
    total = np.abs(y - reference.run_chain(conv.stages, x.astype(float))).max()
    assert total <= bound.linf + bound.direct + bound.fast
    assert "rounding of stages by fast algorithms" in str(bound)
    direct = f.compile(size, "float32", algorithm="direct")
    slow = lr.output_bound(conv, f, size, run=direct)
    assert slow.fast == 0 < slow.direct < bound.direct + bound.fast
    assert lr.output_bound(conv, f, size).fast is None
    assert bound.linf == slow.linf


@pytest.mark.parametrize("kind", ["dense", "spatial SVD", "channel SVD", "transposed"])
def test_certificate_predicts_the_share_of_the_algorithm(kind, rng):
    conv, f, size, run = planned(kind, rng)
    c = lr.certificate(conv, f, run=run)
    assert c == replace(lr.certificate(conv, f), algorithm=c.algorithm)
    x = rng.standard_normal((4, f.in_channels, *size)).astype("float32")
    y = reference.run_chain(f.stages, x.astype(float))
    error = np.linalg.norm(run(x) - y) / np.linalg.norm(y)
    assert error <= c.algorithm <= 10 * error  # that of the worst place in a tile
    assert str(c).splitlines()[-1].split()[0] == "algorithm"
    direct = f.compile(size, "float32", algorithm="direct")
    assert lr.certificate(conv, f, run=direct).algorithm == 0


def test_plans_of_other_chains_are_refused(rng):
    conv, f, size, run = planned("spatial SVD", rng)
    for call in (lr.certificate, lambda *a, **k: lr.output_bound(*a, size, **k)):
        with pytest.raises(ValueError, match="run must be a plan of f, whose stages have weights"):
            call(conv, conv, run=run)
        with pytest.raises(TypeError, match="run must be a plan on the CPU, got function"):
            call(conv, f, run=planned)


def test_bounds_hold_on_a_real_network(data, rng, run_by):
    found = layers(data / "weights" / "resnet20_cifar10.safetensors")
    plain = [x for x in found if x.conv.geometry.stride == (1, 1) and x.conv.in_channels > 3]
    assert len(plain) == 16
    for layer in plain[::5]:
        (stage,) = layer.conv.stages
        x = signs(rng, (1, stage.in_channels, *layer.input_size), "float32")
        for outputs in ((2, 2), (4, 4), (6, 6)):
            error = largest(run_by(stage, outputs, x) - exact(stage, x))
            bound = rounding_bound(stage, "float32", outputs)
            assert (error <= bound).all()
            assert bound.max() <= 2000 * error.max()  # 47 to 1300 times
        f = lr.spatial_svd(layer.conv, stage.weight.shape[0])
        run = f.compile(layer.input_size, "float32")
        limits = lr.output_bound(layer.conv, f, layer.input_size, run=run)
        y = reference.run_chain(f.stages, x.astype(float))
        assert np.abs(run(x) - y).max() <= limits.direct + limits.fast <= 1e-2 * np.abs(y).max()


# Descriptions of plans


def test_a_plan_describes_its_stages(rng):
    conv, f, size, run = planned("channel SVD", rng)
    text = run.describe()
    assert text.startswith("channels-last buffers, float32, threads ")
    head, *rows = (line.split() for line in text.splitlines()[1:])
    assert head == ["stage", "algorithm", "error", "MACs"]
    assert [row[:2] for row in rows] == [["0:", "32x48x3x3"], ["1:", "48x32x1x1"]]
    assert rows[0][2].startswith("F(")
    assert float(rows[0][4]) == pytest.approx(lr.certificate(conv, f, run=run).algorithm, rel=0.6)
    assert rows[1][2] == "dense"
    assert "F(" not in f.compile(size, "float32", algorithm="direct").describe()


@pytest.mark.parametrize("kind", ["spatial SVD", "transposed"])
def test_a_description_has_times_of_the_run(kind, rng):
    _, f, size, run = planned(kind, rng)
    x = np.ones((2, f.in_channels, *size), "float32")
    lines = run.describe(x).splitlines()
    assert all(len(line) <= 80 for line in lines)
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[2:]]
    assert sum(shares[:-1]) == pytest.approx(100, abs=1)
    assert {"pack", "unpack", "rest", "total"} <= {line.split()[0] for line in lines}
    assert run.describe(x.astype("uint8")).startswith("planes, float32")


def test_descriptions_of_long_names_fit_a_terminal(rng):
    f = lr.dense(rng.standard_normal((256, 128, 3, 3, 3)).astype("float32"), padding=1)
    lines = f.compile((8, 8, 8)).describe().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert math.prod(map(int, lines[2].split()[1].split("x"))) == 256 * 128 * 27
