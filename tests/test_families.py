"""Contracts of every family, on every kind of convolution that it applies to."""

import numpy as np
import pytest

import lowrank as lr
from lowrank.core import reference
from lowrank.core.cost import chain_cost
from lowrank.families import FAMILIES, NotApplicable, applicable, tucker

# Fits are made in float64 from a kernel of norm about 1, by a few matrix products of at most
# a few thousand terms: 1e-12 is room enough.
TIGHT = 1e-12
# Errors come as the root of a difference of squares, which loses half of the digits at 0.
ROOT = 5e-7


def random(*shape, seed=0, **options):
    return lr.dense(np.random.default_rng(seed).standard_normal(shape), **options)


#: One convolution of each kind, with an input size.
CONVS = {
    "2-D": (random(6, 8, 3, 3, padding=1), (7, 8)),
    "1-D": (random(6, 8, 5, stride=2, padding=(((1, 3),))), (11,)),
    "3-D": (random(4, 6, 3, 3, 3, padding=1, stride=(1, 2, 1)), (5, 6, 7)),
    "oblong": (random(6, 4, 2, 5, stride=(2, 1), dilation=(1, 2), padding=(1, (3, 2))), (8, 9)),
    "grouped": (random(8, 4, 3, 3, groups=2, stride=2, padding=1), (8, 7)),
    "depthwise": (random(8, 1, 3, 5, groups=8, padding="same"), (6, 7)),
    "pointwise": (random(6, 8, 1, 1), (5, 5)),
    "one axis": (random(6, 8, 1, 5, stride=2), (5, 9)),
    "one in": (random(8, 1, 5, 5), (9, 9)),
    "one out": (random(1, 8, 5, 5, padding=2), (9, 9)),
    "one filter": (random(1, 1, 5, 7), (9, 9)),
    "one volume filter": (random(1, 1, 3, 5, 3), (6, 6, 6)),
    "transposed": (random(6, 8, 3, 3, stride=2, padding=1, transposed=True), (4, 5)),
    "transposed, grouped": (random(8, 3, 3, 3, stride=2, groups=2, transposed=True), (4, 5)),
    "reflected": (random(6, 4, 3, 5, padding=(1, 2), padding_mode="reflect", stride=2), (7, 8)),
    "circular": (random(6, 4, 3, 3, padding=2, padding_mode="circular", dilation=2), (7, 8)),
    "symmetric": (random(6, 4, 3, 5, padding=(1, 2), padding_mode="symmetric"), (7, 8)),
    "replicated": (random(6, 4, 4, 4, padding=((1, 2), (2, 1)), padding_mode="replicate"), (7, 8)),
    "constant": (random(6, 4, 3, 3, padding=1, padding_mode="constant", value=-1.5), (7, 8)),
}  # fmt: skip

MANY = {"cp", "cp3", "tucker", "tucker_full", "tucker_cp", "tensor_train", "kronecker"}
ONE_AXIS = {"spatial_svd", "cp3", "jaderberg", "separable_sum"}
#: Families that have nothing to offer, and where; everywhere else all but `filter` must.
LEFT_OUT = {
    "1-D": ONE_AXIS,
    "one axis": ONE_AXIS,
    "depthwise": set(FAMILIES) - {"spatial_svd"},
    "pointwise": set(FAMILIES) - {"channel_svd", "kronecker"},
    "one in": MANY - {"tucker_full", "kronecker"} | {"separable_sum"},
    "one out": MANY - {"tucker_full", "kronecker", "cp"} | {"jaderberg", "separable_sum"},
    "one filter": set(FAMILIES) - {"spatial_svd"},
    "one volume filter": set(FAMILIES) - {"spatial_svd", "tensor_train", "separable_sum"},
}


#: (convolution, family, variant) of all that applies.
PAIRS = [
    pytest.param(kind, name, variant, id=f"{kind}, {name} {variant}".strip())
    for kind, (conv, _) in CONVS.items()
    for name, variants in applicable(conv).items()
    for variant in variants
]
#: Families that reach the kernel itself at full rank, by theory and in practice: iterations
#: for CP need not get there.
REACHES = {n for n, f in FAMILIES.items() if f.exact} | {"tucker", "tucker_full", "tensor_train"}


def some(points, most=6):
    """At most `most` of a sweep, its ends among them."""
    points = list(points)
    at = np.unique(np.linspace(0, len(points) - 1, most).round().astype(int))
    return [points[i] for i in at]


