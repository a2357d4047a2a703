"""Conversion of PyTorch models for inference on lowrank's engine."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from lowrank.engine import ALGORITHMS
from lowrank.engine.program import Algorithm
from lowrank.interop.torch.batches import tensors_in
from lowrank.interop.torch.copies import check_model, copy_model
from lowrank.interop.torch.modules import is_conv
from lowrank.interop.torch.tracing import onto_engine, swap_modules, trace

TOLERANCE = 1e-3  # relative to the largest output; float32 rounding stays far below


def on_engine(
    model: nn.Module,
    example: torch.Tensor | None = None,
    threads: int | None = None,
    algorithm: Algorithm = "auto",
) -> nn.Module:
    """Return a copy of a model for inference, which runs on lowrank's engine.

    The model is traced.  Its largest parts of supported operations run as programs: batch norms
    are folded, activations and sums are computed with the convolutions before them, and
    intermediate tensors stay in the engine's layout.  PyTorch runs everything else; see
    :func:`describe`.  Tensors of any strides, such as ``channels_last``, are read in place;
    outputs are contiguous.

    Parameters
    ----------
    model : nn.Module
        Model, traced by :mod:`torch.fx`; convolutions in parts that cannot be traced are replaced
        one by one.  It is not changed.
    example : torch.Tensor, optional
        Batch of inputs.  Programs are built for its shape at once, and the outputs of the copy are
        compared with those of `model`: if the traced copy differs, convolutions are replaced one
        by one.
    threads : int, optional
        Number of threads of the engine; PyTorch's number if not given.
    algorithm : str
        ``"auto"``, or ``"direct"``, which never uses a fast algorithm, such as Winograd's, whose
        predicted relative error in float32 is up to 1e-4.

    Returns
    -------
    nn.Module
        Model in evaluation mode, for float32 and float64 tensors that need no gradient.  It builds
        programs at the first call with each shape of the inputs; the batch size is free.  Keep the
        original for training and saving.  On a GPU, convolutions run one by one through CuPy, in
        half precision as well; this is untested on hardware.

    Raises
    ------
    TypeError
        If `model` is not a module of Python.
    ValueError
        If `algorithm` is unknown, weights have no values, or the outputs of the copy on `example`
        differ from those of `model`.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import on_engine
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    ... ).eval()
    >>> fast = on_engine(model)
    >>> x = torch.rand(2, 3, 16, 16)
    >>> with torch.inference_mode():
    ...     torch.allclose(fast(x), model(x), atol=1e-5)
    True
    """
    check_model(model)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")

    def copy_for_inference() -> nn.Module:
        return copy_model(model).eval().requires_grad_(False)

    plain = copy_for_inference()
    whole = nn.Sequential(plain) if is_conv(plain) else plain
    traced = trace(whole) if _has_fixed_arguments(whole) else None
    if traced is None:
        converted = swap_modules(copy_for_inference(), threads, algorithm)
    else:
        converted = onto_engine(traced, threads, algorithm)
    if example is None or _outputs_match(model, converted, example):
        return converted
    converted = swap_modules(copy_for_inference(), threads, algorithm)
    if not _outputs_match(model, converted, example):
        raise ValueError(
            "the outputs of model on lowrank's engine differ from those in PyTorch: does it use "
            "weights or attributes of its convolutions, or random numbers?"
        )
    return converted


def _has_fixed_arguments(model: nn.Module) -> bool:
    """Return whether every call passes all arguments: a trace is valid for one set of them."""
    parameters = inspect.signature(model.forward).parameters.values()
    return all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _outputs_match(model: nn.Module, converted: nn.Module, example: torch.Tensor) -> bool:
    with torch.no_grad():
        expected = tensors_in(copy_model(model).eval()(example))
        try:
            outputs = tensors_in(converted(example))
        except Exception:
            return False
    return len(expected) == len(outputs) and all(map(_is_close, expected, outputs))


def _is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return True  # for example an argmax, which rounding may change
    atol = TOLERANCE * float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return bool(torch.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True))
