"""Invalid arguments raise errors that name them; unusual valid ones work; inputs stay unchanged."""

import re

import numpy as np
import pytest

import lowrank as lr
from lowrank.core import reference
from lowrank.families import FAMILIES

W = np.random.default_rng(0).standard_normal((6, 4, 3, 3))
NAN = np.where(np.arange(9).reshape(3, 3) == 4, np.nan, 1.0)[None, None]


def dense(weight=W, **options):
    return lr.dense(weight, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dense(W[0, 0]), ValueError, r"weight.*\(3, 3\)"),
        (lambda: dense(W[0]), ValueError, None),
        (lambda: dense(np.ones(3)), ValueError, r"weight.*\(3,\)"),
        (lambda: dense(np.ones((1,) * 6)), ValueError, "weight"),
        (lambda: dense(np.ones((0, 4, 3, 3))), ValueError, r"empty.*\(0, 4, 3, 3\)"),
        (lambda: dense(np.ones((2, 2, 0, 3))), ValueError, "empty"),
        (lambda: dense(NAN), ValueError, "weight.*NaN"),
        (lambda: dense(NAN * np.inf), ValueError, "weight.*infinite"),
        (lambda: dense(W.astype(int)), TypeError, "weight.*int64"),
        (lambda: dense(W.astype(complex)), TypeError, "weight.*complex128"),
        (lambda: dense(W > 0), TypeError, "weight.*bool"),
        (lambda: dense(W.astype(object)), TypeError, "weight.*object"),
        (lambda: dense("weights"), TypeError, "weight"),
        (lambda: dense(W, bias=np.ones(5)), ValueError, r"bias.*\(6,\).*\(5,\)"),
        (lambda: dense(W, bias=np.ones((6, 1))), ValueError, "bias"),
        (lambda: dense(W, bias=np.full(6, np.nan)), ValueError, "bias.*NaN"),
        (lambda: dense(W, bias=np.arange(6)), TypeError, "bias.*int64"),
        (lambda: dense(W, groups=4), ValueError, "groups.*6.*4"),
        (lambda: dense(W, groups=0), ValueError, "groups.*0"),
        (lambda: dense(W, groups=-1), ValueError, "groups.*-1"),
        (lambda: dense(W, groups=1.5), TypeError, "groups.*1.5"),
        (lambda: dense(W, stride=0), ValueError, "stride.*0"),
        (lambda: dense(W, stride=(1, 2, 3)), ValueError, "stride.*2 entries"),
        (lambda: dense(W, stride=1.5), TypeError, "stride.*1.5"),
        (lambda: dense(W, stride="2"), TypeError, "stride.*'2'"),
        (lambda: dense(W, stride=None), TypeError, "stride.*None"),
        (lambda: dense(W, dilation=0), ValueError, "dilation.*0"),
        (lambda: dense(W, dilation=(1, -1)), ValueError, "dilation.*-1"),
        (lambda: dense(W, padding=-1), ValueError, "padding.*-1"),
        (lambda: dense(W, padding=((1, 2, 3), 0)), ValueError, "padding"),
        (lambda: dense(W, padding=(1,)), ValueError, "padding.*2 entries"),
        (lambda: dense(W, padding=0.5), TypeError, "padding.*0.5"),
        (lambda: dense(W, padding="half"), ValueError, "padding.*'half'"),
        (lambda: dense(W, padding="same", stride=2), ValueError, "same.*stride"),
        (lambda: dense(W, padding_mode="mirror"), ValueError, "padding_mode.*'mirror'"),
        (lambda: dense(W, padding_mode="constant", value=np.inf), ValueError, "value.*inf"),
        (lambda: dense(W, output_padding=1), ValueError, "output_padding"),
        (lambda: dense(W, transposed=True, padding_mode="reflect"), ValueError, "padding_mode"),
        (lambda: dense(W, transposed=True, output_padding=-1), ValueError, "output_padding"),
    ],
)
def test_impossible_convolutions_are_refused(make, error, message):
    if message is None:
        make()  # (out, in, taps): a 1-D convolution
        return
    with pytest.raises(error) as refusal:
        make()
    assert re.search(message, str(refusal.value), re.DOTALL), refusal.value


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((4, 8, 8)), ValueError, r"\(4, 8, 8\)"),
        (np.ones((1, 5, 8, 8)), ValueError, "4.*5"),
        (np.ones((1, 4, 2, 8)), ValueError, "kernel.*padded input"),
        (np.ones((1, 4, 0, 8)), ValueError, "kernel|input"),
        (np.ones((1, 4, 8, 8), int), TypeError, "x.*int64"),
        (np.ones((1, 4, 8, 8), complex), TypeError, "x.*complex"),
        ([[1.0]], TypeError, "list"),
        (None, TypeError, "NoneType"),
    ],
)
def test_impossible_inputs_are_refused(x, error, message):
    for f in (dense(), lr.spatial_svd(dense(), 2), lr.kronecker(dense(), 2)):
        with pytest.raises(error, match=message):
            f(x)


