"""Training of compressed PyTorch models against their originals, without labels."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree

from lowrank.interop.torch.batches import (
    Run,
    check_batch,
    map_tensors,
    model_input,
    run_error,
    run_model,
    tensors_in,
)
from lowrank.interop.torch.inference import on_engine

Augment = Callable[[Any, torch.Generator], Any]

HELD_OUT = 0.1  # share of the examples on which the loss is measured
MOST_HELD_OUT = 512  # examples
EVALUATIONS = 20  # of the held-out loss, evenly over the budget
# Evaluations without a lower held-out loss that end the training.  They count once the learning
# rate has fallen by half: before, the loss of well-fitted chains is above where it started.
PATIENCE = 5
# Learning rate for a relative squared error of 1.  ResNet-20 at a fifth of the MACs (error 0.24)
# loses less with 0.003 than with 0.001; cifar10_full at a third (0.013) needs 0.001: 0.003 undoes
# its fits.
RATE = 0.006
WARM_UP = 0.03  # share of the budget over which the learning rate rises
ROUNDING = 1e-3  # largest relative distance of outputs on the engine
HALF_PRECISION = (torch.float16, torch.bfloat16)


class DistillationResult(NamedTuple):
    """A trained model and the course of its training.

    Attributes
    ----------
    model : nn.Module
        Trained copy of the compressed model, in its mode, precision and memory format.
    before, after : float
        Loss on held-out examples before and after training: squared error of the outputs,
        relative to their variance.
    steps : int
        Number of optimiser steps.
    examples : int
        Number of examples in these steps.
    seconds : float
        Duration of the whole call.
    reason : str
        Why training ended.
    """

    model: nn.Module
    before: float
    after: float
    steps: int
    examples: int
    seconds: float
    reason: str

    def __str__(self) -> str:
        """Return the report as one line."""
        return (
            f"held-out loss {self.before:.4g} -> {self.after:.4g} in {self.steps:,} steps "
            f"({self.examples:,} examples, {self.seconds:.0f} s); {self.reason}"
        )


def distill(
    small: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    minutes: float = 5.0,
    steps: int | None = None,
    batch_size: int = 64,
    rate: float | None = None,
    activations: Sequence[str] | None = None,
    augment: bool | Augment | None = None,
    run: Run | None = None,
    seed: int = 0,
    progress: Callable[[str, float], object] | None = None,
) -> DistillationResult:
    """Train a compressed model to return the outputs of its original, without labels.

    The loss is the squared error of the outputs and of the activations, relative to their variance,
    so that classifiers and regressions need no settings.  Adam trains every parameter of `small`
    that requires a gradient; the learning rate rises shortly and falls as a cosine over the
    budget.  Batch norms and dropout stay in evaluation mode.  A tenth of the examples is held out:
    the result has the weights with the lowest loss of the outputs on them, and training ends early
    if that loss does not fall for a quarter of the budget in its second half.

    Parameters
    ----------
    small : nn.Module
        Compressed model, such as :func:`compress` returns.  It is not changed.
    model : nn.Module
        Original model.  It is not changed.
    batches : iterable
        Batches of inputs; labels after the input are ignored.  See :class:`TorchModel`.  All are
        kept in memory, and their examples are shuffled.
    minutes : float
        Time budget of the whole call.
    steps : int, optional
        Number of optimiser steps, in place of `minutes`.  The result then depends on no clock: it
        is deterministic for a seed and a number of threads.
    batch_size : int
        Number of examples per step.
    rate : float, optional
        Highest learning rate.  If not given, it is proportional to the square root of the loss
        before training: chains that start closer to the original need smaller steps.
    activations : sequence of str, optional
        Names of modules whose outputs are matched as well; their relative errors together weigh as
        much as that of the outputs.  If not given, the innermost modules around compressed layers,
        such as the blocks of a ResNet: they say more about an example than its output alone, which
        counts when examples are few.
    augment : bool or callable, optional
        Whether examples are flipped along the last axis and shifted along the last two at random,
        by up to an eighth, or a function of a batch and a ``torch.Generator`` that returns another
        batch.  If not given, batches of color images are augmented: floating-point tensors
        (batch, 3, height, width).
    run : callable, optional
        Function that calls either model with a batch; see :class:`TorchModel`.
    seed : int
        Seed of the held-out examples, the order and the augmentation.
    progress : callable, optional
        Function that is called with the name of the task and the finished share of it.

    Returns
    -------
    DistillationResult
        The trained model and a report, which ``str`` formats as one line.

    Raises
    ------
    ValueError
        If no parameter of `small` requires a gradient, there are fewer than two examples, a batch
        does not fit, the outputs of the models differ in shape or are not finite, or a module of
        `activations` does not exist.

    Notes
    -----
    A keyboard interrupt ends the training and returns the best weights so far, as does a loss that
    is not finite; ``reason`` tells.  Parameters in half precision are trained in single precision
    and rounded at the end.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch import compress, distill
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3)
    ... )
    >>> batches = [torch.randn(32, 3, 12, 12)]
    >>> small = compress(model, batches, macs=0.3).model
    >>> result = distill(small, model, batches, steps=20)
    >>> result.after < result.before, result.steps
    (True, 20)
    """
    start = time.perf_counter()
    _check_numbers(minutes=minutes, steps=steps, batch_size=batch_size, rate=rate)
    random = torch.Generator().manual_seed(seed)
    call: Run = run or run_model
    examples = [e for b in batches for e in _split(check_batch(b if run else model_input(b)))]
    if len(examples) < 2:
        raise ValueError(f"batches must hold at least 2 examples, got {len(examples)}")
    order = torch.randperm(len(examples), generator=random).tolist()
    held_out = min(max(1, round(HELD_OUT * len(examples))), MOST_HELD_OUT)
    unseen = list(_joined([examples[i] for i in order[:held_out]], batch_size))
    examples = [examples[i] for i in order[held_out:]]
    if activations is None:
        activations = _blocks(small, model)
    training = _Training(small, model, activations, call, rate, unseen)

    def used() -> float:
        """Return the share of the budget that is used."""
        if steps is not None:
            return training.steps / steps
        return (time.perf_counter() - start) / (60 * minutes)

    def shuffled() -> Iterator[Any]:
        """Yield batches of shuffled examples without end."""
        while True:
            order = torch.randperm(len(examples), generator=random).tolist()
            yield from _joined([examples[i] for i in order], batch_size)

    reason = "the budget is spent"
    checks = 1
    try:
        for x in shuffled():
            share = used()
            if progress is not None:
                progress("distillation", min(share, 1.0))
            if share >= checks / EVALUATIONS:
                checks = math.floor(share * EVALUATIONS) + 1
                training.evaluate(is_patient=share <= 0.5)
                if training.evaluations_since_best >= PATIENCE:
                    reason = "the held-out loss no longer falls"
                    break
            if share >= 1:
                break
            if not training.step(_augmented(x, augment, random), _rate_factor(share)):
                reason = f"the loss became NaN or infinite at step {training.steps}"
                break
    except KeyboardInterrupt:
        reason = "interrupted"
    trained = copy.deepcopy(small)
    trained.load_state_dict(training.best)
    return DistillationResult(
        trained,
        training.before,
        training.after,
        training.steps,
        training.examples,
        time.perf_counter() - start,
        reason,
    )


def _check_numbers(**given: float | None) -> None:
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")


class _Training:
    """A copy of a compressed model in training, and the original that it is compared with."""

    def __init__(
        self,
        small: nn.Module,
        model: nn.Module,
        activations: Sequence[str],
        run: Run,
        rate: float | None,
        held_out: Sequence[Any],
    ) -> None:
        trained, original = copy.deepcopy(small).eval(), copy.deepcopy(model).eval()
        self.is_half = any(p.dtype in HALF_PRECISION for p in trained.parameters())
        if self.is_half:
            trained = trained.float()
        # Training ResNet-20 on one core takes half the time in this layout.
        self.is_channels_last = all(t.is_cpu and t.ndim == 4 for t in tensors_in(held_out))
        if self.is_channels_last:
            trained = trained.to(memory_format=torch.channels_last)
            original = original.to(memory_format=torch.channels_last)
        parameters = [p for p in trained.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(
                "small must have a parameter that requires a gradient, got none: call "
                "small.requires_grad_() first"
            )
        self.trained, self.held_out = trained, held_out
        self.optimiser = torch.optim.Adam(parameters)
        self.student = _Observed(trained, activations, run)
        self.teacher = _teacher(original, activations, run, self._in_layout(held_out[0]))
        self.variances = self._variances()
        self.steps = self.examples = 0
        self.evaluations_since_best = 0
        self.before = self.after = self._held_out_loss()
        if not math.isfinite(self.before):
            raise ValueError("the outputs of small and model must be finite on batches")
        self.rate = RATE * math.sqrt(min(self.before, 1.0)) if rate is None else rate
        self.best = _state(trained)

    def step(self, x: Any, factor: float) -> bool:
        """Take one step at a share of the learning rate; return whether the loss is finite."""
        self.steps += 1
        outputs, activations = self._errors(x)
        loss = _mean(outputs) + _mean(activations)
        if not bool(torch.isfinite(loss)):
            return False
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * factor
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.examples += _length(x)
        return True

    def evaluate(self, is_patient: bool) -> None:
        """Compute the loss on the held-out batches; keep the weights if it is the lowest."""
        loss = self._held_out_loss()
        self.evaluations_since_best += not is_patient
        if loss < self.after:
            self.after, self.best, self.evaluations_since_best = loss, _state(self.trained), 0

    def _held_out_loss(self) -> float:
        with torch.no_grad():
            losses = [(float(_mean(self._errors(x)[0])), _length(x)) for x in self.held_out]
        return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def _errors(self, x: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return squared errors of the outputs and of the activations, relative to variances."""
        x = self._in_layout(x)
        with torch.no_grad():
            wanted = self.teacher(x)
        found = self.student(map_tensors(_single, x) if self.is_half else x)
        shapes = [[tuple(t.shape) for part in parts for t in part] for parts in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"small and model must return tensors of the same shapes, got {shapes[0]} and "
                f"{shapes[1]}"
            )
        variances = iter(self.variances)
        outputs, activations = (
            [(a - b).float().square().mean() / next(variances) for a, b in zip(*parts)]
            for parts in zip(found, wanted)
        )
        return outputs, activations

    def _variances(self) -> list[float]:
        """Return the variance of every output and activation of the original."""
        moments: list[list[tuple[float, float]]] = []
        with torch.no_grad():
            for x in self.held_out:
                found = self.teacher(self._in_layout(x))
                tensors = [t.float() for part in found for t in part]
                moments.append([(float(t.mean()), float(t.square().mean())) for t in tensors])
        variances = []
        for values in zip(*moments):
            mean, square = (sum(v) / len(v) for v in zip(*values))
            # Constant outputs have no variance beyond rounding: take their square, or 1 for zeros.
            spread = square - mean**2
            variances.append(spread if spread > 1e-6 * square else square or 1.0)
        return variances

    def _in_layout(self, x: Any) -> Any:
        if not self.is_channels_last:
            return x
        return map_tensors(lambda t: t.contiguous(memory_format=torch.channels_last), x)


