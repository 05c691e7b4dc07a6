"""A thin adapter from ONNX `Attention` nodes (opsets 23 to 25) to `manyheads.attention`.

https://onnx.ai/onnx/operators/onnx__Attention.html. What differs from us and is arranged here: 3-D
inputs with heads in the last axis, caches as inputs and outputs, float masks (our `attn_bias`),
masks shorter than the keys, and the optional fourth output, which exposes intermediate scores.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

import manyheads as mh


def shipped_cases() -> list[Any]:
    """Every Attention node test in the onnx wheel, without the expanded-function twins."""
    from onnx.backend.test.case import node

    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import attention  # noqa: F401  (fills the list)
    return [
        case
        for case in node._NodeTestCases
        if [n.op_type for n in case.model.graph.node] == ["Attention"]
    ]


def opset(case: Any) -> int:
    return int(next(o.version for o in case.model.opset_import if o.domain == ""))


def run_case(case: Any, backend: str) -> list[tuple[Tensor, Tensor]]:
    """[(ours, expected)] for every output the case asks for."""
    node = case.model.graph.node[0]
    inputs, expected = ([_tensor(x) for x in part] for part in case.data_sets[0])
    names = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    given = iter(inputs)
    tensors = {name: next(given) for name, used in zip(names, node.input, strict=False) if used}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    outputs = onnx_attention(**tensors, **attributes, backend=backend)
    wanted = [out for out, used in zip(outputs, node.output, strict=False) if used]
    return list(zip(wanted, expected, strict=True))


def onnx_attention(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Y, present_key, present_value, qk_matmul_output) as the operator defines them."""
    split = Q.dim() == 3
    if split:
        assert q_num_heads is not None and kv_num_heads is not None
        heads = ((Q, q_num_heads), (K, kv_num_heads), (V, kv_num_heads))
        Q, K, V = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in heads)
    start: int | Tensor = 0
    if past_key is not None and past_value is not None:
        start = past_key.shape[2]
        K, V = torch.cat([past_key, K], dim=2), torch.cat([past_value, V], dim=2)
    if nonpad_kv_seqlen is not None:
        start = nonpad_kv_seqlen - Q.shape[2]

    masks: list[mh.Mask] = []
    bias = None
    if attn_mask is not None:
        attn_mask = attn_mask.reshape(*[1] * (4 - attn_mask.dim()), *attn_mask.shape)
        attn_mask = attn_mask.expand(-1, -1, Q.shape[2], -1)
        missing = K.shape[2] - attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool:
            masks.append(mh.Dense(torch.nn.functional.pad(attn_mask, (0, missing), value=False)))
        else:
            bias = torch.nn.functional.pad(attn_mask, (0, missing), value=-math.inf)
    if is_causal:
        masks.append(mh.Causal())
    if max(left_window_size, right_window_size) >= 0:
        bounds = (None if n < 0 else n for n in (left_window_size, right_window_size))
        masks.append(mh.Window(*bounds))
    if nonpad_kv_seqlen is not None:
        masks.append(mh.KeyLengths(nonpad_kv_seqlen))
    mask = None
    for part in masks:
        mask = part if mask is None else mask & part

    out = mh.attention(
        Q, K, V,
        mask=mask, attn_bias=bias, scale=scale, softcap=softcap or None, query_start=start,
        backend=backend,
    )  # fmt: skip
    if split:
        out = out.transpose(1, 2).flatten(2)
    scores = _exposed_scores(Q, K, mask, bias, start, scale, softcap, qk_matmul_output_mode)
    return out, K, V, scores


def _exposed_scores(
    query: Tensor,
    key: Tensor,
    mask: mh.Mask | None,
    bias: Tensor | None,
    start: int | Tensor,
    scale: float | None,
    softcap: float,
    mode: int,
) -> Tensor:
    """The fourth output: scores 0 raw, 1 after softcap, 2 with bias and mask, 3 after softmax."""
    batch, q_heads, q_len, size = query.shape
    key = key.repeat_interleave(q_heads // key.shape[1], dim=1)
    scores = query.float() @ key.float().mT * (scale or size**-0.5)
    if softcap and mode >= 1:
        scores = softcap * torch.tanh(scores / softcap)
    if mode >= 2 and bias is not None:
        scores = scores + bias
    if mode >= 2 and mask is not None:
        sizes = {"batch": batch, "q_heads": q_heads, "query_start": start}
        allowed = mask.materialize(q_len, key.shape[2], **sizes)
        scores = scores.masked_fill(~allowed, -math.inf)
    if mode == 3:
        scores = torch.softmax(scores, dim=-1).nan_to_num()
    return scores.to(query.dtype)


def _tensor(x: Any) -> Tensor:
    if isinstance(x, onnx.TensorProto):
        x = onnx.numpy_helper.to_array(x)
    if x.dtype.name == "bfloat16":  # not one of numpy's own
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x))
