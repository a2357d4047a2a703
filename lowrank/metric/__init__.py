"""Second moments of a layer's inputs and output gradients, and the metric that they make."""

from lowrank.metric.metric import Metric as Metric
from lowrank.metric.metric import nearest_kronecker as nearest_kronecker
from lowrank.metric.metric import unroll as unroll
from lowrank.metric.metric import white as white
from lowrank.metric.moments import Moments as Moments
