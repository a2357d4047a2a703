"""Chains on array API libraries: NumPy, and one that implements the standard alone."""

import numpy as np
import pytest

import lowrank
from lowrank import Geometry, Stage
from lowrank.core import reference
from lowrank.core.stage import Epilogue
from lowrank.engine import array_api
from lowrank.families import FAMILIES, NotApplicable

MODES = ("zeros", "constant", "replicate", "reflect", "symmetric", "circular")


def strict():
    return pytest.importorskip("array_api_strict")


def run(stages, x, epilogues=None, xp=np):
    epilogues = epilogues or [Epilogue()] * len(stages)
    weights = [xp.asarray(np.ascontiguousarray(array_api.weight_matrices(s))) for s in stages]
    return array_api.run(stages, xp.asarray(x), weights, epilogues, xp)


def assert_close(found, wanted, terms):
    """Compare float64 sums of `terms` products, in any order."""
    found = np.asarray(found)
    assert found.shape == wanted.shape
    scale = np.abs(wanted).max(initial=1e-30)
    assert np.abs(found - wanted).max(initial=0) <= 16 * terms * np.finfo(float).eps * scale


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_all_padding_modes_strides_and_dilations(mode, ndim, rng):
    for stride, dilation, padding in ((1, 1, 1), (2, 1, 2), (1, 2, 3), (3, 2, 2)):
        g = Geometry.of(ndim, stride, padding, dilation, mode, value=0.75)
        stage = Stage(rng.standard_normal((6, 2, *(3,) * ndim)), g, groups=2)
        x = rng.standard_normal((2, 4, *(7,) * ndim))
        assert_close(run([stage], x), reference.run_chain([stage], x), 2 * 3**ndim)


@pytest.mark.parametrize(
    "options",
    [
        {"outer": 2},
        {"inner": 3},
        {"outer": 2, "inner": 2, "shuffle": (4, 2)},
        {"shuffle": (2, 2)},
        {"transposed": True, "outer": 2},
        {"transposed": True, "inner": 3, "shuffle": (3, 2)},
    ],
)
def test_replicated_shuffled_and_transposed_stages(options, rng):
    g = Geometry.of(2, stride=2, padding=1, dilation=(1, 2))
    stage = Stage(rng.standard_normal((6, 2, 3, 2)), g, groups=2, **options)
    x = rng.standard_normal((2, stage.in_channels, 6, 7))
    assert_close(run([stage], x), reference.run_chain([stage], x), 100)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_family_runs_on_the_array_api_standard(family, transposed, rng):
    xp = strict()
    conv = lowrank.dense(
        rng.standard_normal((4, 6, 3, 3)), rng.standard_normal(6 if transposed else 4),
        stride=2, padding=1, transposed=transposed,
    )  # fmt: skip
    try:
        variant = FAMILIES[family].variants(conv)[0]
    except NotApplicable as why:
        pytest.skip(str(why))
    point = next(iter(FAMILIES[family].sweep(conv, variant)))
    stages = point.build()
    x = rng.standard_normal((2, conv.in_channels, 6, 5))
    last = [Epilogue(conv.bias, "relu")]
    found = run(stages, x, [Epilogue()] * (len(stages) - 1) + last, xp)
    wanted = np.maximum(reference.run_chain(stages, x, conv.bias), 0)
    assert_close(found, wanted, 1000)


def test_border_value_passes_through_the_stages(rng):
    g = Geometry.of(1, padding=2, padding_mode="constant", value=-1.5)
    stages = [Stage(rng.standard_normal((3, 2, 3)), g), Stage(rng.standard_normal((2, 3, 3)), g)]
    x = rng.standard_normal((1, 2, 8))
    assert_close(run(stages, x, xp=strict()), reference.run_chain(stages, x), 100)


def test_empty_batch_gives_an_empty_output(rng):
    stage = Stage(rng.standard_normal((3, 2, 3)), Geometry.of(1))
    assert run([stage], np.zeros((0, 2, 8))).shape == (0, 3, 6)
