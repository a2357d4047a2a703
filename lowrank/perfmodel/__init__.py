"""Performance model: predicted and measured run times of chains on this machine."""

from lowrank.perfmodel.calibration import BUDGETS
from lowrank.perfmodel.coefficients import Coefficients as Coefficients
from lowrank.perfmodel.coefficients import PerformanceModel as PerformanceModel
from lowrank.perfmodel.coefficients import Prediction as Prediction
from lowrank.perfmodel.measurement import Measurements as Measurements
from lowrank.perfmodel.store import calibrate as calibrate
from lowrank.perfmodel.store import current as current
from lowrank.perfmodel.store import path as path
from lowrank.perfmodel.store import predict as predict

#: Runtimes that have cost coefficients: transforms, this engine, onnxruntime, PyTorch and the GPU.
RUNTIMES = tuple(BUDGETS)
