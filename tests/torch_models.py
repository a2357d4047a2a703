"""Models and data that the PyTorch tests share."""

import functools

import pytest
import torch
from torch import nn

from lowrank.interop.torch import compress


@pytest.fixture(autouse=True)
def single_thread():
    """Fix PyTorch's threads and seed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@functools.cache
def compressed_net():
    """Return a small network and its compression to half of the MACs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_statistics(small_net())
        return model, compress(model, make_batches(), macs=0.5)


def is_close(found, wanted, terms=1000):
    """Return whether tensors agree up to the rounding of sums of `terms` products."""
    assert found.shape == wanted.shape
    found, wanted = found.detach(), wanted.detach()
    eps = torch.finfo(found.dtype).eps
    scale = float(wanted.abs().max()) + 1e-30
    # Random roundings add up to sqrt(terms); 16 covers their tails and error growth in the chain.
    return float((found.double() - wanted.double()).abs().max()) <= 16 * terms**0.5 * eps * scale


def small_net(bias=False):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def make_batches(n=2, size=8, shape=(3, 10, 10)):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(size, *shape, generator=random) for _ in range(n)]


def with_statistics(model):
    """Return the model in evaluation mode, with random batch-norm statistics and gains."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                m.weight.data.uniform_(0.5, 2)
                m.bias.data.normal_(0, 0.1)
    return model.eval()


class Shared(nn.Module):
    """A convolution with two names that is called twice, and one that is never called."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.more = nn.ModuleDict({"b": self.a, "idle": nn.Conv2d(4, 4, 3)})

    def forward(self, x):
        return self.more["b"](torch.relu(self.a(x)))


class OptionalArgument(nn.Module):
    """An optional argument, and layers that are called with keyword arguments."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x, scale=None):
        y = self.norm(input=self.conv(input=x))
        return y if scale is None else scale * y
