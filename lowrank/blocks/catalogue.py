"""Constructors of the blocks of well-known networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from lowrank._typing import Array
from lowrank.blocks.block import BatchNorm, Block, fold_batch_norm
from lowrank.core.geometry import Geometry, as_integers
from lowrank.core.stage import Activation, Stage
from lowrank.factorization import Factorization, chain


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
    r"""Make a depthwise separable convolution: depthwise, then pointwise, as in Xception.

    Parameters
    ----------
    depthwise : ndarray, shape (in * multiplier, 1, \*kernel)
        Depthwise weights, `multiplier` filters per channel.
    pointwise : ndarray, shape (out, in * multiplier, 1, ...)
        Pointwise weights.
    bias : ndarray, shape (out,), optional
        Bias after the pointwise stage.
    stride, dilation : int or sequence of int
        Stride and dilation of the depthwise stage.
    padding : int or ``"same"``
        Zero padding of the depthwise stage; ``"same"`` is half the extent at each end.
    multiplier : int
        Filters per input channel.

    Returns
    -------
    Factorization

    Raises
    ------
    ValueError
        If the shapes do not match.

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
    r"""Make a block of a depthwise and a pointwise stage, each with a bias and an activation.

    Parameters
    ----------
    depthwise : ndarray, shape (channels * multiplier, 1, \*kernel)
        Depthwise weights, `multiplier` filters per channel.
    pointwise : ndarray, shape (out, in, 1, ...)
        Pointwise weights.
    bias : (ndarray or None, ndarray or None)
        Bias of the first and of the second stage.
    activation : (str, str)
        Activation of each stage: ``"none"``, ``"relu"`` or ``"relu6"``.
    order : str
        Order of the stages: ``"dw-pw"`` as in MobileNet, or ``"pw-dw"`` as in blueprint separable
        convolutions.
    stride, dilation : int or sequence of int
        Stride and dilation of the depthwise stage.
    padding : int or ``"same"``
        Zero padding of the depthwise stage; ``"same"`` is half the extent at each end.
    multiplier : int
        Filters per input channel of the depthwise stage.

    Returns
    -------
    Block
        Callable; :meth:`Block.compile` plans it once for many calls.

    Raises
    ------
    ValueError
        If the shapes do not match, or an order or activation is unknown.

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
            raise ValueError(f"{name} must have two entries, one per stage, got {pair!r}")
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
            "depthwise and pointwise must fit: the first stage has "
            f"{stages[0].out_channels} output channels, the second {stages[1].in_channels} input "
            "channels"
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
    r"""Make a flattened convolution: pointwise, then depthwise along each axis.

    Parameters
    ----------
    passes : sequence of ndarray
        Weights (channels, in, 1, ...), then (channels, 1, ..., taps, ...) for each axis.
    bias : ndarray, shape (channels,), optional
        Bias after the last pass.

    Returns
    -------
    Factorization
        Chain that is padded to keep the size.

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
    """Make a ShuffleNet unit: grouped pointwise, shuffle, depthwise, grouped pointwise.

    Parameters
    ----------
    reduce, expand : ndarray, shape (out, in // groups, 1, 1)
        Grouped pointwise weights.
    depthwise : ndarray, shape (channels, 1, height, width)
        Depthwise weights of the shuffled channels.
    groups : int
        Groups of the pointwise stages, between which the shuffle exchanges channels.
    stride : int
        Stride of the depthwise stage.
    norms : sequence of BatchNorm or None
        Batch normalisation after each stage, folded.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not match.

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
    a, b, c = _fold_norms((first, middle, last), norms)
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
    r"""Make a MobileNet block: depthwise and pointwise, each followed by an activation.

    Parameters
    ----------
    depthwise : ndarray, shape (in, 1, \*kernel)
        Depthwise weights.
    pointwise : ndarray, shape (out, in, 1, ...)
        Pointwise weights.
    stride : int
        Stride of the depthwise stage.
    norms : sequence of BatchNorm or None
        Batch normalisation after each stage, folded.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not match.

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
    a, b = _fold_norms(parts, norms)
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
    r"""Make an inverted residual block of MobileNetV2 or EfficientNet.

    Parameters
    ----------
    expand : ndarray, shape (wide, in, 1, 1), or None
        Weights of the expansion; None for a block without expansion.
    depthwise : ndarray, shape (wide, 1, \*kernel)
        Depthwise weights.
    project : ndarray, shape (out, wide, 1, 1)
        Weights of the projection to the output channels.
    stride : int
        Stride of the depthwise stage.
    activation : str
        Name of the activation between chains: ``"silu"`` for EfficientNet.
    squeeze_excite : bool
        True for a squeeze-excite after the depthwise stage, as in EfficientNet.
    norms : sequence of BatchNorm or None
        Batch normalisation after each convolution, folded.

    Returns
    -------
    Block
        Ends with ``"add input"`` if the shapes allow the skip.

    Raises
    ------
    ValueError
        If the shapes do not match.

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
    *early, last = _fold_norms(chains, norms)
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
    """Make a middle block of Xception: activations and separable convolutions, with a skip.

    Parameters
    ----------
    separables : sequence of (depthwise, pointwise)
        Weights of :func:`separable`.
    norms : sequence of BatchNorm or None, optional
        Batch normalisation after each convolution, folded.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not match.

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
    folded = _fold_norms(chains, norms or [None] * len(chains))
    parts = [p for f in folded for p in ("relu", f)]
    return Block((*parts, "add input"))


