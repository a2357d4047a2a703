"""Chains of every family, of the ranks in compared.csv, beside other libraries: one thread."""

from . import measure

#: Three of the layers; asv_benchmarks.compare has them all.
LAYERS = "64 3x3 at 56x56|256 3x3 at 14x14|32 3x3x3"
PEERS = ["PyTorch", "TensorLy-Torch", "onnxruntime", "dense layer, PyTorch"]
WORK = measure.works(["chain"], "64 3x3 at 56x56")


class Chains(measure.Beside):
    """The same chain in other libraries, and the layer that it stands for in PyTorch."""

    params = (measure.names(["chain"], LAYERS), PEERS)

    def setup_cache(self):
        return measure.table(["chain"], LAYERS)

    setup_cache.timeout = 600


class ChainTimes(measure.Alone):
    """Their own times."""

    params = (measure.names(["chain"], LAYERS),)
    setup_cache = Chains.setup_cache
