"""Run the suites on older commits: missing features are n/a, renamed ones are found."""

import importlib

#: Exceptions that an older commit raises where it lacks what a benchmark needs.
MISSING = (ImportError, AttributeError, TypeError)
#: Former names of families.
FORMER_NAMES = {
    "channel_svd": ("encode", "decode"),
    "spatial_svd": ("spatial",),
    "filter_basis": ("basis",),
    "network_decoupling": ("decouple",),
}


def require(make, *args):
    """Return ``make(*args)``; raise NotImplementedError (asv's n/a) if this commit lacks it."""
    try:
        return make(*args)
    except MISSING as error:
        raise NotImplementedError(str(error)) from error


def family_names(*names):
    """Return the names that this commit has for families; those that it lacks are left out."""
    import lowrank as lr

    present = [n for name in names for n in (name, *FORMER_NAMES.get(name, ()))]
    return [name for name in present if name in lr.FAMILIES]


def family_function(name):
    """Return the function that fits a family, whatever its name is on this commit."""
    import lowrank as lr

    return getattr(lr, family_names(name)[0])


def resolve(*paths):
    """Return the first of some ``module:attribute`` paths that this commit has, newest first."""
    for path in paths:
        module, attribute = path.split(":")
        try:
            return getattr(importlib.import_module(f"lowrank.{module}"), attribute)
        except MISSING:
            continue
    raise NotImplementedError(f"this commit has none of {', '.join(paths)}")


def is_replicated(stage):
    """Return whether a stage has tied copies."""
    # Early stages had another attribute of the name `outer`.
    names = ("left", "right") if hasattr(stage, "left") else ("outer", "inner")
    return any(getattr(stage, name, 1) > 1 for name in names)
