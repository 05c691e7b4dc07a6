"""`MultiHeadAttention`: linear projections around `attention()`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads import jagged, masks, weights
from manyheads.arguments import (
    check_against_weight,
    check_input,
    check_query_start,
    check_sizes,
    number,
)
from manyheads.caches import KVCache
from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.functional import attention
from manyheads.masks import Mask
from manyheads.positions import ScoreBias, as_bias
from manyheads.projection import project
from manyheads.rotary import Rotary
from manyheads.spec import Geometry, PerBatch

#: Makes the norm of one head's queries or keys from the head size.
NormFactory = Callable[[int], nn.Module]


class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017): Concat(head_1, ..., head_h) W_O.

    head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V). The paper's W^Q, W^K, W^V, W_O are `q_proj`,
    `k_proj`, `v_proj`, `out_proj`, each an `nn.Linear`; h is `num_heads`, d_k and d_v `head_dim`.

    ========================  =====================================================
    you call                  you get
    ========================  =====================================================
    attend(x)                 self-attention
    attend(x, memory)         cross-attention, memory as key and value
    attend(x, key, value)     cross-attention with their own keys and values
    attend(x, cache=cache)    self-attention over all tokens so far, x being the next
    ========================  =====================================================

    Args:
        embed_dim: E, the query's size.
        num_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq: fewer is grouped-query attention, 1 multi-query.
            None: Hq.
        head_dim: D; None: E / Hq.
        key_dim: the key's size; None: E.
        value_dim: the value's size; None: E.
        out_dim: the output's size; None: E.
        bias: biases on all four projections.
        positions: a `Rotary`, which turns queries and keys; None for no positions.
        mask: a mask that every call obeys (`Causal()`), with the call's own, `&`.
        attn_bias: a score bias added in every call (`Alibi()`), with the call's own, `+`. Its
            parameters are this module's.
        qk_norm: "rms" or "layer" to normalise each head's queries and keys before the positions
            (`q_norm`, `k_norm`), or what makes such a module from the head size.
        dropout: share of the weights dropped, in training only.
        scale: factor on the scores; None: 1 / sqrt(D).

    Projection weights start Xavier-uniform, each on its own sizes, and biases at zero.

    Self-attention does not multiply by one concatenated W^Q W^K W^V: measured, that is no faster
    (docs/decisions/0003-separate-projections.md).

    Raises:
        ArgumentError, ArgumentTypeError: sizes that do not divide, an unknown `qk_norm`, or
            another option that cannot mean anything.

    >>> attend = MultiHeadAttention(embed_dim=16, num_heads=4, num_kv_heads=2, key_dim=6)
    >>> memory = torch.zeros(3, 7, 6)
    >>> attend(torch.zeros(3, 5, 16), memory, torch.zeros(3, 7, 16)).shape
    torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        out_dim: int | None = None,
        bias: bool = True,
        positions: Rotary | None = None,
        mask: Mask | Tensor | None = None,
        attn_bias: ScoreBias | Tensor | None = None,
        qk_norm: Literal["rms", "layer"] | NormFactory | None = None,
        dropout: float = 0.0,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            {
                "embed_dim": embed_dim,
                "num_heads": num_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "key_dim": key_dim,
                "value_dim": value_dim,
                "out_dim": out_dim,
            }
        )
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ArgumentError(
                f"num_heads={num_heads} is not divisible by num_kv_heads={num_kv_heads}; expected "
                f"a multiple, every key/value head serves as many query heads: change one of them."
            )
        if head_dim is None and embed_dim % num_heads:
            raise ArgumentError(
                f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}; expected a "
                f"multiple: change one of them, or give head_dim."
            )
        head_dim = embed_dim // num_heads if head_dim is None else head_dim
        _check_positions(positions, head_dim)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.key_dim = embed_dim if key_dim is None else key_dim
        self.value_dim = embed_dim if value_dim is None else value_dim
        self.out_dim = embed_dim if out_dim is None else out_dim
        self.positions = positions
        self.mask = None if mask is None else masks.as_mask(mask)
        self.attn_bias = None if attn_bias is None else as_bias(attn_bias)
        self.dropout = number("dropout", dropout, "a number in [0, 1)", lambda p: 0.0 <= p < 1.0)
        self.scale = (
            None if scale is None else number("scale", scale, "a finite number", math.isfinite)
        )

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim, num_heads * head_dim)
        self.k_proj = linear(self.key_dim, num_kv_heads * head_dim)
        self.v_proj = linear(self.value_dim, num_kv_heads * head_dim)
        self.out_proj = linear(num_heads * head_dim, self.out_dim)
        self.q_norm = _make_norm(qk_norm, head_dim, device, dtype)
        self.k_norm = _make_norm(qk_norm, head_dim, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections anew: Xavier-uniform weights, zero biases."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        attn_bias: ScoreBias | Tensor | None = None,
        cache: KVCache | None = None,
        query_start: PerBatch | None = None,
    ) -> Tensor:
        """Attend from every row of `query`.

        With a `cache`, the new keys and values are appended to it and all of it is attended to.
        The rows of a self-attention stand at its end: positions go on where they stopped. The
        keys of a cross-attention are projected once, then given as no rows:
        `attend(x, memory, cache=cache)`, from then on `attend(x, memory[:, :0], cache=cache)`.

        Args:
            query: [B, Lq, E] or [Lq, E]. Or, as `attention` takes them, jagged [B, L*, E].
            key: [B, Lk, key_dim] or [Lk, key_dim]; None for self-attention.
            value: [B, Lk, value_dim] or [Lk, value_dim]; None takes `key`.
            mask: which keys a query may attend to, on top of the module's mask; a mask object or
                a bool tensor that broadcasts to [B, Hq, Lq, Lk], True = may attend, where Lk
                counts the cached keys too.
            attn_bias: what is added to the scores, on top of the module's.
            cache: one `KVCache` per layer and text; inference only.
            query_start: position of the first query row among the keys, an int or int tensor
                [B]. None: in self-attention the row's own place, in cross-attention what the mask
                says, or else Lk - Lq.

        Returns:
            [B, Lq, out_dim] or [Lq, out_dim]. A row that may attend to nothing is `out_proj.bias`.

        Raises:
            ShapeError, ArgumentTypeError, ArgumentError, DeviceError: inputs that do not fit.
        """
        self_attention = key is None
        if jagged.any_nested(query, key, value):
            return self._forward_jagged(query, key, value, mask, attn_bias, cache, query_start)
        key, value = self._complete(query, key, value)
        if query.dim() == 2:
            out = self.forward(
                query[None],
                None if self_attention else key[None],
                None if self_attention else value[None],
                mask=mask, attn_bias=attn_bias, cache=cache, query_start=query_start,
            )  # fmt: skip
            return out[0]
        q, k, v, options = self._inputs(
            query, key, value, self_attention, mask, attn_bias, cache, query_start
        )
        out = attention(q, k, v, **options, dropout_p=self.dropout if self.training else 0.0)
        return project(self.out_proj, out.transpose(1, 2).flatten(2))

    def _inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        self_attention: bool,
        mask: Mask | Tensor | None,
        attn_bias: ScoreBias | Tensor | None,
        cache: KVCache | None,
        query_start: PerBatch | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """What `attention` is called with: [B, H, L, D] each, and the other arguments.

        Keys and values are appended to the cache, and come with all that it holds.
        """
        q = self._heads(project(self.q_proj, query), self.num_heads, self.q_norm)
        k = self._heads(project(self.k_proj, key), self.num_kv_heads, self.k_norm)
        v = self._heads(project(self.v_proj, value), self.num_kv_heads)

        past = 0
        if cache is not None:
            _check_cache(cache)
            past = cache.length
        if query_start is not None:
            query_start = check_query_start(query_start, q.shape[0], q.device)
        mask = _both(self.mask, mask)
        geometry = Geometry(
            q.shape[0], self.num_heads, q.shape[2], past + k.shape[2], q.device, query_start
        )
        query_start, stand = _place(mask, geometry, past if self_attention else None)
        if self.positions is not None:
            turn, tables = self.positions.turn, self.positions.tables(stand, q)
            q = turn(q, *tables)
            if isinstance(stand, Tensor) or stand != past or k.shape[2] != q.shape[2]:
                tables = self.positions.tables(past, k)
            k = turn(k, *tables)
        if cache is not None:
            k, v = cache.append(k, v)
        options = {
            "mask": mask,
            "attn_bias": _sum(self.attn_bias, attn_bias),
            "scale": self.scale,
            "query_start": query_start,
        }
        return q, k, v, options

    def _forward_jagged(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        mask: Any,
        attn_bias: Any,
        cache: Any,
        query_start: Any,
    ) -> Tensor:
        memory = query if key is None else key
        packed = jagged.pack(
            query,
            memory,
            memory if value is None else value,
            mask,
            "[B, L*, E]",
            attn_bias=attn_bias if isinstance(attn_bias, Tensor) else None,
            cache=cache,
            query_start=query_start,
        )
        out = self.forward(
            packed.query,
            None if key is None else packed.key,
            None if value is None else packed.value,
            mask=packed.mask,
            attn_bias=attn_bias,
        )
        return packed.unpack(out)

    def _complete(
        self, query: Tensor, key: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Key and value, filled in where left out; all three inputs checked."""
        if key is None:
            if value is not None:
                raise ArgumentError(
                    "got a value without a key; expected (query), (query, key) or "
                    "(query, key, value): give the key too."
                )
            key = value = query
        elif value is None:
            value = key
        inputs = (("query", query, self.embed_dim, self.q_proj),
                  ("key", key, self.key_dim, self.k_proj),
                  ("value", value, self.value_dim, self.v_proj))  # fmt: skip
        for name, tensor, size, projection in inputs:
            check_input(name, tensor, size, query)
            # A replaced projection (quantised, adapted, offloaded) has its own rules.
            weight = projection.weight
            own_rules = "forward" in projection.__dict__ or not isinstance(weight, Tensor)
            if not own_rules and weight.is_floating_point():
                check_against_weight(name, tensor, weight)
        return key, value

    def _heads(self, projected: Tensor, heads: int, norm: nn.Module | None = None) -> Tensor:
        """[B, L, heads * D] seen as [B, heads, L, D]; nothing is copied."""
        split = projected.reshape(*projected.shape[:2], heads, self.head_dim)
        if norm is not None:
            # Autocast leaves a norm's weights in float32, and so its input has to be.
            wide = torch.is_autocast_enabled(split.device.type)
            split = norm(split.float() if wide else split).to(split.dtype)
        return split.transpose(1, 2)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> MultiHeadAttention:
        """A copy of an `nn.MultiheadAttention`: same weights, dtype, dropout and mode.

        Batches come first here, whatever the module's `batch_first`; masks are True where one
        may attend, the opposite of torch's; and it is the output alone that is returned.

        Raises:
            ArgumentError: the module was made with add_bias_kv or add_zero_attn.

        >>> MultiHeadAttention.from_torch(nn.MultiheadAttention(8, 2, kdim=6)).k_proj.in_features
        6
        """
        loaded = weights.from_torch(module)
        return cls._of(loaded, module.num_heads, module.dropout).train(module.training)

    @classmethod
    def from_tutorial(
        cls, source: Mapping[str, Tensor] | nn.Module, num_heads: int
    ) -> MultiHeadAttention:
        """The weights of the tutorial listing (`linear_q`, `linear_k`, `linear_v`, `linear_o`).

        What the listing computes from them is another matter: docs/tutorial-listing.md.

        Args:
            source: the listing's module, or its state_dict.
            num_heads: the number of heads it was trained with.

        Raises:
            ArgumentError: names missing from the state_dict, or not of this layout.
            ShapeError: weights that do not fit each other or `num_heads`.
        """
        return cls._of(weights.from_tutorial(source), num_heads)

    @classmethod
    def from_bert(
        cls, state_dict: Mapping[str, Tensor], prefix: str, num_heads: int
    ) -> MultiHeadAttention:
        """The attention of one layer of a Hugging Face BERT, without the layer norm after it.

        Args:
            state_dict: the model's, or any part that holds the layer.
            prefix: what stands before `attention.self.query.weight`, for instance
                "bert.encoder.layer.0.".
            num_heads: the configuration's num_attention_heads.

        Raises:
            ArgumentError: names missing, or inside the attention and not known.
            ShapeError: weights that do not fit each other or `num_heads`.
        """
        return cls._of(weights.from_bert(state_dict, prefix), num_heads)

    @classmethod
    def _of(
        cls, loaded: Mapping[str, Tensor], num_heads: int, dropout: float = 0.0
    ) -> MultiHeadAttention:
        """A module that owns copies of these weights, dtype and device kept."""
        sizes = weights.sizes(loaded, num_heads)
        module = cls(**sizes, dropout=dropout, device="meta")
        copies = {name: tensor.detach().clone() for name, tensor in loaded.items()}
        module.load_state_dict(copies, assign=True)
        return module

    def extra_repr(self) -> str:
        """Sizes and options, for the module's repr."""
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append(f"head_dim={self.head_dim}")
        options = {
            "positions": self.positions,
            "mask": self.mask,
            "dropout": self.dropout or None,
            "scale": self.scale,
        }
        parts += [f"{name}={option}" for name, option in options.items() if option is not None]
        return ", ".join(parts)


