"""PyTorch models as compressible models: their layers, and what runs through them."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from lowrank._typing import Array
from lowrank.compress.model import Chains, Layer, Samples
from lowrank.factorization import Factorization
from lowrank.interop.torch.attention import Attention
from lowrank.interop.torch.batches import (
    Batches,
    Run,
    check_batch,
    first_examples,
    first_tensor,
    map_tensors,
    model_input,
    run_error,
    run_model,
    split_examples,
    tensors_in,
)
from lowrank.interop.torch.chains import to_module
from lowrank.interop.torch.copies import (
    check_model,
    copy_model,
    replace_module,
    run_eagerly,
    with_sizes,
)
from lowrank.interop.torch.modules import copy_to_array, from_layer, to_numpy
from lowrank.interop.torch.plain import find_plain_layers, put_plain_layers
from lowrank.interop.torch.runtimes import Call, network_call
from lowrank.interop.torch.survey import survey
from lowrank.interop.torch.verification import verify

Loss = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
GRAPH_BYTES = 1 << 26  # of a backward pass, about: batches that take more are split
GRAPH_COPIES = 6  # arrays of the size of a layer's output in it: with norms and activations


class _StopForward(Exception):
    """Raised in a hook to end a forward pass once all inputs are collected."""


class TorchModel:
    """A PyTorch model with calibration batches, as a compressible model.

    Parameters
    ----------
    model : nn.Module
        Model; copied, never changed, and run in evaluation mode.  Of a module that torch.compile
        returned, the module that it was given.
    batches : iterable or callable
        Calibration batches, or a function that returns an iterator over them.  A batch is a tensor;
        a tuple or list whose first entry is the input, such as a loader of images and labels
        yields; a mapping of arguments by name; or any nesting of tensors that `run` takes.  They
        are read anew in every pass and must be the same then; only those of an iterator, which can
        be read once, are kept in memory.
    loss : str or callable
        Loss whose output gradients weight the errors.

        - ``"projections"``: random combinations of all outputs, so that the second moment of the
          gradients weights the squared change of the outputs.
        - ``"labels"``: cross-entropy of labels drawn from the softmax of the outputs (Fisher
          information).  If the network is certain about all calibration examples, few of them
          dominate.
        - A function of the output and a ``torch.Generator`` that returns the sum over examples.
    run : callable, optional
        Function that calls the model with a batch, such as
        ``lambda model, batch: model(batch[0], batch[1])``; the first axis of every tensor in a
        batch is the example.

    Attributes
    ----------
    layers : tuple of Layer
        Replaceable layers in the order in which the first example runs them.  Layers that share
        their weights are one, named after the first.
    left_out : dict of str to str
        Layers that cannot be replaced, and modules that multiply by weights without a layer, with
        the reasons.
    left_out_macs : dict of str to int
        Their MACs per example.
    batches : int
        Number of calibration batches.
    batch_size : int
        Number of examples in the first of them.

    Raises
    ------
    TypeError
        If `model` is not a module of Python.
    ValueError
        If the model runs no replaceable layer, has no weights, or fails on a batch.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import TorchModel
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> net = TorchModel(model, [torch.zeros(4, 3, 16, 16)])
    >>> [(layer.name, layer.input_size) for layer in net.layers]
    [('0', (16, 16))]
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        loss: str | Loss = "projections",
        run: Run | None = None,
    ) -> None:
        check_model(model)
        if loss not in ("projections", "labels") and not callable(loss):
            raise ValueError(f"loss must be 'projections', 'labels' or a function, got {loss!r}")
        self.data = Batches(batches, lambda b: check_batch(b if run else model_input(b)))
        self.loss = loss
        self.run: Run = run or run_model
        self.original = model
        self._model = copy_model(model).eval().requires_grad_(False)
        self._installed: dict[str, Any] = {}  # chains in the compressed copy
        self.batches = len(self.data)
        example = first_examples(self.data.first, 1)
        try:
            self._plain, self._model = find_plain_layers(
                self._model, lambda m: self._run(m, example)
            )
            self._compressed = copy_model(self._model)
            found = survey(self._model, model, lambda m: self._run(m, example))
        except Exception as cause:
            raise run_error(self.data.first, cause) from cause
        self.left_out, self.left_out_macs = found.left_out, found.left_out_macs
        self._members = found.members
        if not found.names:
            omitted = "; ".join(f"{n or 'model'}: {why}" for n, why in [*self.left_out.items()][:5])
            raise ValueError(
                "the model runs no convolution or linear layer that can be replaced: nn.Conv1d to "
                "3d, nn.ConvTranspose1d to 3d or nn.Linear, called as modules"
                + (f" ({omitted})" if omitted else "")
            )
        self.layers, calls, self._outputs_per_example = self._find_layers(example)
        two = self._output_shapes(first_examples(self.data.first, 2))
        # Whether the number of calls depends on the batch size.
        self._has_example_loops = {n: len(s) for n, s in two.items()} != calls
        # Whether outputs of two examples are those of one example and of another.
        self._is_by_example = not self._has_example_loops and all(
            len(shape) > 1 and shape[0] == 2 for shapes in two.values() for shape in shapes
        )
        self.batch_size = max((len(t) for t in tensors_in(self.data.first) if t.ndim), default=1)

    def _run(self, model: nn.Module, x: Any) -> Any:
        """Call a model with a copy of a batch, which it may overwrite."""
        with run_eagerly():
            return self.run(model, map_tensors(torch.clone, x))

    def _members_in(self, model: nn.Module) -> dict[nn.Module, str]:
        """Return the modules of a copy that layers stand for, with the names of the layers."""
        return {model.get_submodule(m): n for n, ms in self._members.items() for m in ms}

    def _find_layers(self, example: Any) -> tuple[tuple[Layer, ...], dict[str, int], int]:
        """Return the layers, their numbers of calls, and the size of their outputs together."""
        modules = self._members_in(self._model)
        inputs: dict[str, list[torch.Tensor]] = {}
        outputs: list[tuple[str, torch.Tensor]] = []
        scales: dict[str, Array] = {}

        def record_scale(module: Any, args: Any, kwargs: Any) -> None:
            for name, out in outputs:
                if out is _layer_input(args, kwargs) and module.running_var is not None:
                    gain = torch.rsqrt(module.running_var + module.eps)
                    if module.weight is not None:
                        gain = gain * module.weight
                    scales[name] = to_numpy(gain)

        hooks = []
        for module, name in modules.items():

            def record_input(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                inputs.setdefault(name, []).append(_layer_input(args, kwargs))

            def record_output(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                outputs.append((name, out))

            hooks.append(module.register_forward_pre_hook(record_input, with_kwargs=True))
            hooks.append(module.register_forward_hook(record_output))
        hooks += [
            m.register_forward_pre_hook(record_scale, with_kwargs=True)
            for m in self._model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        with _remove_after(hooks), torch.no_grad():
            self._run(self._model, example)
        calls = {name: len(tensors) for name, tensors in inputs.items()}
        layers = []
        for name, tensors in inputs.items():
            module = self._model.get_submodule(name)
            sizes = [tuple(_with_batch(module, x).shape[2:]) for x in tensors]
            size, *others = sizes
            try:
                conv = from_layer(module)
            except ValueError as why:
                raise ValueError(f"{why} (layer {name})") from why
            several = tuple(sizes) if any(other != size for other in others) else ()
            layers.append(Layer(name, conv, size, scales.get(name), calls[name], sizes=several))
        return tuple(layers), calls, sum(out.numel() for _, out in outputs)

    def _output_shapes(self, x: Any) -> dict[str, list[torch.Size]]:
        """Return the shapes of the outputs of every layer on a batch."""
        shapes: dict[str, list[torch.Size]] = {}
        hooks = []
        for module, name in self._members_in(self._model).items():

            def record(module: nn.Module, args: Any, out: torch.Tensor, name: str = name) -> None:
                shapes.setdefault(name, []).append(out.shape)

            hooks.append(module.register_forward_hook(record))
        with _remove_after(hooks), torch.no_grad():
            self._run(self._model, x)
        return shapes

    def _with_chains(self, chains: Chains) -> nn.Module:
        """Return the original if there are no chains, else the working copy with exactly these."""
        if not chains:
            return self._model
        for name in {*self._installed, *chains}:
            if self._installed.get(name) is not chains.get(name):
                old = self._model.get_submodule(name)
                new = _stand_in(chains[name], old).eval() if name in chains else old
                new.requires_grad_(False)
                for member in self._members[name]:
                    self._compressed = replace_module(self._compressed, member, new)
        self._installed = dict(chains)
        return self._compressed

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        """See :class:`lowrank.compress.CompressibleModel`."""
        model = self._with_chains(chains)
        calls = {layer.name: layer.times for layer in self.layers}
        for x in self.data:
            found: dict[str, list[Array]] = {name: [] for name in names}

            def record(x: torch.Tensor, name: str, found: dict[str, list[Array]] = found) -> None:
                original = self._model.get_submodule(name)
                # A copy: later operations may overwrite the tensor.
                found[name].append(copy_to_array(_with_batch(original, x)))
                if not self._has_example_loops and all(len(found[n]) >= calls[n] for n in names):
                    raise _StopForward

            hooks = [
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, n=n, record=record: record(
                        _layer_input(args, kwargs), n
                    ),
                    with_kwargs=True,
                )
                for module, n in self._members_in(model).items()
                if n in found
            ]
            with _remove_after(hooks), torch.no_grad():
                try:
                    self._run(model, x)
                except _StopForward:
                    pass
                except Exception as cause:
                    raise run_error(x, cause) from cause
            yield {name: tuple(arrays) for name, arrays in found.items()}

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        """See :class:`lowrank.compress.CompressibleModel`."""
        return self._gradients(names, seed)

    def _gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples]:
        random = torch.Generator().manual_seed(seed)
        most = GRAPH_BYTES // (4 * GRAPH_COPIES * self._outputs_per_example or 1)
        for x in self.data:
            parts = split_examples(x, max(most, 1)) if self._is_by_example else [x]
            found = [self._gradients_of(part, names, random) for part in parts]
            samples: Samples = {}
            for name in names:  # one at a time: the parts of a layer are let go
                calls = zip(*(part.pop(name) for part in found))
                samples[name] = tuple(c[0] if len(c) == 1 else np.concatenate(c) for c in calls)
            yield samples

    def _gradients_of(self, x: Any, names: Sequence[str], random: torch.Generator) -> Samples:
        """Return the gradients at the outputs of layers on some examples."""
        outputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}

        def watch(name: str, out: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled() or out.is_inference():  # as of a frozen backbone
                outputs[name].append(out)
                return out
            if not out.requires_grad:  # for example, behind an embedding
                out = out.detach().requires_grad_()
            outputs[name].append(out)
            return out.clone()  # a later operation may overwrite it

        hooks = [
            module.register_forward_hook(lambda module, args, out, n=n: watch(n, out))
            for module, n in self._members_in(self._model).items()
            if n in outputs
        ]
        with _remove_after(hooks), torch.enable_grad():
            try:
                result = self._run(self._model, x)
            except Exception as cause:
                raise run_error(x, cause) from cause
            # Checkpoints run layers again in the backward pass: keep the outputs so far.
            outs = {name: list(found) for name, found in outputs.items()}
            every = [out for found in outs.values() for out in found]
            gradients = iter(_gradients(self._loss(result, random), every))
        samples = {}
        for name, found in outs.items():
            own = [next(gradients) for _ in found]
            module = self._model.get_submodule(name)
            samples[name] = (
                ()
                if all(g is None for g in own)
                else tuple(
                    copy_to_array(_with_batch(module, torch.zeros_like(out) if g is None else g))
                    for out, g in zip(found, own)
                )
            )
        return samples

    def _loss(self, output: Any, random: torch.Generator) -> torch.Tensor:
        """Return the loss, summed over examples."""
        y = first_tensor(output)
        if callable(self.loss):
            return self.loss(y, random)
        if self.loss == "labels":
            if y.ndim < 2:
                raise ValueError(
                    f"outputs must be (batch, classes, ...) for loss='labels', got {tuple(y.shape)}"
                )
            logits = y.reshape(len(y), y.shape[1], -1).movedim(1, 2).reshape(-1, y.shape[1])
            probabilities = logits.detach().float().cpu().softmax(1)
            labels = torch.multinomial(probabilities, 1, generator=random)[:, 0].to(y.device)
            return nn.functional.cross_entropy(logits, labels, reduction="sum")
        return sum(
            ((t * torch.randn(t.shape, generator=random).to(t)).sum() for t in tensors_in(output)
             if t.is_floating_point()),
            torch.zeros(()),
        )  # fmt: skip

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """See :class:`lowrank.compress.CompressibleModel`."""
        model = self._with_chains(chains)
        for x in self.data:
            with torch.no_grad():
                yield (to_numpy(first_tensor(self._run(model, x))),)

    def fingerprint(self) -> str:
        """See :class:`lowrank.compress.CompressibleModel`."""
        parts: list[Any] = [repr(self.original), getattr(self.run, "__qualname__", "")]
        for kind in sorted({type(m) for m in self.original.modules()}, key=repr):
            try:  # what `forward` does between the layers
                parts.append(inspect.getsource(kind))
            except (OSError, TypeError):
                parts.append(repr(kind))
        parts += [(tuple(t.shape), t.dtype) for t in tensors_in(self.data.first)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def call(self, chains: Chains, runtime: str, batch: int, threads: int) -> Call | None:
        """See :class:`lowrank.compress.CompressibleModel`."""

        def repeat(t: torch.Tensor) -> torch.Tensor:
            return t.repeat(-(-batch // len(t)), *[1] * (t.ndim - 1))[:batch] if t.ndim else t

        module = self.replaced(chains).eval().requires_grad_(False)
        given = map_tensors(repeat, self.data.first)
        return network_call(module, given, runtime, threads, self.run)

    def replaced(self, chains: Chains, tied: bool = True) -> nn.Module:
        """Return a copy of the model with layers replaced by chains.

        Parameters
        ----------
        chains : mapping of str to Factorization
            Chain per layer name.
        tied : bool
            See :func:`lowrank.interop.torch.chains.to_module`.

        Returns
        -------
        nn.Module
            Ordinary, trainable modules, in the mode of the original, with the sizes of the layers
            as attributes, such as ``out_features``, and the type, device and shape of ``weight``.
        """
        model = copy_model(self.original)
        if chains:
            # All attention, as a transformer may pass other tensors on if one layer is PyTorch's.
            used = {
                name: plain
                for name, plain in self._plain.items()
                if isinstance(plain, Attention)
                or any(layer == name or layer.startswith(f"{name}.") for layer in chains)
            }
            model = put_plain_layers(model, used)
        for name, f in chains.items():
            new = _stand_in(f, model.get_submodule(name), tied)
            for member in self._members[name]:
                model = replace_module(model, member, new)
        return model

    def verify(self, compressed: nn.Module, chains: Chains | None) -> float:
        """Run a compressed model on the first batch, and return the relative error of its outputs.

        Parameters
        ----------
        compressed : nn.Module
            What :meth:`replaced` returned.
        chains : mapping of str to Factorization or None
            Chains of its layers; None if more than its layers has changed.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            See :func:`lowrank.interop.torch.verification.verify`.
        """
        original = put_plain_layers(copy_model(self.original), self._plain)
        return verify(
            compressed, original, chains, self._members,
            lambda m: self._run(m, self.data.first),
        )  # fmt: skip


def layers(model: nn.Module, example: torch.Tensor) -> Mapping[str, Layer]:
    """Return the replaceable layers of a model by name, in the order in which they run.

    Parameters
    ----------
    model : nn.Module
        Model; not changed.
    example : torch.Tensor
        Batch of inputs.

    Returns
    -------
    mapping of str to Layer

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import layers
    >>> found = layers(torch.nn.Conv1d(4, 8, 5), torch.zeros(1, 4, 100))
    >>> [layer.cost.macs for layer in found.values()]
    [15360]
    """
    return {layer.name: layer for layer in TorchModel(model, [example]).layers}


@contextlib.contextmanager
def _remove_after(hooks: Iterable[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _stand_in(f: Factorization, layer: nn.Module, tied: bool = True) -> nn.Module:
    """Return what replaces a layer: a chain with the layer's sizes as attributes."""
    return with_sizes(to_module(f, layer, tied), layer)


def _gradients(loss: torch.Tensor, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of a loss at outputs; None where the loss does not depend on one."""
    at = [i for i, out in enumerate(outputs) if out.requires_grad]
    found: list[torch.Tensor | None] = [None] * len(outputs)
    if not loss.requires_grad or not at:
        return found
    try:
        grads = torch.autograd.grad(loss, [outputs[i] for i in at], allow_unused=True)
    except RuntimeError as why:  # reentrant checkpoints, functions without a backward pass
        warnings.warn(f"the model cannot be differentiated: {why}", stacklevel=2)
        return found
    for i, grad in zip(at, grads):
        found[i] = grad
    return found


def _layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs["input"]


def _with_batch(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return an input or output of a layer as (batch, channels, *spatial)."""
    if isinstance(module, nn.Linear):
        x = x if x.ndim > 1 else x[None]
        return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]).transpose(1, 2)
    ndim = cast(Any, module).weight.ndim - 2
    return x if x.ndim == ndim + 2 else x[None]
