"""Filters of xarray.DataArray objects, which keep their names and coordinates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowrank.filters.window import Window


def is_data_array(x: object) -> bool:
    """Return whether `x` is an xarray.DataArray, without importing xarray."""
    kind = type(x)
    return kind.__module__.partition(".")[0] == "xarray" and kind.__name__ == "DataArray"


def values_of(image: Any) -> Any:
    """Return the array of a DataArray: in memory, of Dask or on a GPU."""
    # Asking an array of a file for its data reads all of it; xarray has no public test for these.
    if not getattr(image.variable, "_in_memory", True) and image.chunks is None:
        raise TypeError(
            "image must be in memory or of Dask, got an xarray.DataArray that has not been read: "
            "image.chunk() makes it lazy, image.load() reads it"
        )
    return image.data


def as_numbers(image: Any, axes: Any) -> Any:
    """Return axes that are given as names of dimensions as numbers."""
    if isinstance(axes, str):
        axes = [axes]
    if not isinstance(axes, Iterable) or not any(isinstance(a, str) for a in axes):
        return axes
    for name in axes:
        if isinstance(name, str) and name not in image.dims:
            raise ValueError(f"axes must be of {', '.join(map(str, image.dims))}, got {name!r}")
    return [image.dims.index(a) if isinstance(a, str) else a for a in axes]


def as_data_array(image: Any, values: Any, window: Window) -> Any:
    """Return values as a DataArray like an image.

    Of "valid" results, coordinates are those of the samples at the centres of windows.  Those
    of "full" results would lie outside of the image: they are dropped.
    """
    coordinates = image
    for axis, taps, before, pads in zip(window.along, window.taps, window.before, window.pads):
        name = image.dims[axis]
        if sum(pads) < taps - 1:
            part = slice(before, before + values.shape[axis])
            coordinates = coordinates.isel({name: part})
        elif sum(pads) > taps - 1:
            outside = [c for c, v in coordinates.coords.items() if name in v.dims]
            coordinates = coordinates.drop_vars(outside)
    return type(image)(
        values, coords=coordinates.coords, dims=image.dims, name=image.name, attrs=image.attrs
    )
