"""Performance model: predicted run time of a chain on this machine, before it is built."""

from lowrank.perfmodel.calibration import BUDGETS
from lowrank.perfmodel.coefficients import Coefficients as Coefficients
from lowrank.perfmodel.coefficients import PerformanceModel as PerformanceModel
from lowrank.perfmodel.coefficients import Prediction as Prediction
from lowrank.perfmodel.store import calibrate as calibrate
from lowrank.perfmodel.store import current as current
from lowrank.perfmodel.store import path as path
from lowrank.perfmodel.store import predict as predict

#: Runtimes that have cost coefficients: transforms, this engine, PyTorch's layouts and the GPU.
RUNTIMES = tuple(BUDGETS)
