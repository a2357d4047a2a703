"""Blocks of well-known networks, compared with the reference stage by stage."""

import numpy as np
import pytest
from scipy import special

import lowrank as lr
from lowrank import blocks
from lowrank.core import reference

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def norm(rng, channels):
    return blocks.BatchNorm(
        *(rng.standard_normal(channels) for _ in range(3)), rng.uniform(0.5, 2, channels)
    )


def normalised(y, n):
    scale, shift, mean, variance = (a[:, None, None] for a in n[:4])
    return (y - mean) / np.sqrt(variance + n.eps) * scale + shift


def conv(x, w, stride=1, groups=1, dilation=1, transposed=False):
    """Run a convolution with same padding by the reference."""
    reach = [dilation * (k - 1) for k in w.shape[2:]]
    pads = [(n // 2, n - n // 2) for n in reach]
    f = lr.dense(
        w, stride=stride, groups=groups, dilation=dilation, transposed=transposed,
        padding=0 if transposed else pads,
    )  # fmt: skip
    return reference.run_chain(f.stages, x)


def relu(x):
    return np.maximum(x, 0)


def relu6(x):
    return np.clip(x, 0, 6)


def pooled(x):
    """Return ShuffleNet's shortcut for stride 2: average pooling of 3 x 3 samples."""
    n = x.shape[1]
    return conv(x, np.full((n, 1, 3, 3), 1 / 9), 2, n)


WORDS = {
    "relu": relu,
    "relu6": relu6,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hard_swish": lambda x: x * relu6(x + 3) / 6,
    "gelu": lambda x: x * (1 + special.erf(x / np.sqrt(2))) / 2,
    "tanh": np.tanh,
    "leaky_relu": lambda x: np.maximum(x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
}


def run(block, x, skip=None):
    """Run the chains of a block and the operations between them."""
    start = x
    for part in block.parts:
        if not isinstance(part, str):
            x = part(x)
            continue
        for word in part.split(", "):
            if word == "add input":
                x = x + start
            elif word == "concatenate pooled input":
                x = np.concatenate([x, pooled(start)], 1)
            elif word == "concatenate skip":
                x = np.concatenate([x, skip], 1)
            elif word != "squeeze-excite":
                x = WORDS[word](x)
    return x


@pytest.fixture
def x(rng):
    return rng.standard_normal((2, 8, 10, 11))


@pytest.mark.parametrize("stride", [1, 2])
def test_mobilenet_v1(rng, x, stride):
    d, p = rng.standard_normal((8, 1, 3, 3)), rng.standard_normal((12, 8, 1, 1))
    a, b = norm(rng, 8), norm(rng, 12)
    block = blocks.mobilenet_v1(d, p, stride=stride, norms=(a, b))
    y = relu(normalised(conv(x, d, stride, 8), a))
    np.testing.assert_allclose(run(block, x), relu(normalised(conv(y, p), b)), **TIGHT)
    by_hand = (8 * 9 + 12 * 8) * (110 if stride == 1 else 5 * 6)
    assert block.macs((8, 10, 11)) == by_hand


@pytest.mark.parametrize(("stride", "outs", "se"), [(1, 8, False), (2, 12, False), (1, 8, True)])
def test_inverted_residual(rng, x, stride, outs, se):
    e, d = rng.standard_normal((24, 8, 1, 1)), rng.standard_normal((24, 1, 5, 5))
    p = rng.standard_normal((outs, 24, 1, 1))
    norms = norm(rng, 24), norm(rng, 24), norm(rng, outs)
    word = "silu" if se else "relu6"
    block = blocks.inverted_residual(
        e, d, p, stride=stride, norms=norms, activation=word, squeeze_excite=se
    )
    act = WORDS[word]
    y = act(normalised(conv(x, e), norms[0]))
    y = act(normalised(conv(y, d, stride, 24), norms[1]))
    y = normalised(conv(y, p), norms[2])
    skips = stride == 1 and outs == 8
    np.testing.assert_allclose(run(block, x), y + x if skips else y, **TIGHT)
    assert ("squeeze-excite" in block.parts) == se
    assert ("add input" in block.parts) == skips


def test_xception(rng, x):
    weights = [
        (rng.standard_normal((8, 1, 3, 3)), rng.standard_normal((8, 8, 1, 1))) for _ in "abc"
    ]
    norms = [norm(rng, 8) for _ in "abc"]
    y = x
    for (d, p), n in zip(weights, norms):
        y = normalised(conv(conv(relu(y), d, groups=8), p), n)
    np.testing.assert_allclose(run(blocks.xception(weights, norms), x), y + x, **TIGHT)


def test_unet_step(rng, x):
    up = rng.standard_normal((8, 4, 2, 2))
    skip = rng.standard_normal((2, 6, 20, 22))
    d, p = rng.standard_normal((10, 1, 3, 3)), rng.standard_normal((4, 10, 1, 1))
    n = norm(rng, 4)
    y = conv(x, up, stride=2, transposed=True)
    y = relu(normalised(conv(conv(np.concatenate([y, skip], 1), d, groups=10), p), n))
    block = blocks.unet_step(up, [(d, p)], [n])
    np.testing.assert_allclose(run(block, x, skip), y, **TIGHT)


@pytest.mark.parametrize("stride", [1, 2])
def test_shuffle_unit(rng, x, stride):
    r, e = rng.standard_normal((12, 4, 1, 1)), rng.standard_normal((8, 6, 1, 1))
    d = rng.standard_normal((12, 1, 3, 3))
    norms = norm(rng, 12), norm(rng, 12), norm(rng, 8)
    block = blocks.shuffle_unit(r, d, e, groups=2, stride=stride, norms=norms)
    y = relu(normalised(conv(x, r, groups=2), norms[0]))
    y = y.reshape(2, 2, 6, *y.shape[2:]).swapaxes(1, 2).reshape(y.shape)
    y = normalised(conv(y, d, stride, 12), norms[1])
    y = normalised(conv(y, e, groups=2), norms[2])
    expected = y + x if stride == 1 else np.concatenate([y, pooled(x)], 1)
    np.testing.assert_allclose(run(block, x), relu(expected), **TIGHT)
    with pytest.raises(ValueError, match="input_shape"):
        block.macs((7, 10, 11))


def test_flattened(rng, x):
    # one lateral pass over the channels, then one along each axis
    lateral, v, h = (rng.standard_normal(s) for s in ((6, 8, 1, 1), (6, 1, 3, 1), (6, 1, 1, 5)))
    y = conv(conv(conv(x, lateral), v, groups=6), h, groups=6)
    f = blocks.flattened([lateral, v, h])
    np.testing.assert_allclose(f(x), y, **TIGHT)
    assert f.cost((10, 11)).macs == 6 * (8 + 3 + 5) * 110


def test_separable_dilated_with_multiplier(rng, x):
    d, p = rng.standard_normal((16, 1, 3, 3)), rng.standard_normal((5, 16, 1, 1))
    f = blocks.separable(d, p, stride=2, dilation=2, multiplier=2)
    np.testing.assert_allclose(f(x), conv(conv(x, d, 2, 8, 2), p), **TIGHT)


def test_grouped_pointwise_dilated_and_transposed_chains_run(rng, x):
    grouped = lr.dense(rng.standard_normal((12, 2, 1, 1)), groups=4)
    assert grouped.cost((10, 11)).macs == 12 * 2 * 110
    dilated = lr.dense(rng.standard_normal((12, 8, 3, 3)), dilation=3, padding=3)
    assert dilated.output_shape((10, 11)) == (12, 10, 11)
    for f in (
        grouped,
        dilated,
        lr.dense(rng.standard_normal((8, 6, 4, 4)), stride=2, transposed=True),
    ):
        np.testing.assert_allclose(f(x), reference.run_chain(f.stages, x), **TIGHT)


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_folds_exactly(rng, x, bias):
    b = rng.standard_normal(6) if bias else None
    f = lr.tucker(lr.dense(rng.standard_normal((6, 8, 3, 3)), b, padding=1), (4, 4))
    n = norm(rng, 6)
    np.testing.assert_allclose(blocks.fold_batch_norm(f, n)(x), normalised(f(x), n), **TIGHT)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_folds_into_transposed_convolutions(rng, x, groups):
    up = lr.dense(rng.standard_normal((8, 3, 2, 2)), stride=2, transposed=True, groups=groups)
    n = norm(rng, 3 * groups)
    expected = normalised(up(x), n)
    np.testing.assert_allclose(blocks.fold_batch_norm(up, n)(x), expected, **TIGHT)
    cheaper = lr.channel_svd(up, 3)
    expected = normalised(cheaper(x), n)
    np.testing.assert_allclose(blocks.fold_batch_norm(cheaper, n)(x), expected, **TIGHT)


def test_impossible_blocks_are_refused(rng):
    d, p = np.ones((8, 1, 3, 3)), np.ones((4, 8, 1, 1))
    with pytest.raises(ValueError, match="pointwise"):
        blocks.separable(d, np.ones((4, 8, 3, 3)))
    with pytest.raises(ValueError, match="depthwise"):
        blocks.separable(np.ones((8, 2, 3, 3)), p)
    with pytest.raises(
        ValueError, match=r"6 output channels.*8 input channels|8 output channels.*6 input"
    ):
        blocks.separable(d, np.ones((4, 6, 1, 1)))
    with pytest.raises(ValueError, match="norms"):
        blocks.mobilenet_v1(d, p, norms=(None,))
    for variance in (-1.0, np.nan):
        bad = blocks.BatchNorm(*np.ones((3, 4)), np.full(4, variance))
        with pytest.raises(ValueError, match="variance"):
            blocks.fold_batch_norm(lr.dense(np.ones((4, 4, 3))), bad)
    with pytest.raises(ValueError, match=r"channels|norm|shape"):
        blocks.fold_batch_norm(lr.dense(np.ones((4, 4, 3))), norm(rng, 5))


@pytest.mark.parametrize("activation", [("none", "none"), ("relu", "relu6"), ("relu6", "none")])
@pytest.mark.parametrize("order", ["dw-pw", "pw-dw"])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_and_pointwise_run_in_one_call(rng, x, activation, order, stride):
    mix = rng.standard_normal((6, 8, 1, 1))
    filters = rng.standard_normal((8 if order == "dw-pw" else 6, 1, 3, 3))
    biases = [rng.standard_normal(len(w)) for w in (filters, mix)][:: 1 if order == "dw-pw" else -1]
    block = blocks.fused_separable(
        filters, mix, bias=biases, activation=activation, order=order, stride=stride
    )
    y = 4 * x  # large enough to reach 6
    for k, word in enumerate(activation):
        spatial = (k == 0) == (order == "dw-pw")
        y = conv(y, filters, stride, len(filters)) if spatial else conv(y, mix)
        y = WORDS.get(word, lambda y: y)(y + biases[k][:, None, None])
    for threads in (1, 2):
        run = block.compile(x.shape[1:], threads=threads)
        np.testing.assert_allclose(run(4 * x), y, **TIGHT)
    np.testing.assert_allclose(block(4 * x), y, **TIGHT)
    single = block(4 * x.astype(np.float32))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, y, rtol=1e-4, atol=1e-4)  # float32 sums of 100 products


def test_block_of_activations_runs_in_one_call(rng, x):
    d, p = rng.standard_normal((8, 1, 3, 3)), rng.standard_normal((6, 8, 1, 1))
    block = blocks.mobilenet_v1(d, p, norms=(norm(rng, 8), norm(rng, 6)), stride=2)
    np.testing.assert_allclose(block(x), run(block, x), **TIGHT)


def random_blocks(rng):
    """Yield blocks of every word, with their input."""
    x = rng.standard_normal((2, 8, 10, 11))
    e, d, p = (rng.standard_normal(s) for s in ((24, 8, 1, 1), (24, 1, 5, 5), (8, 24, 1, 1)))
    norms = norm(rng, 24), norm(rng, 24), norm(rng, 8)
    for word in ("relu6", "silu", "hard_swish", "gelu"):
        yield blocks.inverted_residual(e, d, p, activation=word, norms=norms), x
    yield blocks.inverted_residual(e, d, p, stride=2, norms=norms), x
    weights = [
        (rng.standard_normal((8, 1, 3, 3)), rng.standard_normal((8, 8, 1, 1))) for _ in "abc"
    ]
    yield blocks.xception(weights, [norm(rng, 8) for _ in "abc"]), x
    r, d = rng.standard_normal((12, 4, 1, 1)), rng.standard_normal((12, 1, 3, 3))
    e = rng.standard_normal((8, 6, 1, 1))
    for stride in (1, 2):
        yield blocks.shuffle_unit(r, d, e, groups=2, stride=stride), x
    one_axis = lr.dense(rng.standard_normal((3, 3, 5)), padding=2)
    yield blocks.Block((one_axis, "tanh", "add input")), rng.standard_normal((3, 3, 40))
    volume = lr.dense(rng.standard_normal((2, 2, 3, 3, 3)), rng.standard_normal(2), padding=1)
    parts = ("relu", lr.cp(volume, 3), "add input, leaky_relu", volume, "elu")
    yield blocks.Block(parts), rng.standard_normal((1, 2, 5, 6, 7))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("algorithm", ["auto", "direct"])
def test_blocks_of_every_word_run_as_one_program(rng, dtype, algorithm):
    for block, x in random_blocks(rng):
        expected = run(block, x)
        plans = [
            block.compile(x.shape[1:], dtype, threads, algorithm=algorithm) for threads in (1, 2)
        ]
        y = plans[0](x.astype(dtype))
        assert y.dtype == dtype
        # Sums of at most 216 products, and of the roundings of at most six operations before them.
        eps = 1e-11 if dtype == "float64" else 2e-5
        np.testing.assert_allclose(y, expected, rtol=eps, atol=eps * np.abs(expected).max())
        np.testing.assert_array_equal(plans[1](x.astype(dtype)), y)
        out = np.full(y.shape, np.nan, dtype)
        assert plans[0](x.astype(dtype), out) is out
        np.testing.assert_array_equal(out, y)
        assert sum(s.macs for s in plans[0].breakdown(x.astype(dtype))) > 0
        assert "share" in plans[0].describe(x.astype(dtype))


def test_decoder_step_takes_its_skip(rng, x):
    up, skip = rng.standard_normal((8, 4, 2, 2)), rng.standard_normal((2, 6, 20, 22))
    d, p = rng.standard_normal((10, 1, 3, 3)), rng.standard_normal((4, 10, 1, 1))
    step = blocks.unet_step(up, [(d, p)])
    np.testing.assert_allclose(step(x, skip=skip), run(step, x, skip), **TIGHT)
    plan = step.compile(x.shape[1:])
    with pytest.raises(ValueError, match="skip must be given"):
        plan(x)
    with pytest.raises(ValueError, match="skip must have shape"):
        plan(x, skip=skip[:, 1:])
    with pytest.raises(ValueError, match="batch of x"):
        plan(x, skip=skip[1:])
    with pytest.raises(ValueError, match="no skip connection"):
        blocks.mobilenet_v1(np.ones((8, 1, 3, 3)), np.ones((4, 8, 1, 1)))(x, skip=skip)


def test_blocks_that_no_program_runs_are_refused(rng, x):
    d, p = rng.standard_normal((8, 1, 3, 3)), rng.standard_normal((6, 8, 1, 1))
    block = blocks.mobilenet_v1(d, p, stride=2)
    with pytest.raises(ValueError, match=r"'add input' needs an input of shape \(6, 5, 6\)"):
        blocks.Block((*block.parts, "add input")).compile((8, 10, 11))
    with pytest.raises(ValueError, match="'swish' is unknown"):
        blocks.Block((*block.parts, "swish")).compile((8, 10, 11))
    with pytest.raises(ValueError, match="'squeeze-excite' has no weights"):
        blocks.Block((*block.parts, "squeeze-excite")).compile((8, 10, 11))
    with pytest.raises(ValueError, match="a chain must follow 'concatenate skip'"):
        blocks.Block((*block.parts, "concatenate skip")).compile((8, 10, 11))
    with pytest.raises(ValueError, match="a chain of 8 input channels gets 6"):
        blocks.Block((*block.parts, "silu", *block.parts)).compile((8, 10, 11))
    xception = blocks.xception([(rng.standard_normal((8, 1, 3, 3)), np.ones((8, 8, 1, 1)))])
    run_one = xception.compile((8, 10, 11), "float64")
    with pytest.raises(TypeError, match="x must be an array of float64"):
        run_one(x.astype(np.float32))
    with pytest.raises(ValueError, match="algorithm must be one of"):
        xception.compile((8, 10, 11), algorithm="fast")
    with pytest.raises(ValueError, match="threads must be between 1 and 2147483647, got 0"):
        xception.compile((8, 10, 11), threads=0)
    with pytest.raises(ValueError, match="overlap"):
        run_one(x, x)


def test_chain_compiles_with_an_activation(rng, x):
    f = lr.tucker(lr.dense(rng.standard_normal((6, 8, 3, 3)), rng.standard_normal(6)), (4, 4))
    expected = np.clip(f(x), 0, 6)
    np.testing.assert_array_equal(f.compile(x.shape[1:], activation="relu6")(x), expected)
    with pytest.raises(ValueError, match="activation must be one of none, relu, relu6"):
        f.compile(x.shape[1:], activation="tanh")


def test_impossible_fused_blocks_are_refused():
    d, p = np.ones((8, 1, 3, 3)), np.ones((4, 8, 1, 1))
    with pytest.raises(ValueError, match="activation must be one of"):
        blocks.fused_separable(d, p, activation=("relu", "swish"))
    with pytest.raises(ValueError, match="two entries"):
        blocks.fused_separable(d, p, activation="relu")
    with pytest.raises(ValueError, match="dw-pw or pw-dw"):
        blocks.fused_separable(d, p, order="both")
    with pytest.raises(ValueError, match=r"4 output channels.*8 input channels"):
        blocks.fused_separable(d, p, order="pw-dw")
    with pytest.raises(ValueError, match="bias must have two entries"):
        blocks.fused_separable(d, p, bias=None)
    with pytest.raises(ValueError, match="multiplier must divide 8 filters, got 0"):
        blocks.fused_separable(d, p, multiplier=0)
    with pytest.raises(ValueError, match="the same spatial axes"):
        blocks.fused_separable(d, np.ones((4, 8, 1)))


def test_block_requires_a_chain_and_refuses_inner_constant_padding():
    with pytest.raises(ValueError, match="at least one chain"):
        blocks.Block(()).compile((8, 10, 11))
    first = lr.dense(np.ones((1, 1, 1)))
    padded = lr.dense(np.ones((1, 1, 3)), padding=1, padding_mode="constant", value=7.0)
    with pytest.raises(ValueError, match=r"padding_mode.*after the first chain"):
        blocks.Block((first, "relu", padded)).compile((1, 9))
    alone = blocks.Block((padded, "relu"))(np.array([[[1.0, 2.0, 3.0]]]))
    np.testing.assert_array_equal(alone, [[[10, 6, 12]]])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "symmetric", "replicate", "circular"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (1, 2)])
def test_padding_modes_within_a_block_equal_those_of_its_chains(rng, mode, stride):
    first = lr.dense(rng.standard_normal((6, 4, 1, 1)), rng.standard_normal(6))
    second = lr.dense(
        rng.standard_normal((6, 1, 3, 3)), rng.standard_normal(6),
        groups=6, padding=1, padding_mode=mode, stride=stride,
    )  # fmt: skip
    third = lr.dense(rng.standard_normal((5, 6, 3, 3)), padding=1, padding_mode=mode)
    block = blocks.Block((first, "relu", second, "relu6", third))
    for size in ((9, 12), (8, 7), (20, 33)):
        x = rng.standard_normal((2, 4, *size))
        one_by_one = third(relu6(second(relu(first(x)))))
        np.testing.assert_array_equal(block(x), one_by_one)
