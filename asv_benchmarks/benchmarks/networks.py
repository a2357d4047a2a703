"""Whole networks of the comparison: trained and with random weights, dense and compressed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

try:
    import torch
except ImportError:  # asv imports every module of this folder
    torch = None

from . import architectures, nets, whole

#: Families of compressed networks: the one that is predicted to be fastest is taken per layer.
FAMILIES = ("channel_svd", "spatial_svd", "tucker")
WIDE = 64  # channels of most layers of a network that low rank should accelerate


class Network(NamedTuple):
    """A network with its batch sizes and the target of the exact program over the best peer."""

    name: str  # of nets, or of an architecture that gets random weights
    batches: tuple[int, ...]
    target: float


NETWORKS = (
    Network("resnet20_cifar10", (1, 64), 2.0),
    Network("vww_mobilenet_025_96", (1,), 1.2),
    Network("kws_cnn_l", (1,), 1.0),
    Network("faststyle_udnie", (1,), 1.6),
    Network("meshnet3d_model20chan3cls", (1,), 1.2),
    Network("crepe_tiny_1d", (1,), 1.2),
    Network("resnet18", (1,), 1.6),
    Network("vgg16", (1,), 1.6),
)
#: Shares of the MACs, with the targets of wide networks over their own exact programs.
SHARES = {"1/2": (1 / 2, 1.15), "1/3": (1 / 3, 1.4)}
#: Targets over the best peer's dense network.
OVER_DENSE = {("resnet20_cifar10", "1/3"): 2.6}


def load(name: str, batch: int) -> tuple[Any, Any]:
    """Return a network and a batch of inputs."""
    for case in nets.cases(name):
        return case.model, whole.inputs(case, batch)
    torch.manual_seed(0)
    model = getattr(architectures, name)().eval().requires_grad_(False)
    return model, torch.randn(batch, 3, 224, 224)


class Candidates:
    """Chains of all ranks for the convolutions of a network, swept once for all budgets.

    Layers of equal shapes share their chains, since only times are measured.
    """

    def __init__(self, model: Any, x: Any) -> None:
        from lowrank import FAMILIES as ALL
        from lowrank.families import NotApplicable
        from lowrank.interop.torch import TorchModel

        self.net = TorchModel(model, [x[:1]])
        self.sweeps: dict[Any, list[list[Any]]] = {}
        self.built: dict[Any, Any] = {}
        for layer in self.net.layers:
            key = _shapes(layer)
            if layer.conv.ndim == 0 or layer.conv.groups > 1 or key in self.sweeps:
                continue
            self.sweeps[key] = []
            for name in FAMILIES:
                try:
                    variants = ALL[name].variants(layer.conv)
                except NotApplicable:
                    continue
                self.sweeps[key] += [list(ALL[name].sweep(layer.conv, v)) for v in variants]
        self.layers = [layer for layer in self.net.layers if self.sweeps.get(_shapes(layer))]

    @property
    def is_wide(self) -> bool:
        """Whether most layers with candidates have many channels."""
        convs = [layer.conv for layer in self.layers]
        wide = [min(conv.in_channels, conv.out_channels) >= WIDE for conv in convs]
        return 2 * sum(wide) > len(wide)

    def compress(self, share: float, batch: int, threads: int) -> Any:
        """Return the network at a share of its MACs.

        All layers with candidates keep equal shares.  The most accurate chain within the share is
        taken of every variant of a family, and of these the one that is predicted to be fastest.
        Linear and grouped layers, and small ones whose share is below rank 1, stay dense.
        """
        import lowrank as lr

        total = sum(layer.cost.macs for layer in self.net.layers)
        kept = 1 - (1 - share) * total / sum(layer.cost.macs for layer in self.layers)

        @cache
        def fastest(key: Any, macs: float, size: tuple[int, ...]) -> Any:
            found = []
            for k, sweep in enumerate(self.sweeps[key]):
                priced = ((p.error, p, lr.chain(p.stages)) for p in sweep)
                fits = [c for c in priced if c[2].cost(size).macs <= macs]
                if fits:
                    _, point, f = min(fits, key=lambda c: c[0])
                    time = lr.perfmodel.predict(f, size, batch=batch, threads=threads)
                    found.append((time.seconds, k, point))
            if not found:
                return None
            _, k, point = min(found, key=lambda c: c[:2])
            if (key, k, point.rank) not in self.built:
                self.built[key, k, point.rank] = point.build()
            return self.built[key, k, point.rank]

        chains = {}
        for layer in self.layers:
            stages = fastest(_shapes(layer), kept * layer.cost.macs, layer.input_size)
            if stages is not None:
                chains[layer.name] = lr.chain(stages, layer.conv.bias)
        return self.net.replaced(chains)


def _shapes(layer: Any) -> Any:
    """Return what the chains of a layer and their costs depend on, besides its weights."""
    (stage,) = layer.conv.stages
    return stage.weight.shape, stage.geometry, stage.groups, layer.input_size


def measure(counts: tuple[int, ...], quick: bool, only: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the comparison's rows, one list per line: one row per number of threads.

    The first line of a network is its exact program beside the best peer.  Every compressed
    version has two: beside its own exact program, and beside the best peer's dense network.
    """
    shares = dict(list(SHARES.items())[:1]) if quick else SHARES
    for network in NETWORKS if torch is not None else ():
        if only not in f"network: {network.name}":
            continue
        try:
            candidates = Candidates(*load(network.name, 1))
        except FileNotFoundError as error:
            print(f"{network.name} is left out: {error}", file=sys.stderr)
            continue
        for batch in network.batches[:1] if quick else network.batches:
            model, x = load(network.name, batch)
            lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for threads in counts:
                small = {k: candidates.compress(s, batch, threads) for k, (s, _) in shares.items()}
                seconds = 0.3 if quick else whole.SECONDS
                seen = whole.timings({"dense": model} | small, x, threads, seconds)
                for row in _rows(network, candidates.is_wide, list(small), seen):
                    row |= {"name": f"{row['name']}, N={batch}", "threads": threads}
                    lines.setdefault((row["kind"], row["name"]), []).append(row)
            yield from lines.values()


def _rows(
    network: Network, is_wide: bool, labels: list[str], seen: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one network on one number of threads."""

    def peers(label: str) -> dict[str, float]:
        """Return the other libraries' times of one version."""
        return {k: t for k, t in seen.items() if label in k.split() and "engine" not in k}

    def row(kind: str, label: str, peers: dict[str, float], target: float, **more: Any) -> Any:
        name = network.name if label == "dense" else f"{network.name} at {label} of the MACs"
        ours = seen[f"engine {label}"]
        return {"kind": kind, "name": name, "ours": ours, "peers": peers, "target": target} | more

    yield row("network", "dense", peers("dense"), network.target)
    for label in labels:
        target = SHARES[label][1] if is_wide else 1.0
        yield row("low rank", label, {"exact program": seen["engine dense"]}, target, least=1.0)
        over = OVER_DENSE.get((network.name, label), 1.0)
        yield row("over dense", label, peers("dense"), over, others=peers(label))
