"""Helpers that several file formats share."""

from __future__ import annotations

from collections.abc import Mapping

from lowrank.compress.model import Chains, Layer
from lowrank.factorization import Factorization


def check_chains(chains: Chains, layers: Mapping[str, Layer]) -> None:
    """Raise unless every chain has the shapes of the layer that it replaces."""
    for name, f in chains.items():
        if name not in layers:
            raise ValueError(f"no layer {name!r} among {', '.join(layers)}")
        if not isinstance(f, Factorization):
            raise TypeError(f"layer {name!r}: a chain must be a Factorization, got {f!r:.80}")
        conv, size = layers[name].conv, layers[name].input_size
        try:
            expected, actual = conv.output_shape(size), f.output_shape(conv.input_shape(size))
        except ValueError as why:
            raise ValueError(f"layer {name!r}: {why}") from None
        if expected != actual:
            raise ValueError(
                f"layer {name!r}: the chain must have output shape {expected}, got {actual}"
            )


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
