"""Keras models: compress them in memory, or from and to ``.keras`` and ``.h5`` files."""

from lowrank.interop.keras.files import save as save
from lowrank.interop.keras.model import KerasModel as KerasModel
