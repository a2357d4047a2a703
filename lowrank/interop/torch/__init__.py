"""PyTorch models: compress them, and run their convolutions on lowrank's engine."""

from lowrank.interop.torch.engine import Engine as Engine
from lowrank.interop.torch.engine import on_engine as on_engine
from lowrank.interop.torch.model import Small as Small
from lowrank.interop.torch.model import TorchNet as TorchNet
from lowrank.interop.torch.model import compress as compress
from lowrank.interop.torch.model import layers as layers
from lowrank.interop.torch.model import renormalise as renormalise
