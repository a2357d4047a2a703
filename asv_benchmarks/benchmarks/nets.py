"""Third-party trained networks with their data and scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

try:
    import torch
except ImportError:  # asv imports every module of this folder
    torch = None

from .net_data import DRAWN, Data, cifar, cifar_batches
from .net_weights import NETS, load_net


class Case(NamedTuple):
    """A trained network, its data and its score.

    Attributes
    ----------
    name : str
        Name of its weight file.
    model : torch.nn.Module
        float32, in evaluation mode.
    calibration : callable
        Maps a seed to batches of preprocessed inputs.
    test : callable
        Returns the test inputs, and their labels or None.
    score : callable
        Maps a module to a number, higher is better: top-1, or agreement with the original network
        where there are no labels.
    unit : str
        Unit of the score.
    """

    name: str
    model: Any
    calibration: Callable[[int], list[Any]]
    test: Callable[[], Data]
    score: Callable[[Any], float]
    unit: str


def outputs(model: Any, inputs: Any, batch: int = 50) -> Any:
    """Return a module's outputs for all inputs, computed in batches."""
    with torch.no_grad():
        return torch.cat([model(x) for x in inputs.split(batch)])


def psnr(found: Any, reference: Any, peak: float) -> float:
    """Return the peak signal-to-noise ratio in dB; infinite for equal tensors."""
    error = float(((found - reference).double() ** 2).mean())
    return 10 * math.log10(peak**2 / error) if error else math.inf


def top1(model: Any, inputs: Any, labels: Any) -> float:
    """Return the top-1 accuracy in %."""
    return _agreement_rate(outputs(model, inputs).argmax(1), labels)


def _agreement_rate(a: Any, b: Any) -> float:
    return 100 * float((a == b).double().mean())


def _agreement_score(
    name: str, test: Callable[[], Data], peak: float | None
) -> Callable[[Any], float]:
    """Return a score of the agreement with the original network on the test inputs.

    The original is loaded separately, so that changes to the module of a case do not affect it.
    """

    @cache
    def original() -> Data:
        inputs, _ = test()
        return inputs, outputs(load_net(name), inputs)

    def score(model: Any) -> float:
        inputs, reference = original()
        found = outputs(model, inputs)
        return (
            psnr(found, reference, peak)
            if peak
            else _agreement_rate(found.argmax(1), reference.argmax(1))
        )

    return score


def _test(draw: Callable[[int | None], Any]) -> Data:
    return draw(None), None


def _batches(draw: Callable[[int | None], Any], seed: int) -> list[Any]:
    return list(draw(seed).split(32))


def _accuracy(test: Callable[[], Data], model: Any) -> float:
    return top1(model, *test())


def cases(only: str = "") -> Iterator[Case]:
    """Yield the networks whose names contain `only`."""
    for name in NETS:
        if only not in name:
            continue
        if name in DRAWN:
            draw, peak = DRAWN[name]
            test, batches = partial(_test, draw), partial(_batches, draw)
            score = _agreement_score(name, test, peak)
            unit = "dB PSNR" if peak else "% equal arg-max"
        else:
            test, batches = partial(cifar, name, "test_lossless_500"), partial(cifar_batches, name)
            score, unit = partial(_accuracy, test), "% top-1"
        yield Case(name, load_net(name), batches, test, score, unit)