@pytest.mark.parametrize(("kind", "name", "variant"), PAIRS)
def test_sweeps_predict_errors_bounds_and_costs(kind, name, variant):
    conv, size = CONVS[kind]
    family, weight = FAMILIES[name], conv.to_dense()
    points = list(family.sweep(conv, variant))
    assert points
    assert len({p.rank for p in points}) == len(points)
    for p in some(points):
        stages = p.build()
        f = lr.chain(stages, groups=conv.groups)
        error = lr.Factorization(stages, conv.geometry, conv.groups).error(weight)
        if family.exact:
            assert error == pytest.approx(p.error, abs=ROOT)
            assert p.bound == p.error
        else:
            assert error <= p.error + ROOT
        assert p.bound <= error + ROOT
        assert p.bound == pytest.approx(family.bound(conv, p.rank, variant), abs=ROOT)
        # priced without weights as with them
        assert all(np.isnan(s.weight.flat[0]) for s in p.stages)
        shape = (conv.in_channels, *size)
        assert chain_cost(p.stages, shape) == chain_cost(stages, shape)
        assert f.output_shape(size) == conv.output_shape(size)


@pytest.mark.parametrize(("kind", "name", "variant"), PAIRS)
def test_chains_compute_their_dense_kernel(rng, kind, name, variant):
    conv, size = CONVS[kind]
    x = rng.standard_normal((2, conv.in_channels, *size))
    p = some(FAMILIES[name].sweep(conv, variant), 3)[1]
    f = FAMILIES[name].fit(conv, p.rank, variant)
    g = conv.geometry
    same = lr.dense(
        f.to_dense(), stride=g.stride, padding=g.padding, dilation=g.dilation,
        groups=conv.groups, padding_mode=g.padding_mode, value=g.value,
        transposed=conv.transposed, output_padding=g.output_padding,
    )  # fmt: skip
    expected = reference.run_chain(same.stages, x)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(reference.run_chain(f.stages, x), expected, atol=TIGHT * scale)
    np.testing.assert_allclose(f(x), expected, atol=TIGHT * scale)
    assert (f.family, f.variant, f.rank) == (name, variant, p.rank)
    assert f.geometry == conv.geometry


@pytest.mark.parametrize(("kind", "name", "variant"), [p for p in PAIRS if p.values[1] in REACHES])
def test_full_rank_is_exact(kind, name, variant):
    conv, _ = CONVS[kind]
    family = FAMILIES[name]
    if name == "tensor_train":
        # large enough for any train; what is too large is refused with the limits
        with pytest.raises(ValueError, match="rank") as refusal:
            family.fit(conv, (10**9,) * variant.count("-"), variant)
        limits = str(refusal.value).split("from ")[1].split(", got")[0]
        rank = tuple(int(limit.split(" to ")[1]) for limit in limits.split(", "))
    else:
        rank = max(p.rank for p in family.sweep(conv, variant))
        if name in ("tucker", "tucker_full"):
            rank = tuple(
                max(p.rank[k] for p in family.sweep(conv, variant)) for k in range(len(rank))
            )
    assert family.fit(conv, rank, variant).error(conv.to_dense()) < ROOT


@pytest.mark.parametrize("kind", CONVS)
def test_inapplicable_families_are_left_out_with_a_reason(kind):
    conv, size = CONVS[kind]
    left_out = lr.frontier(conv, size).left_out
    for name in FAMILIES:
        if name in left_out:
            with pytest.raises(NotApplicable, match=name):
                FAMILIES[name].fit(conv, 1, None)
    assert set(left_out) == LEFT_OUT.get(kind, {"separable_sum"})


# Powers of two near 1e-30 and 1e30: exact, so that iterations take the same path.
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
@pytest.mark.parametrize("name", FAMILIES)
def test_errors_do_not_depend_on_scale(name, scale):
    shape = (1, 1, 3, 3, 3) if name == "separable_sum" else (6, 8, 3, 3)
    conv = random(*shape)
    scaled = lr.dense(conv.to_dense() * scale)
    for variant in FAMILIES[name].variants(conv):
        pairs = zip(FAMILIES[name].sweep(conv, variant), FAMILIES[name].sweep(scaled, variant))
        for a, b in some(pairs, 3):
            assert a.rank == b.rank
            assert a.error == b.error
            f = lr.Factorization(b.build(), scaled.geometry)
            assert f.error(scaled.to_dense()) <= b.error + ROOT


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_constant_kernels_have_rank_one(name, value):
    shape = (1, 1, 3, 3, 3) if name == "separable_sum" else (6, 8, 3, 3)
    conv = lr.dense(np.full(shape, value))
    for variant in FAMILIES[name].variants(conv):
        p = next(iter(FAMILIES[name].sweep(conv, variant)))
        f = FAMILIES[name].fit(conv, p.rank, variant)
        assert all(np.isfinite(s.weight).all() for s in f.stages)
        assert f.error(conv.to_dense()) < ROOT


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_is_kept_and_inputs_are_not_modified(name):
    shape = (1, 1, 3, 3, 3) if name == "separable_sum" else (6, 8, 3, 3)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    before = weight.copy()
    conv = lr.dense(weight, np.ones(shape[0], np.float32))
    variant = FAMILIES[name].variants(conv)[0]
    p = some(FAMILIES[name].sweep(conv, variant), 3)[1]
    f = FAMILIES[name].fit(conv, p.rank, variant)
    assert f.dtype == np.float32
    np.testing.assert_array_equal(f.bias, conv.bias)
    np.testing.assert_array_equal(weight, before)
    x = np.ones((1, shape[1], *(6,) * (len(shape) - 2)), np.float32)
    assert f(x).dtype == np.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda c: lr.spatial_svd(c, 8),
        lambda c: lr.tucker(c, (6, 5)),
        lambda c: lr.tucker_full(c, (6, 5, 2, 2)),
        lambda c: lr.tensor_train(c, (4, 5, 6)),
        lambda c: lr.tucker_cp(c, (6, 5, 12)),
    ],
)
def test_stages_have_equal_norms(make):
    norms = [np.linalg.norm(s.weight) for s in make(random(16, 16, 3, 3)).stages]
    np.testing.assert_allclose(norms, norms[0])