def test_impossible_outputs_are_refused(rng):
    x = rng.standard_normal((2, 4, 8, 8))
    f = lr.spatial_svd(dense(), 2)
    y = f(x)
    wrong = [
        np.empty((2, 6, 6, 5)),
        np.empty((1, 6, 6, 6)),
        np.empty((2, 6, 6, 6), np.float32),
        np.empty((2, 6, 6, 6), int),
    ]
    frozen = np.empty((2, 6, 6, 6))
    frozen.flags.writeable = False
    for out in (*wrong, frozen):
        with pytest.raises((ValueError, TypeError), match=r"out|writ|read-only"):
            f(x, out=out)
    with pytest.raises(ValueError, match="overlap"):
        dense(W[:4, :, 1:2, 1:2])(x, out=x)
    out = np.empty_like(y)
    assert f(x, out=out) is out
    np.testing.assert_array_equal(out, y)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rank", [0, -1, 10**6, 1.5, "3", None, (), (1, 2, 3, 4, 5, 6, 7)])
def test_impossible_ranks_are_refused(name, rank):
    conv = lr.dense(np.ones((1, 1, 3, 3, 3))) if name == "separable_sum" else dense()
    variant = FAMILIES[name].variants(conv)[0]
    with pytest.raises((ValueError, TypeError), match="rank"):
        FAMILIES[name].fit(conv, rank, variant)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: lr.spatial_svd(c, 2, "h-d"), "variant.*h-w"),
        (lambda c: lr.filter_basis(c, 2, "x"), "variant"),
        (lambda c: lr.network_decoupling(c, 2, "pw"), "variant.*dw-pw"),
        (lambda c: lr.kronecker(c, 2, "5x5x1x1 first"), "dividing 6x4x3x3"),
        (lambda c: lr.kronecker(c, 2, "2x2 first"), "variant|2x2"),
        (lambda c: lr.kronecker(c, 2, "2x2x1x1 sideways"), "variant|sideways"),
        (lambda c: lr.kronecker(c, 2, ""), "variant"),
        (lambda c: lr.tensor_train(c, (2, 2, 2), "t-w-h-s"), "variant"),
        (lambda c: lr.frontier(c, (8, 8), ["svd"]), "families.*'svd'"),
        (lambda c: lr.frontier(c, (8, 8), axis="time"), "axis.*'time'"),
        (lambda c: lr.frontier(c, (8, 8, 8, 8)), "input_shape"),
        (lambda c: lr.frontier(c, (5, 8, 8)), "input_shape"),
        (lambda c: lr.frontier(c, (2, 2)), "larger|more than"),
        (lambda c: lr.frontier(lr.spatial_svd(c, 2), (8, 8)), "one dense stage"),
        (lambda c: lr.spatial_svd(lr.spatial_svd(c, 2), 2), "one dense stage"),
        (lambda c: lr.approximate(c, (8, 8), macs=0), "macs.*0"),
        (lambda c: lr.approximate(c, (8, 8), macs=-0.5), "macs"),
        (lambda c: lr.approximate(c, (8, 8), macs="20 tons"), "'20 tons'"),
        (lambda c: lr.approximate(c, (8, 8), macs=float("nan")), "macs"),
        (lambda c: lr.approximate(c, (8, 8), params="0"), "params"),
        (lambda c: lr.approximate(c, (8, 8), macs=1e-9), "infeasible.*minimum"),
        (lambda c: lr.approximate(c, (8, 8), max_error=-0.1), "max_error.*-0.1"),
        (lambda c: lr.approximate(c, (8, 8), max_error=float("nan")), "max_error"),
        (lambda c: lr.approximate(c, (8, 8), rank=0), "rank"),
        (lambda c: c.error(np.ones((2, 2))), r"\(2, 2\)"),
        (lambda c: c.cost((1, 2, 3, 4)), "input_shape"),
        (lambda c: c.compile((8, 8), threads=0), "threads.*0"),
        (lambda c: lr.chain([]), "stage"),
        (lambda c: lr.chain([c.stages[0], c.stages[0]]), "6 output channels.*4 input"),
        (lambda c: lr.certificate(c, lr.chain(c.stages)), "no family"),
    ],
)
def test_impossible_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        make(dense())