class _Observed:
    """Calls of a model, with its outputs and the activations of some modules."""

    def __init__(self, model: nn.Module, activations: Sequence[str], run: Run) -> None:
        self.model, self.run, self.names = model, run, activations
        self.found: dict[str, list[torch.Tensor]] = {}
        for name in activations:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"activations must name modules of both models, got {name!r}"
                ) from None
            module.register_forward_hook(partial(self._record, name))

    def _record(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        # A copy: later operations may overwrite the tensor.
        self.found.setdefault(name, []).extend(t.clone() for t in _floats(output))

    def __call__(self, x: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the floating-point tensors of the output, and of the observed modules."""
        self.found.clear()
        try:
            outputs = _floats(self.run(self.model, x))
        except Exception as cause:
            raise run_error(x, cause) from cause
        if not outputs:
            raise ValueError("the models must return a floating-point tensor, got none")
        return outputs, [t for name in self.names for t in self.found.get(name, [])]


def _teacher(model: nn.Module, activations: Sequence[str], run: Run, x: Any) -> _Observed:
    """Return the original: on lowrank's engine where its outputs on a batch are equal there."""
    plain = _Observed(model, activations, run)
    if activations or not all(t.is_cpu and t.dtype == torch.float32 for t in tensors_in(x)):
        return plain
    try:
        fast = _Observed(on_engine(model), (), run)
        with torch.no_grad():
            pairs = zip(plain(x)[0], fast(x)[0], strict=True)
            is_equal = all(a.shape == b.shape and _distance(a, b) < ROUNDING for a, b in pairs)
    except Exception:  # of the trace, or anything in a model
        return plain
    return fast if is_equal else plain


def _blocks(small: nn.Module, model: nn.Module) -> list[str]:
    """Return the names of the modules that hold compressed layers, without the whole model.

    On ResNet-20 at a fifth of the MACs, 150 steps with these activations reach the held-out loss of
    350 steps without.
    """
    original = dict(model.named_modules())
    compressed = [
        name
        for name, module in small.named_modules()
        if name in original and type(module) is not type(original[name])
    ]
    return sorted({name.rpartition(".")[0] for name in compressed} - {""})


def _single(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in HALF_PRECISION else t


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the relative distance of `b` from `a` in the Frobenius norm."""
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(a.dtype).tiny))


def _floats(output: Any) -> list[torch.Tensor]:
    return [t for t in tensors_in(output) if t.is_floating_point()]


def _mean(errors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(errors)).mean() if errors else torch.zeros(())


def _state(model: nn.Module) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in model.state_dict().items()}


def _rate_factor(share: float) -> float:
    """Return the share of the learning rate after a share of the budget."""
    return min(1.0, (share + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * share)) / 2


def _length(x: Any) -> int:
    """Return the number of examples in a batch: the length of its first tensor that has one."""
    return next((len(t) for t in tensors_in(x) if t.ndim), 1)


def _split(batch: Any) -> list[Any]:
    """Return the examples of a batch as batches of one; the batch where it cannot be split."""
    leaves = _pytree.tree_leaves(batch)
    if not all(isinstance(t, torch.Tensor) and t.ndim for t in leaves):
        return [batch]
    lengths = {len(t) for t in leaves}
    if len(lengths) > 1:
        return [batch]
    return [map_tensors(itemgetter(slice(i, i + 1)), batch) for i in range(*lengths)]


def _joined(examples: Iterable[Any], size: int) -> Iterator[Any]:
    """Yield batches of up to `size` examples of one structure, shape and type."""
    groups: dict[Any, list[list[torch.Tensor]]] = {}
    specs: dict[Any, Any] = {}
    for example in examples:
        leaves, spec = _pytree.tree_flatten(example)
        if not all(isinstance(t, torch.Tensor) and t.shape[:1] == (1,) for t in leaves):
            yield example
            continue
        key = str(spec), tuple((t.shape, t.dtype, t.device) for t in leaves)
        specs[key] = spec
        groups.setdefault(key, []).append(leaves)
        if len(groups[key]) == size:
            yield _join(groups.pop(key), spec)
    for key, group in groups.items():
        yield _join(group, specs[key])


def _join(group: Sequence[Sequence[torch.Tensor]], spec: Any) -> Any:
    return _pytree.tree_unflatten([torch.cat(tensors) for tensors in zip(*group)], spec)


def _augmented(x: Any, augment: bool | Augment | None, random: torch.Generator) -> Any:
    """Return a batch, augmented if asked or if it holds color images."""
    if callable(augment):
        return augment(x, random)
    is_image = isinstance(x, torch.Tensor) and x.ndim == 4 and x.is_floating_point()
    if augment and not is_image:
        raise ValueError(
            "augment=True needs batches of images (batch, channels, height, width): give a function"
        )
    if augment is None:
        augment = is_image and x.shape[1] == 3
    return _flip_and_shift(x, random) if augment else x


def _flip_and_shift(x: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return images, flipped horizontally and shifted by up to an eighth at random."""
    n, _, height, width = x.shape
    top, left = height // 8, width // 8
    flips = torch.rand(n, 1, 1, 1, generator=random) < 0.5
    rows = torch.randint(2 * top + 1, (n,), generator=random).tolist()
    columns = torch.randint(2 * left + 1, (n,), generator=random).tolist()
    x = torch.where(flips.to(x.device), x.flip(-1), x)
    padded = nn.functional.pad(x, (left, left, top, top), mode="reflect")
    return torch.stack(
        [p[:, r : r + height, c : c + width] for p, r, c in zip(padded, rows, columns)]
    )
