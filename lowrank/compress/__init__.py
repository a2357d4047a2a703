"""Whole networks: a budget spent on layers, families and ranks, and layers fitted to data."""

from __future__ import annotations

from lowrank.compress.model import Layer as Layer
from lowrank.compress.model import Net as Net
from lowrank.compress.optimise import Choice as Choice
from lowrank.compress.optimise import spend as spend
from lowrank.compress.options import Option as Option
from lowrank.compress.options import options as options
from lowrank.compress.pipeline import Compressed as Compressed
from lowrank.compress.pipeline import Nothing as Nothing
from lowrank.compress.pipeline import compress_model as compress_model
from lowrank.compress.pipeline import make_plan as make_plan
from lowrank.compress.plan import Alternative as Alternative
from lowrank.compress.plan import Entry as Entry
from lowrank.compress.plan import Plan as Plan
from lowrank.compress.statistics import Measured as Measured
