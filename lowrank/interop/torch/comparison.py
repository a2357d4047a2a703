"""Comparison of what models compute, run after run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from lowrank.interop.torch.copies import run_eagerly

TOLERANCE = 1e-3  # relative to the largest output; GPUs may add in another order in every run


def difference(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> str:
    """Return how outputs differ by more than rounding; "" if they do not.

    Parameters
    ----------
    a, b : sequence of torch.Tensor
        Outputs of two models.

    Returns
    -------
    str

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch.comparison import difference
    >>> difference([torch.ones(2)], [torch.ones(2)]), difference([torch.ones(2)], [])
    ('', '0 tensors instead of 1')
    """
    if len(a) != len(b):
        return f"{len(b)} tensors instead of {len(a)}"
    for x, y in zip((t.detach() for t in a), (t.detach() for t in b)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{y.dtype} {tuple(y.shape)} instead of {x.dtype} {tuple(x.shape)}"
        if not x.is_floating_point() or not x.numel():
            if not torch.equal(x, y):
                return "other integers"
            continue
        scale = float(x.abs().nan_to_num(0.0, 0.0, 0.0).max())
        if not torch.allclose(x, y, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True):
            return "other values"
    return ""


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Run without gradients, eagerly, and with the same random numbers every time.

    Yields
    ------
    None
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad(), run_eagerly():
        torch.manual_seed(0)
        yield
