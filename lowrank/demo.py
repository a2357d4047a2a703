"""Demonstration: compress a trained network, and split an image filter into separable terms.

python -m lowrank.demo [FOLDER]      (writes its pictures to FOLDER, by default `demo`)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

import lowrank
from lowrank import filters
from lowrank._typing import Array
from lowrank.core import tables
from lowrank.interop.weights import layers, read_weights
from lowrank.report import figures

#: Weights of the digit network, shipped with the package; a manifest is beside them.
WEIGHTS = Path(__file__).parent / "data" / "digits.safetensors"
SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 10)
REPETITIONS = 11


def main() -> None:
    """Print two tables and write two pictures."""
    parser = argparse.ArgumentParser(prog="python -m lowrank.demo", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    compress_digit_network(folder)
    separate_lens_blur(folder)


def compress_digit_network(folder: Path) -> None:
    """Print the top-1 accuracy of the digit network per share of its MACs.

    Parameters
    ----------
    folder : Path
        Folder for the picture.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = layers(WEIGHTS)
    weights = read_weights(WEIGHTS)
    images, labels = load_digits(return_X_y=True)
    _, x, _, y = train_test_split(images, labels, test_size=0.25, random_state=0)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    dense = {layer.name: layer.conv for layer in found}
    sizes = {layer.name: layer.input_size or () for layer in found}
    original = accuracy(dense, weights, x, y)
    print(
        f"A network of {len(found)} convolutions has {original:.1%} top-1 accuracy on {len(y)} "
        "test digits.\nEach convolution but the first, which has 1 % of the MACs, becomes the "
        "chain of\nlowest error within a share of its MACs. There is no fine-tuning.\n"
    )
    fronts = {
        name: lowrank.frontier(dense[name], sizes[name], axis="macs") for name in list(dense)[1:]
    }
    header = (
        "share",
        *(f"{n}: family, error" for n in fronts),
        "MAC reduction",
        "top-1",
        "speed-up",
    )
    rows = [header, ("1", *("dense, 0" for _ in fronts), "1.0x", f"{original:.1%}", "1.0x")]
    replaced = {name: dense[name] for name in fronts}
    inputs = {
        name: np.ones((len(x), *front.input_shape), np.float32) for name, front in fronts.items()
    }
    dense_macs = sum(conv.cost(sizes[name]).macs for name, conv in dense.items())
    for share in SHARES:
        choices = {
            name: front.affordable(share * front.dense.cost.macs).build()
            for name, front in fronts.items()
        }
        chains = dense | choices
        macs = sum(f.cost(sizes[name]).macs for name, f in chains.items())
        errors = (
            f"{f.family}, {f.error(dense[name].to_dense()):.2f}" for name, f in choices.items()
        )
        speed_up = measure_speed_up(
            *(partial(run_all, compile_all(fs, inputs)) for fs in (replaced, choices))
        )
        rows.append(
            (
                f"1/{round(1 / share)}", *errors, f"{dense_macs / macs:.1f}x",
                f"{accuracy(chains, weights, x, y):.1%}", f"{speed_up:.1f}x",
            )
        )  # fmt: skip
    print("\n".join(tables.align_columns(rows)))
    print("\nMAC reduction: whole network; speed-up: measured, replaced convolutions only.")
    name = max(fronts, key=lambda n: fronts[n].dense.cost.macs)
    picture = folder / "digits.svg"
    figures.error_against_cost([fronts[name]], picture, title=f"{name} of the digit network")
    print(f"Error against cost of {name}, all families: {picture}\n")


def forward(
    chains: Mapping[str, lowrank.Factorization], weights: Mapping[str, Array], x: Array
) -> Array:
    """Return the outputs of the digit network, (images, 10), with these convolutions."""
    x = np.maximum(chains["conv1"](x), 0)
    x = np.maximum(chains["conv2"](x), 0)
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    x = np.maximum(chains["conv3"](x), 0).mean((2, 3))
    return x @ weights["linear.weight"].T + weights["linear.bias"]


def accuracy(
    chains: Mapping[str, lowrank.Factorization], weights: Mapping[str, Array], x: Array, y: Array
) -> float:
    """Return the top-1 accuracy of the digit network on images `x` with labels `y`."""
    return float((forward(chains, weights, x).argmax(1) == y).mean())


def compile_all(
    chains: Mapping[str, lowrank.Factorization], inputs: Mapping[str, Array]
) -> list[tuple[Callable[..., Array], Array]]:
    """Return each chain, compiled for its input, with that input."""
    return [
        (f.compile(inputs[name].shape[1:], np.float32), inputs[name]) for name, f in chains.items()
    ]


def run_all(plans: list[tuple[Callable[..., Array], Array]]) -> None:
    """Run every compiled chain once."""
    for run, x in plans:
        run(x)


def separate_lens_blur(folder: Path) -> None:
    """Print error and speed-up of a lens blur per number of separable terms.

    Parameters
    ----------
    folder : Path
        Folder for the picture.
    """
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("china.jpg").astype(np.float32)[..., 1]
    kernel = filters.disk(9.5)
    expected = filters.correlate(photo, kernel)
    shape = "x".join(map(str, kernel.shape))
    print(f"A {shape} lens blur of a {photo.shape[0]}x{photo.shape[1]} photograph, approximated by")
    print("a sum of separable terms (a filter along the columns, then one along the rows):\n")
    rows = [("terms", "MAC reduction", "kernel error", "largest error (grey levels)", "speed-up")]
    dense = lowrank.dense(
        kernel[None, None], padding=kernel.shape[0] // 2, padding_mode="symmetric"
    )
    run_dense = dense.compile(photo.shape, np.float32)
    x = photo[None, None]
    for rank in (1, 2, 3, 4, 6):
        separable = filters.separate(kernel, rank=rank)
        run_separable = separable.compile(photo.shape, np.float32)
        largest = float(np.abs(run_separable(x)[0, 0] - expected).max())
        ratio = dense.cost(photo.shape).macs / separable.cost(photo.shape).macs
        speed_up = measure_speed_up(partial(run_dense, x), partial(run_separable, x))
        error = separable.error(kernel[None, None])
        rows.append(
            (str(rank), f"{ratio:.1f}x", f"{error:.3f}", f"{largest:.2f}", f"{speed_up:.1f}x")
        )
    print("\n".join(tables.align_columns(rows)))
    picture = folder / "blur.svg"
    figures.filter_and_chain(
        kernel, filters.separate(kernel, rank=3), picture, title="a lens blur in three terms"
    )
    print(f"\nThe blur, its three-term approximation, and the difference: {picture}")


def measure_speed_up(before: Callable[[], object], after: Callable[[], object]) -> float:
    """Return the ratio of the median times of two functions that run alternately."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPETITIONS):
        for run, times in zip((before, after), seconds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


if __name__ == "__main__":
    main()
