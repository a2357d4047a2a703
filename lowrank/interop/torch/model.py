"""PyTorch: layers out of any module tree, chains into it, and models run on lowrank's engine."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from lowrank._typing import Array
from lowrank.compress import Plan, compress_model
from lowrank.compress.model import Chains, Layer, Samples
from lowrank.interop.torch.engine import on_engine as on_engine
from lowrank.interop.torch.modules import (
    array,
    held,
    is_layer,
    names_of,
    of_module,
    rows_of,
    to_module,
)

Loss = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
Run = Callable[[nn.Module, Any], Any]


class _Stop(Exception):
    """All that was wanted has been seen."""


class TorchNet:
    """A PyTorch model with calibration batches, as compression sees it.

    Parameters
    ----------
    model : nn.Module
        Copied, never changed; run in evaluation mode.
    batches : iterable
        Of inputs: a tensor; a tuple whose first entry is it, such as a loader of images and
        labels gives; a mapping of the model's arguments by name; or what `run` takes, tensors
        anywhere in it.  All are held in memory.
    loss : str or callable
        What output gradients are of.  ``"projections"``: random combinations of the outputs, so
        that the second moment of gradients is what the squared change of the outputs weighs;
        all outputs, where there are several.
        ``"labels"``: the cross-entropy of labels that are drawn from the softmax of the outputs,
        the Fisher information; where a network is sure of all calibration examples, few of them
        then decide.  Or a function of the output and a generator, to the sum over examples.
    run : callable, optional
        How a model gets a batch, such as ``lambda model, batch: model(batch[0], batch[1])``; the
        first axis of every tensor in it counts examples.

    Raises
    ------
    ValueError
        If the model has no layer that runs and may change, or a batch does not fit it.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import TorchNet
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> net = TorchNet(model, [torch.zeros(4, 3, 16, 16)])
    >>> [(layer.name, layer.input_size) for layer in net.layers]
    [('0', (16, 16))]
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: str | Loss = "projections",
        run: Run | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")
        if loss not in ("projections", "labels") and not callable(loss):
            raise ValueError(f"loss must be 'projections', 'labels' or a function, got {loss!r}")
        self.data = [_checked(b if run else _input(b)) for b in batches]
        if not self.data:
            raise ValueError("there must be at least one calibration batch")
        self.loss = loss
        self.run: Run = run or _run
        self.original = model
        self._model = _copied(model).eval().requires_grad_(False)
        self._work = copy.deepcopy(self._model)
        self._have: dict[str, Any] = {}
        self.layers = self._traced()
        self.batches = len(self.data)
        if not self.layers:
            raise ValueError(
                "the model runs no convolution or linear layer: nn.Conv1d to 3d, "
                "nn.ConvTranspose1d to 3d or nn.Linear, called as modules"
            )

    def _traced(self) -> tuple[Layer, ...]:
        """Layers in the order in which the first example runs them."""
        modules = _layers(self._model)
        seen: dict[str, list[torch.Tensor]] = {}
        given: list[tuple[str, torch.Tensor]] = []
        scales: dict[str, Array] = {}

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen.setdefault(modules[module], []).append(_given(args, kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            given.append((modules[module], out))

        def norm(module: Any, args: Any, kwargs: Any) -> None:
            for name, out in given:
                if out is _given(args, kwargs) and module.running_var is not None:
                    gain = torch.rsqrt(module.running_var + module.eps)
                    if module.weight is not None:
                        gain = gain * module.weight
                    scales[name] = array(gain)

        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules]
        hooks += [m.register_forward_hook(after) for m in modules]
        hooks += [
            m.register_forward_pre_hook(norm, with_kwargs=True)
            for m in self._model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        try:
            with torch.inference_mode():
                self.run(self._model, _cut(self.data[0], 1))
        except Exception as why:
            raise _refused(self.data[0], why) from why
        finally:
            for h in hooks:
                h.remove()
        calls = {name: len(found) for name, found in seen.items()}
        self._apart = self._calls(modules, _cut(self.data[0], 2)) != calls
        layers = []
        by_name = {n: m for m, n in modules.items()}
        for name, inputs in seen.items():
            module = by_name[name]
            x = _batched(module, inputs[0])
            layers.append(
                Layer(name, of_module(module), tuple(x.shape[2:]), scales.get(name), len(inputs))
            )
        return tuple(layers)

    def _calls(self, modules: Mapping[nn.Module, str], x: Any) -> dict[str, int]:
        """How often layers are called."""
        found: dict[str, int] = {}

        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            found[modules[module]] = found.get(modules[module], 0) + 1

        hooks = [m.register_forward_pre_hook(count) for m in modules]
        try:
            with torch.inference_mode():
                self.run(self._model, x)
        finally:
            for h in hooks:
                h.remove()
        return found

    def _synced(self, chains: Chains) -> nn.Module:
        """The working copy with these chains in place, and no others."""
        if not chains:
            return self._model
        for name in {*self._have, *chains}:
            if self._have.get(name) is not chains.get(name):
                old = self._model.get_submodule(name)
                new = to_module(chains[name], old).eval() if name in chains else old
                new.requires_grad_(False)
                for alias in names_of(self._model, old):
                    self._work = _set(self._work, alias, new)
        self._have = dict(chains)
        return self._work

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        """See :class:`lowrank.compress.Net`."""
        model = self._synced(chains)
        for x in self.data:
            found: dict[str, list[Array]] = {name: [] for name in names}
            times = {layer.name: layer.times for layer in self.layers}

            def hook(x: torch.Tensor, name: str) -> None:
                old = self._model.get_submodule(name)
                # A copy: what follows may write there.
                found[name].append(held(_batched(old, x)))  # noqa: B023
                if not self._apart and all(len(found[n]) >= times[n] for n in names):  # noqa: B023
                    raise _Stop

            hooks = [
                model.get_submodule(n).register_forward_pre_hook(
                    lambda module, args, kwargs, name=n: hook(_given(args, kwargs), name),
                    with_kwargs=True,
                )
                for n in names
            ]
            try:
                with torch.inference_mode():
                    self.run(model, x)
            except _Stop:
                pass
            except Exception as why:
                raise _refused(x, why) from why
            finally:
                for h in hooks:
                    h.remove()
            yield {name: tuple(a) for name, a in found.items()}

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        """See :class:`lowrank.compress.Net`."""
        return self._gradients(names, seed)

    def _gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples]:
        random = torch.Generator().manual_seed(seed)
        for x in self.data:
            found: dict[str, list[Array]] = {name: [] for name in names}

            def hook(name: str, out: torch.Tensor) -> torch.Tensor:
                old = self._model.get_submodule(name)

                def keep(g: torch.Tensor) -> None:
                    found[name].append(held(_batched(old, g)))  # noqa: B023

                if not out.requires_grad:  # such as behind an embedding
                    out = out.detach().requires_grad_().clone()
                out.register_hook(keep)
                return out

            hooks = [
                self._model.get_submodule(n).register_forward_hook(
                    lambda module, args, out, name=n: hook(name, out)
                )
                for n in names
            ]
            try:
                with torch.enable_grad():
                    given = _map(_followed, x)
                    loss = self._lost(self.run(self._model, given), random)
                    if loss.requires_grad:
                        loss.backward()
            finally:
                for h in hooks:
                    h.remove()
            yield {name: tuple(a) for name, a in found.items()}

    def _lost(self, given: Any, random: torch.Generator) -> torch.Tensor:
        y = _output(given)
        if callable(self.loss):
            return self.loss(y, random)
        if self.loss == "labels":
            if y.ndim < 2:
                raise ValueError(
                    f"labels are drawn from outputs (batch, classes, ...), got {tuple(y.shape)}"
                )
            flat = y.reshape(len(y), y.shape[1], -1).movedim(1, 2).reshape(-1, y.shape[1])
            shares = flat.detach().float().cpu().softmax(1)
            drawn = torch.multinomial(shares, 1, generator=random)[:, 0].to(y.device)
            return nn.functional.cross_entropy(flat, drawn, reduction="sum")
        every = [t for t in torch.utils._pytree.tree_leaves(given) if torch.is_tensor(t)]
        return sum(
            ((t * torch.randn(t.shape, generator=random).to(t)).sum() for t in every
             if t.is_floating_point()),
            torch.zeros(()),
        )  # fmt: skip

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """See :class:`lowrank.compress.Net`."""
        model = self._synced(chains)
        for x in self.data:
            with torch.inference_mode():
                yield (array(_output(self.run(model, x))),)

    def replaced(self, chains: Chains, tied: bool = True) -> nn.Module:
        """A copy of the model with chains in the place of layers.

        Parameters
        ----------
        chains : mapping of str to Factorization
            By layer.
        tied : bool
            As for :func:`lowrank.interop.torch.modules.to_module`.

        Returns
        -------
        nn.Module
            Ordinary, trainable modules in the mode that the original is in.
        """
        model = _copied(self.original)
        for name, f in chains.items():
            old = model.get_submodule(name)
            new = to_module(f, old, tied)
            for alias in names_of(model, old):
                model = _set(model, alias, new)
        return model


class Small(NamedTuple):
    """What :func:`compress` returns.

    Attributes
    ----------
    model : nn.Module
        The compressed copy.
    plan : lowrank.compress.Plan
        What every layer became, printable.
    rows : tuple of lowrank.compress.pipeline.Reconstructed
        How each layer came out.
    """

    model: nn.Module
    plan: Plan
    rows: tuple[Any, ...]


def compress(
    model: nn.Module,
    calibration_batches: Iterable[Any],
    *,
    plan: Plan | None = None,
    loss: str | Loss = "projections",
    run: Run | None = None,
    tied: bool = True,
    passes: int = 1,
    refit: bool = False,
    renorm: bool = False,
    folder: str | os.PathLike[str] | None = None,
    progress: Callable[[str, float], object] | None = None,
    **budget: Any,
) -> Small:
    """Make a trained model cheaper within a budget, without training it.

    Parameters
    ----------
    model : nn.Module
        With convolutions, transposed ones, or linear layers anywhere in its tree.  It stays as
        it is.
    calibration_batches : iterable
        A few hundred examples, as :class:`TorchNet` takes them.
    plan : lowrank.compress.Plan, optional
        What to do; made from `budget` if not given.
    loss : str or callable
        As for :class:`TorchNet`.
    run : callable, optional
        As for :class:`TorchNet`: how a model of several inputs gets a batch.
    tied : bool
        Whether tied weights stay one parameter; see :class:`lowrank.interop.torch.modules.Tied`.
    passes : int
        Over all layers, as for :func:`lowrank.compress.pipeline`.
    refit : bool
        Whether layers that stay make up for errors ahead of them, too.
    folder : path, optional
        Where finished layers are kept, for a run that is interrupted.
    progress : callable, optional
        Called with what is being done and the share of it that is.
    renorm : bool
        Whether batch norms are estimated anew on the calibration batches.  It repairs crude
        fits and harms good ones.
    **budget
        ``macs=``, ``params=``, ``seconds=`` or ``bytes=``, and all else that
        :func:`lowrank.compress.make_plan` takes.

    Returns
    -------
    Small
        The new model, the plan, and how each layer came out.

    Raises
    ------
    ValueError
        If there is nothing to compress, a batch does not fit the model, or nothing is within the
        budget; the message says what is possible.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import compress
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)
    ... )
    >>> small = compress(model, [torch.randn(8, 3, 12, 12)], macs=0.5)
    >>> now, before = small.plan.total("macs")
    >>> now <= before / 2, tuple(small.model(torch.zeros(1, 3, 12, 12)).shape)
    (True, (1, 16, 10, 10))
    """
    net = TorchNet(model, calibration_batches, loss, run)
    done = compress_model(
        net, plan, passes=passes, refit=refit, folder=folder, progress=progress, **budget
    )
    small = net.replaced(done.chains, tied)
    if renorm:
        renormalise(small, net.data, net.run)
    return Small(small, done.plan, done.rows)


def renormalise(model: nn.Module, batches: Iterable[Any], run: Run | None = None) -> None:
    """Estimate the means and variances of batch norms anew, in place.

    Parameters
    ----------
    model : nn.Module
        Its batch norms are changed.
    batches : iterable
        Inputs, as :class:`TorchNet` takes them; all count alike.
    run : callable, optional
        How the model gets a batch.
    """
    modes = {m: m.training for m in model.modules()}
    norms = {
        m: m.momentum
        for m in modes
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    }
    model.eval()
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # a plain mean
            m.train()
        with torch.no_grad():
            for x in batches:
                (run or _run)(model, x if run else _input(x))
    finally:
        for m, momentum in norms.items():
            m.momentum = momentum
        for m, mode in modes.items():
            m.training = mode


def layers(model: nn.Module, example: torch.Tensor) -> Mapping[str, Layer]:
    """The layers of a model that may be replaced, by name, in the order in which they run.

    Parameters
    ----------
    model : nn.Module
        Of any kind; it stays as it is.
    example : torch.Tensor
        A batch of inputs.

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
    return {layer.name: layer for layer in TorchNet(model, [example]).layers}


def _input(batch: Any) -> Any:
    """A batch without what is not for the model."""
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def _run(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, Mapping) else model(x)


def _checked(batch: Any) -> Any:
    tensors = _tensors(batch)
    if not tensors:
        raise TypeError(
            f"a calibration batch must be a tensor, a tuple that begins with one or a mapping of "
            f"them, got {type(batch).__qualname__}"
        )
    if any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors):
        raise ValueError("calibration batches must be finite: found NaN or infinity")
    return batch


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, torch.Tensor)]


def _map(do: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, do, batch)


def _cut(batch: Any, examples: int) -> Any:
    """The first examples of a batch."""
    return _map(lambda t: t[:examples] if t.ndim else t, batch)


def _followed(x: torch.Tensor) -> torch.Tensor:
    """A copy that gradients go back to."""
    x = x.clone()
    return x.requires_grad_() if x.is_floating_point() or x.is_complex() else x


def _refused(batch: Any, why: Exception) -> ValueError:
    shapes = ", ".join(str(tuple(t.shape)) for t in _tensors(batch))
    return ValueError(f"the model cannot be run on a batch of shape {shapes}: {why}")


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as why:
        raise ValueError(
            f"the model cannot be copied ({why}); weights that are made anew in every pass, such "
            "as those of torch.nn.utils.weight_norm, have to be fixed first: "
            "torch.nn.utils.remove_weight_norm, or parametrize.remove_parametrizations"
        ) from why


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a layer, however it is passed."""
    return args[0] if args else kwargs["input"]


def _output(y: Any) -> torch.Tensor:
    """The first tensor of whatever a model returns."""
    if isinstance(y, torch.Tensor):
        return y
    some = y.values() if isinstance(y, Mapping) else y
    if isinstance(some, Iterable):
        for one in some:
            return _output(one)
    raise TypeError(f"the model returns {type(y).__qualname__}, which holds no tensor")


def _batched(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Inputs or outputs of a layer as (batch, channels, *spatial)."""
    if isinstance(module, nn.Linear):
        return rows_of(x if x.ndim > 1 else x[None])
    ndim = cast(Any, module).weight.ndim - 2
    return x if x.ndim == ndim + 2 else x[None]


def _layers(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that may be replaced: those whose weights nobody but themselves reads."""
    found = {m: n for n, m in model.named_modules() if is_layer(m)}
    for owner in model.modules():
        if isinstance(owner, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            for child in owner.children():
                found.pop(child, None)
    return found


def _set(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """The model with another module of that name; the module itself if the name is empty."""
    if not name:
        return new
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    return model
