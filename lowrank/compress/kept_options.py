"""Options of layers in a folder, from which interrupted planning continues."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowrank import io
from lowrank.compress.model import Layer
from lowrank.compress.plan import candidate_as_dict, read_candidate
from lowrank.core.files import atomic_write, set_aside
from lowrank.factorization import Factorization
from lowrank.families import SweepPoint
from lowrank.metric import Metric
from lowrank.selection.candidates import Candidate


class KeptOptions:
    """Fitted options of layers, kept in a folder.

    Parameters
    ----------
    folder : path
        Folder, which is made if it is not there.
    settings : object
        What options depend on beside the layer and its metric, with a `repr` of its values.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: object) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings = settings

    def _path(self, layer: Layer, metric: Metric) -> Path:
        conv = layer.conv
        record = (self.settings, layer.name, layer.input_size, layer.passes, repr(conv))
        key = hashlib.sha256(repr((*record, conv.geometry, conv.transposed)).encode())
        arrays = (
            conv.stages[0].weight, conv.bias, layer.scale, metric.channel_factor,
            *metric.tap_factors, metric.input_moment, metric.gradient_moment,
        )  # fmt: skip
        for array in arrays:
            key.update(b"-" if array is None else array.tobytes())
        return self.folder / f"options-{key.hexdigest()[:16]}.safetensors"

    def read(self, layer: Layer, metric: Metric) -> list[Candidate] | None:
        """Return the options of a layer; None if they are not there, or damaged.

        Parameters
        ----------
        layer : Layer
            Layer of the network.
        metric : Metric
            Metric that its options are fitted in.
        """
        path = self._path(layer, metric)
        try:
            entries = json.loads(path.with_suffix(".json").read_text("utf-8"))
            chains = io.load(path)
            return [
                _restore(entry, chains.get(str(i)), layer, metric)
                for i, entry in enumerate(entries)
            ]
        except FileNotFoundError:
            return None
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as why:
            for file in (path.with_suffix(".json"), path):
                if file.exists():
                    aside = set_aside(file)
            warnings.warn(f"{path}: damaged ({why}): renamed to {aside.name}", stacklevel=2)
            return None

    def write(self, layer: Layer, metric: Metric, options: Sequence[Candidate]) -> None:
        """Keep the options of a layer.

        Parameters
        ----------
        layer, metric : Layer, Metric
            As in :meth:`read`.
        options : sequence of Candidate
            Dense candidate and fitted ones.
        """
        path = self._path(layer, metric)
        io.save(path, {str(i): c.build() for i, c in enumerate(options) if not c.is_dense})
        # Last: without it, the options count as not there.
        with atomic_write(path.with_suffix(".json")) as part:
            entries = [candidate_as_dict(c) | {"exact": c.exact} for c in options]
            part.write_text(json.dumps(entries, allow_nan=False), "utf-8")


def _restore(
    entry: Mapping[str, Any], f: Factorization | None, layer: Layer, metric: Metric
) -> Candidate:
    """Return a candidate with the weights of a chain; without a chain, the dense layer."""
    c = read_candidate(entry)
    if c.is_dense != (f is None):
        raise ValueError(f"{c.name} must {'not ' if c.is_dense else ''}have a chain")
    c = replace(c, exact=bool(entry["exact"]), _conv=layer.conv, _metric=metric)
    if f is None:
        return c
    stages = f.stages
    return replace(c, _point=SweepPoint(c.rank, c.error, c.bound, stages, lambda: stages))
