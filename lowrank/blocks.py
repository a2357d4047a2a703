"""The cheap convolutions of well-known networks, as chains that run and can be priced.

A chain is linear.  What lies between the linear parts of a block (activations, squeeze-excite,
skips) is named in a :class:`Block` by a word.  A block whose words are all ``"relu"`` or
``"relu6"`` runs in one call; other words are the caller's to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np

from lowrank._typing import Array
from lowrank.core.cost import Cost
from lowrank.core.geometry import Geometry, as_integers
from lowrank.core.stage import Activation, Stage
from lowrank.engine import Runner
from lowrank.factorization import Factorization, as_input, chain, compile_chains


class BatchNorm(NamedTuple):
    """What a batch normalisation has learnt and seen: four arrays of shape (channels,).

    Attributes
    ----------
    scale, shift : ndarray, shape (channels,)
        Learnt.
    mean, variance : ndarray, shape (channels,)
        Seen in training.
    eps : float
        Added to the variance.

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
    """A block of a network: its chains in order, with words for what is not linear.

    Attributes
    ----------
    parts : tuple
        Factorizations, and between them words such as ``"relu6"`` or ``"add input"``.

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
        """The linear parts."""
        return tuple(p for p in self.parts if not isinstance(p, str))

    def to(self, device: str) -> Block:
        """The same block with its weights on another device; see :meth:`Factorization.to`.

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
            As for a chain.

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
        r"""Cost of each chain for one example.

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
        r"""Multiply-adds of all chains for one example.

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
        self, input_shape: Sequence[int], dtype: Any = None, threads: int | None = None
    ) -> Runner:
        r"""Plan the whole block, activations included, to run in one call.

        Parameters
        ----------
        input_shape : sequence of int
            (channels, \*spatial), or the spatial size alone; the batch is free.
        dtype : dtype, optional
            float32 or float64; the precision of the weights if not given.
        threads : int, optional
            Threads to use; all that OpenMP offers if not given.

        Returns
        -------
        callable
            ``run(x, out=None)``, to be called many times, from any thread.

        Raises
        ------
        ValueError
            If the block has another word than ``"relu"`` and ``"relu6"``, which the message names,
            or a constant border after its first chain.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank import blocks
        >>> block = blocks.mobilenet_v1(np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1)), stride=2)
        >>> run = block.compile((3, 32, 32), threads=1)
        >>> run(np.ones((1, 3, 32, 32))).shape
        (1, 8, 16, 16)
        """
        links: list[tuple[Factorization, Activation]] = []
        for part in self.parts:
            if not isinstance(part, str):
                modes = {s.geometry.padding_mode for s in part.stages}
                if links and "constant" in modes:
                    raise ValueError(
                        "a constant border after the first chain cannot run inside a plan: compile "
                        "the chains of this block one by one"
                    )
                links.append((part, "none"))
            elif links and part in ("relu", "relu6") and links[-1][1] == "none":
                links[-1] = (links[-1][0], cast(Activation, part))
            else:
                raise ValueError(
                    f"{part!r} cannot run inside a plan, only relu and relu6 after a chain can: "
                    "compile the chains of this block one by one"
                )
        if not links:
            raise ValueError("this block has no chain to run")
        return compile_chains(links, input_shape, dtype, threads)

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Run the block; see :meth:`compile`.

        Parameters
        ----------
        x : ndarray, shape (batch, channels, \\*spatial)
            Floating-point; it is computed in its own precision.
        out : ndarray, optional
            Where to put the result; must not overlap `x`.

        Returns
        -------
        ndarray, shape (batch, out, \\*spatial)

        Raises
        ------
        ValueError, TypeError
            As for :meth:`compile`, or if `x` does not fit.
        """
        if not self.chains:
            raise ValueError("this block has no chain to run")
        x = as_input(self.chains[0], x)
        return self.compile(x.shape[1:], x.dtype)(x, out)

    def _shapes(self, shape: Sequence[int]) -> Iterator[tuple[Factorization, Sequence[int]]]:
        first = self.chains[0]
        size = first.input_shape(shape)[1:]
        for f in self.chains:  # a concatenated skip changes the channels, not the size
            yield f, (f.in_channels, *size)
            size = f.output_shape(size)[1:]


def fold_batch_norm(f: Factorization, norm: BatchNorm) -> Factorization:
    """The chain followed by a batch normalisation, as one chain.

    Parameters
    ----------
    f : Factorization
        Its last stage untied.
    norm : BatchNorm
        Over the output channels of `f`.

    Returns
    -------
    Factorization
        With the last stage scaled and a bias.

    Raises
    ------
    ValueError
        If the last stage is tied, a shape is wrong, or a variance plus eps not above 0.

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
        raise ValueError("a tied or shuffled last stage has no channels of its own to scale")
    arrays = [np.asarray(a, np.float64) for a in norm[:4]]
    if any(a.shape != (f.out_channels,) for a in arrays):
        raise ValueError(
            f"the batch norm must have {f.out_channels} channels, "
            f"got {', '.join(str(a.shape) for a in arrays)}"
        )
    scale, shift, mean, variance = arrays
    if not (np.isfinite(arrays).all() and variance.min() + norm.eps > 0):
        raise ValueError(
            "the batch norm must be finite, with variance plus eps above 0, "
            f"got a variance of {variance.min()}"
        )
    factor = scale / np.sqrt(variance + norm.eps)
    # (groups, rows, columns, *kernel): plain stages put out rows, transposed ones columns.
    rows, columns = last.weight.shape[0] // last.groups, last.weight.shape[1]
    split = (1, columns) if last.transposed else (rows, 1)
    parts = last.weight.reshape(last.groups, rows, columns, -1) * factor.reshape(-1, *split, 1)
    weight = parts.reshape(last.weight.shape).astype(f.dtype)
    bias = (0.0 if f.bias is None else f.bias) * factor + shift - mean * factor
    return replace(
        f, stages=(*f.stages[:-1], replace(last, weight=weight)), bias=bias.astype(f.dtype)
    )


