"""Candidates of every family, their Pareto front, and the choice within a budget."""

from lowrank.selection.frontier import Candidate as Candidate
from lowrank.selection.frontier import Frontier as Frontier
from lowrank.selection.frontier import amount_of as amount_of
from lowrank.selection.frontier import approximate as approximate
from lowrank.selection.frontier import choose as choose
from lowrank.selection.frontier import frontier as frontier
from lowrank.selection.frontier import nothing_within as nothing_within
from lowrank.selection.frontier import time_of as time_of
