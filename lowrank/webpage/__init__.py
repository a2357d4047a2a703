"""What compression did to a network, as one page of HTML that needs nothing else."""

from __future__ import annotations

from lowrank.webpage.facts import Facts as Facts
from lowrank.webpage.facts import LayerFacts as LayerFacts
from lowrank.webpage.facts import gather as gather
from lowrank.webpage.page import page as page
from lowrank.webpage.page import save as save