def separable(
    depthwise: Array,
    pointwise: Array,
    bias: Array | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str = "same",
    dilation: int | Sequence[int] = 1,
    multiplier: int = 1,
) -> Factorization:
    r"""Depthwise, then pointwise, with nothing in between: Xception's and Keras's separable one.

    Parameters
    ----------
    depthwise : ndarray, shape (in * multiplier, 1, \*kernel)
        One filter a channel, or `multiplier` of them.
    pointwise : ndarray, shape (out, in * multiplier, 1, ...)
        Mixes the channels.
    bias : ndarray, shape (out,), optional
        Added at the end.
    stride, dilation : int or sequence of int
        Of the depthwise stage.
    padding : int or ``"same"``
        Of the depthwise stage; ``"same"`` keeps half an extent on either side.
    multiplier : int
        Filters for each input channel.

    Returns
    -------
    Factorization

    Raises
    ------
    ValueError
        If the shapes do not follow one another.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> f = blocks.separable(np.ones((3, 1, 3, 3)), np.ones((128, 3, 1, 1)), padding=0)
    >>> f.cost((3, 7, 7)).macs
    10275
    """
    first = _depthwise(depthwise, stride, padding, dilation, multiplier)
    return chain([first, _pointwise(pointwise)], bias)


def fused_separable(
    depthwise: Array,
    pointwise: Array,
    *,
    bias: Sequence[Array | None] = (None, None),
    activation: Sequence[Activation] = ("none", "none"),
    order: Literal["dw-pw", "pw-dw"] = "dw-pw",
    stride: int | Sequence[int] = 1,
    padding: int | str = "same",
    dilation: int | Sequence[int] = 1,
    multiplier: int = 1,
) -> Block:
    r"""Depthwise and pointwise in one pass, each with a bias and an activation.

    Parameters
    ----------
    depthwise : ndarray, shape (channels * multiplier, 1, \*kernel)
        One filter a channel, or `multiplier` of them.
    pointwise : ndarray, shape (out, in, 1, ...)
        Mixes the channels.
    bias : (ndarray or None, ndarray or None)
        Added after the first and after the second of the two, in the order in which they run.
    activation : (str, str)
        What follows each: ``"none"``, ``"relu"`` or ``"relu6"``.
    order : str
        ``"dw-pw"``, MobileNet's, or ``"pw-dw"``, blueprint's.
    stride, dilation : int or sequence of int
        Of the depthwise stage.
    padding : int or ``"same"``
        Zeros around the depthwise stage's input; ``"same"`` keeps half an extent on either side.
    multiplier : int
        Filters for each channel that the depthwise stage takes.

    Returns
    -------
    Block
        Call it, or :meth:`Block.compile` it once and call that.

    Raises
    ------
    ValueError
        If the shapes do not follow one another, or a word is none of the above.

    References
    ----------
    .. [1] A. G. Howard et al., "MobileNets: efficient convolutional neural networks for mobile
       vision applications", 2017. :arxiv:`1704.04861`.
    .. [2] D. Haase, M. Amthor, "Rethinking depthwise separable convolutions", CVPR 2020.
       :arxiv:`2003.13549`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> block = blocks.fused_separable(
    ...     np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1)),
    ...     bias=(np.zeros(3), np.ones(8)), activation=("relu6", "relu6"), stride=2,
    ... )
    >>> block(np.ones((1, 3, 8, 8))).max()
    np.float64(6.0)
    """
    if order not in ("dw-pw", "pw-dw"):
        raise ValueError(f"order must be dw-pw or pw-dw, got {order!r}")
    for name, pair in (("bias", bias), ("activation", activation)):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"{name} must have two entries, one a stage, got {pair!r}")
    depthwise, pointwise = np.asarray(depthwise), np.asarray(pointwise)
    if not 3 <= depthwise.ndim == pointwise.ndim:
        raise ValueError(
            "depthwise and pointwise must have two channel axes and the same spatial axes, got "
            f"shapes {depthwise.shape} and {pointwise.shape}"
        )
    (multiplier,) = as_integers("multiplier", multiplier, 1)
    if multiplier < 1 or len(depthwise) % multiplier:
        raise ValueError(f"multiplier must divide {len(depthwise)} filters, got {multiplier}")
    stages = [_depthwise(depthwise, stride, padding, dilation, multiplier), _pointwise(pointwise)]
    if order == "pw-dw":
        stages.reverse()
    if stages[0].out_channels != stages[1].in_channels:
        raise ValueError(
            f"the first stage gives {stages[0].out_channels} channels but the second takes "
            f"{stages[1].in_channels}"
        )
    parts: list[Factorization | str] = []
    for stage, b, word in zip(stages, bias, activation):
        if word not in get_args(Activation):
            raise ValueError(
                f"activation must be one of {', '.join(get_args(Activation))}, got {word!r}"
            )
        parts.append(chain([stage], b))
        if word != "none":
            parts.append(word)
    return Block(tuple(parts))