@pytest.mark.parametrize(
    "make",
    [
        lambda c: lr.approximate(c, (8, 8)),
        lambda c: lr.approximate(c, (8, 8), macs=0.5, params=0.5),
        lambda c: c.compile((8, 8), np.int32),
        lambda c: c.compile((8, 8), np.float16),
        lambda c: lr.frontier(W, (8, 8)),
        lambda c: lr.spatial_svd(W, 2),
    ],
)
def test_missing_or_conflicting_arguments_are_refused(make):
    with pytest.raises(TypeError):
        make(dense())


def test_unusual_memory_layouts_and_integer_types_work(rng):
    x = rng.standard_normal((2, 4, 8, 8))
    expected = dense(stride=2, padding=1, groups=1)(x)
    odd = [
        np.asfortranarray(W),
        W[::-1, ::-1, ::-1, ::-1][::-1, ::-1, ::-1, ::-1],
        W.astype(">f8"),
        W.tolist(),
    ]
    for weight in odd:
        f = lr.dense(weight, stride=np.int64(2), padding=np.int8(1), groups=np.int64(1))
        np.testing.assert_array_equal(f(x), expected)
        np.testing.assert_array_equal(lr.spatial_svd(f, np.int64(3)).rank, (3,))
    f = lr.dense(W, stride=np.array([2, 2]), padding=[[1, 1], (1, 1)])
    for y in (np.asfortranarray(x), x[:, ::-1][:, ::-1], x.astype(">f8"), x[..., ::-1][..., ::-1]):
        np.testing.assert_array_equal(f(y), expected)
    channels_last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(f(channels_last), expected)
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(f(frozen), expected)


def test_half_precision_weights_become_float32():
    f = lr.dense(W.astype(np.float16))
    assert f.dtype == np.float32
    assert f(np.ones((1, 4, 5, 5), np.float16)).dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_output_has_the_precision_of_the_input(dtype):
    for weight in (W, W.astype(np.float32)):
        assert dense(weight)(np.ones((1, 4, 5, 5), dtype)).dtype == dtype


def test_empty_batch_gives_an_empty_output():
    up = lr.dense(W, transposed=True, stride=2)
    for f in (dense(), lr.cp(dense(), 2), lr.kronecker(dense(), 2), up, lr.cp(up, 2)):
        x = np.empty((0, f.in_channels, 8, 8))
        shape = (0, *f.output_shape((8, 8)))
        assert f(x).shape == reference.run_chain(f.stages, x).shape == shape


def test_inputs_are_never_changed(rng):
    weight, bias = W.copy(), rng.standard_normal(6)
    x = rng.standard_normal((2, 4, 8, 8))
    copies = weight.copy(), bias.copy(), x.copy()
    conv = lr.dense(weight, bias, padding=1)
    lr.frontier(conv, (8, 8))
    lr.approximate(conv, (8, 8), macs=0.5)(x)
    for array, copy in zip((weight, bias, x), copies):
        np.testing.assert_array_equal(array, copy)
    weight[:] = 0  # the chain has a copy
    assert conv.to_dense().any()


