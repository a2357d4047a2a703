"""Whole networks: a budget spent on layers, families and ranks, and layers fitted to data."""

from __future__ import annotations

from lowrank.models.net import Layer as Layer
from lowrank.models.net import Net as Net
