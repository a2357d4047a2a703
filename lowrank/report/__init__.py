"""Report on a compressed network, as one HTML page without external resources."""

from __future__ import annotations

from lowrank.report.comparison import Comparison as Comparison
from lowrank.report.comparison import LayerComparison as LayerComparison
from lowrank.report.comparison import compare as compare
from lowrank.report.html import render as render
from lowrank.report.html import save as save
