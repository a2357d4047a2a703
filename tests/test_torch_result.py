"""Compressed models as ordinary PyTorch models: saved, exported, trained."""

import copy

import numpy as np
import pytest

import lowrank

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch_models import (  # noqa: E402
    compressed_net,
    is_close,
    make_batches,
    small_net,
    with_statistics,
)
from torch_models import single_thread as single_thread  # noqa: E402

from lowrank.interop.torch import compress  # noqa: E402
from lowrank.interop.torch.chains import to_module  # noqa: E402


def test_state_dict_can_be_saved_and_loaded(tmp_path):
    compressed = compressed_net()[1].model
    torch.save(compressed.state_dict(), tmp_path / "net.pt")
    other = copy.deepcopy(compressed)
    for p in other.parameters():
        nn.init.zeros_(p)
    other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    x = make_batches()[0]
    with torch.no_grad():
        assert torch.equal(other(x), compressed(x))
    torch.save(compressed, tmp_path / "whole.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), compressed(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compressed_model_can_be_exported():
    compressed = compressed_net()[1].model.eval()
    x = make_batches()[0]
    program = torch.export.export(compressed, (x,))
    with torch.no_grad():
        assert is_close(program.module()(x), compressed(x))
    tied = to_module(
        lowrank.kronecker(lowrank.dense(np.ones((8, 8, 3, 3), np.float32)), rank=1),
        nn.Conv2d(1, 1, 1),
    )
    program = torch.export.export(tied, (torch.ones(2, 8, 6, 6),))
    assert is_close(program.module()(torch.ones(2, 8, 6, 6)), tied(torch.ones(2, 8, 6, 6)))


def test_compressed_model_runs_in_half_precision():
    compressed = copy.deepcopy(compressed_net()[1].model).half()
    x = make_batches()[0]
    with torch.no_grad():
        expected = compressed_net()[1].model(x)
        assert (compressed(x.half()).float() - expected).abs().max() < 0.02 * expected.abs().max()


def test_compressed_model_keeps_channels_last():
    compressed = copy.deepcopy(compressed_net()[1].model).to(memory_format=torch.channels_last)[:6]
    x = make_batches()[0]
    with torch.no_grad():
        y = compressed(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert is_close(y, compressed_net()[1].model[:6](x).detach())


@pytest.mark.parametrize("family", ["spatial_svd", "kronecker"])
def test_training_lowers_the_loss(family):
    model = with_statistics(small_net())
    compressed = compress(
        model, make_batches(), macs=0.6, families=[family, "channel_svd"]
    ).model.train()
    x, labels = make_batches()[0], torch.arange(8) % 5
    sgd = torch.optim.SGD(compressed.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(compressed(x), labels)
        sgd.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in compressed.parameters()
                   if p.ndim > 1)  # fmt: skip
        sgd.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compressed_model_trains_with_ddp(tmp_path):
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(
            copy.deepcopy(compressed_net()[1].model).train()
        )
        model(make_batches()[0]).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()
