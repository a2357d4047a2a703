"""Calibration batches of PyTorch models: read anew in every pass, and the same then."""

import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, Dataset, TensorDataset  # noqa: E402

from lowrank.interop.torch import TorchModel, compress  # noqa: E402
from lowrank.interop.torch.batches import Batches  # noqa: E402


def images(n=24):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Noisy(Dataset):
    """Images with noise from PyTorch's random numbers, or NumPy's."""

    def __init__(self, numpy=False):
        self.images, self.numpy = images(), numpy

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        noise = np.random.random() if self.numpy else torch.rand(())  # noqa: NPY002
        return self.images[i] + noise


def model():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 12, 3), torch.nn.ReLU(), torch.nn.Conv2d(12, 12, 3)]
    return torch.nn.Sequential(*layers)


SOURCES = {
    "list": lambda: list(images().split(8)),
    "function": lambda: lambda: iter(images().split(8)),
    "generator": lambda: (x for x in images().split(8)),
    "loader": lambda: DataLoader(TensorDataset(images()), batch_size=8),
    "shuffled": lambda: DataLoader(TensorDataset(images()), batch_size=8, shuffle=True),
    "shuffled by a generator": lambda: DataLoader(
        TensorDataset(images()), batch_size=8, shuffle=True, generator=torch.Generator()
    ),
    "drawn with replacement": lambda: DataLoader(
        images(64), batch_size=8, generator=(g := torch.Generator()),
        sampler=torch.utils.data.RandomSampler(range(64), True, 64, g),
    ),
    "augmented": lambda: DataLoader(Noisy(), batch_size=8, shuffle=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_passes_see_the_same_batches(name):
    data = TorchModel(model(), SOURCES[name]()).data
    one, two = list(data), [(a, b) for a, b in zip(data, data, strict=True)]
    assert len(one) == len(two) == len(data)
    for a, (b, c) in zip(one, two, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert torch.equal(one[0], data.first)
    if name in ("list", "generator", "loader"):
        assert torch.equal(torch.cat(one), images())
    else:
        assert not torch.equal(one[0], one[1])


def test_other_random_numbers_stay_as_they_are():
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    list(Batches(SOURCES["augmented"](), lambda b: b))
    assert torch.equal(torch.rand(4), want)


def test_a_loader_is_never_listed():
    alive = []

    def source():
        for _ in range(6):
            batch = torch.zeros(8, 3, 8, 8)
            alive.append(weakref.ref(batch))
            yield batch

    most = 0
    for _ in Batches(source, lambda b: b):
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
    assert most <= 2  # the first one, and that of now


def test_batches_that_change_are_refused():
    loader = DataLoader(Noisy(numpy=True), batch_size=8)
    with pytest.raises(ValueError, match="batches must be the same in every pass"):
        compress(model(), loader, macs=0.5)
    sizes = iter((3, 2))
    data = Batches(lambda: iter([torch.zeros(2)] * next(sizes)), lambda b: b)
    with pytest.raises(ValueError, match="batches must be the same in every pass"):
        list(data)


def test_shuffled_batches_compress_as_a_list_of_them_does():
    loader = SOURCES["shuffled"]()
    data = list(TorchModel(model(), loader).data)
    torch.manual_seed(0)
    a = compress(model(), data, macs=0.5).model
    listed = TorchModel(model(), SOURCES["generator"]())
    assert len(list(listed.data)) == listed.batches == 3
    x = images()
    assert torch.equal(a(x), compress(model(), iter(data), macs=0.5).model(x))


@pytest.mark.parametrize("bad", [3, None])
def test_what_holds_no_batches_is_refused(bad):
    with pytest.raises(TypeError, match="batches must be an iterable or a function"):
        TorchModel(model(), bad)
    with pytest.raises(ValueError, match="at least one calibration batch"):
        TorchModel(model(), [])