@pytest.mark.parametrize("name", ["cp", "tucker_full"])
def test_one_input_or_output_channel_is_accepted(name, rng):
    for shape in ((8, 1, 5, 5), (1, 8, 5, 5)):
        conv = random(*shape, padding=2)
        if name in applicable(conv):
            rank = 4 if name == "cp" else (min(3, shape[0]), min(3, shape[1]), 2, 3)
            f = FAMILIES[name].fit(conv, rank, None)
            x = rng.standard_normal((2, shape[1], 7, 8))
            np.testing.assert_allclose(f(x), lr.dense(f.to_dense(), padding=2)(x), atol=TIGHT * 100)
            assert min(min(s.weight.shape[:2]) for s in f.stages) >= 1
            assert f.error(conv.to_dense()) < 1


def test_kronecker_accepts_any_split_that_divides_the_shape(rng):
    for shape, variant in (
        ((9, 3, 3, 3), "3x3x1x1 first"),
        ((64, 3, 9, 9), "8x1x3x3 last"),
        ((1, 1, 9, 9), "1x1x3x3 first"),
        ((15, 7, 5, 1), "5x7x1x1 last"),
    ):
        b = tuple(map(int, variant.split()[0].split("x")))
        a = tuple(n // m for n, m in zip(shape, b))
        weight = np.kron(rng.standard_normal(a), rng.standard_normal(b))
        f = lr.kronecker(lr.dense(weight), 1, variant)
        assert f.error(weight) < ROOT
        assert f.params == np.prod(a) + np.prod(b)
    for variant in ("3x3x1x1  first", "\uff13x3x1x1 first", "3x3x1x1", "3x3x1x1 first "):
        with pytest.raises(ValueError, match="variant"):
            lr.kronecker(lr.dense(np.ones((9, 3, 3, 3))), 1, variant)


def test_spatial_svd_error_is_the_spectral_tail():
    conv = random(6, 4, 3, 3)
    matrix = conv.to_dense().transpose(1, 2, 0, 3).reshape(12, 18)
    s = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 5, 12):
        tail = np.sqrt((s[rank:] ** 2).sum() / (s**2).sum())
        assert lr.spatial_svd(conv, rank, "h-w").error(conv.to_dense()) == pytest.approx(
            tail, abs=ROOT
        )


@pytest.mark.parametrize("sizes", [(64, 64, 9, 9, 9), (512, 512), (64, 64, 3, 3), (8, 8, 7, 7, 7)])
def test_tucker_sweeps_cover_every_mode(sizes):
    found = list(tucker._grid(sizes))
    assert len(found) <= tucker.POINTS
    for mode, size in enumerate(sizes):
        ranks = {rank[mode] for rank in found}
        assert {1, size} <= ranks or size == 1
        assert len(ranks) >= min(size, 3)


def test_kronecker_recovers_a_sum_of_two_terms(rng):
    # two terms of (3, 4, 1, 3) (x) (2, 2, 3, 1): B's tap (i, j) inside A's (I, J)
    a, b = rng.standard_normal((2, 3, 4, 1, 3)), rng.standard_normal((2, 2, 2, 3, 1))
    weight = sum(np.kron(a[r], b[r]) for r in range(2))
    f = lr.kronecker(lr.dense(weight), 2, "2x2x3x1 first")
    assert f.error(weight) < ROOT
    assert f.params == a.size + b.size


def test_cp_recovers_a_sum_of_three_terms(rng):
    factors = [rng.standard_normal((n, 3)) for n in (12, 10, 3, 3)]
    weight = np.einsum("ar,br,cr,dr->abcd", *factors)
    assert lr.cp(lr.dense(weight), 3).error(weight) < 1e-3


def test_frontiers_hold_no_weights(monkeypatch):
    # of the frontier of a large layer no candidate may hold its weights
    front = lr.frontier(random(64, 64, 3, 3), (8, 8), ["spatial_svd", "channel_svd", "kronecker"])
    held = [s.weight for c in front if c._point for s in c._point.stages]
    assert len(held) > 20
    assert all(w.strides == (0,) * w.ndim for w in held)