def flattened(passes: Sequence[Array], bias: Array | None = None) -> Factorization:
    r"""Pointwise, then a depthwise pass along each axis: a flattened convolution.

    Parameters
    ----------
    passes : sequence of ndarray
        (channels, in, 1, ...), then for each axis in turn (channels, 1, ..., taps, ...).
    bias : ndarray, shape (channels,), optional
        Added at the end.

    Returns
    -------
    Factorization
        Padded to keep the size.

    References
    ----------
    .. [1] J. Jin, A. Dundar, E. Culurciello, "Flattened convolutional neural networks for
       feedforward acceleration", 2014. :arxiv:`1412.5474`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> shapes = [(8, 3, 1, 1), (8, 1, 3, 1), (8, 1, 1, 3)]
    >>> blocks.flattened([np.ones(s) for s in shapes]).params
    72
    """
    first, *rest = passes
    return chain([_pointwise(first), *(_depthwise(w) for w in rest)], bias)


def shuffle_unit(
    reduce: Array,
    depthwise: Array,
    expand: Array,
    *,
    groups: int,
    stride: int = 1,
    norms: Sequence[BatchNorm | None] = (None, None, None),
) -> Block:
    """ShuffleNet's unit: grouped pointwise, shuffle, depthwise, grouped pointwise.

    Parameters
    ----------
    reduce, expand : ndarray, shape (out, in // groups, 1, 1)
        Grouped pointwise weights.
    depthwise : ndarray, shape (channels, 1, height, width)
        Filters of the shuffled channels.
    groups : int
        Groups of the pointwise stages; the shuffle deals their channels out to one another.
    stride : int
        Of the depthwise stage.
    norms : sequence of BatchNorm or None
        After each of the three, folded in.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not follow one another.

    References
    ----------
    .. [1] X. Zhang, X. Zhou, M. Lin, J. Sun, "ShuffleNet: an extremely efficient convolutional
       neural network for mobile devices", CVPR 2018. :arxiv:`1707.01083`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> unit = blocks.shuffle_unit(
    ...     np.ones((8, 4, 1, 1)), np.ones((8, 1, 3, 3)), np.ones((8, 4, 1, 1)), groups=2
    ... )
    >>> unit.parts[1], unit.chains[1].stages[0].shuffle
    ('relu', (2, 4))
    """
    first = chain([_pointwise(reduce, groups)])
    channels = reduce.shape[0]
    spatial = replace(_depthwise(depthwise, stride), shuffle=(groups, channels // groups))
    middle, last = chain([spatial]), chain([_pointwise(expand, groups)])
    a, b, c = _folded((first, middle, last), norms)
    if stride > 1:
        return Block((a, "relu", b, c, "concatenate pooled input, relu"))
    fits = reduce.shape[1] * groups == expand.shape[0]
    return Block((a, "relu", b, c, "add input, relu" if fits else "relu"))


def mobilenet_v1(
    depthwise: Array,
    pointwise: Array,
    *,
    stride: int = 1,
    norms: Sequence[BatchNorm | None] = (None, None),
) -> Block:
    r"""MobileNet's block: depthwise and pointwise, each followed by an activation.

    Parameters
    ----------
    depthwise : ndarray, shape (in, 1, \*kernel)
        One filter a channel.
    pointwise : ndarray, shape (out, in, 1, ...)
        Mixes the channels.
    stride : int
        Of the depthwise stage.
    norms : sequence of BatchNorm or None
        After each of the two, folded in.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not follow one another.

    References
    ----------
    .. [1] A. G. Howard et al., "MobileNets: efficient convolutional neural networks for mobile
       vision applications", 2017. :arxiv:`1704.04861`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> block = blocks.mobilenet_v1(np.ones((3, 1, 3, 3)), np.ones((8, 3, 1, 1)), stride=2)
    >>> [f.output_shape((32, 32)) for f in block.chains]
    [(3, 16, 16), (8, 32, 32)]
    """
    parts = (chain([_depthwise(depthwise, stride)]), chain([_pointwise(pointwise)]))
    a, b = _folded(parts, norms)
    return Block((a, "relu", b, "relu"))


def inverted_residual(
    expand: Array | None,
    depthwise: Array,
    project: Array,
    *,
    stride: int = 1,
    activation: str = "relu6",
    squeeze_excite: bool = False,
    norms: Sequence[BatchNorm | None] = (None, None, None),
) -> Block:
    r"""MobileNetV2's block, and EfficientNet's with ``activation="silu", squeeze_excite=True``.

    Parameters
    ----------
    expand : ndarray, shape (wide, in, 1, 1), or None
        None where the block does not expand.
    depthwise : ndarray, shape (wide, 1, \*kernel)
        One filter a channel.
    project : ndarray, shape (out, wide, 1, 1)
        Down to the block's outputs.
    stride : int
        Of the depthwise stage.
    activation : str
        Its name, for the words between the chains.
    squeeze_excite : bool
        Whether a squeeze-excite follows the depthwise stage.
    norms : sequence of BatchNorm or None
        After each convolution, folded in.

    Returns
    -------
    Block
        Ends with ``"add input"`` where the shapes allow the skip.

    Raises
    ------
    ValueError
        If the shapes do not follow one another.

    References
    ----------
    .. [1] M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, "MobileNetV2: inverted
       residuals and linear bottlenecks", CVPR 2018. :arxiv:`1801.04381`.
    .. [2] M. Tan, Q. V. Le, "EfficientNet: rethinking model scaling for convolutional neural
       networks", ICML 2019. :arxiv:`1905.11946`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> block = blocks.inverted_residual(
    ...     np.ones((12, 2, 1, 1)), np.ones((12, 1, 3, 3)), np.ones((2, 12, 1, 1))
    ... )
    >>> [p for p in block.parts if isinstance(p, str)]
    ['relu6', 'relu6', 'add input']
    """
    chains = [chain([_depthwise(depthwise, stride)]), chain([_pointwise(project)])]
    if expand is not None:
        chains.insert(0, chain([_pointwise(expand)]))
    *early, last = _folded(chains, norms)
    parts: list[Factorization | str] = [p for f in early for p in (f, activation)]
    if squeeze_excite:
        parts.append("squeeze-excite")
    parts.append(last)
    inputs = depthwise.shape[0] if expand is None else expand.shape[1]
    if stride == 1 and inputs == project.shape[0]:
        parts.append("add input")
    return Block(tuple(parts))


def xception(
    separables: Sequence[tuple[Array, Array]], norms: Sequence[BatchNorm | None] | None = None
) -> Block:
    """Xception's middle block: activations and separable convolutions, with a skip around.

    Parameters
    ----------
    separables : sequence of (depthwise, pointwise)
        Weights as for :func:`separable`.
    norms : sequence of BatchNorm or None, optional
        After each, folded in.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not follow one another.

    References
    ----------
    .. [1] F. Chollet, "Xception: deep learning with depthwise separable convolutions", CVPR
       2017. :arxiv:`1610.02357`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> weights = [(np.ones((8, 1, 3, 3)), np.ones((8, 8, 1, 1)))] * 3
    >>> [p for p in blocks.xception(weights).parts if isinstance(p, str)]
    ['relu', 'relu', 'relu', 'add input']
    """
    chains = [separable(d, p) for d, p in separables]
    folded = _folded(chains, norms or [None] * len(chains))
    parts = [p for f in folded for p in ("relu", f)]
    return Block((*parts, "add input"))


def unet_step(
    up: Array,
    separables: Sequence[tuple[Array, Array]],
    norms: Sequence[BatchNorm | None] | None = None,
) -> Block:
    """One step up a separable U-Net: transposed convolution, skip, separable convolutions.

    Parameters
    ----------
    up : ndarray, shape (in, out, 2, 2)
        Transposed convolution of stride 2.
    separables : sequence of (depthwise, pointwise)
        Weights as for :func:`separable`; the first takes the skip's channels as well.
    norms : sequence of BatchNorm or None, optional
        After each separable convolution, folded in.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not follow one another.

    References
    ----------
    .. [1] O. Ronneberger, P. Fischer, T. Brox, "U-Net: convolutional networks for biomedical
       image segmentation", MICCAI 2015. :arxiv:`1505.04597`.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank import blocks
    >>> step = blocks.unet_step(
    ...     np.ones((8, 4, 2, 2)), [(np.ones((8, 1, 3, 3)), np.ones((4, 8, 1, 1)))]
    ... )
    >>> [p for p in step.parts if isinstance(p, str)]
    ['concatenate skip', 'relu']
    """
    ndim = up.ndim - 2
    rise = chain([Stage(up, Geometry.of(ndim, stride=2), transposed=True)])
    chains = [separable(d, p) for d, p in separables]
    folded = _folded(chains, norms or [None] * len(chains))
    parts = [p for f in folded for p in (f, "relu")]
    return Block((rise, "concatenate skip", *parts))


def _folded(
    chains: Sequence[Factorization], norms: Sequence[BatchNorm | None]
) -> list[Factorization]:
    if len(norms) < len(chains):
        raise ValueError(f"norms must have {len(chains)} entries, got {len(norms)}")
    return [f if n is None else fold_batch_norm(f, n) for f, n in zip(chains, norms)]


def _pointwise(weight: Array, groups: int = 1) -> Stage:
    if max(weight.shape[2:]) > 1:
        raise ValueError(f"a pointwise weight has kernel 1, got shape {weight.shape}")
    return Stage(weight, Geometry.of(weight.ndim - 2), groups)


def _depthwise(
    weight: Array,
    stride: int | Sequence[int] = 1,
    padding: int | str = "same",
    dilation: int | Sequence[int] = 1,
    multiplier: int = 1,
) -> Stage:
    """One filter a channel, or a multiple of them."""
    if weight.shape[1] != 1:
        raise ValueError(f"a depthwise weight is (channels, 1, *kernel), got {weight.shape}")
    ndim = weight.ndim - 2
    extent = Geometry.of(ndim, 1, 0, dilation).extent(weight.shape[2:])
    pads = [((e - 1) // 2, e // 2) for e in extent] if padding == "same" else padding
    if isinstance(pads, str):
        raise ValueError(f"padding must be a number or 'same', got {padding!r}")
    return Stage(weight, Geometry.of(ndim, stride, pads, dilation), len(weight) // multiplier)
