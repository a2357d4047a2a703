"""Second moments of what a layer gets and of its output gradients, and the metric they make."""

from lowrank.metric.moments import Metric as Metric
from lowrank.metric.moments import Moments as Moments
from lowrank.metric.moments import factored as factored
from lowrank.metric.moments import unrolled as unrolled
from lowrank.metric.moments import white as white
