"""The time model: what a chain is going to take on this machine, before it is built."""

from lowrank.perfmodel.calibration import BUDGETS
from lowrank.perfmodel.coefficients import Machine as Machine
from lowrank.perfmodel.coefficients import Prediction as Prediction
from lowrank.perfmodel.coefficients import Rates as Rates
from lowrank.perfmodel.store import calibrate as calibrate
from lowrank.perfmodel.store import current as current
from lowrank.perfmodel.store import path as path
from lowrank.perfmodel.store import predict as predict

#: What has rates: transforms, our engine, and PyTorch in its two layouts.
RUNTIMES = tuple(BUDGETS)
