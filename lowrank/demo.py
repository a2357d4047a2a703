"""The main job in a minute: a trained network made cheaper, and an image filtered.

python -m lowrank.demo [FOLDER]      writes its pictures there, `demo` if not given
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, load_sample_image
from sklearn.model_selection import train_test_split

import lowrank
from lowrank import filters
from lowrank._typing import Array
from lowrank.core import tables
from lowrank.interop.weights import layers, read_weights
from lowrank.report import figures

WEIGHTS = Path(__file__).parent / "data" / "digits.safetensors"
SHARES = (1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 10)


def main() -> None:
    """Print two tables and write two pictures."""
    parser = argparse.ArgumentParser(prog="python -m lowrank.demo", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("demo"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    network(folder)
    image(folder)


def network(folder: Path) -> None:
    """What each share of the multiply-adds costs a small network in digits."""
    found = layers(WEIGHTS)
    weights = read_weights(WEIGHTS)
    images, labels = load_digits(return_X_y=True)
    _, x, _, y = train_test_split(images, labels, test_size=0.25, random_state=0)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    dense = {layer.name: layer.conv for layer in found}
    sizes = {layer.name: layer.input_size or () for layer in found}
    right = accuracy(dense, weights, x, y)
    print(
        f"A network of {len(found)} convolutions reads {right:.1%} of {len(y)} unseen digits "
        "right.\nEach but the first, which has 1 % of the work, is replaced by the chain of small\n"
        "ones that is closest to it within a share of its multiply-adds; nothing is trained\n"
        "again.\n"
    )
    fronts = {
        name: lowrank.frontier(dense[name], sizes[name], axis="macs") for name in list(dense)[1:]
    }
    rows = [("share", *(f"{n}: family, error" for n in fronts), "fewer", "digits right", "faster")]
    replaced = {name: dense[name] for name in fronts}
    inputs = {
        name: np.ones((len(x), *front.input_shape), np.float32) for name, front in fronts.items()
    }
    whole = sum(conv.cost(sizes[name]).macs for name, conv in dense.items())
    rows.append(("1", *("dense, 0" for _ in fronts), "1.0x", f"{right:.1%}", "1.0x"))
    for share in SHARES:
        picks = {
            name: front.affordable(share * front.dense.cost.macs).build()
            for name, front in fronts.items()
        }
        chains = dense | picks
        macs = sum(f.cost(sizes[name]).macs for name, f in chains.items())
        said = (f"{f.family}, {f.error(dense[name].to_dense()):.2f}" for name, f in picks.items())
        ratio = faster(*(partial(run_all, planned(fs, inputs)) for fs in (replaced, picks)))
        score = accuracy(chains, weights, x, y)
        rows.append((f"1/{round(1 / share)}", *said, f"{whole / macs:.1f}x", f"{score:.1%}",
                     f"{ratio:.1f}x"))  # fmt: skip
    print("\n".join(tables.align_columns(rows)))
    print("\nfewer: multiply-adds of the network; faster: time of the two, measured here.")
    name = max(fronts, key=lambda n: fronts[n].dense.cost.macs)
    picture = folder / "digits.svg"
    figures.error_against_cost([fronts[name]], picture, title=f"{name} of the digit network")
    print(f"What {name} could become, all families: {picture}\n")


def forward(
    chains: Mapping[str, lowrank.Factorization], weights: Mapping[str, Array], x: Array
) -> Array:
    """The network's output, (images, 10), with these convolutions."""
    x = np.maximum(chains["conv1"](x), 0)
    x = np.maximum(chains["conv2"](x), 0)
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    x = np.maximum(chains["conv3"](x), 0).mean((2, 3))
    return x @ weights["linear.weight"].T + weights["linear.bias"]


def planned(
    chains: Mapping[str, lowrank.Factorization], inputs: Mapping[str, Array]
) -> list[tuple[Callable[..., Array], Array]]:
    """Each chain, compiled for its input, and that input."""
    return [
        (f.compile(inputs[name].shape[1:], np.float32), inputs[name]) for name, f in chains.items()
    ]


def run_all(plans: list[tuple[Callable[..., Array], Array]]) -> None:
    """Run every plan once."""
    for run, x in plans:
        run(x)


def accuracy(
    chains: Mapping[str, lowrank.Factorization], weights: Mapping[str, Array], x: Array, y: Array
) -> float:
    """Share of the images that are read right."""
    return float((forward(chains, weights, x).argmax(1) == y).mean())


def image(folder: Path) -> None:
    """A lens blur of a photograph, as fewer and fewer separable terms."""
    photo = load_sample_image("china.jpg").astype(np.float32)[..., 1]
    kernel = filters.disk(9.5)
    truth = filters.correlate(photo, kernel)
    shape = "x".join(map(str, kernel.shape))
    print(f"A photograph of {photo.shape[0]}x{photo.shape[1]} under a {shape} lens blur,")
    print("as a sum of terms that each run along the columns, then along the rows:\n")
    rows = [
        ("terms", "fewer multiply-adds", "kernel error", "largest error, grey levels", "faster")
    ]
    dense = lowrank.dense(
        kernel[None, None], padding=kernel.shape[0] // 2, padding_mode="symmetric"
    )
    run = dense.compile(photo.shape, np.float32)
    x = photo[None, None]
    for rank in (1, 2, 3, 4, 6):
        variant = filters.separate(kernel, rank=rank)
        passes = variant.compile(photo.shape, np.float32)
        off = float(np.abs(passes(x)[0, 0] - truth).max())
        fewer = dense.cost(photo.shape).macs / variant.cost(photo.shape).macs
        ratio = faster(partial(run, x), partial(passes, x))
        error = variant.error(kernel[None, None])
        rows.append((str(rank), f"{fewer:.1f}x", f"{error:.3f}", f"{off:.2f}", f"{ratio:.1f}x"))
    print("\n".join(tables.align_columns(rows)))
    picture = folder / "blur.svg"
    figures.filter_and_form(
        kernel, filters.separate(kernel, rank=3), picture, title="a lens blur in three terms"
    )
    print(f"\nThe blur, its three-term form, and the difference: {picture}")


def faster(before: Callable[[], object], after: Callable[[], object]) -> float:
    """Time of `before` over that of `after`: medians of runs that take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(11):
        for run, times in zip((before, after), seconds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])


if __name__ == "__main__":
    main()
