"""Check of a compressed PyTorch model: it is run, and compared with what was planned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lowrank.factorization import Factorization
from lowrank.interop.torch.batches import tensors_in
from lowrank.interop.torch.comparison import repeatable
from lowrank.interop.torch.copies import copy_model

#: Relative error of outputs from which a model does something else than planned: rounding in
#: half precision, through many layers, stays below.
LIMIT = 0.1


def verify(
    compressed: nn.Module,
    original: nn.Module,
    chains: Mapping[str, Factorization] | None,
    members: Mapping[str, Sequence[str]],
    run: Callable[[nn.Module], Any],
) -> float:
    """Run a compressed model, and return the relative error of its outputs.

    The outputs are compared with those of the original with the dense kernels of the chains as its
    weights, which are the same unless something other than their calls depends on the layers.

    Parameters
    ----------
    compressed : nn.Module
        Model to check; not changed.
    original : nn.Module
        Model that was compressed.
    chains : mapping of str to Factorization or None
        Chains of its layers; None if more than its layers has changed.
    members : mapping of str to sequence of str
        Modules that each layer stands for.
    run : callable
        Runs a model on a batch and returns the output.

    Returns
    -------
    float
        Root mean square of the change of all outputs, over that of the outputs of the original.

    Raises
    ------
    ValueError
        If the compressed model cannot be run, has values that are not finite where those of the
        original are, or other outputs than planned.
    """

    def outputs(model: nn.Module) -> list[torch.Tensor]:
        with repeatable():
            found = tensors_in(run(copy_model(model, is_shared=True).eval()))
        return [t.detach() for t in found]

    before = outputs(original)
    try:
        after = outputs(compressed)
    except Exception as why:  # whatever a model does with its layers
        raise ValueError(
            f"the compressed model cannot be run: {type(why).__name__}: {why}; pin the layers "
            "that it needs as they are"
        ) from why
    for a, b in zip(before, after):
        if a.shape == b.shape and bool((torch.isfinite(a) & ~torch.isfinite(b)).any()):
            raise ValueError(
                "outputs of the compressed model must be finite where those of the original are, "
                "got NaN or infinity: allow a larger budget"
            )
    if chains is None:
        return output_error(before, after)
    planned = with_dense_kernels(original, chains, members)
    wanted = outputs(planned)
    missed = output_error(wanted, after)
    if missed > LIMIT and output_error(wanted, outputs(planned)) <= LIMIT:
        raise ValueError(
            f"outputs of the compressed model must be those of its kernels, but differ by "
            f"{missed:.0%}: something in the model depends on the type of a layer; pin that layer"
        )
    return output_error(before, after)


def with_dense_kernels(
    model: nn.Module,
    chains: Mapping[str, Factorization],
    members: Mapping[str, Sequence[str]],
) -> nn.Module:
    """Return a copy of a model whose layers have the dense kernels and the biases of chains.

    Parameters
    ----------
    model : nn.Module
        Model; not changed.
    chains : mapping of str to Factorization
        Chains by layer.
    members : mapping of str to sequence of str
        Modules that each layer stands for.

    Returns
    -------
    nn.Module
    """
    copied = copy_model(model)
    for name, f in chains.items():
        weight = torch.from_numpy(f.to_dense().copy())
        for member in members[name]:
            layer: Any = copied.get_submodule(member)
            layer.weight.data.copy_(weight.reshape(layer.weight.shape))
            if f.bias is not None:
                bias = torch.from_numpy(f.bias.copy())
                layer.bias = nn.Parameter(bias.to(layer.weight.data), layer.weight.requires_grad)
    return copied


def output_error(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    """Return the relative RMS error of all floating-point outputs that have the same shapes.

    Parameters
    ----------
    before, after : sequence of torch.Tensor
        Outputs of two models.

    Returns
    -------
    float
        NaN if no outputs can be compared.
    """
    missed = whole = 0.0
    for a, b in zip(before, after):
        if a.shape == b.shape and (a.is_floating_point() or a.is_complex()):
            known = torch.isfinite(a)
            wide = torch.complex128 if a.is_complex() else torch.float64
            x, y = (t[known].cpu().to(wide) for t in (a, b))
            missed += float((y - x).abs().square().sum())
            whole += float(x.abs().square().sum())
    return math.sqrt(missed / whole) if whole else math.nan
