"""Whole networks: a budget allocated over layers and families, and layers fitted to data."""

from __future__ import annotations

from lowrank.compress.latency import Latency as Latency
from lowrank.compress.latency import Timing as Timing
from lowrank.compress.model import CompressibleModel as CompressibleModel
from lowrank.compress.model import Layer as Layer
from lowrank.compress.optimise import Allocation as Allocation
from lowrank.compress.optimise import allocate as allocate
from lowrank.compress.options import FAST_FAMILIES as FAST_FAMILIES
from lowrank.compress.options import layer_options as layer_options
from lowrank.compress.pipeline import CompressedLayers as CompressedLayers
from lowrank.compress.pipeline import compress_model as compress_model
from lowrank.compress.plan import CompressionPlan as CompressionPlan
from lowrank.compress.planning import NothingToCompressError as NothingToCompressError
from lowrank.compress.planning import make_plan as make_plan
from lowrank.compress.statistics import LayerStatistics as LayerStatistics
from lowrank.selection.budget import InfeasibleBudgetError as InfeasibleBudgetError
