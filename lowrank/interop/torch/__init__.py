"""PyTorch models: compress them, and run their convolutions on lowrank's engine."""

from lowrank.interop.torch.compression import CompressionResult as CompressionResult
from lowrank.interop.torch.compression import compress as compress
from lowrank.interop.torch.compression import reestimate_batch_norm as reestimate_batch_norm
from lowrank.interop.torch.description import describe as describe
from lowrank.interop.torch.distillation import DistillationResult as DistillationResult
from lowrank.interop.torch.distillation import distill as distill
from lowrank.interop.torch.engine import EngineModule as EngineModule
from lowrank.interop.torch.inference import on_engine as on_engine
from lowrank.interop.torch.model import TorchModel as TorchModel
from lowrank.interop.torch.model import layers as layers
