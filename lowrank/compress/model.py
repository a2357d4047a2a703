"""What compression asks of a trained network, wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lowrank._typing import Array, Ints
from lowrank.factorization import Factorization

Chains = Mapping[str, Factorization]
Samples = dict[str, tuple[Array, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One convolution of a network, or a linear layer as the pointwise convolution that it is.

    Attributes
    ----------
    name : str
        As the network calls it.
    conv : Factorization
        One dense stage, with the layer's bias.
    input_size : tuple of int
        Spatial size of its input, for one example; (1,) for a linear layer.
    scale : ndarray or None, shape (out,)
        What its outputs are multiplied by next: the gain of a batch norm.  Errors count by it.
    times : int
        How often one example goes through it.

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

    @property
    def cost(self) -> Any:
        """Of one run for one example."""
        return self.conv.cost(self.input_size)


class Net(Protocol):
    """A trained network with calibration data at hand; PyTorch's, ONNX's and others'.

    Arrays are float32, (batch, channels, \\*spatial); those of a linear layer have one spatial
    axis, of the vectors of an example.
    """

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers that may be replaced, in the order in which they first run."""

    @property
    def batches(self) -> int:
        """Calibration batches; 0 where there are no data."""

    def inputs(self, names: Sequence[str], chains: Chains) -> Iterator[Samples]:
        """What layers get, a batch at a time, where `chains` stand in for layers of their names.

        One array for every time that a layer runs, which nothing writes to later.  Nothing behind
        the last of the layers needs to be run.
        """

    def gradients(self, names: Sequence[str], seed: int) -> Iterator[Samples] | None:
        """Gradients of the loss of every example by the outputs of layers, a batch at a time.

        Of the sum over examples, with labels drawn from the network's own outputs; None where the
        network cannot be differentiated.
        """

    def outputs(self, chains: Chains) -> Iterator[tuple[Array, ...]]:
        """What the network gives, a batch at a time."""

    def replaced(self, chains: Chains) -> Any:
        """A new network, in the form that the original came in; that one is not touched."""
