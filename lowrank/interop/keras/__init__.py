"""Keras models in ``.keras`` and ``.h5`` files: compress them and write them back."""

from lowrank.interop.keras.model import KerasModel as KerasModel
