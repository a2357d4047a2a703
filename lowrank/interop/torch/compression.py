"""Compression of PyTorch models within a budget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from lowrank.compress import CompressionPlan, compress_model
from lowrank.interop.torch.batches import Run, model_input, run_model
from lowrank.interop.torch.model import Loss, TorchModel


class CompressionResult(NamedTuple):
    """A compressed PyTorch model and how it was made.

    Attributes
    ----------
    model : nn.Module
        Compressed copy of the model.
    plan : lowrank.compress.CompressionPlan
        Family, variant, rank and cost of every layer; printable.
    rows : tuple of lowrank.compress.pipeline.LayerError
        Reconstruction error of each layer.
    output_error : float
        Relative RMS error of the outputs on the first calibration batch; NaN if they cannot be
        compared, such as integers.
    """

    model: nn.Module
    plan: CompressionPlan
    rows: tuple[Any, ...]
    output_error: float


def compress(
    model: nn.Module,
    calibration_batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    plan: CompressionPlan | None = None,
    loss: str | Loss = "projections",
    run: Run | None = None,
    tied: bool = True,
    passes: int = 1,
    refit: bool = False,
    reestimate_norms: bool = False,
    folder: str | os.PathLike[str] | None = None,
    timed: bool = False,
    progress: Callable[[str, float], object] | None = None,
    **budget: Any,
) -> CompressionResult:
    """Compress a trained model within a budget, without training.

    Layers stay as they are where something else than their call depends on them: see
    :attr:`CompressionPlan.left_out`.  The compressed model is run on the first batch before it is
    returned.

    Parameters
    ----------
    model : nn.Module
        Model with convolutions, transposed convolutions or linear layers anywhere in its module
        tree.  It is not changed.
    calibration_batches : iterable or callable
        A few hundred examples; see :class:`TorchModel`.
    plan : lowrank.compress.CompressionPlan, optional
        Plan to execute; made from `budget` if not given.
    loss : str or callable
        Loss whose gradients weight the errors; see :class:`TorchModel`.
    run : callable, optional
        Function that calls the model with a batch; see :class:`TorchModel`.
    tied : bool
        Whether tied weights stay one parameter; see
        :class:`lowrank.interop.torch.chains.TiedLayer`.
    passes : int
        Number of passes over all layers; see :func:`lowrank.compress.compress_model`.
    refit : bool
        Whether layers that stay dense are refitted to compensate for errors of earlier layers.
    folder : path, optional
        Folder for finished layers, from which an interrupted run continues.
    timed : bool
        Whether the finished model is timed beside the original; see
        :func:`lowrank.compress.compress_model`.
    progress : callable, optional
        Function that is called with the name of the current task and the finished share of it.
    reestimate_norms : bool
        Whether statistics of batch norms are re-estimated on the calibration batches.  This
        repairs crude fits and harms good ones.
    **budget
        ``macs=``, ``params=``, ``seconds=`` or ``bytes=``, families and ranks of single layers
        (``layers={"conv3": ("tucker", (16, 8))}``), and every other argument of
        :func:`lowrank.compress.make_plan`.

    Returns
    -------
    CompressionResult

    Raises
    ------
    ValueError
        If there is nothing to compress, a batch does not fit the model, the budget is infeasible
        (the message gives the minimum), or the compressed model does not compute what was planned.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import compress
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)
    ... )
    >>> result = compress(model, [torch.randn(8, 3, 12, 12)], macs=0.5)
    >>> compressed, original = result.plan.total("macs")
    >>> compressed <= original / 2, tuple(result.model(torch.zeros(1, 3, 12, 12)).shape)
    (True, (1, 16, 10, 10))
    """
    net = TorchModel(model, calibration_batches, loss, run)
    done = compress_model(
        net,
        plan,
        passes=passes,
        refit=refit,
        folder=folder,
        timed=timed,
        progress=progress,
        **budget,
    )
    compressed = net.replaced(done.chains, tied)
    error = net.verify(compressed, done.chains)
    if reestimate_norms:
        reestimate_batch_norm(compressed, net.data, net.run)
        error = net.verify(compressed, None)
    return CompressionResult(compressed, done.plan, done.rows, error)


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any], run: Run | None = None) -> None:
    """Re-estimate the running means and variances of batch norms, in place.

    Parameters
    ----------
    model : nn.Module
        Model whose batch norms are changed.
    batches : iterable
        Batches of inputs, weighted equally; see :class:`TorchModel`.
    run : callable, optional
        Function that calls the model with a batch.
    """
    modes = {m: m.training for m in model.modules()}
    momenta = {
        m: m.momentum
        for m in modes
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    }
    model.eval()
    try:
        for m in momenta:
            m.reset_running_stats()
            m.momentum = None  # cumulative average
            m.train()
        with torch.no_grad():
            for x in batches:
                (run or run_model)(model, x if run else model_input(x))
    finally:
        for m, momentum in momenta.items():
            m.momentum = momentum
        for m, mode in modes.items():
            m.training = mode
