"""Whole modules against PyTorch's: evaluation, a training step, one step of decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from calls import calls_of
from rows import BF16, FP32, NAMES, Goal
from tasks import Task, multiply_limit, tolerance
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import manyheads as mh
from manyheads.benchmark import attention_flops, check_close, read_rate

EMBED, HEADS = 768, 12
BATCH, LENGTH = 8, 512
CACHED = 4096

FAST_PATH = "aten::_native_multi_head_attention"


class SlowPathError(RuntimeError):
    """nn.MultiheadAttention did not take the path that makes it a fair peer."""


def module_tasks(only: str) -> Iterator[Task]:
    """Those whose name contains `only`."""
    goals = (("eval", FP32, 1.75), ("eval", BF16, 1.4), ("train", FP32, 1.3), ("train", BF16, 1.5))
    for mode, dtype, goal in goals:
        name = f"module {mode} {NAMES[dtype]} ({BATCH}, {LENGTH}, {EMBED}), {HEADS} heads"
        if only in name:
            yield module_task(name, mode == "train", dtype, Goal(ratio=goal))
    name = f"module decode bf16 ({EMBED}), {HEADS} heads, cache {CACHED}"
    if only in name:
        yield decode_task(name, BF16, Goal(ratio=3.0))


def module_task(name: str, training: bool, dtype: torch.dtype, goal: Goal) -> Task:
    """nn.MultiheadAttention and its copy as ours, without weights returned."""
    torch.manual_seed(0)
    peer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=dtype).train(training)
    ours = mh.MultiHeadAttention.from_torch(peer)
    x = torch.randn(BATCH, LENGTH, EMBED).to(dtype)
    gradient = torch.randn_like(x)

    def theirs(x: Tensor) -> Tensor:
        return peer(x, x, x, need_weights=False)[0]

    def side(forward: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[[], Any]:
        if not training:
            return without_gradients(lambda: forward(x))
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        return lambda: torch.autograd.grad(forward(leaves[0]), leaves, gradient)

    sides = side(ours, ours), side(theirs, peer)
    if not training:
        check_fast_path(sides[1])
    names = [name for name, _ in ours.named_parameters()]

    def check(got: Any, expected: Any) -> None:
        if training:
            got = packed(got[0], dict(zip(names, got[1:], strict=True)))
        pairs = zip(got, expected, strict=True) if training else [(got, expected)]
        for one, other in pairs:
            check_close(one, other, tolerance(dtype))

    limit, limit_name = multiply_limit(dtype)
    projections = 2 * 4 * BATCH * LENGTH * EMBED**2
    attention = attention_flops(BATCH, HEADS, LENGTH**2, EMBED // HEADS, EMBED // HEADS)
    work = 3 * projections + attention * 7 // 2 if training else projections + attention
    return Task(name, *sides, check, limit, limit_name, work, goal)


def packed(x: Tensor, ours: dict[str, Tensor]) -> list[Tensor]:
    """Our gradients in the order and the layout of nn.MultiheadAttention's."""
    kinds = ("weight", "bias")
    stacked = [torch.cat([ours[f"{p}_proj.{kind}"] for p in "qkv"]) for kind in kinds]
    return [x, *stacked, *(ours[f"out_proj.{kind}"] for kind in kinds)]


def without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)


def check_fast_path(call: Callable[[], Any]) -> None:
    """Raise unless nn.MultiheadAttention runs its fused kernel, as it does for its users."""
    ran = calls_of(call)
    if FAST_PATH not in ran:
        raise SlowPathError(f"nn.MultiheadAttention did not call {FAST_PATH}, but {', '.join(ran)}")


def decode_task(name: str, dtype: torch.dtype, goal: Goal) -> Task:
    """One token after `CACHED` others, batch 1: the same through nn.Linear and PyTorch's attention.

    Both write the token's key and value behind those that are there; the next call does so again.
    """
    torch.manual_seed(0)
    size = EMBED // HEADS
    attend = mh.MultiHeadAttention(EMBED, HEADS, dtype=dtype).eval()
    linears = {}
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        linears[projection] = nn.Linear(EMBED, EMBED, dtype=dtype)
        linears[projection].load_state_dict(getattr(attend, projection).state_dict())
    past = torch.randn(2, 1, HEADS, CACHED, size).to(dtype)
    memory = torch.empty(2, 1, HEADS, CACHED + 1, size, dtype=dtype)
    memory[:, :, :, :CACHED] = past
    cache = mh.KVCache(CACHED + 1)
    cache.append(*past)
    x = torch.randn(1, 1, EMBED).to(dtype)

    def ours() -> Tensor:
        cache.truncate(CACHED)
        return attend(x, cache=cache)

    def peer() -> Tensor:
        q, k, v = (linears[f"{p}_proj"](x).view(1, 1, HEADS, size).transpose(1, 2) for p in "qkv")
        memory[0, :, :, CACHED:] = k
        memory[1, :, :, CACHED:] = v
        return linears["out_proj"](sdpa(q, *memory).transpose(1, 2).flatten(2))

    read = [memory, *(linear.weight.detach() for linear in linears.values())]
    return Task(
        name,
        without_gradients(ours),
        without_gradients(peer),
        lambda one, other: check_close(one, other, tolerance(dtype)),
        lambda: read_rate(*read),
        "read rate",
        sum(tensor.numel() * tensor.element_size() for tensor in read),
        goal,
    )
