"""Blocks of chains and activations, which run in one call, and batch normalisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np

from lowrank import engine
from lowrank._typing import Array
from lowrank.blocks.program import BlockPlan, plan_block
from lowrank.core.cost import Cost
from lowrank.core.stage import Activation
from lowrank.core.threads import as_threads
from lowrank.engine import Algorithm, Runner
from lowrank.factorization import Factorization, as_input, compile_chains


class BatchNorm(NamedTuple):
    """Parameters of a batch normalisation.

    Attributes
    ----------
    scale, shift : ndarray, shape (channels,)
        Learnt parameters.
    mean, variance : ndarray, shape (channels,)
        Running statistics.
    eps : float
        Constant added to the variance.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank.blocks import BatchNorm
    >>> BatchNorm(np.ones(8), np.zeros(8), np.zeros(8), np.ones(8)).eps
    1e-05
    """

    scale: Array
    shift: Array
    mean: Array
    variance: Array
    eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a network: chains, and words for the operations between them.

    Attributes
    ----------
    parts : tuple of Factorization or str
        Chains in order, and words such as ``"relu6"`` or ``"add input"``.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> block = blocks.mobilenet_v1(np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1)), stride=2)
    >>> [p if isinstance(p, str) else p.family for p in block.parts]
    ['chain', 'relu', 'chain', 'relu']
    >>> block.macs((3, 32, 32))
    13056
    """

    parts: tuple[Factorization | str, ...]

    @property
    def chains(self) -> tuple[Factorization, ...]:
        """Chains of the block, in order."""
        return tuple(p for p in self.parts if not isinstance(p, str))

    def to(self, device: str) -> Block:
        """Return the block with its weights on another device; see :meth:`Factorization.to`.

        Parameters
        ----------
        device : str
            ``"cpu"``, ``"cuda"``, or such as ``"cuda:1"``.

        Returns
        -------
        Block

        Raises
        ------
        ImportError, RuntimeError, ValueError, MemoryError
            See :meth:`Factorization.to`.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import blocks
        >>> block = blocks.mobilenet_v1(np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1)))
        >>> [f.device for f in block.to("cpu").chains]
        ['cpu', 'cpu']
        """
        return Block(tuple(p if isinstance(p, str) else p.to(device) for p in self.parts))

    def costs(self, input_shape: Sequence[int]) -> tuple[Cost, ...]:
        r"""Return the cost of each chain for one example.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial).

        Returns
        -------
        tuple of Cost

        Raises
        ------
        ValueError
            If the channels do not match, or a kernel does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import blocks
        >>> block = blocks.mobilenet_v1(np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1)))
        >>> [c.params for c in block.costs((3, 32, 32))]
        [27, 24]
        """
        return tuple(f.cost(shape) for f, shape in self._shapes(input_shape))

    def macs(self, input_shape: Sequence[int]) -> int:
        r"""Return the MACs of all chains for one example.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial).

        Returns
        -------
        int

        Raises
        ------
        ValueError
            If the channels do not match, or a kernel does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import blocks
        >>> blocks.mobilenet_v1(np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1))).macs((3, 32, 32))
        52224
        """
        return sum(c.macs for c in self.costs(input_shape))

    def compile(
        self,
        input_shape: Sequence[int],
        dtype: Any = None,
        threads: int | None = None,
        algorithm: Algorithm = "auto",
    ) -> Runner | BlockPlan:
        r"""Plan the whole block, activations included, to run in one call.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial), or the spatial size alone; the batch is free.
        dtype : dtype, optional
            float32 or float64; the precision of the weights if not given.
        threads : int, optional
            Number of threads; all that OpenMP offers if not given.
        algorithm : str
            ``"auto"`` or ``"direct"``; see :meth:`lowrank.Factorization.compile`.

        Returns
        -------
        callable
            ``run(x, out=None)``, which any thread may call; ``run(x, out=None, skip=skip)`` for
            blocks that concatenate a skip.

        Raises
        ------
        ValueError
            If parts do not fit, or a word is unknown or needs weights (``"squeeze-excite"``).

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import blocks
        >>> block = blocks.mobilenet_v1(np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1)), stride=2)
        >>> run = block.compile((3, 32, 32), threads=1)
        >>> run(np.ones((1, 3, 32, 32))).shape
        (1, 8, 16, 16)
        """
        first = self._first()
        links = self._links()
        if links is not None:
            return compile_chains(links, input_shape, dtype, threads, algorithm)
        if first.device != "cpu":
            raise ValueError(
                "on a GPU, parts must be chains, each followed by relu or relu6 at most: compile "
                "the chains of this block one by one"
            )
        threads = as_threads(threads)
        engine.check_options(algorithm, threads)
        if dtype is None:
            dtype = np.result_type(*(f.dtype for f in self.chains))
        return plan_block(
            self.parts,
            first.input_shape(input_shape),
            engine.as_precision(dtype, first.stages[0].weight),
            threads or engine.max_threads(),
            algorithm,
        )

    def __call__(self, x: Array, out: Array | None = None, *, skip: Array | None = None) -> Array:
        """Run the block; see :meth:`compile`.

        Parameters
        ----------
        x : ndarray, shape (batch, channels, \\*spatial)
            Floating-point input; its precision is that of the computation.
        out : ndarray, optional
            Output array; must not overlap `x`.
        skip : ndarray, optional
            What a decoder step concatenates: (batch, channels, \\*spatial).

        Returns
        -------
        ndarray, shape (batch, out, \\*spatial)

        Raises
        ------
        ValueError, TypeError
            See :meth:`compile`; or if an array does not fit.
        """
        x = as_input(self._first(), x)
        run = self.compile(x.shape[1:], x.dtype)
        if isinstance(run, BlockPlan):
            return run(x, out, skip=skip)
        if skip is not None:
            raise ValueError("skip must be None: this block has no skip connection")
        return run(x, out)

    def _first(self) -> Factorization:
        if not self.chains:
            raise ValueError("parts must have at least one chain")
        return self.chains[0]

    def _links(self) -> list[tuple[Factorization, Activation]] | None:
        """Return chains and their activations if they are all of the block, or None."""
        links: list[tuple[Factorization, Activation]] = []
        for part in self.parts:
            if not isinstance(part, str):
                if links and any(s.geometry.padding_mode == "constant" for s in part.stages):
                    raise ValueError(
                        "padding_mode must not be 'constant' after the first chain of a plan: "
                        "compile the chains of this block one by one"
                    )
                links.append((part, "none"))
            elif links and part in ("relu", "relu6") and links[-1][1] == "none":
                links[-1] = (links[-1][0], cast(Activation, part))
            else:
                return None
        return links

    def _shapes(self, shape: Sequence[int]) -> Iterator[tuple[Factorization, Sequence[int]]]:
        first = self.chains[0]
        size = first.input_shape(shape)[1:]
        for f in self.chains:  # a concatenated skip changes the number of channels, not the size
            yield f, (f.in_channels, *size)
            size = f.output_shape(size)[1:]


