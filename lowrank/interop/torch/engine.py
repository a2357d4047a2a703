"""PyTorch models whose convolutions run on lowrank's engine, or on its GPU kernels: inference."""

from __future__ import annotations

import copy
import importlib
import inspect
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn

from lowrank.blocks import BatchNorm, fold_batch_norm
from lowrank.core.geometry import Geometry
from lowrank.core.stage import Activation
from lowrank.engine import Runner
from lowrank.factorization import Factorization, chain, compile_chains
from lowrank.interop.torch.modules import Bias, Tied, array, is_conv, of_module

Links = tuple[tuple[Factorization, Activation], ...]
PLANS = 32  # input shapes that a module keeps plans for
DIFFERENCE = 1e-3  # between a traced model and the original: rounding stays far below
_PADS = {
    nn.ReflectionPad1d: "reflect", nn.ReflectionPad2d: "reflect", nn.ReflectionPad3d: "reflect",
    nn.ReplicationPad1d: "replicate", nn.ReplicationPad2d: "replicate",
    nn.ReplicationPad3d: "replicate", nn.CircularPad1d: "circular", nn.CircularPad2d: "circular",
    nn.CircularPad3d: "circular", nn.ConstantPad1d: "constant", nn.ConstantPad2d: "constant",
    nn.ConstantPad3d: "constant", nn.ZeroPad1d: "constant", nn.ZeroPad2d: "constant",
    nn.ZeroPad3d: "constant",
}  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_RELUS = (torch.relu, torch.relu_, nn.functional.relu)
_ADDS = (operator.add, operator.iadd, torch.add)


