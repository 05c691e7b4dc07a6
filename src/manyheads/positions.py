"""Score biases: what is added to the scores because of where the query and the key stand.

`Alibi` and `RelativeBias` are functions of the distance j - p between key and query, and stay that
small all the way into the kernel; `DenseBias` is a tensor of scores. They add up with `+`, and
`lower_bias` turns the sum into the `BiasPlan` that backends read. Rotary positions, which turn the
vectors instead of adding to the scores, are in `rotary.py`.

The biases are `nn.Module`s, so that a parameter inside one is trained, moved and saved with the
model that holds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manyheads.arguments import autocast, check_strided, whole_number
from manyheads.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError
from manyheads.spec import NO_BIAS, BiasPlan, Geometry


class ScoreBias(nn.Module):
    """Base of the biases; `a + b` adds both to the scores."""

    def __add__(self, other: object) -> BiasSum:
        if not isinstance(other, ScoreBias):
            wrap = "Wrap the tensor: mh.DenseBias(tensor)."
            fix = wrap if isinstance(other, Tensor) else "Use a bias."
            raise ArgumentTypeError(
                f"biases add up with biases; got {type(other).__name__} beside +. {fix}"
            )
        return BiasSum(*_parts(self), *_parts(other))

    __radd__ = __add__  # only what is no bias gets here

    def lower(self, geometry: Geometry, dtype: torch.dtype) -> BiasPlan:
        """The plan of this bias for one call whose query has `dtype`."""
        raise NotImplementedError


class BiasSum(ScoreBias):
    """Several biases added together; written `a + b`."""

    def __init__(self, *parts: ScoreBias) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def lower(self, geometry: Geometry, dtype: torch.dtype) -> BiasPlan:
        """See `ScoreBias.lower`."""
        plan = BiasPlan()
        for part in self.parts:
            assert isinstance(part, ScoreBias)
            plan = _add(plan, part.lower(geometry, dtype))
        return plan


class Alibi(ScoreBias):
    """Attention with linear biases (Press et al., 2022): adds -slope[h] * |p - j|.

    p is the query's position and j the key's; under a causal mask this is the paper's
    -m * (i - j). The paper's m is our slope: 2^(-8/H), 2^(-16/H), ... for H heads, and for an H
    that is not a power of two those of the power below, filled up with every other slope of the
    power above (the authors' rule).

    Args:
        slopes: [Hq], any float dtype; None takes the paper's. Gradients flow to it, and an
            `nn.Parameter` is trained with the model that holds this bias.

    Raises:
        ShapeError: `slopes` is not one number per query head (some of it at the call).

    >>> Alibi.paper_slopes(8)[:3]
    [0.5, 0.25, 0.125]
    >>> Alibi(torch.tensor([0.5, 0.1]))
    Alibi(slopes=[2])
    """

    slopes: Tensor | None

    def __init__(self, slopes: Tensor | None = None) -> None:
        super().__init__()
        if slopes is not None:
            _check_float(slopes, "Alibi slopes")
            if slopes.dim() != 1:
                raise ShapeError(
                    f"Alibi slopes have shape {list(slopes.shape)}; expected one number per query "
                    f"head, [Hq]: flatten them."
                )
        _hold(self, "slopes", slopes)

    @staticmethod
    def paper_slopes(num_heads: int) -> list[float]:
        """The slopes of the paper for any number of heads."""
        if num_heads < 1:
            raise ArgumentError(
                f"ALiBi slopes for {num_heads} heads: expected at least 1 head: give the query's."
            )
        power = 2 ** (num_heads.bit_length() - 1)
        slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
        between = [2.0 ** (-8 * (2 * h + 1) / (2 * power)) for h in range(power)]
        return slopes + between[: num_heads - power]

    def lower(self, geometry: Geometry, dtype: torch.dtype) -> BiasPlan:
        """See `ScoreBias.lower`."""
        wide = _score_dtype(dtype)
        if self.slopes is None:
            paper = self.paper_slopes(geometry.q_heads)
            return BiasPlan(slopes=torch.tensor(paper, dtype=wide, device=geometry.device))
        _check_device(self.slopes, geometry, "Alibi slopes")
        if len(self.slopes) != geometry.q_heads:
            raise ShapeError(
                f"Alibi has {len(self.slopes)} slopes; expected one per query head, "
                f"{geometry.q_heads}: give so many, or leave them out for the paper's."
            )
        return BiasPlan(slopes=self.slopes.to(wide))

    def extra_repr(self) -> str:
        """Arguments, for the module's repr."""
        return "" if self.slopes is None else f"slopes={list(self.slopes.shape)}"


class RelativeBias(ScoreBias):
    """T5's learned relative position bias (Raffel et al., 2020): adds table[bucket(j - p), h].

    The nearest distances have a bucket each; farther ones share buckets that widen
    logarithmically, and everything from `max_distance` on shares the last. Bidirectional tables
    keep half their buckets for keys ahead of the query; otherwise such keys count as distance 0.
    Because the buckets saturate, the bias of any length is one row of
    2 * max_distance + 1 (or max_distance + 1) numbers per head: no Lq x Lk tensor is made.

    Args:
        num_heads: Hq.
        num_buckets: rows of the table; even if bidirectional.
        max_distance: where the last bucket begins, in positions.
        bidirectional: True for encoders, False for decoders (T5's `is_decoder`).

    `table` [num_buckets, Hq] is a parameter laid out as Hugging Face's
    `relative_attention_bias.weight`; it starts at zero. T5 does not scale its scores: pass
    scale=1.0 to `attention` to match it.

    Raises:
        ArgumentError: sizes that leave no room for the logarithmic buckets.
        ArgumentTypeError: a size that is no int.

    >>> RelativeBias(num_heads=2, num_buckets=8, max_distance=16).table.shape
    torch.Size([8, 2])
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads = whole_number(num_heads, "RelativeBias's num_heads")
        num_buckets = whole_number(num_buckets, "RelativeBias's num_buckets")
        max_distance = whole_number(max_distance, "RelativeBias's max_distance")
        per_side = num_buckets // 2 if bidirectional else num_buckets
        if num_heads < 1:
            raise ArgumentError(
                f"RelativeBias got num_heads={num_heads}; expected at least 1: give the query's."
            )
        if per_side < 2 or (bidirectional and num_buckets % 2):
            expected = "an even number of at least 4" if bidirectional else "at least 2"
            raise ArgumentError(f"RelativeBias got num_buckets={num_buckets}; expected {expected}.")
        if max_distance <= per_side // 2:
            raise ArgumentError(
                f"RelativeBias got max_distance={max_distance}; expected more than the "
                f"{per_side // 2} distances that have a bucket of their own "
                f"(num_buckets={num_buckets}): raise it, or use fewer buckets."
            )
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.table = nn.Parameter(torch.zeros(num_buckets, num_heads, device=device, dtype=dtype))
        # The bucket of every distance that matters, -max_distance first. Not a buffer, and on the
        # CPU on purpose: a model built on the meta device would lose a buffer's values.
        last = max_distance if bidirectional else 0
        self._bucket_of = self._bucket(torch.arange(-max_distance, last + 1, device="cpu"))

    def _bucket(self, ahead: Tensor) -> Tensor:
        """int64: the bucket of each distance j - p; T5's rule in T5's float32 arithmetic."""
        per_side, first = self.num_buckets, torch.zeros_like(ahead)
        if self.bidirectional:
            per_side //= 2
            first = (ahead > 0) * per_side
            distance = ahead.abs()
        else:
            distance = (-ahead).clamp(min=0)
        exact = per_side // 2
        growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(
            self.max_distance / exact
        )
        far = exact + (growth * (per_side - exact)).long()
        return first + torch.where(distance < exact, distance, far.clamp(max=per_side - 1))

    def lower(self, geometry: Geometry, dtype: torch.dtype) -> BiasPlan:
        """See `ScoreBias.lower`."""
        _check_device(self.table, geometry, "RelativeBias table")
        if self.num_heads != geometry.q_heads:
            raise ShapeError(
                f"RelativeBias was made for {self.num_heads} heads; the query has "
                f"{geometry.q_heads}: make it with num_heads={geometry.q_heads}."
            )
        values = self.table[self._bucket_of.to(geometry.device)]  # [N, Hq]
        return BiasPlan(
            distance_values=values.t().to(_score_dtype(dtype)),
            distance_offset=self.max_distance,
        )

    def extra_repr(self) -> str:
        """Arguments, for the module's repr."""
        return (
            f"num_heads={self.num_heads}, num_buckets={self.num_buckets}, "
            f"max_distance={self.max_distance}, bidirectional={self.bidirectional}"
        )


class DenseBias(ScoreBias):
    """A tensor added to the scores as it is; gradients flow to it.

    Args:
        tensor: [B|1, Hq|1, Lq|1, Lk|1], or fewer axes, aligned to the right as in broadcasting
            ([Lq, Lk], [Hq, Lq, Lk]); the query's dtype or float32. An `nn.Parameter` is trained
            with the model that holds this bias.

    Masking belongs in `mask=`: a bias of -inf gives the same output, but is O(Lq * Lk) memory and
    is not skipped.

    Raises:
        ArgumentTypeError: not a floating tensor, or (at the call) a dtype other than those; under
            torch.autocast other half types are cast.
        ShapeError: the rank is outside 2..4, or (at the call) a size does not fit.

    >>> DenseBias(torch.zeros(3, 5))
    DenseBias(shape=[3, 5])
    """

    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        _check_dense(tensor)
        _hold(self, "tensor", tensor)

    def lower(self, geometry: Geometry, dtype: torch.dtype) -> BiasPlan:
        """See `ScoreBias.lower`."""
        return _lower_dense(self.tensor, geometry, dtype)

    def extra_repr(self) -> str:
        """Arguments, for the module's repr."""
        return f"shape={list(self.tensor.shape)}"


def lower_bias(
    attn_bias: ScoreBias | Tensor | None, geometry: Geometry, dtype: torch.dtype
) -> BiasPlan:
    """What `attn_bias` adds to the scores of one call, as data.

    Args:
        attn_bias: a bias, a sum of them, a float tensor (a `DenseBias`), or None.
        geometry: the call's sizes.
        dtype: the query's dtype. Slopes and distance values come out in float32 (float64 for a
            float64 query), because a bfloat16 slope times a distance is useless; a dense part
            keeps its dtype, O(Lq * Lk) being too much to copy.

    Raises:
        ArgumentTypeError: something else was passed, or a wrong dtype.
        ShapeError: a part does not fit the geometry.
        DeviceError: a part is on another device.
    """
    if attn_bias is None:
        return NO_BIAS
    if isinstance(attn_bias, Tensor):
        _check_dense(attn_bias)
        return _lower_dense(attn_bias, geometry, dtype)
    return as_bias(attn_bias).lower(geometry, dtype)


def as_bias(attn_bias: ScoreBias | Tensor) -> ScoreBias:
    """The bias itself, or DenseBias of a float tensor; raises ArgumentTypeError for all else."""
    if isinstance(attn_bias, ScoreBias):
        return attn_bias
    if isinstance(attn_bias, Tensor):
        return DenseBias(attn_bias)
    raise ArgumentTypeError(
        f"attn_bias is a {type(attn_bias).__name__}; expected Alibi, RelativeBias, DenseBias, a "
        f"sum of them, a float tensor, or None: torch.as_tensor converts arrays and lists."
    )


def _lower_dense(tensor: Tensor, geometry: Geometry, dtype: torch.dtype) -> BiasPlan:
    _check_device(tensor, geometry, "attn_bias")
    if tensor.dtype not in (dtype, torch.float32):
        (tensor,) = autocast(tensor)  # float32 stays as it is: nothing is gained by rounding it
    if tensor.dtype not in (dtype, torch.float32):
        raise ArgumentTypeError(
            f"attn_bias has dtype {tensor.dtype}; expected the query's {dtype}, or torch.float32: "
            f"convert it with .to({dtype})."
        )
    sizes = (geometry.batch, geometry.q_heads, geometry.q_len, geometry.k_len)
    dense = tensor.reshape([1] * (4 - tensor.dim()) + list(tensor.shape))
    if any(got not in (1, size) for got, size in zip(dense.shape, sizes, strict=True)):
        raise ShapeError(
            f"attn_bias has shape {list(tensor.shape)}; expected each size to be 1 or that of "
            f"[B, Hq, Lq, Lk] = {list(sizes)}, aligned to the right."
        )
    # A float32 bias of a half query stays float32; of a float64 query it becomes float64.
    return BiasPlan(dense=dense.double() if dtype == torch.float64 else dense)


def _add(left: BiasPlan, right: BiasPlan) -> BiasPlan:
    """The plan that adds what both plans add."""
    values, offset = right.distance_values, right.distance_offset
    if left.distance_values is not None:
        if values is None:
            values, offset = left.distance_values, left.distance_offset
        else:
            values, offset = _add_tables(left.distance_values, left.distance_offset, values, offset)
    return BiasPlan(
        slopes=_add_present(left.slopes, right.slopes),
        distance_values=values,
        distance_offset=offset,
        dense=_add_present(left.dense, right.dense),
        dense_is_sum=left.dense_is_sum or (left.dense is not None and right.dense is not None),
    )


def _add_tables(
    left: Tensor, left_offset: int, right: Tensor, right_offset: int
) -> tuple[Tensor, int]:
    """One table [Hq, N] over the distances of both, and its offset; each is held at its ends."""
    offset = max(left_offset, right_offset)
    end = max(left.shape[1] - left_offset, right.shape[1] - right_offset)
    ahead = torch.arange(-offset, end, device=left.device)
    return (
        left[:, (ahead + left_offset).clamp(0, left.shape[1] - 1)]
        + right[:, (ahead + right_offset).clamp(0, right.shape[1] - 1)]
    ), offset


def _add_present(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _parts(bias: ScoreBias) -> list[ScoreBias]:
    return list(bias.parts) if isinstance(bias, BiasSum) else [bias]  # type: ignore[arg-type]


def _hold(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Keep a tensor so that it moves with the module; only parameters enter its state_dict."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor, persistent=False)


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_float(tensor: Tensor, what: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(
            f"{what}: got {type(tensor).__name__}; expected a float torch.Tensor."
        )
    if not tensor.is_floating_point():
        hint = " A bool tensor is a mask: pass it as mask=." if tensor.dtype == torch.bool else ""
        raise ArgumentTypeError(f"{what}: got {tensor.dtype}; expected a float dtype.{hint}")


def _check_dense(tensor: Tensor) -> None:
    _check_float(tensor, "attn_bias")
    check_strided("attn_bias", tensor)
    if not 2 <= tensor.dim() <= 4:
        raise ShapeError(
            f"attn_bias has shape {list(tensor.shape)}; expected 2 to 4 axes, "
            f"[B|1, Hq|1, Lq|1, Lk|1] or its last two or three: reshape it."
        )


def _check_device(tensor: Tensor, geometry: Geometry, what: str) -> None:
    if tensor.device != geometry.device:
        raise DeviceError(
            f"{what}: on {tensor.device}; expected the query's {geometry.device}: move it with "
            f".to({str(geometry.device)!r})."
        )
