"""Filters with the functions of scipy.ndimage: their names, signatures and results."""

from lowrank.ndimage.correlation import convolve as convolve
from lowrank.ndimage.correlation import convolve1d as convolve1d
from lowrank.ndimage.correlation import correlate as correlate
from lowrank.ndimage.correlation import correlate1d as correlate1d
from lowrank.ndimage.derivatives import gaussian_gradient_magnitude as gaussian_gradient_magnitude
from lowrank.ndimage.derivatives import gaussian_laplace as gaussian_laplace
from lowrank.ndimage.derivatives import laplace as laplace
from lowrank.ndimage.derivatives import prewitt as prewitt
from lowrank.ndimage.derivatives import sobel as sobel
from lowrank.ndimage.patch import patched as patched
from lowrank.ndimage.smoothing import gaussian_filter as gaussian_filter
from lowrank.ndimage.smoothing import gaussian_filter1d as gaussian_filter1d
from lowrank.ndimage.smoothing import uniform_filter as uniform_filter
from lowrank.ndimage.smoothing import uniform_filter1d as uniform_filter1d
