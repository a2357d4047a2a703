"""Rules that choose a rank: by error, by cost, by energy, and by variational Bayes.

Each takes a convolution and a family, and returns a rank for that family's fit.  They look at the
weights only, not at data or a network; each documents what it guarantees.
"""

from lowrank.selection.ranks.rules import energy as energy
from lowrank.selection.ranks.rules import for_error as for_error
from lowrank.selection.ranks.rules import for_ratio as for_ratio
from lowrank.selection.ranks.vbmf import Estimate as Estimate
from lowrank.selection.ranks.vbmf import RankWarning as RankWarning
from lowrank.selection.ranks.vbmf import evbmf as evbmf
from lowrank.selection.ranks.vbmf import evbmf_of as evbmf_of
from lowrank.selection.ranks.vbmf import relaxed_evbmf as relaxed_evbmf
