"""The interface of a trained model that compression needs, for every framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lowrank._typing import Array, Ints
from lowrank.core.cost import Cost
from lowrank.core.stage import Stage
from lowrank.factorization import Factorization

Chains = Mapping[str, Factorization]
Samples = dict[str, tuple[Array, ...]]
Call = Callable[[], object]
_SHOWN = 5  # reasons, and layers per reason, in a message


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One convolution of a model, or a linear layer as the pointwise convolution that it is.

    Attributes
    ----------
    name : str
        Name in the model.
    conv : Factorization
        One dense stage, with the layer's bias.
    input_size : tuple of int
        Spatial size of its input, for one example; (1,) for a linear layer.
    scale : ndarray or None, shape (out,)
        Gain of the batch norm behind it, by which errors of its outputs are weighted.
    times : int
        Number of times that one example passes it.
    accepts : callable or None
        Function that tells whether the model can hold a chain of given stages, whose weights may
        be abstract; None if it can hold every chain.
    sizes : tuple of tuple of int
        Spatial size of the input of each pass, such as those of a head on several levels of a
        pyramid; empty if all are `input_size`.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank.compress import Layer
    >>> layer = Layer("conv1", lowrank.dense(np.ones((8, 3, 3, 3)), padding=1), (32, 32))
    >>> layer.cost.macs == layer.conv.cost((32, 32)).macs
    True
    """

    name: str
    conv: Factorization
    input_size: Ints
    scale: Array | None = None
    times: int = 1
    accepts: Callable[[Sequence[Stage]], bool] | None = None
    sizes: tuple[Ints, ...] = ()

    @property
    def passes(self) -> float:
        """MACs of all passes of one example, relative to those of a pass at `input_size`."""
        if not self.sizes:
            return self.times
        return sum(self.conv.cost(size).macs for size in self.sizes) / self.cost.macs

    @property
    def cost(self) -> Cost:
        """Cost of one run for one example."""
        return self.conv.cost(self.input_size)


class OmittedLayer(NamedTuple):
    """A layer, or another linear operation, that stays as it is and is in no budget.

    Attributes
    ----------
    reason : str
        Why it is left out, as a clause about it.
    macs : int or None
        MACs per example; None if unknown.
    """

    reason: str
    macs: int | None = None


class CompressibleModel(Protocol):
    """A trained model with calibration data, from PyTorch, ONNX, Keras or a weights file.

    Arrays are float32, (batch, channels, \\*spatial); those of a linear layer have one spatial
    axis, over the vectors of an example.  A model may have `left_out`, a dict of the reasons why
    other layers are not among `layers`, `left_out_macs`, a dict of their MACs, and `batch_size`,
    the number of examples in a batch, by which passes over the data are limited in memory.
    """

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Layers that may be replaced, in the order in which they first run."""

    @property
    def batches(self) -> int:
        """Number of calibration batches; 0 without data."""

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        """Yield the inputs of layers, one batch at a time, with `chains` in place of layers.

        One array per time that a layer runs; nothing writes to it later.  The model need not be
        run beyond the last of the layers.
        """

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        """Yield the gradients of each example's loss at the outputs of layers, batch by batch.

        One array per time that a layer runs, in the order of :meth:`inputs`; none for a layer that
        the loss does not depend on.  None where the model cannot be differentiated.
        """

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """Yield the outputs of the model, one batch at a time."""

    def replaced(self, chains: Chains) -> Any:
        """Return a new model in the form of the original, which is not changed."""

    def fingerprint(self) -> str:
        """Return a hash of all that the time of the network depends on."""

    def call(self, chains: Chains, runtime: str, batch: int, threads: int) -> Call | None:
        """Return a call of the network on a runtime, on `batch` examples.

        None if the network as a whole cannot run there.
        """


def omitted_layers(model: CompressibleModel) -> dict[str, OmittedLayer]:
    """Return the layers that were seen in a model and cannot be replaced.

    Parameters
    ----------
    model : CompressibleModel
        Any model.

    Returns
    -------
    dict of str to OmittedLayer
    """
    macs = getattr(model, "left_out_macs", {})
    reasons = getattr(model, "left_out", {})
    return {name: OmittedLayer(reason, macs.get(name)) for name, reason in reasons.items()}


def describe_reasons(reasons: Mapping[str, str]) -> str:
    """Return the reasons why layers stay, each with the first layers that it holds for.

    Parameters
    ----------
    reasons : mapping of str to str
        Reasons by the name of the layer.

    Returns
    -------
    str
        One line; empty without layers.

    Examples
    --------
    >>> from lowrank.compress.model import describe_reasons
    >>> describe_reasons({"a": "it is quantized", "b": "it is quantized", "c": "it is shared"})
    'a, b: it is quantized; c: it is shared'
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name or "the model itself")
    parts = []
    for reason, of in list(names.items())[:_SHOWN]:
        more = f" and {len(of) - _SHOWN} more" if len(of) > _SHOWN else ""
        parts.append(f"{', '.join(of[:_SHOWN])}{more}: {reason}")
    if len(names) > _SHOWN:
        rest = sum(len(of) for of in list(names.values())[_SHOWN:])
        parts.append(f"and {rest} more")
    return "; ".join(parts)
