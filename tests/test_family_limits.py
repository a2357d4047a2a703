"""Ranks of single layers that are chosen by a share of the parameters or by the largest error."""

import numpy as np
import pytest

import lowrank
from lowrank import FAMILIES
from lowrank.families import applicable
from lowrank.metric import Moments
from lowrank.selection import ranks

CONV = lowrank.dense(np.random.default_rng(0).standard_normal((6, 5, 3, 3)), np.ones(6), padding=1)


CUBE = lowrank.dense(np.random.default_rng(0).standard_normal((4, 1, 3, 3, 3)))


def public(name):
    return getattr(lowrank, name)


def suited(name):
    """Return a convolution that a family applies to."""
    return CUBE if name == "separable_sum" else CONV


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_a_share_of_the_parameters(name):
    share, conv = 0.9, suited(name)
    f = public(name)(conv, share)
    assert f.family == name
    assert f.params <= share * conv.params
    assert f.rank == ranks.for_ratio(conv, name, params=share)
    assert (f.bias is None) == (conv.bias is None)
    assert f.geometry == conv.geometry


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_the_largest_error(name):
    limit, conv = 0.8, suited(name)
    f = public(name)(conv, max_error=limit)
    assert f.family == name
    assert f.error(conv.to_dense()) <= limit
    rank = ranks.for_error(conv, name, limit)
    assert f.rank == rank or FAMILIES[name].is_outer_product_sum  # other starts, other errors
    with pytest.raises(ValueError, match="max_error must be at least"):
        public(name)(conv, 1 if len(f.rank) == 1 else (1,) * len(f.rank), max_error=0.1)
    exact = public(name)(conv, f.rank if len(f.rank) > 1 else f.rank[0], max_error=0.99)
    assert exact.rank == f.rank


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_is_wrong_with_a_limit(name):
    conv = suited(name)
    with pytest.raises(TypeError, match=f"{name} needs a rank or max_error="):
        public(name)(conv)
    with pytest.raises(ValueError, match="max_error must be a number"):
        public(name)(conv, max_error=-1)
    for limit in ("small", True, float("nan"), None, 0.5j):
        with pytest.raises((TypeError, ValueError), match="max_error"):
            public(name)(conv, max_error=limit)
    for rank in (True, (True, 2), "2", 2 + 0j):
        with pytest.raises(TypeError, match="integers, or a share of the parameters"):
            public(name)(conv, rank)
    with pytest.raises(ValueError, match=r"rank must be at least 0.* for .*, got 0.0001"):
        public(name)(conv, 1e-4)
    for rank in (1.0, 1.5, 0.0, -0.5, float("nan")):
        with pytest.raises(TypeError, match="share of the parameters between 0 and 1"):
            public(name)(conv, rank)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.has_fast_sweep])
def test_limits_hold_in_a_metric(name):
    moments = Moments(CONV)
    moments.add(np.random.default_rng(1).standard_normal((16, 5, 9, 9)).cumsum(axis=-1))
    metric = moments.metric()
    family = FAMILIES[name]
    f = family.fit(CONV, metric=metric, max_error=0.3)
    assert f.rank
    half = family.fit(CONV, 0.9, metric=metric)
    assert half.params <= 0.9 * CONV.params
    with pytest.raises(ValueError, match="at rank"):
        family.fit(CONV, (1,) * len(half.rank), metric=metric, max_error=1e-3)


def test_variants_are_kept():
    for name, variants in applicable(CONV).items():
        if FAMILIES[name].has_fast_sweep:
            for variant in variants:
                f = FAMILIES[name].fit(CONV, 0.95, variant)
                assert f.variant == variant
    with pytest.raises(ValueError, match="variant must be one of"):
        lowrank.channel_svd(CONV, 0.5, "sideways")
    f = lowrank.kronecker(CONV, 0.5, "3x5x1x1 first")
    assert f.variant == "3x5x1x1 first"


@pytest.mark.parametrize("rank", [np.float32(0.9), np.float64(0.9)])
def test_shares_may_be_numbers_of_numpy(rank):
    assert lowrank.channel_svd(CONV, rank).rank == lowrank.channel_svd(CONV, 0.9).rank