def unet_step(
    up: Array,
    separables: Sequence[tuple[Array, Array]],
    norms: Sequence[BatchNorm | None] | None = None,
) -> Block:
    """Make a decoder step of a separable U-Net: upsampling, skip, separable convolutions.

    Parameters
    ----------
    up : ndarray, shape (in, out, 2, 2)
        Weights of a transposed convolution of stride 2.
    separables : sequence of (depthwise, pointwise)
        Weights of :func:`separable`; the first also reads the channels of the skip.
    norms : sequence of BatchNorm or None, optional
        Batch normalisation after each separable convolution, folded.

    Returns
    -------
    Block

    Raises
    ------
    ValueError
        If the shapes do not match.

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
    upsampling = chain([Stage(up, Geometry.of(ndim, stride=2), transposed=True)])
    chains = [separable(d, p) for d, p in separables]
    folded = _fold_norms(chains, norms or [None] * len(chains))
    parts = [p for f in folded for p in (f, "relu")]
    return Block((upsampling, "concatenate skip", *parts))


def _fold_norms(
    chains: Sequence[Factorization], norms: Sequence[BatchNorm | None]
) -> list[Factorization]:
    if len(norms) < len(chains):
        raise ValueError(f"norms must have {len(chains)} entries, got {len(norms)}")
    return [f if n is None else fold_batch_norm(f, n) for f, n in zip(chains, norms)]


def _pointwise(weight: Array, groups: int = 1) -> Stage:
    if max(weight.shape[2:]) > 1:
        raise ValueError(f"a pointwise weight must have kernel size 1, got shape {weight.shape}")
    return Stage(weight, Geometry.of(weight.ndim - 2), groups)


def _depthwise(
    weight: Array,
    stride: int | Sequence[int] = 1,
    padding: int | str = "same",
    dilation: int | Sequence[int] = 1,
    multiplier: int = 1,
) -> Stage:
    if weight.shape[1] != 1:
        raise ValueError(
            f"a depthwise weight must have shape (channels, 1, *kernel), got {weight.shape}"
        )
    ndim = weight.ndim - 2
    extent = Geometry.of(ndim, 1, 0, dilation).extent(weight.shape[2:])
    pads = [((e - 1) // 2, e // 2) for e in extent] if padding == "same" else padding
    if isinstance(pads, str):
        raise ValueError(f"padding must be a number or 'same', got {padding!r}")
    return Stage(weight, Geometry.of(ndim, stride, pads, dilation), len(weight) // multiplier)