class Engine(nn.Module):  # type: ignore[misc]
    """Convolutions one after another, each with what follows it, planned and run by lowrank.

    Parameters
    ----------
    links : sequence of (Factorization, str)
        Chains with their biases, and ``"none"``, ``"relu"`` or ``"relu6"`` after each.
    threads : int, optional
        PyTorch's number, when a plan is made, if not given.

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> import lowrank
    >>> from lowrank.interop.torch.engine import Engine
    >>> f = lowrank.dense(np.ones((4, 2, 3), np.float32), bias=np.full(4, -10, np.float32))
    >>> Engine([(f, "relu")])(torch.ones(1, 2, 5)).max()
    tensor(0.)
    """

    def __init__(
        self, links: Sequence[tuple[Factorization, Activation]], threads: int | None = None
    ) -> None:
        super().__init__()
        self.links: Links = tuple(links)
        self.threads = threads
        # A look-up by the whole shape is the fastest; plans serve every size of a batch.
        self._plans: dict[Any, tuple[Runner, tuple[int, ...]]] = {}
        self._runners: dict[Any, tuple[Runner, tuple[int, ...]]] = {}

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Run it; (batch, channels, *spatial), or without the batch.

        Parameters
        ----------
        input : torch.Tensor
            By the name that PyTorch's layers have for it.

        Returns
        -------
        torch.Tensor
            In memory of its own.

        Raises
        ------
        TypeError
            If it is of a precision that does not run where it is.
        ValueError
            If gradients are asked for, or the shape does not fit.
        """
        x = input
        if x.requires_grad:
            x = _without_gradient(x)
        dtype = x.dtype
        key = x.shape, dtype, x.device
        found = self._plans.get(key)
        if found is None:
            if x.ndim == self.links[0][0].ndim + 1:
                return self.forward(x[None])[0]
            found = self._planned(x)
        if not x.is_contiguous():
            x = x.contiguous()
        run, shape = found
        y = torch.empty(shape, dtype=dtype, device=x.device)
        if x.is_cuda:
            _run_on_gpu(run, x, y)
        else:
            run(x.numpy(), y.numpy())
        return y

    def _planned(self, x: torch.Tensor) -> tuple[Runner, tuple[int, ...]]:
        known = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        if x.device.type not in ("cpu", "cuda") or x.dtype not in known[: 4 if x.is_cuda else 2]:
            raise TypeError(
                f"lowrank's engine runs float32 and float64 tensors on the CPU, on CUDA half "
                f"precisions as well, got {x.dtype} on {x.device}: convert with "
                ".to('cpu', torch.float32)"
            )
        first = self.links[0][0]
        if x.ndim != first.ndim + 2 or x.shape[1] != first.in_channels:
            raise ValueError(
                f"x must be (batch, {first.in_channels} channels, and {first.ndim} spatial axes), "
                f"got {tuple(x.shape)}"
            )
        shape: tuple[int, ...] = tuple(x.shape[1:])
        key = shape, x.dtype, x.device
        plan = self._runners.get(key)
        if plan is None:
            threads = self.threads or torch.get_num_threads()
            links = self.links
            if x.is_cuda:
                links = tuple((f.to(f"cuda:{x.device.index}"), a) for f, a in links)
            run = compile_chains(links, shape, str(x.dtype).removeprefix("torch."), threads)
            size = shape
            for f, _ in self.links:
                size = f.output_shape(size)
            plan = self._runners[key] = run, size
            _trim(self._runners)
        found = self._plans[x.shape, x.dtype, x.device] = plan[0], (len(x), *plan[1])
        _trim(self._plans)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plans": {}, "_runners": {}}  # plans are made anew

    def extra_repr(self) -> str:
        """What printing a model says of it."""
        words = [w for f, a in self.links for w in (repr(f), *([a] if a != "none" else []))]
        return " -> ".join(words)


# Modules whose outputs share no memory with their inputs.
_FRESH = (
    Engine, *_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm,
    nn.LayerNorm, nn.Linear,
)  # fmt: skip


def _trim(plans: dict[Any, Any]) -> None:
    if len(plans) > PLANS:
        plans.pop(next(iter(plans)), None)


def on_engine(
    model: nn.Module, example: torch.Tensor | None = None, threads: int | None = None
) -> nn.Module:
    """A copy of a model for inference, its convolutions on lowrank's engine.

    Batch norms are folded into the convolutions before them, ReLU and ReLU6 become part of the
    engine's runs, and chains of convolutions with nothing between them run as one.  Everything
    else stays PyTorch's.  Tensors go in and come out without a copy, except that an input that is
    not contiguous, such as one in ``channels_last``, is copied once.

    Parameters
    ----------
    model : nn.Module
        Traced by :mod:`torch.fx`; where that cannot be, in part or as a whole, convolutions are
        replaced one by one.  It stays as it is.
    example : torch.Tensor, optional
        A batch of inputs, to make plans for its shape at once, and to compare with what the
        model gives: where the traced one differs, convolutions are replaced one by one.
    threads : int, optional
        Of the engine; PyTorch's number if not given.

    Returns
    -------
    nn.Module
        In evaluation mode, for float32 and float64 tensors that need no gradient.  Plans are made
        when an input shape first comes.  Keep the original to train and to save.  Tensors on a GPU
        run there, through CuPy, in half precisions as well; that has not been tried on one.

    Raises
    ------
    TypeError
        If `model` is no module.
    ValueError
        If the copy does not give what the model gives on `example`.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__qualname__}")

    def fresh() -> nn.Module:
        return copy.deepcopy(model).eval().requires_grad_(False)

    plain = fresh()
    if is_conv(plain):
        made: nn.Module = Engine([(of_module(plain), "none")], threads)
    else:
        try:
            made = _traced(plain, threads) if _one_way(plain) else _swapped(plain, threads)
        except Exception:  # control flow that depends on tensors, and whatever else models do
            made = _swapped(fresh(), threads)
    if example is None or _alike(model, made, example):
        return made
    made = _swapped(fresh(), threads)
    if not _alike(model, made, example):
        raise ValueError(
            "on lowrank's engine the model does not give what it gives in PyTorch: does it use "
            "weights or attributes of its convolutions, or random numbers?"
        )
    return made


