"""Chains of every family at the ranks of compared.csv, beside other libraries; one thread."""

from . import tables

#: Three of the layers; asv_benchmarks.compare measures all.
LAYERS = "64 3x3 at 56x56|256 3x3 at 14x14|32 3x3x3"
PEERS = ["PyTorch", "TensorLy-Torch", "onnxruntime", "dense layer, PyTorch"]
WORK = tables.case_recipes(["chain"], "64 3x3 at 56x56")


class Chains(tables.PeerRatios):
    """Times relative to the same chain in other libraries and to the dense layer in PyTorch."""

    params = (tables.case_names(["chain"], LAYERS), PEERS)

    def setup_cache(self):
        return tables.measure_table(["chain"], LAYERS)

    setup_cache.timeout = 600


class ChainTimes(tables.OwnTimes):
    """Absolute times."""

    params = (tables.case_names(["chain"], LAYERS),)
    setup_cache = Chains.setup_cache
