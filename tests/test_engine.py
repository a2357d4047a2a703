"""The engine: results do not depend on batch, threads, memory layout or plan."""

import threading

import numpy as np
import pytest

import lowrank as lr
from lowrank import filters
from lowrank.core import reference


def chains(rng):
    """Yield a chain of every kind, with an input size."""
    w = rng.standard_normal((8, 6, 3, 3))
    conv = lr.dense(w, rng.standard_normal(8), stride=(1, 2), padding=1)
    yield "dense", conv, (9, 21)
    yield "pointwise", lr.dense(rng.standard_normal((8, 6, 1, 1))), (12, 13)
    yield "cp", lr.cp(conv, 5), (9, 21)
    yield "kronecker", lr.kronecker(conv, 2, "2x2x1x1 first"), (9, 21)
    yield "spatial_svd", lr.spatial_svd(lr.dense(w, padding=1, padding_mode="reflect"), 4), (17, 40)
    yield "network_decoupling", lr.network_decoupling(conv, 2, "pw-dw"), (9, 21)
    yield "transposed", lr.tucker(lr.dense(w, stride=2, transposed=True), (3, 4)), (7, 8)
    yield "series", lr.dense(rng.standard_normal((6, 1, 5)), groups=6, padding=2), (70,)
    yield "volume", lr.spatial_svd(lr.dense(rng.standard_normal((4, 6, 3, 3, 3))), 3), (6, 7, 20)
    yield "blur", filters.separate(filters.gauss(1.0)), (30, 50)
    yield (
        "many channels, few samples",
        lr.dense(rng.standard_normal((96, 64, 3, 3)), padding=1),
        (4, 4),
    )


NAMES = [name for name, _, _ in chains(np.random.default_rng(0))]


@pytest.fixture(params=NAMES)
def case(request, rng):
    return next((f, size) for name, f, size in chains(rng) if name == request.param)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch", [2, 5])
def test_batch_equals_its_examples(case, rng, batch, dtype):
    f, size = case
    x = rng.standard_normal((batch, f.in_channels, *size)).astype(dtype)
    alone = np.concatenate([f(one[None]) for one in x])
    np.testing.assert_array_equal(f(x), alone)
    channels_last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    np.testing.assert_array_equal(f(np.moveaxis(channels_last, -1, 1)), alone)
    strided = np.repeat(x, 2, 0)[::2]
    np.testing.assert_array_equal(f(strided), alone)
    np.testing.assert_array_equal(f(x[::-1])[::-1], alone)
    repeated = np.broadcast_to(x[:1], x.shape)
    np.testing.assert_array_equal(f(repeated), np.repeat(alone[:1], batch, 0))


def test_results_do_not_depend_on_threads(case, rng):
    f, size = case
    for batch in (1, 3):
        x = rng.standard_normal((batch, f.in_channels, *size))
        results = [f.compile(size, threads=n)(x) for n in (1, 2, 3, 8)]
        for y in results[1:]:
            np.testing.assert_array_equal(y, results[0])


def test_out_may_have_any_strides(case, rng):
    f, size = case
    x = rng.standard_normal((2, f.in_channels, *size))
    expected = f(x)
    wide = np.full((*expected.shape[:-1], 2 * expected.shape[-1]), 7.0)
    for out in (np.empty_like(expected), wide[..., ::2], np.empty_like(expected.T).T):
        assert f(x, out=out) is out
        np.testing.assert_array_equal(out, expected)
    assert (wide[..., 1::2] == 7).all()


