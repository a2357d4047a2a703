"""Measurements by a formula, in place of a clock."""

import lowrank
from lowrank.perfmodel.timing import CallTime


class FakeMeasurements:
    """Measured seconds that are a multiple of a chain's MACs, by its number of stages.

    Records the constructor's arguments and the chains that were asked for; a chain with a number
    of stages in `unable` has no operator in the runtime.
    """

    def __init__(self, factors, unable=()):
        self.factors, self.unable, self.known, self.calls = factors, unable, {}, []

    def __call__(self, runtime, batch, threads, in_network):
        self.calls.append((runtime, batch, threads, in_network))
        return self

    def seconds(self, dense, chains, shape):
        found = []
        for stages in (dense, *chains):
            if len(stages) in self.unable:
                raise NotImplementedError("no operator")
            key = tuple(s.weight.shape for s in stages), shape
            macs = lowrank.chain(stages).cost(shape).macs
            found.append(self.known.setdefault(key, macs * self.factors[len(stages)] * 1e-9))
        return found[0], found[1:]

    def measure(self, chains, shape):
        """Return times with two samples each, 1 % below and above."""
        first, others = self.seconds(chains[0], chains[1:], shape)
        return [CallTime(t, 0.01, (0.99 * t, 1.01 * t)) for t in (first, *others)]
