"""Costs compared with counts by hand, many of them from articles."""

from fractions import Fraction

import numpy as np
import pytest

import lowrank as lr
from lowrank.core.cost import stage_costs


def ones(*shape):
    return np.ones(shape, np.float32)


def macs(f, *size):
    return f.cost(size).macs


def test_3x3_filter_on_a_5x5_image_has_81_macs_and_72_separated():
    dense = lr.dense(ones(1, 1, 3, 3))
    assert macs(dense, 5, 5) == 81
    assert macs(lr.spatial_svd(dense, 1, "w-h"), 5, 5) == 5 * 3 * 3 + 3 * 3 * 3 == 72


@pytest.mark.parametrize(("size", "taps"), [(5, 3), (7, 5), (50, 3), (64, 9), (9, 9)])
def test_mac_ratio_of_a_separable_filter(size, taps):
    # N x N samples, m taps: m (N-m+1) (2N-m+1) MACs for two 1-D passes, m^2 (N-m+1)^2 for dense
    dense = lr.dense(ones(1, 1, taps, taps))
    share = Fraction(macs(lr.spatial_svd(dense, 1), size, size), macs(dense, size, size))
    assert share == Fraction(2 * size - taps + 1, taps * (size - taps + 1))


def test_128_filters_of_3x3x3_on_7x7():
    dense = lr.dense(ones(128, 3, 3, 3))
    assert macs(dense, 7, 7) == 86_400
    f = lr.network_decoupling(dense, 1)
    assert [c.macs for c in f.stage_costs((7, 7))] == [675, 9_600]
    assert macs(f, 7, 7) == 10_275


def test_256_filters_of_5x5x3_on_12x12():
    dense = lr.dense(ones(256, 3, 5, 5))
    assert macs(dense, 12, 12) == 1_228_800
    f = lr.network_decoupling(dense, 1)
    assert [c.macs for c in f.stage_costs((12, 12))] == [4_800, 49_152]
    assert macs(f, 12, 12) == 53_952


def test_64_to_128_channels_have_73728_macs_per_pixel():
    assert macs(lr.dense(ones(128, 64, 3, 3)), 3, 3) == 73_728


def test_7x7x7_taps_have_343_macs_per_voxel_and_three_passes_21():
    dense = lr.dense(ones(1, 1, 7, 7, 7))
    assert macs(dense, 7, 7, 7) == dense.params == 343
    f = lr.separable_sum(dense, 1)
    assert [s.weight.size for s in f.stages] == [7, 7, 7]
    # on a large volume the border is negligible: 21 per voxel
    assert macs(f, 1006, 1006, 1006) / 1000**3 == pytest.approx(21, rel=0.02)


@pytest.mark.parametrize("outs", [8, 64, 72, 128])
@pytest.mark.parametrize("taps", [3, 5])
def test_mac_ratio_of_depthwise_separable(outs, taps):
    dense = lr.dense(ones(outs, 16, taps, taps))
    share = Fraction(macs(lr.network_decoupling(dense, 1), 20, 20), macs(dense, 20, 20))
    assert share == Fraction(1, outs) + Fraction(1, taps**2)


def test_parameters_of_the_keras_example():
    bias = ones(128)
    dense = lr.dense(ones(128, 3, 3, 3), bias)
    plain = lr.dense(ones(128, 3, 3, 3))
    assert (dense.params, plain.params) == (3_584, 3_456)
    g = lr.Geometry.of(2)
    depthwise, pointwise = lr.Stage(ones(3, 1, 3, 3), g, 3), lr.Stage(ones(128, 3, 1, 1), g)
    assert lr.chain([depthwise, pointwise]).params == 411
    # the depthwise layer of the example has a bias, which a chain folds into the last one
    assert lr.chain([depthwise, pointwise], bias).params + 3 == 542


def test_traffic_of_depthwise_separable_layers():
    # 64 -> 128 channels at 112 x 112, in MB of float32: dense, stage by stage, fused
    dense = lr.dense(ones(128, 64, 3, 3), padding=1)
    f = lr.network_decoupling(dense, 1, "dw-pw")
    mega = 4 / 1e6
    size = (112, 112)
    assert round(dense.cost(size).traffic * mega, 2) == 9.93
    assert round(f.cost(size).traffic * mega, 2) == 16.09
    assert round(f.cost(size).fused * mega, 2) == 9.67


