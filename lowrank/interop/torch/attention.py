"""Attention whose projections are layers that can be replaced."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):  # type: ignore[misc]
    """Multi-head attention that calls its projections as linear layers.

    It computes the same as nn.MultiheadAttention, which reads the weights of its projections and
    never calls them, so that no chain could stand in for one.

    Parameters
    ----------
    like : nn.MultiheadAttention
        Module whose weights are copied; without ``bias_k``, ``bias_v`` and ``add_zero_attn``.

    Attributes
    ----------
    q_proj, k_proj, v_proj, out_proj : nn.Module
        Projections of the query, the key, the value and of the output.
    in_proj_bias : None
        Sign by which nn.TransformerEncoderLayer calls its modules, and reads no weights.

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch.attention import Attention
    >>> mha = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> x = torch.randn(3, 5, 8)
    >>> torch.allclose(Attention(mha)(x, x, x)[0], mha(x, x, x)[0], atol=1e-6)
    True
    """

    def __init__(self, like: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = (
            like.embed_dim,
            like.num_heads,
            like.head_dim,
        )
        self.kdim, self.vdim = like.kdim, like.vdim
        self.dropout, self.batch_first = like.dropout, like.batch_first
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        if like.in_proj_weight is None:
            weights = [like.q_proj_weight, like.k_proj_weight, like.v_proj_weight]
        else:
            weights = list(like.in_proj_weight.chunk(3))
        given = like.in_proj_bias
        biases = [None] * 3 if given is None else list(given.chunk(3))
        for name, weight, bias in zip(PROJECTIONS, weights, biases):
            setattr(self, name, linear(weight, bias))
        self.out_proj = linear(like.out_proj.weight, like.out_proj.bias)
        self.train(like.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output and the attention weights, as nn.MultiheadAttention does.

        Parameters
        ----------
        query, key, value : torch.Tensor
            Of shape (length, batch, features), (batch, length, features) if `batch_first`, or
            (length, features).
        key_padding_mask : torch.Tensor, optional
            Keys to ignore, of shape (batch, length).
        need_weights : bool
            Whether weights are returned.
        attn_mask : torch.Tensor, optional
            Pairs to ignore (bool), or what is added to their scores.
        average_attn_weights : bool
            Whether weights are averaged over heads.
        is_causal : bool
            Whether `attn_mask` is that of causal attention.

        Returns
        -------
        output : torch.Tensor
        weights : torch.Tensor or None

        Raises
        ------
        ValueError
            If `is_causal` is given without `attn_mask`.
        """
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, got None")
        is_batched = query.ndim == 3
        if not is_batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q = self._split(self.q_proj(query))
        k, v = self._split(self.k_proj(key)), self._split(self.v_proj(value))
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout, self.training)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not is_batched:
            return y[0], None if weights is None else weights[0]
        return y if self.batch_first else y.transpose(0, 1), weights

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, features) as (batch, heads, length, features of a head)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self, q: torch.Tensor, pairs: torch.Tensor | None, keys: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return what is added to the scores of (batch, heads, queries, keys)."""
        mask = None
        if pairs is not None:
            mask = _as_scores(pairs, q)
            if mask.ndim == 3:
                mask = mask.unflatten(0, (-1, self.num_heads))
        if keys is not None:
            ignored = _as_scores(keys, q)[:, None, None]
            mask = ignored if mask is None else mask + ignored
        return mask


def _as_scores(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask.to(like.dtype)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Return a linear layer with copies of a weight and a bias.

    Parameters
    ----------
    weight : torch.Tensor, shape (outputs, inputs)
        Weight.
    bias : torch.Tensor, shape (outputs,), optional
        Bias.

    Returns
    -------
    nn.Linear

    Examples
    --------
    >>> import torch
    >>> from lowrank.interop.torch.attention import linear
    >>> linear(torch.eye(3, 4), None)
    Linear(in_features=4, out_features=3, bias=False)
    """
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias is not None, weight.device, weight.dtype)
    layer.weight.data.copy_(weight.detach())
    if bias is not None:
        layer.bias.data.copy_(bias.detach())
    return layer
