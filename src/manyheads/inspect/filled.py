"""How many keys of a call there are in truth: a static cache has slots that are still empty."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.spec import AttentionCall, BandPlan, DensePlan, IntervalsPlan


def filled_length(call: AttentionCall, positions: Tensor) -> int | None:
    """Keys up to the last one that any query may attend to or stands at; None if that is all.

    positions: int64 [B|1, Lq], where each query row stands on the key axis.
    """
    k_len = call.geometry.k_len
    if not positions.numel():
        return None
    stands = int(positions.max()) + 1
    if stands >= k_len:  # nearly every call
        return None
    filled = max(stands, _reach(call, positions), 0)
    return filled if filled < k_len else None


def _reach(call: AttentionCall, positions: Tensor) -> int:
    """Keys up to the last one that any query may attend to."""
    plan = call.plan
    if isinstance(plan, IntervalsPlan):
        begins, ends = plan.ranges.unbind(-1)
        return int(ends.masked_fill(ends <= begins, 0).max()) if ends.numel() else 0
    if isinstance(plan, DensePlan):
        seen = plan.allowed.flatten(0, 2).any(0).nonzero()
        if plan.allowed.shape[-1] == 1:  # one entry for all keys
            return call.geometry.k_len if len(seen) else 0
        return int(seen.max()) + 1 if len(seen) else 0
    if not isinstance(plan, BandPlan):
        return call.geometry.k_len
    end = torch.as_tensor(call.geometry.k_len if plan.key_end is None else plan.key_end)
    reach = end
    if plan.right is not None:
        reach = torch.minimum(positions.amax(1) + plan.right + 1, end)
        if not plan.first_within_right:
            first = torch.as_tensor(plan.key_start + plan.first_n)
            reach = torch.maximum(reach, torch.minimum(first, end))
    return int(reach.max())