def _run_on_gpu(run: Runner, x: torch.Tensor, y: torch.Tensor) -> None:
    """Run a plan of CuPy's on PyTorch's memory and in PyTorch's current stream."""
    cupy = importlib.import_module("cupy")
    stream = torch.cuda.current_stream(x.device)

    def taken(t: torch.Tensor) -> Any:
        if t.dtype == torch.bfloat16:  # which DLPack does not bring
            importlib.import_module("ml_dtypes")
            return cupy.from_dlpack(t.view(torch.int16)).view("bfloat16")
        return cupy.from_dlpack(t)

    with cupy.cuda.Device(x.device.index):
        external = getattr(cupy.cuda.Stream, "from_external", None)
        if external is not None and hasattr(stream, "__cuda_stream__"):
            there = external(stream)
        else:
            there = cupy.cuda.ExternalStream(stream.cuda_stream, x.device.index)
        with there:
            run(taken(x), taken(y))


def _one_way(model: nn.Module) -> bool:
    """Whether all inputs are always given: a trace cannot tell whether others are."""
    given = inspect.signature(model.forward).parameters.values()
    return all(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in given)


def _alike(model: nn.Module, made: nn.Module, example: torch.Tensor) -> bool:
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(example)
        try:
            found = made(example)
        except Exception:
            return False
    before, now = _tensors(wanted), _tensors(found)
    return len(before) == len(now) and all(map(_near, before, now))


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return True  # such as an index of the largest, which rounding may change
    most = DIFFERENCE * float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return bool(torch.allclose(a, b, rtol=0.0, atol=most, equal_nan=True))


def _tensors(y: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(y) if isinstance(t, torch.Tensor)]