def fold_batch_norm(f: Factorization, norm: BatchNorm) -> Factorization:
    """Fold a batch normalisation into the chain before it.

    Parameters
    ----------
    f : Factorization
        Chain whose last stage is not replicated.
    norm : BatchNorm
        Normalisation of the output channels of `f`.

    Returns
    -------
    Factorization
        Chain with a scaled last stage and a bias.

    Raises
    ------
    ValueError
        If the last stage is replicated, a shape is wrong, or variance plus eps is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank
    >>> from lowrank import blocks
    >>> one = np.ones(2)
    >>> f = lowrank.dense(np.ones((2, 1, 3)))
    >>> blocks.fold_batch_norm(f, blocks.BatchNorm(2 * one, one, 3 * one, one, 0.0)).bias
    array([-5., -5.])
    """
    last = f.stages[-1]
    if last.outer * last.inner > 1 or (last.transposed and last.shuffle != (1, 1)):
        raise ValueError(
            "the last stage must have weights for each output channel, in order: got outer "
            f"{last.outer}, inner {last.inner} and shuffle {last.shuffle}"
        )
    arrays = [np.asarray(a, np.float64) for a in norm[:4]]
    if any(a.shape != (f.out_channels,) for a in arrays):
        raise ValueError(
            f"norm must have arrays of shape ({f.out_channels},), "
            f"got {', '.join(str(a.shape) for a in arrays)}"
        )
    scale, shift, mean, variance = arrays
    if not (np.isfinite(arrays).all() and variance.min() + norm.eps > 0):
        raise ValueError(
            "norm must be finite, with variance plus eps above 0, "
            f"got a smallest variance of {variance.min()}"
        )
    factor = scale / np.sqrt(variance + norm.eps)
    # (groups, rows, columns, *kernel): output channels are rows, or columns if transposed.
    rows, columns = last.weight.shape[0] // last.groups, last.weight.shape[1]
    split = (1, columns) if last.transposed else (rows, 1)
    parts = last.weight.reshape(last.groups, rows, columns, -1) * factor.reshape(-1, *split, 1)
    weight = parts.reshape(last.weight.shape).astype(f.dtype)
    bias = (0.0 if f.bias is None else f.bias) * factor + shift - mean * factor
    return replace(
        f, stages=(*f.stages[:-1], replace(last, weight=weight)), bias=bias.astype(f.dtype)
    )
