"""Weights files: read tensors and layers, and compress a network known by its weights alone."""

from lowrank.interop.weights.manifest import read_manifest as read_manifest
from lowrank.interop.weights.model import WeightsFile as WeightsFile
from lowrank.interop.weights.model import WeightsModel as WeightsModel
from lowrank.interop.weights.tensors import ENDINGS as ENDINGS
from lowrank.interop.weights.tensors import StoredLayer as StoredLayer
from lowrank.interop.weights.tensors import layers as layers
from lowrank.interop.weights.tensors import read_weights as read_weights