def test_one_plan_runs_in_many_threads_and_batches_at_once(case, rng):
    f, size = case
    run = f.compile(size)
    inputs = [rng.standard_normal((n, f.in_channels, *size)) for n in (1, 2, 3, 4)] * 3
    expected = [f(x) for x in inputs]
    found = [None] * len(inputs)

    def work(i):
        for _ in range(5):
            found[i] = run(inputs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "mode", ["zeros", "reflect", "symmetric", "replicate", "circular", "constant"]
)
@pytest.mark.parametrize("stride", [(2, 1), (1, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize("size", [(8, 12), (9, 12), (10, 13), (11, 7)])
def test_padding_of_a_later_stage_with_unequal_strides(rng, mode, stride, size):
    w = rng.standard_normal((6, 5, 3, 3))
    conv = lr.dense(w, stride=stride, padding=((2, 1), (1, 2)), padding_mode=mode, value=3.0)
    x = rng.standard_normal((2, 5, *size))
    expected = reference.run_chain(conv.stages, x)
    for f in (conv, lr.tucker(conv, (6, 5)), lr.channel_svd(conv, 6), lr.cp3(conv, 5)):
        result = reference.run_chain(f.stages, x)
        # sums of some hundred products of numbers near 1, in float64
        np.testing.assert_allclose(f(x), result, rtol=0, atol=1e-10)
        if f.error(w) < 1e-12:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)


def misaligned(x):
    """Return a copy of `x` at an address that is not a multiple of its item size."""
    room = np.empty(x.nbytes + 1, np.uint8)
    moved = room[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    assert not moved.flags.aligned
    return moved


def test_misaligned_arrays_give_correct_results(case, rng):
    f, size = case
    x = rng.standard_normal((2, f.in_channels, *size))
    expected = f(x)
    np.testing.assert_array_equal(f(misaligned(x)), expected)
    out = misaligned(np.zeros_like(expected))
    assert f(x, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_plans_read_and_write_small_integers(case, rng, dtype):
    f, size = case
    x = rng.integers(0, 100, (3, f.in_channels, *size)).astype(dtype)
    run = f.compile(size, np.float64, algorithm="direct")
    exact = run(x.astype(np.float64))
    np.testing.assert_array_equal(run(x), exact)
    limits = np.iinfo(dtype)
    out = np.empty(exact.shape, dtype)
    run(x, out)
    np.testing.assert_array_equal(out, np.clip(np.rint(exact), limits.min, limits.max))


@pytest.mark.parametrize("threads", [1, 2])
def test_breakdown_counts_all_macs(case, rng, threads):
    f, size = case
    run = f.compile(size, threads=threads)
    x = rng.standard_normal((2, f.in_channels, *size))
    steps = run.breakdown(x, repeat=1)
    plain = not f.transposed and max(f.geometry.stride) == 1
    done = sum(s.macs for s in steps)
    assert done >= 2 * f.cost(size).macs or not plain
    if len(f.stages) == 1 and plain:  # no halo is computed twice
        assert done == 2 * f.cost(size).macs
    assert all(s.seconds >= 0 for s in steps if s.step != "rest")
    out = np.empty_like(run(x), np.uint8)
    assert "store" in {s.step for s in run.breakdown(x, out)} or f.transposed
    with pytest.raises(ValueError, match="repeat must be at least 1"):
        run.breakdown(x, repeat=0)


def test_plan_caches_at_most_8_batch_sizes(case, rng):
    f, size = case
    run = f.compile(size)
    for n in range(1, 13):
        run(np.zeros((n, f.in_channels, *size), np.uint8))  # programs serve any batch
    assert 1 in run.planned
    assert len(run.planned) <= 8


@pytest.mark.parametrize(
    ("channels", "size", "rank"), [(64, 56, 32), (128, 112, 64), (512, 7, 256), (1, 512, 1)]
)
def test_plans_have_tasks_for_64_threads(channels, size, rank):
    taps = 3 if channels > 1 else 5
    weight = np.ones((channels, channels, taps, taps), np.float32)
    conv = lr.dense(weight, padding=taps // 2)
    for f in (conv, lr.spatial_svd(conv, rank)):
        run = f.compile((size, size), np.float32, threads=64)
        assert min(s.core.tasks for s in run.segments) >= 64


@pytest.mark.full
def test_sizes_beyond_32_bits_give_correct_results():
    # 2^31 samples and more: 17 GB in float32 with the output, so only where there is room
    with open("/proc/meminfo") as about:
        free = int(next(line for line in about if line.startswith("MemAvailable")).split()[1])
    if free < 22 << 20:
        pytest.skip("not 22 GB of memory free")
    n = 2**31 + 70
    x = np.zeros((1, 1, n), np.float32)
    x[0, 0, -3:] = (1, 2, 4)
    x[0, 0, 2**31 - 1] = 8
    y = lr.dense(np.array([[[1, 10, 100]]], np.float32), padding=1)(x)
    np.testing.assert_array_equal(y[0, 0, -4:], [100, 210, 421, 42])
    np.testing.assert_array_equal(y[0, 0, 2**31 - 3 : 2**31 + 2], [0, 800, 80, 8, 0])
