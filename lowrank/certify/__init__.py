"""Certificates: error against its lower bound, error at the output, rounding errors."""

from lowrank.certify.arithmetic import rounding_bound as rounding_bound
from lowrank.certify.bounds import Certificate as Certificate
from lowrank.certify.bounds import certificate as certificate
from lowrank.certify.half_precision import Rounding as Rounding
from lowrank.certify.half_precision import rounding as rounding
from lowrank.certify.output import OutputBound as OutputBound
from lowrank.certify.output import output_bound as output_bound
