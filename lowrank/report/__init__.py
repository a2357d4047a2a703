"""What compression did to a network, as one page of HTML that needs nothing else."""

from __future__ import annotations

from lowrank.report.facts import Facts as Facts
from lowrank.report.facts import LayerFacts as LayerFacts
from lowrank.report.facts import gather as gather
from lowrank.report.page import page as page
from lowrank.report.page import save as save
