"""Time training steps of factorised layers on lowrank's engine and in PyTorch, and print a table.

    python -m asv_benchmarks.training [--threads N] [--repeats N]

A step is the forward pass and the backward pass of one layer: gradients of its input, weights and
bias.  Layers are spatial SVDs of 3x3 convolutions and other chains; PyTorch runs them contiguous
("faster" compares with it) and channels-last ("best" compares with the faster of the two).  Weights
change before every step, as by an optimiser.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

import lowrank
from lowrank.interop.torch import on_engine
from lowrank.interop.torch.chains import to_module

#: Name, family, rank, channels, size of the image and batch.
CASES: tuple[tuple[str, str, int | tuple[int, ...], int, int, int], ...] = (
    ("spatial SVD", "spatial_svd", 32, 64, 56, 8),
    ("spatial SVD, batch 1", "spatial_svd", 32, 64, 56, 1),
    ("spatial SVD, batch 32", "spatial_svd", 32, 64, 56, 32),
    ("spatial SVD, 128 channels", "spatial_svd", 64, 128, 28, 8),
    ("channel SVD", "channel_svd", 32, 64, 56, 8),
    ("Tucker", "tucker", (24, 24), 64, 56, 8),
)
NEED = 1.3  # times as fast as PyTorch, of the first case


def time_step(layer: nn.Module, x: torch.Tensor) -> Callable[[], float]:
    """Return a function that runs a training step and returns its seconds."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    grad = torch.randn_like(layer(x))
    parameters = list(layer.parameters())

    def step() -> float:
        with torch.no_grad():
            for p in parameters:
                p.mul_(0.999)
                p.grad = None
        x.grad = None
        start = time.perf_counter()
        layer(x).backward(grad)
        return time.perf_counter() - start

    return step


def measure(
    family: str, rank: Any, channels: int, size: int, batch: int, repeats: int
) -> list[float]:
    """Return the medians of the milliseconds of a step: PyTorch, channels-last and lowrank."""
    torch.manual_seed(0)
    like = nn.Conv2d(channels, channels, 3, padding=1)
    f = lowrank.dense(like.weight.detach().numpy(), bias=like.bias.detach().numpy(), padding=1)
    layer = to_module(getattr(lowrank, family)(f, rank=rank), like)
    x = torch.randn(batch, channels, size, size)
    last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    steps = [
        time_step(layer, x),
        time_step(last, x.contiguous(memory_format=torch.channels_last)),
        time_step(on_engine(layer, trainable=True), x),
    ]
    times = [[step() for step in steps] for _ in range(repeats + 1)][1:]
    return [1e3 * float(np.median(column)) for column in zip(*times)]


def main() -> int:
    """Run the command line; return 1 if the first case is too slow."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads = ("PyTorch", "ch.-last", "lowrank", "faster", "best")
    print(f"{'ms per step':28} " + " ".join(f"{head:>9}" for head in heads))
    gains = []
    for name, *case in CASES:
        plain, last, engine = measure(*case, options.repeats)
        gains.append(plain / engine)
        print(
            f"{name:28} {plain:9.2f} {last:9.2f} {engine:9.2f} {plain / engine:8.2f}x "
            f"{min(plain, last) / engine:8.2f}x",
            flush=True,
        )
    return int(gains[0] < NEED)


if __name__ == "__main__":
    sys.exit(main())