@pytest.fixture
def conv():
    """8 channels to 12, 3 x 5 taps, stride 2 along w: 9 x 12 in, 9 x 6 out."""
    rng = np.random.default_rng(0)
    return lr.dense(rng.standard_normal((12, 8, 3, 5)), stride=(1, 2), padding=(1, 2))


SIZE = (9, 12)
AT = {"whole": 9 * 12, "half": 9 * 6}


@pytest.mark.parametrize(
    ("make", "stages"),
    [
        (lambda c: lr.channel_svd(c, 4), [(4 * 8 * 15, "half"), (12 * 4, "half")]),
        (lambda c: lr.channel_svd(c, 4, "input"), [(4 * 8, "whole"), (12 * 4 * 15, "half")]),
        (lambda c: lr.spatial_svd(c, 4, "h-w"), [(4 * 8 * 3, "whole"), (12 * 4 * 5, "half")]),
        (lambda c: lr.spatial_svd(c, 4, "w-h"), [(4 * 8 * 5, "half"), (12 * 4 * 3, "half")]),
        (lambda c: lr.network_decoupling(c, 2, "dw-pw"), [(8 * 2 * 15, "half"), (12 * 16, "half")]),
        (
            lambda c: lr.network_decoupling(c, 2, "pw-dw"),
            [(24 * 8, "whole"), (12 * 2 * 15, "half")],
        ),
        (
            lambda c: lr.cp(c, 7),
            [(7 * 8, "whole"), (7 * 3, "whole"), (7 * 5, "half"), (12 * 7, "half")],
        ),
        (lambda c: lr.cp3(c, 7), [(7 * 8, "whole"), (7 * 15, "half"), (12 * 7, "half")]),
        (
            lambda c: lr.tucker(c, (5, 3)),
            [(3 * 8, "whole"), (5 * 3 * 15, "half"), (12 * 5, "half")],
        ),
        (
            lambda c: lr.tensor_train(c, (3, 4, 5)),
            [(3 * 8, "whole"), (4 * 3 * 3, "whole"), (5 * 4 * 5, "half"), (12 * 5, "half")],
        ),
        # four replicas of B with 3 terms of 2 x 2; then two of A with 6 x 4 channels per term
        (
            lambda c: lr.kronecker(c, 3, "2x2x1x1 first"),
            [(4 * 6 * 2, "whole"), (2 * 6 * 12 * 15, "half")],
        ),
    ],
)  # fmt: skip
def test_macs_of_every_stage(conv, make, stages):
    f = make(conv)
    assert [c.macs for c in f.stage_costs(SIZE)] == [n * AT[at] for n, at in stages]
    assert f.cost(SIZE).macs == sum(n * AT[at] for n, at in stages)


def test_replicated_weights_count_once_as_parameters(conv):
    f = lr.kronecker(conv, 3, "2x2x1x1 first")
    assert [s.weight.size for s in f.stages] == [6 * 2, 6 * 12 * 15]


def test_memory_of_a_chain():
    f = lr.spatial_svd(lr.dense(ones(12, 8, 3, 5), ones(12)), 4, "h-w")
    read, between, written = 8 * 9 * 12, 4 * 7 * 12, 12 * 7 * 8
    weights = 4 * 8 * 3 + 12 * 4 * 5 + 12
    cost = f.cost((9, 12))
    assert cost.params == weights
    assert cost.traffic == read + 2 * between + written + weights
    assert cost.fused == read + written + weights
    assert cost.peak == max(read + between, between + written)


def test_transposed_stage_has_macs_per_input_sample():
    conv = lr.dense(ones(8, 12, 3, 3), stride=2, padding=1, output_padding=1, transposed=True)
    assert conv.output_shape((5, 5)) == (12, 10, 10)
    assert conv.cost((5, 5)).macs == 8 * 12 * 9 * 25


def test_macs_of_a_grouped_and_dilated_convolution():
    conv = lr.dense(ones(8, 2, 3, 3), groups=4, dilation=2)
    assert conv.cost((10, 10)).macs == 8 * 2 * 9 * 6 * 6
    assert conv.params == 8 * 2 * 9


def test_chain_cost_sums_stage_costs(conv):
    f = lr.cp(conv, 3)
    stages = stage_costs(f.stages, (8, *SIZE))
    whole = f.cost(SIZE)
    assert whole.macs == sum(c.macs for c in stages)
    assert whole.traffic == sum(c.traffic for c in stages)
    assert whole.peak == max(c.peak for c in stages)
