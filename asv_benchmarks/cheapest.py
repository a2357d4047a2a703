"""Count which family is the cheapest for a given error, over layers of trained networks.

    LOWRANK_DATA=... python -m asv_benchmarks.cheapest [--net WORD] [--json]

For every layer and error: the cheapest candidate of all families by MACs, and by predicted time on
one thread.  A row is a kind of layer and an error: for how many layers each family is the cheapest,
and the median share of the dense layer's cost.  Takes long.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lowrank
from lowrank.interop.weights import StoredLayer, layers

ERRORS = (0.1, 0.2, 0.3, 0.5)
MAX_EQUAL = 6  # layers of equal shape with 128 or more outputs (style network)


def kind(layer: StoredLayer) -> str:
    conv = layer.conv
    taps = conv.stages[0].kernel
    if conv.groups > 1:
        return "depthwise"
    if conv.in_channels == 1 and math.prod(taps) > 1:
        return "1 channel in"
    if len([k for k in taps if k > 1]) == 1:
        return "1-D"
    return " × ".join(map(str, taps))


def measure_layers(word: str) -> Iterator[dict[str, Any]]:
    folder = os.environ.get("LOWRANK_DATA")
    if not folder:
        sys.exit("LOWRANK_DATA names no folder with the trained networks")
    for path in sorted(Path(folder, "weights").glob(f"*{word}*.safetensors")):
        seen_shapes: Counter[Any] = Counter()
        for layer in layers(path):
            shape = layer.conv.stages[0].weight.shape
            seen_shapes[shape] += 1
            if (shape[0] >= 128 and seen_shapes[shape] > MAX_EQUAL) or layer.input_size is None:
                continue
            row = {"net": path.stem, "layer": layer.name, "kind": kind(layer)}
            for axis in ("macs", "seconds"):
                front = lowrank.frontier(layer.conv, layer.input_size, axis=axis, threads=1)
                dense_cost = cost(front.dense, axis)
                for error in ERRORS:
                    c = front.within(error)
                    row[f"{axis} {error}"] = c.family, cost(c, axis) / dense_cost
            yield row


def cost(candidate: Any, axis: str) -> float:
    return float(candidate.seconds if axis == "seconds" else candidate.cost.macs)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--net", default="", help="part of a name")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = list(measure_layers(given.net))
    if given.json:
        json.dump(rows, sys.stdout, indent=1)
        return
    kinds = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    for name, some in sorted(kinds.items(), key=lambda k: -len(k[1])):
        for error in ERRORS:
            cells = []
            for axis in ("macs", "seconds"):
                picks = [r[f"{axis} {error}"] for r in some]
                counted = Counter(family for family, _ in picks).most_common()
                text = ", ".join(f"{family} {n}" for family, n in counted[:3])
                rest = sum(n for _, n in counted[3:])
                text += f", others {rest}" if rest else ""
                cells.append(f"{text} ({statistics.median(s for _, s in picks):.2f})")
            print(f"| {name} ({len(some)}) | {error} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
