"""Top-1 accuracy of ResNet-20 against its MACs and measured time, without fine-tuning.

Methods as for the digit network; 256 calibration images and 500 test images from the folder
LOWRANK_DATA.  Times are of 1 and of 64 images through the whole network on one thread, on lowrank
and as the same chains in PyTorch, relative to PyTorch's dense network in its better layout.  The
uniform methods leave the first convolution and the last layer dense.
"""

import sys

import tables

from lowrank import compress

SHARES = (0.67, 0.5, 0.4, 0.33, 0.25)
UNIFORM = ("spatial_svd", "tucker")
BATCHES = (1, 64)


def rows(case):
    from asv_benchmarks.benchmarks import whole
    from lowrank.interop.torch import TorchModel
    from lowrank.interop.weights import WeightsModel

    net = TorchModel(case.model, case.calibration(0))
    blind = WeightsModel(tables.folder() / "weights" / "resnet20_cifar10.safetensors")
    statistics, weights_only = compress.LayerStatistics(net), compress.LayerStatistics(blind)
    methods = {
        f"uniform {family}": lambda share, family=family: tables.uniform(net.layers, family, share)
        for family in UNIFORM
    }
    inner = [x.name for x in net.layers[1:] if x.conv.ndim == 2]
    dense = [x.name for x in net.layers if x.name not in inner]

    def capped(share):
        """Spatial SVD within one share of MACs per layer, fitted front to back on data."""
        plan = compress.make_plan(
            net, macs=1.0, families=["spatial_svd"], pinned=dense, statistics=statistics,
            capped=dict.fromkeys(inner, share),
        )  # fmt: skip
        return compress.compress_model(net, plan).chains

    methods["uniform spatial_svd, on data"] = capped
    methods["optimised, weights only"] = lambda share: (
        compress.compress_model(blind, macs=share, statistics=weights_only).chains
    )
    methods["optimised, on data"] = lambda share: (
        compress.compress_model(net, macs=share, statistics=statistics).chains
    )
    total = sum(x.cost.macs for x in net.layers)
    yield "dense", "1.0000", f"{case.score(case.model):.2f}", *times(whole, case, case.model)
    for method, compressed in methods.items():
        for share in SHARES:
            chains = compressed(share)
            small = net.replaced(chains)
            macs = sum((chains.get(x.name) or x.conv).cost(x.input_size).macs for x in net.layers)
            yield (method, f"{macs / total:.4f}", f"{case.score(small):.2f}",
                   *times(whole, case, small))  # fmt: skip


def times(whole, case, small):
    for batch in BATCHES:
        both = {"dense": case.model, "compressed": small}
        found = whole.timings(both, whole.inputs(case, batch), 1)
        best = {
            who: min(t for name, t in found.items() if name.startswith(who))
            for who in ("torch dense", "engine compressed", "torch compressed")
        }
        dense = best.pop("torch dense")
        yield from (f"{t / dense:.3f}" for t in best.values())


def main(target):
    tables.required_folder()
    tables.require_torch().set_num_threads(1)
    from asv_benchmarks.benchmarks import nets

    (case,) = nets.cases("resnet20")
    header = ["method", "macs", "accuracy"]
    header += [f"{who}_{n}" for n in BATCHES for who in ("lowrank", "torch")]
    tables.write(target, header, rows(case))


if __name__ == "__main__":
    main(sys.argv[1])
