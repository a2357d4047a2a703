"""ONNX models: compress them, write them back, and run them on the engine."""

from lowrank.interop.batches import read_batches as read_batches
from lowrank.interop.onnx.engine import EngineNetwork as EngineNetwork
from lowrank.interop.onnx.engine import on_engine as on_engine
from lowrank.interop.onnx.files import save as save
from lowrank.interop.onnx.model import OnnxModel as OnnxModel
from lowrank.interop.onnx.model import open_model as open_model
