"""Certificates: the achieved error beside the least possible, and what it means at the output."""

from lowrank.certify.bounds import SUMS as SUMS
from lowrank.certify.bounds import Certificate as Certificate
from lowrank.certify.bounds import OutputBound as OutputBound
from lowrank.certify.bounds import Rounding as Rounding
from lowrank.certify.bounds import certificate as certificate
from lowrank.certify.bounds import output_bound as output_bound
from lowrank.certify.bounds import rounding as rounding
from lowrank.certify.bounds import second_moment as second_moment
