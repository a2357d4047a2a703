"""Conversion of PyTorch models for inference on lowrank's engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from lowrank.engine import check_options
from lowrank.engine.program import Algorithm
from lowrank.interop.torch.batches import run_model, tensors_in
from lowrank.interop.torch.copies import check_model, copy_model
from lowrank.interop.torch.modules import call_hooks, is_conv
from lowrank.interop.torch.tracing import onto_engine, swap_for_inference, trace
from lowrank.interop.torch.training import swap_for_training

TOLERANCE = 1e-3  # relative to the largest output; float32 rounding stays far below

HALF_ROUNDINGS = 16  # of outputs in half precision, in units of its epsilon


def on_engine(
    model: nn.Module,
    example: torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    threads: int | None = None,
    algorithm: Algorithm = "auto",
    trainable: bool = False,
) -> nn.Module:
    """Return a copy of a model that runs on lowrank's engine, for inference if not `trainable`.

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
    example : torch.Tensor, tuple or mapping, optional
        Batch of inputs: the argument of the model, a tuple of arguments, or a mapping of arguments
        by name.  Programs are built for its shape at once, and the outputs of the copy are
        compared with those of `model`: if the traced copy differs, convolutions are replaced one
        by one.
    threads : int, optional
        Number of threads of the engine; PyTorch's number if not given.
    algorithm : str
        ``"auto"``, or ``"direct"``, which never uses a fast algorithm, such as Winograd's, whose
        predicted relative error in float32 is up to 1e-4.
    trainable : bool
        Whether the copy has the parameters and the mode of `model`, for training: convolutions and
        chains of them run on the engine, forward and backward, and PyTorch runs all else.

    Returns
    -------
    nn.Module
        Model in evaluation mode, for floating-point tensors that need no gradient; half precisions
        are computed in float32.  Its state dict is that of `model`: one that is loaded runs from
        then on.  It builds programs at the first call with each shape of the inputs; the batch
        size is free.  ``torch.compile`` and ``torch.export`` capture it with the operator
        ``lowrank::chain``.  On a GPU, convolutions run one by one through CuPy; this is untested on
        hardware.

    Raises
    ------
    TypeError
        If `model` is not a module of Python, or `example` holds no tensor.
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
    check_options(algorithm, threads)
    if example is not None and not tensors_in(example):
        raise TypeError(
            "example must be a tensor, a tuple of arguments or a mapping of arguments by name, got "
            f"{type(example).__qualname__} without a tensor"
        )
    if trainable:
        return swap_for_training(copy_model(model), threads, algorithm)
    source = copy_model(model).eval().requires_grad_(False)
    return EngineModel(source, example, threads, algorithm)


class EngineModel(nn.Module):  # type: ignore[misc]
    """A model for inference on lowrank's engine, with the state dict of the PyTorch model.

    It is converted again when a state dict is loaded, and when it is moved or cast.

    Parameters
    ----------
    source : nn.Module
        PyTorch model in evaluation mode, which has the parameters.
    example : torch.Tensor, tuple or mapping, optional
        See :func:`on_engine`.
    threads : int, optional
        Number of threads of the engine.
    algorithm : str
        ``"auto"`` or ``"direct"``.

    Attributes
    ----------
    converted : nn.Module
        Model that runs.
    """

    def __init__(
        self,
        source: nn.Module,
        example: torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
        threads: int | None = None,
        algorithm: Algorithm = "auto",
    ) -> None:
        super().__init__()
        self.__dict__["source"] = source  # no submodule: its parameters are not those that run
        self.threads, self.algorithm, self.is_traced = threads, algorithm, True
        self.register_load_state_dict_post_hook(_forget_converted)
        self._convert()
        if example is None or _outputs_match(source, self, example):
            return
        self.is_traced = False
        self._convert()
        if not _outputs_match(source, self, example):
            raise ValueError(
                "the outputs of model on lowrank's engine differ from those in PyTorch: does it "
                "use weights or attributes of its convolutions, or random numbers?"
            )

    @property
    def forward(self) -> Callable[..., Any]:
        """Forward pass of the converted model, with the names of its arguments and its hooks."""
        has_hooks = bool(call_hooks(self.converted))
        return cast(Callable[..., Any], self.converted if has_hooks else self.converted.forward)

    def _convert(self) -> None:
        plain = self._copy_of_source()
        whole = nn.Sequential(plain) if is_conv(plain) else plain
        traced = trace(whole) if self.is_traced and _has_fixed_arguments(whole) else None
        if traced is None:
            plain = self._copy_of_source()
            self.converted = swap_for_inference(plain, self.threads, self.algorithm)
        else:
            self.converted = onto_engine(traced, self.threads, self.algorithm)

    def _copy_of_source(self) -> nn.Module:
        return copy_model(self.source, is_shared=True).eval().requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state dict of the PyTorch model."""
        return self.source.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict of the PyTorch model, and run with its weights from now on."""
        keys = self.source.load_state_dict(state_dict, strict, assign)
        self._convert()
        return keys

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Load the part of the state dict of a model that this one is in."""
        own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        try:
            keys = self.load_state_dict(own, strict=False)
        except RuntimeError as error:  # sizes that differ
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + k for k in keys.missing_keys]
        unexpected_keys += [prefix + k for k in keys.unexpected_keys]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.source._apply(fn, recurse)
        self._convert()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_modules": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._convert()


def _forget_converted(module: nn.Module, keys: Any) -> None:
    """Take the parameters that only run off the keys that a state dict lacks."""
    keys.missing_keys[:] = [k for k in keys.missing_keys if "converted" not in k.split(".")]


def _has_fixed_arguments(model: nn.Module) -> bool:
    """Return whether every call passes all arguments: a trace is valid for one set of them."""
    parameters = inspect.signature(model.forward).parameters.values()
    return all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _outputs_match(model: nn.Module, converted: nn.Module, example: Any) -> bool:
    with torch.no_grad():
        expected = tensors_in(_call(copy_model(model).eval(), example))
        try:
            outputs = tensors_in(_call(converted, example))
        except Exception:
            return False
    return len(expected) == len(outputs) and all(map(_is_close, expected, outputs))


def _call(model: nn.Module, example: Any) -> Any:
    """Call a model with a tuple of arguments, a mapping of them by name, or one argument."""
    return model(*example) if isinstance(example, tuple) else run_model(model, example)


def _is_close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return True  # for example an argmax, which rounding may change
    # PyTorch rounds every layer of a half-precision model.
    tolerance = max(TOLERANCE, HALF_ROUNDINGS * torch.finfo(a.dtype).eps)
    atol = tolerance * float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return bool(torch.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True))
