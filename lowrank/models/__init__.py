"""Whole networks: a budget spent on layers, families and ranks, and layers fitted to data."""

from __future__ import annotations

from lowrank.models.budget import Choice as Choice
from lowrank.models.budget import spend as spend
from lowrank.models.compress import Compressed as Compressed
from lowrank.models.compress import Nothing as Nothing
from lowrank.models.compress import compress as compress
from lowrank.models.compress import make_plan as make_plan
from lowrank.models.measured import Measured as Measured
from lowrank.models.net import Layer as Layer
from lowrank.models.net import Net as Net
from lowrank.models.options import Option as Option
from lowrank.models.options import options as options
from lowrank.models.plan import Alternative as Alternative
from lowrank.models.plan import Entry as Entry
from lowrank.models.plan import Plan as Plan
