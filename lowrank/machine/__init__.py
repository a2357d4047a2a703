"""The time model: what a chain is going to take on this machine, before it is built."""

from lowrank.machine.calibration import BUDGETS
from lowrank.machine.rates import Machine as Machine
from lowrank.machine.rates import Prediction as Prediction
from lowrank.machine.rates import Rates as Rates
from lowrank.machine.store import calibrate as calibrate
from lowrank.machine.store import current as current
from lowrank.machine.store import path as path
from lowrank.machine.store import predict as predict

#: What has rates: transforms, our engine, and PyTorch in its two layouts.
ENGINES = tuple(BUDGETS)