def test_public_objects_are_immutable():
    f = lr.spatial_svd(dense(W, bias=np.ones(6)), 2)
    for array in (f.stages[0].weight, f.bias):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        f.rank = (3,)
    with pytest.raises(AttributeError):
        f.stages[0].groups = 2
    front = lr.frontier(f if f.family == "dense" else dense(), (8, 8), ["spatial_svd"])
    with pytest.raises(AttributeError):
        front[0].error = 0.0


def test_stages_copy_their_weights_and_stay_read_only(rng):
    import copy
    import pickle

    weight = rng.standard_normal((4, 4, 3))
    stage = lr.Stage(weight, lr.Geometry.of(1))
    original = weight.copy()
    weight[:] = 0
    np.testing.assert_array_equal(stage.weight, original)
    f = lr.spatial_svd(dense(W, bias=np.ones(6)), 2)
    for duplicate in (pickle.loads(pickle.dumps(f)), copy.deepcopy(f)):
        assert repr(duplicate) == repr(f)
        for s in duplicate.stages:
            assert not s.weight.flags.writeable
        np.testing.assert_array_equal(duplicate.to_dense(), f.to_dense())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: lr.Stage([[[1.0]]], g), "weight.*floating"),
        (lambda g: lr.Stage(np.ones((1, 1, 1), int), g), "weight.*floating"),
        (lambda g: lr.Stage(np.ones((1, 1, 1), complex), g), "weight.*floating"),
        (lambda g: lr.Stage(np.ones((2, 1, 1)), g, 2.0), "groups.*2.0"),
        (lambda g: lr.Geometry((1.5,), ((0, 0),), (1,)), "stride.*1.5"),
        (lambda g: dense().astype(int), "dtype.*int64"),
        (lambda g: dense().compile((8, 8), threads=1.5), "threads.*1.5"),
        (lambda g: dense()([[1.0]]), "x must be a NumPy or CuPy array, got list"),
        (
            lambda g: dense()(np.ma.ones((1, 4, 8, 8))),
            "x must be a NumPy or CuPy array, got Masked",
        ),
        (lambda g: dense().cost((8.7, 8)), "input_shape.*8.7"),
        (lambda g: lr.approximate(W, (8, 8), macs=0.5), "conv must come from"),
        (lambda g: lr.certificate(W, dense()), "conv must come from"),
        (lambda g: lr.approximate(dense(), (8, 8), macs=[1]), "macs"),
    ],
)
def test_errors_name_the_argument_of_the_wrong_type(make, message):
    with pytest.raises(TypeError, match=re.compile(message, re.DOTALL)):
        make(lr.Geometry.of(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: lr.Geometry.of(4), "1 to 3"),
        (lambda g: lr.Geometry.of(0), "1 to 3"),
        (lambda g: lr.Geometry.of(1, value=np.nan), "value"),
        (lambda g: lr.Stage(np.ones((1, 1, 1)), g, shuffle=(2,)), "shuffle"),
        (lambda g: lr.chain([lr.Stage(np.ones((8, 4, 1)), g)], groups=2), "mix"),
        (lambda g: lr.chain([lr.Stage(np.ones((8, 4, 1)), g)], groups=3), "groups.*3"),
        (
            lambda g: lr.approximate(dense(), (8, 8), macs=0.5, families="spatial_svd"),
            "families.*list",
        ),
        (lambda g: lr.approximate(dense(), (8, 8), macs="."), "'.'"),
        (lambda g: lr.approximate(dense(), (8, 8), max_error="0.1"), "max_error.*'0.1'"),
    ],
)
def test_errors_name_the_argument_that_is_out_of_range(make, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        make(lr.Geometry.of(1))


def test_chain_of_one_grouped_stage_has_its_groups():
    stage = lr.Stage(W[:, :1], lr.Geometry.of(2), groups=6)
    f = lr.chain([stage])
    assert f.groups == 6
    assert lr.spatial_svd(f, 1).in_channels == 6


def test_families_may_be_any_iterable():
    f = lr.approximate(dense(), (8, 8), rank=2, families=iter(["spatial_svd"]))
    assert f.rank == (2,)
