"""What one attention call is, as plain data: its geometry, its mask plan, its bias plan, its needs.

Nothing here computes attention. `masks/` and `positions.py` produce plans, `dispatch.py` reads
`AttentionSpec`, the backends consume `AttentionCall`.

Axis letters, used everywhere: B batch, Hq query heads, Hkv key/value heads (Hq = G * Hkv), Lq and
Lk lengths, D head size of query and key, Dv head size of value. Positions count along the key
axis: query row r stands at key position p, key j at position j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

#: One number for the whole call, or int32 [B], one per batch element.
PerBatch: TypeAlias = int | Tensor


# Not frozen, as two others below: that would make one cost a microsecond of every call.
@dataclass(slots=True)
class Geometry:
    """The sizes a mask or bias is lowered for.

    `query_start` is what the caller gave (None: not given, so masks may align the queries
    themselves and the default is Lk - Lq).
    """

    batch: int
    q_heads: int
    q_len: int
    k_len: int
    device: torch.device
    query_start: PerBatch | None = None


@dataclass(slots=True)
class QueryPositions:
    """Where each query row stands on the key axis: p = start + r, or p = rows[b, r].

    start: int or int32 [B], used where `rows` is None.
    rows: int32 [B|1, Lq], for packed documents, where every document is aligned by itself.
    """

    start: PerBatch = 0
    rows: Tensor | None = None

    def materialize(self, geometry: Geometry) -> Tensor:
        """int64 [B|1, Lq]: the position of every query row."""
        if self.rows is not None:
            return self.rows.to(geometry.device, torch.int64)
        row = torch.arange(geometry.q_len, device=geometry.device)
        return _column(self.start, geometry, dims=2) + row[None]


@dataclass(frozen=True, slots=True)
class FullPlan:
    """Every query may attend to every key."""

    kind = "full"

    def materialize(self, geometry: Geometry, positions: QueryPositions) -> Tensor:
        return torch.ones(
            (1, 1, geometry.q_len, geometry.k_len), dtype=torch.bool, device=geometry.device
        )


@dataclass(frozen=True, slots=True)
class BandPlan:
    """A window around the query's position, plus the first keys, inside a key range; O(1) memory.

    Key j is allowed for position p when key_start <= j < key_end and either

    - p - left <= j <= p + right (None: unbounded on that side), or
    - j < key_start + first_n and, if `first_within_right`, also j <= p + right.

    Every number is an int or int32 [B]. `key_end` None means Lk.
    """

    left: PerBatch | None = None
    right: PerBatch | None = None
    first_n: PerBatch = 0
    first_within_right: bool = True
    key_start: PerBatch = 0
    key_end: PerBatch | None = None

    kind = "band"

    def is_top_left_causal(self, positions: QueryPositions) -> bool:
        """Whether this is exactly "key j <= query row r", told without reading a tensor."""
        for number in (self.right, self.first_n, self.key_start, positions.start):
            if not isinstance(number, int) or number != 0:
                return False
        return self.left is None and self.key_end is None and positions.rows is None

    def materialize(self, geometry: Geometry, positions: QueryPositions) -> Tensor:
        p = positions.materialize(geometry)[:, None, :, None]
        j = torch.arange(geometry.k_len, device=geometry.device)
        start = _column(self.key_start, geometry)
        end = geometry.k_len if self.key_end is None else _column(self.key_end, geometry)
        below_right = torch.ones_like(p + j, dtype=torch.bool)
        above_left = below_right
        if self.right is not None:
            below_right = j <= p + _column(self.right, geometry)
        if self.left is not None:
            above_left = j >= p - _column(self.left, geometry)
        first = j < start + _column(self.first_n, geometry)
        if self.first_within_right:
            first = first & below_right
        return ((above_left & below_right) | first) & (j >= start) & (j < end)


@dataclass(frozen=True, slots=True)
class IntervalsPlan:
    """Each query row's allowed keys as up to four half-open ranges.

    ranges: int32 [B|1, Hq|1, Lq, R, 2] contiguous, 1 <= R <= 4; an empty range has end <= start.
    Ranges of one row may overlap or touch; they are a union. Values lie in [0, Lk].
    """

    ranges: Tensor

    kind = "intervals"

    def materialize(self, geometry: Geometry, positions: QueryPositions) -> Tensor:
        j = torch.arange(geometry.k_len, device=geometry.device)
        start, end = self.ranges[..., 0, None], self.ranges[..., 1, None]
        return ((j >= start) & (j < end)).any(dim=-2)


@dataclass(frozen=True, slots=True)
class DensePlan:
    """A bool per (query, key) pair: O(Lq * Lk) memory, and `reason` says why nothing smaller did.

    allowed: bool [B|1, Hq|1, Lq, Lk], True = may attend.
    from_user: the caller handed in this tensor, so no memory was spent by us.
    """

    allowed: Tensor
    reason: str
    from_user: bool = False

    kind = "dense"

    def materialize(self, geometry: Geometry, positions: QueryPositions) -> Tensor:
        return self.allowed


MaskPlan: TypeAlias = FullPlan | BandPlan | IntervalsPlan | DensePlan


@dataclass(frozen=True, slots=True)
class BiasPlan:
    """What is added to the scaled, soft-capped scores; the parts add up.

    slopes: [Hq], ALiBi: adds -slope * |p - j|.
    distance_values: [Hq, N] with distance_offset: adds
        distance_values[h, clamp(j - p + distance_offset, 0, N - 1)] (T5's relative bias).
    dense: [B|1, Hq|1, Lq|1, Lk|1], added as it is. dense_is_sum: it was made here, of several.
    """

    slopes: Tensor | None = None
    distance_values: Tensor | None = None
    distance_offset: int = 0
    dense: Tensor | None = None
    dense_is_sum: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        names = (
            ("alibi", self.slopes),
            ("relative", self.distance_values),
            ("dense", self.dense),
        )
        return tuple(name for name, part in names if part is not None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        parts = (self.slopes, self.distance_values, self.dense)
        return tuple(part for part in parts if part is not None)

    def materialize(self, geometry: Geometry, positions: QueryPositions) -> Tensor | None:
        """The sum of the parts, broadcastable to [B, Hq, Lq, Lk]; None if there are none."""
        total = self.dense
        if self.slopes is None and self.distance_values is None:
            return total
        p = positions.materialize(geometry)[:, None, :, None]
        ahead = torch.arange(geometry.k_len, device=geometry.device) - p  # j - p
        if self.slopes is not None:
            alibi = -self.slopes[:, None, None] * ahead.abs()
            total = alibi if total is None else total + alibi
        if self.distance_values is not None:
            last = self.distance_values.shape[1] - 1
            index = (ahead + self.distance_offset).clamp(0, last)[:, 0]
            relative = self.distance_values[:, index].movedim(0, 1)
            total = relative if total is None else total + relative
        return total


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Shapes, dtypes and needs of one call: all that choosing a backend may depend on."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: str  # "cpu", "cuda", ...
    plan: str  # "full", "band", "intervals" or "dense"
    bias: tuple[str, ...] = ()  # any of "alibi", "relative", "dense"
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    needs_grad: bool = False
    needs_lse: bool = False
    causal: bool = False  # the plan is exactly "key j <= query row r"
    transformed: bool = False  # inside a torch.func transform or forward-mode differentiation
    forward_mode: bool = False  # of these, forward-mode differentiation
    dense_memory: str | None = None  # what `dense_memory` says of the call's mask and bias


#: Adds nothing.
NO_BIAS = BiasPlan()


def has_values(tensor: Tensor) -> bool:
    """False for a stand-in that only has a shape: a meta tensor, or one of FakeTensorMode."""
    if torch.compiler.is_compiling():
        return False
    like = tensor.new_empty(0)  # fake also where the mode takes real tensors
    return not (like.is_meta or is_fake(like))


def collapse(tensor: Tensor) -> Tensor:
    """The view that has 1 element along every axis that repeats one (stride 0)."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def may_collapse(bias: Tensor) -> bool:
    """False if someone may want the gradient of a dense bias: the view would get all of it.

    Under a torch.func transform a tensor does not tell that it requires grad.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    return not (bias.requires_grad and torch.is_grad_enabled())


def dense_memory(plan: MaskPlan, bias: BiasPlan) -> str | None:
    """Why kernels need more than a dense mask and bias as they were given, Lq * Lk; None if not.

    Kernels read bools and float32, contiguous along the keys, and broadcast every other axis.
    """
    reasons = []
    if isinstance(plan, DensePlan):
        allowed = plan.allowed
        if allowed.stride(3) != 1 and allowed.stride(2) != 0 and _has_pairs(allowed):
            reasons.append("the mask is copied, for a contiguous last axis")
    dense = bias.dense
    if dense is not None and _has_pairs(dense):
        read = collapse(dense) if may_collapse(dense) else dense
        ready = dense.dtype is torch.float32 and dense.stride(3) == 1
        if not ready and _has_pairs(read):
            reasons.append("attn_bias is copied, as float32 with a contiguous last axis")
        elif bias.dense_is_sum:
            reasons.append("attn_bias is the sum of several tensors")
        elif read is dense and dense.requires_grad and _repeats(dense):
            reasons.append("attn_bias gets a gradient as large as it was expanded to")
    return f"{' and '.join(reasons)}: memory grows with Lq * Lk" if reasons else None


@dataclass(slots=True)
class AttentionCall:
    """One validated call, as a backend receives it.

    query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv], one dtype, any strides.
    sinks: [Hq] or None. softcap: None, or the positive c of c * tanh(s / c).
    dropout_factors: what weights are multiplied by, [B, Hq, Lq, Lk], if that is drawn already.
    A backend returns (out [B, Hq, Lq, Dv], lse float32 [B, Hq, Lq] or None).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    geometry: Geometry
    plan: MaskPlan
    positions: QueryPositions
    bias: BiasPlan
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    needs_lse: bool = False
    dropout_factors: Tensor | None = None


def _repeats(tensor: Tensor) -> bool:
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _has_pairs(tensor: Tensor) -> bool:
    return tensor.shape[2] > 1 and tensor.shape[3] > 1


def _column(value: PerBatch, geometry: Geometry, dims: int = 4) -> Tensor | int:
    """A per-batch number shaped to broadcast against [B, ...] of `dims` dimensions."""
    if isinstance(value, int):
        return value
    return value.to(geometry.device, torch.int64).reshape(-1, *[1] * (dims - 1))