def _check_positions(positions: Rotary | None, head_dim: int) -> None:
    if positions is not None and not isinstance(positions, Rotary):
        raise ArgumentTypeError(
            f"positions is a {type(positions).__name__}; expected a Rotary or None: score biases "
            f"such as Alibi go to attn_bias."
        )
    if positions is not None and positions.dim > head_dim:
        raise ArgumentError(
            f"positions turns {positions.dim} channels; expected at most head_dim={head_dim}: "
            f"Rotary({head_dim}) turns all."
        )


def _check_cache(cache: KVCache) -> None:
    if not isinstance(cache, KVCache):
        raise ArgumentTypeError(
            f"cache is a {type(cache).__name__}; expected a KVCache or None: make one for each "
            f"layer and text with KVCache()."
        )


def _make_norm(
    qk_norm: Literal["rms", "layer"] | NormFactory | None,
    head_dim: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module | None:
    if qk_norm is None:
        return None
    if qk_norm == "rms":
        return nn.RMSNorm(head_dim, eps=1e-6, device=device, dtype=dtype)
    if qk_norm == "layer":
        return nn.LayerNorm(head_dim, device=device, dtype=dtype)
    if isinstance(qk_norm, str) or not callable(qk_norm):
        raise ArgumentError(
            f"qk_norm is {qk_norm!r}; expected 'rms', 'layer', None, or what makes a module from "
            f"the head size, e.g. torch.nn.RMSNorm."
        )
    return qk_norm(head_dim).to(device=device, dtype=dtype)


def _place(
    mask: Mask | None, geometry: Geometry, row: int | None
) -> tuple[PerBatch | None, int | Tensor]:
    """The query_start to attend with, and where the query rows stand, for `Rotary`.

    row: in self-attention the place of the first query among the keys. `KeyLengths` would move it
    to the end of each sequence, which is meant for queries that are not rows of the keys.
    """
    start: PerBatch = geometry.k_len - geometry.q_len
    if geometry.query_start is not None:
        start = geometry.query_start
    elif mask is not None:
        where = masks.lower(mask, geometry)[1]
        if where.rows is not None:
            return None, where.rows
        start = where.start
        if row is not None and (isinstance(start, Tensor) or start != row):
            return row, row
    if isinstance(start, Tensor):
        rows = torch.arange(geometry.q_len, device=geometry.device)
        return geometry.query_start, start.to(geometry.device).reshape(-1, 1) + rows
    return geometry.query_start, start


def _both(own: Mask | None, given: Mask | Tensor | None) -> Mask | None:
    """The keys allowed by the module's mask and the call's."""
    if given is None:
        return own
    given = masks.as_mask(given)
    return given if own is None else own & given


def _sum(own: ScoreBias | None, given: ScoreBias | Tensor | None) -> ScoreBias | Tensor | None:
    """The module's bias plus the call's."""
    if own is None or given is None:
        return given if own is None else own
    return own + as_bias(given)
