"""What the tests of masks share: geometries, pictures, and lowering checked against the meaning."""

from __future__ import annotations

import torch

from manyheads import masks
from manyheads.masks import Causal, Documents, FirstKeys, Window
from manyheads.spec import Geometry

CPU = torch.device("cpu")
LENGTHS = torch.tensor([7, 5, 3])
DOCS = Documents([2, 3], [3, 4])
SINKS = Causal() & (Window(1, 0) | FirstKeys(1))


def geometry(q_len, k_len, *, batch=1, q_heads=1, query_start=None):
    return Geometry(batch, q_heads, q_len, k_len, CPU, query_start)


def rows_of(mask, q_len, k_len, **sizes):
    """The mask of batch element 0, head 0 as strings of 0 and 1."""
    allowed = mask.materialize(q_len, k_len, **sizes)[0, 0]
    return ["".join("01"[int(bit)] for bit in row) for row in allowed]


def check_lowering(mask, where):
    """The lowered plan means what the mask means; returns the plan."""
    plan, positions = masks.lower(mask, where)
    defined = mask.materialize(
        where.q_len,
        where.k_len,
        batch=where.batch,
        q_heads=where.q_heads,
        query_start=where.query_start,
    )
    size = (where.batch, where.q_heads, where.q_len, where.k_len)
    lowered = plan.materialize(where, positions)
    assert defined.dtype == lowered.dtype == torch.bool
    assert defined.dim() == 4 and defined.shape[2:] == size[2:]
    assert torch.equal(lowered.expand(size), defined.expand(size))
    return plan
