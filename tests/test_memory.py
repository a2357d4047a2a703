"""Memory of compression: what the documentation promises, in a process of its own."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")

#: Prints how far the largest memory of a process grew with the statistics of a deep network.
SCRIPT = """
import resource
import torch
from torch import nn
from lowrank.compress import LayerStatistics
from lowrank.interop.torch import TorchModel

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def network(depth):
    layers = [nn.Conv2d(3, {channels}, 3, padding=1)]
    for _ in range(depth - 1):
        layers += [nn.BatchNorm2d({channels}), nn.ReLU()]
        layers.append(nn.Conv2d({channels}, {channels}, 3, padding=1))
    return nn.Sequential(*layers).eval()

torch.manual_seed(0)
torch.set_num_threads(1)
small = TorchModel(network(2), [torch.randn(2, 3, 8, 8)])  # what imports take is no part of it
LayerStatistics(small).metrics(small.layers)
net, data = network({depth}), [torch.randn({batch}, 3, {size}, {size}) for _ in range(2)]
with torch.no_grad():
    net(data[0])
before = peak()
model = TorchModel(net, data)
LayerStatistics(model).metrics(model.layers)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is in other units elsewhere")
def test_statistics_take_the_memory_that_is_stated():
    depth, channels, batch, size = 24, 16, 128, 32
    script = SCRIPT.format(depth=depth, channels=channels, batch=batch, size=size)
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    positions = 2 * batch * size**2 * depth
    moments = depth * (9 * channels) ** 2
    largest = 4 * batch * channels * size**2
    stated = max(320 << 20, 5 * largest) + 24 * moments + 8 * positions
    # The outputs of all layers alone take 200 MB, and what a backward pass keeps of them 1 GB.
    assert depth * largest * 5 > 2 * stated
    assert int(run.stdout) < stated
