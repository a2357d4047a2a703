"""Separable and low-rank convolution: the error, the cost, and an engine that runs the chain."""

from lowrank.cost import Cost as Cost
from lowrank.factorization import Factorization as Factorization
from lowrank.factorization import chain as chain
from lowrank.factorization import dense as dense
from lowrank.families import FAMILIES as FAMILIES
from lowrank.families.cp import cp as cp
from lowrank.families.cp import cp3 as cp3
from lowrank.families.cp import filter as filter
from lowrank.families.cp import jaderberg as jaderberg
from lowrank.families.svd import basis as basis
from lowrank.families.svd import decode as decode
from lowrank.families.svd import decouple as decouple
from lowrank.families.svd import encode as encode
from lowrank.families.svd import kronecker as kronecker
from lowrank.families.svd import spatial as spatial
from lowrank.families.tt import tensor_train as tensor_train
from lowrank.families.tucker import tucker as tucker
from lowrank.families.tucker import tucker_cp as tucker_cp
from lowrank.families.tucker import tucker_full as tucker_full
from lowrank.geometry import Geometry as Geometry
from lowrank.search import Candidate as Candidate
from lowrank.search import Frontier as Frontier
from lowrank.search import approximate as approximate
from lowrank.search import frontier as frontier
from lowrank.stage import Stage as Stage
