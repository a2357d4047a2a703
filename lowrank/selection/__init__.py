"""Candidates of every family, their Pareto front, and the choice within a budget."""

from lowrank.selection.budget import Budget as Budget
from lowrank.selection.budget import InfeasibleBudgetError as InfeasibleBudgetError
from lowrank.selection.budget import format_budget as format_budget
from lowrank.selection.budget import parse_budget as parse_budget
from lowrank.selection.candidates import COSTS as COSTS
from lowrank.selection.candidates import Candidate as Candidate
from lowrank.selection.choice import approximate as approximate
from lowrank.selection.choice import choose as choose
from lowrank.selection.choice import explain_dense_pick as explain_dense_pick
from lowrank.selection.front import Frontier as Frontier
from lowrank.selection.front import frontier as frontier