def _without_gradient(x: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        raise ValueError(
            "lowrank's engine computes no gradients: use torch.inference_mode() or "
            "x.detach(), and train the PyTorch model"
        )
    return x.detach()


class _Tracer(fx.Tracer):  # type: ignore[misc]
    """Walks into whatever is not PyTorch's own; modules that cannot be traced stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: set[str] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Tied | Bias) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        last = next(iter(reversed(self.graph.nodes)))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            name = self.path_of_module(m)
            self.whole.add(name)
            return self.create_proxy("call_module", name, args, kwargs)


def _traced(model: nn.Module, threads: int | None) -> nn.Module:
    tracer = _Tracer()
    graph = tracer.trace(model)
    traced = fx.GraphModule(model, graph)
    for name in tracer.whole:
        parent, _, leaf = name.rpartition(".")
        setattr(traced.get_submodule(parent), leaf, _swapped(traced.get_submodule(name), threads))
    runs = _runs(traced)
    for i, run in enumerate(runs):
        name = f"lowrank_engine_{i}"
        traced.add_module(name, Engine(run.links, threads))
        end = run.nodes[-1]
        with graph.inserting_after(end):
            new = graph.call_module(name, (run.nodes[0].args[0],))
        end.replace_all_uses_with(new)
        for node in reversed(run.nodes):
            graph.erase_node(node)
        run.nodes = [new]
    modules = dict(traced.named_modules(remove_duplicate=False))
    _write_in_place(
        graph,
        {
            node
            for node in graph.nodes
            if node.op == "call_module" and isinstance(modules.get(str(node.target)), _FRESH)
        },
    )
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval()


class _Run:
    """Nodes that become one module of the engine."""

    def __init__(self, nodes: list[fx.Node], f: Factorization) -> None:
        self.nodes = nodes
        self.links: list[tuple[Factorization, Activation]] = [(f, "none")]

    def takes(self, f: Factorization) -> bool:
        """Whether a chain may join this run.

        A chain joins where nothing is in between, and a pointwise one joins a depthwise one,
        MobileNet's pair.  Others gain nothing: what they share of a tile is small beside their
        work.  A constant border counts from the input of a run, PyTorch's from that of a layer.
        """
        g = f.stages[0].geometry
        if g.padding_mode == "constant" and any(map(any, g.padding)):
            return False
        last, activation = self.links[-1]
        if last.bias is None and activation == "none":
            return True
        return last.stages[-1].kind == "depthwise" and f.stages[0].kind == "pointwise"

    def append(self, f: Factorization, nodes: list[fx.Node]) -> None:
        last, activation = self.links[-1]
        if last.bias is None and activation == "none":
            self.links[-1] = (chain((*last.stages, *f.stages), f.bias), "none")
        else:
            self.links.append((f, "none"))
        self.nodes += nodes

    def absorbs(self, node: fx.Node, module: nn.Module | None) -> bool:
        """Whether this is a bias, a norm, an activation or nothing, which then is part of it."""
        f, activation = self.links[-1]
        stage = f.stages[-1]
        word = _activation(node, module)
        if isinstance(module, _DROPOUTS):
            pass
        elif word is not None and activation == "none":
            activation = word
        elif activation != "none":
            return False
        elif isinstance(module, Bias):
            bias = array(module.bias)
            f = replace(f, bias=bias if f.bias is None else f.bias + bias)
        elif (
            isinstance(module, _NORMS)
            and module.running_mean is not None
            and module.running_var is not None
            and stage.outer * stage.inner == 1
            and not (stage.transposed and stage.shuffle != (1, 1))
        ):
            f = fold_batch_norm(f, _norm(module))
        else:
            return False
        self.links[-1] = (f, activation)
        self.nodes.append(node)
        return True


def _runs(traced: fx.GraphModule) -> list[_Run]:
    """The convolutions of a graph, with all that may run along with them."""
    modules = dict(traced.named_modules(remove_duplicate=False))
    runs: list[_Run] = []
    ending: dict[fx.Node, _Run] = {}  # by the last node
    for node in traced.graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            continue
        f = None if module is None or len(node.args) > 1 or node.kwargs else _linear(module)
        if f is None:
            run = ending.get(source)
            if run is not None and len(source.users) == 1 and run.absorbs(node, module):
                del ending[source]
                ending[node] = run
            continue
        nodes = [node]
        pad = modules.get(source.target) if source.op == "call_module" else None
        padded = None if pad is None or len(source.users) > 1 else _behind(pad, f)
        if padded is not None:
            f, nodes, source = padded, [source, node], cast(fx.Node, source.args[0])
        run = ending.get(source)
        if run is not None and len(source.users) == 1 and run.takes(f):
            del ending[source]
            run.append(f, nodes)
        else:
            run = _Run(nodes, f)
            runs.append(run)
        ending[node] = run
    return runs


def _linear(module: nn.Module) -> Factorization | None:
    """A module as a chain, if it is a convolution or one with tied weights."""
    if is_conv(module):
        return of_module(module)
    if isinstance(module, Tied):
        inner = _linear_of(list(module.inner.children()))
        if inner is not None and len(inner.stages) == 1:
            (stage,) = inner.stages
            copies = {"outer": module.left, "inner": module.right, "shuffle": module.shuffle}
            tied = replace(stage, **cast("dict[str, Any]", copies))
            return chain([tied])
    return None


def _linear_of(children: Sequence[nn.Module]) -> Factorization | None:
    """Modules as one chain, if all are linear."""
    found: Factorization | None = None
    pad: nn.Module | None = None
    for child in children:
        if isinstance(child, Bias) and found is not None and pad is None:
            if found.bias is not None:
                return None
            found = replace(found, bias=array(child.bias))
            continue
        if type(child) in _PADS and pad is None:
            pad = child
            continue
        f = _linear(child)
        if f is not None and pad is not None:
            f = _behind(pad, f)
            pad = None
        if f is None or (found is not None and found.bias is not None):
            return None
        if found is not None:
            if f.stages[0].geometry.padding_mode == "constant":
                return None
            f = chain((*found.stages, *f.stages), f.bias)
        found = f
    return found if pad is None else None


def _behind(pad: nn.Module, f: Factorization) -> Factorization | None:
    """A convolution with the padding of the module before it, if it can have that."""
    mode = _PADS.get(cast(Any, type(pad)))
    stage = f.stages[0]
    g = stage.geometry
    if mode is None or len(f.stages) > 1 or stage.transposed or g.padding_mode != "zeros":
        return None
    ends = [int(p) for p in cast(Any, pad).padding]
    pairs = [(ends[i], ends[i + 1]) for i in range(0, len(ends), 2)][::-1]
    if len(pairs) != g.ndim or min(ends) < 0:
        return None
    value = float(getattr(pad, "value", 0.0)) if mode == "constant" else 0.0
    if mode == "constant" and value == 0.0:
        mode = "zeros"
    if mode != "zeros" and any(map(any, g.padding)):
        return None
    both = tuple((a + c, b + d) for (a, b), (c, d) in zip(pairs, g.padding))
    geometry = Geometry.of(g.ndim, g.stride, both, g.dilation, cast(Any, mode), value)
    return replace(f, stages=(replace(stage, geometry=geometry),), geometry=geometry)


def _activation(node: fx.Node, module: nn.Module | None) -> Activation | None:
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu"
    if node.op == "call_function" and node.target in _RELUS:
        return "relu"
    if node.op == "call_function" and node.target is nn.functional.relu6:
        return "relu6"
    if node.op == "call_function" and node.target is nn.functional.hardtanh:
        given = dict(zip(("min_val", "max_val"), node.args[1:])) | node.kwargs
        ends = given.get("min_val", -1.0), given.get("max_val", 1.0)
        return "relu6" if ends == (0, 6) else None
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return "relu6" if (module.min_val, module.max_val) == (0, 6) else None
    return "relu" if type(module) is nn.ReLU else None


def _norm(module: Any) -> BatchNorm:
    ones = torch.ones_like(module.running_mean)
    scale = ones if module.weight is None else module.weight
    shift = 0 * ones if module.bias is None else module.bias
    mean, variance = array(module.running_mean), array(module.running_var)
    return BatchNorm(array(scale), array(shift), mean, variance, module.eps)


def _swapped(model: nn.Module, threads: int | None) -> nn.Module:
    """Convolutions, and sequences of nothing else, replaced one by one, in place."""
    done: dict[nn.Module, nn.Module] = {}

    def swapped(module: nn.Module) -> nn.Module:
        if module not in done:
            done[module] = module
            alone = [module] if type(module) is not nn.Sequential else list(module)
            f = _linear_of(alone)
            if f is not None:
                done[module] = Engine([(f, "none")], threads)
            else:
                for name, child in module.named_children():
                    new = swapped(child)
                    if new is not child:
                        setattr(module, name, new)
        return done[module]

    return swapped(model)


def _write_in_place(graph: fx.Graph, fresh: set[fx.Node]) -> None:
    """Sums and ReLUs into outputs that are in memory of their own and that nothing else reads."""
    for node in list(graph.nodes):
        given = [a for a in node.args if isinstance(a, fx.Node)]
        own = [a for a in given if a in fresh and len(a.users) == 1]
        if not own:
            continue
        if _activation(node, _called(graph, node)) == "relu":
            with graph.inserting_before(node):
                new = graph.call_function(torch.relu_, (own[0],))
        elif (
            node.op == "call_function"
            and node.target in _ADDS
            and len(given) == len(node.args) == 2
            and given[0] is not given[1]
            and not node.kwargs
            and (node.target is not operator.iadd or given[0] in own)  # else it writes elsewhere
        ):
            with graph.inserting_before(node):
                other = given[1] if own[0] is given[0] else given[0]
                new = graph.call_function(_added, (own[0], other))
        else:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        fresh.add(new)


def _called(graph: fx.Graph, node: fx.Node) -> nn.Module | None:
    owner = graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    return cast(nn.Module, owner.get_submodule(str(node.target)))


def _added(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum, in the memory of `a` where it fits."""
    if a.shape == b.shape and a.dtype == b.dtype:
        return a.add_(b)
    return a + b
