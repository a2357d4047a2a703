"""Cheap convolution blocks of well-known networks, as chains with a cost, which run.

Chains are linear.  Operations between the chains of a :class:`Block`, such as activations,
squeeze-excite and skips, are words.  A block whose words are all ``"relu"`` or ``"relu6"`` runs in
one call; other operations are left to the caller.
"""

from lowrank.blocks.block import BatchNorm as BatchNorm
from lowrank.blocks.block import Block as Block
from lowrank.blocks.block import fold_batch_norm as fold_batch_norm
from lowrank.blocks.catalogue import flattened as flattened
from lowrank.blocks.catalogue import fused_separable as fused_separable
from lowrank.blocks.catalogue import inverted_residual as inverted_residual
from lowrank.blocks.catalogue import mobilenet_v1 as mobilenet_v1
from lowrank.blocks.catalogue import separable as separable
from lowrank.blocks.catalogue import shuffle_unit as shuffle_unit
from lowrank.blocks.catalogue import unet_step as unet_step
from lowrank.blocks.catalogue import xception as xception
