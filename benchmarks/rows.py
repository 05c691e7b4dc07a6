"""What is timed: the shapes, and the goal stated for each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import manyheads as mh
from manyheads.benchmark import attention_flops

#: What falls short of a goal by less than this share of it counts as having met it.
TOLERANCE = 0.03


@dataclass(frozen=True)
class Goal:
    """What to reach; with both given, either will do.

    ratio: PyTorch's time over ours.
    share: of the machine's limit.
    """

    ratio: float | None = None
    share: float | None = None

    def text(self, limit: str) -> str:
        parts = [] if self.ratio is None else [f"{self.ratio:g}x"]
        parts += [] if self.share is None else [f"{self.share:.0%} of {limit}"]
        return " or ".join(parts)

    def met(self, ratio: float, share: float) -> bool | None:
        """None where nothing is asked for."""
        reached = [got >= (1 - TOLERANCE) * wanted
                   for got, wanted in ((ratio, self.ratio), (share, self.share))
                   if wanted is not None]  # fmt: skip
        return any(reached) if reached else None


@dataclass(frozen=True)
class Row:
    """One call of attention, or with `gradients` a forward and a backward pass.

    queries: how many, the last ones; None for as many as keys. Few make it decoding, whose limit is
        the rate at which the machine reads memory of that size, not its multiply-adds.
    window: how many keys a query sees, itself included; causal.
    documents: the length of each of the packed documents.
    transposed: [B, L, H, D] memory, as a projection leaves it.
    learned_bias: a dense bias [Hq, L, L] that wants its gradient.
    peers: also timed against what `make bench-peers` installs.
    slow: a call takes PyTorch seconds, so five pairs must do.
    """

    name: str
    heads: tuple[int, int]
    length: int
    size: int
    goal: Goal
    batch: int = 1
    causal: bool = False
    window: int | None = None
    documents: int | None = None
    alibi: bool = False
    transposed: bool = False
    dtype: torch.dtype = torch.float32
    queries: int | None = None
    gradients: bool = False
    dropout: float = 0.0
    learned_bias: bool = False
    peers: bool = False
    slow: bool = False

    @property
    def reads(self) -> bool:
        return self.queries is not None

    @property
    def mask(self) -> mh.Mask | None:
        if self.documents is not None:
            return mh.Documents([self.documents] * (self.length // self.documents))
        if self.window is not None:
            return mh.Causal() & mh.Window(self.window - 1, 0)
        return mh.Causal() if self.causal else None

    def inputs(self) -> list[Tensor]:
        """Query, key, value; the same on every call."""
        random = torch.Generator().manual_seed(0)
        (hq, hkv), lq = self.heads, self.queries or self.length
        if self.transposed:
            shapes = [(self.batch, self.length, h, self.size) for h in (hq, hkv, hkv)]
            return [torch.randn(s, generator=random).transpose(1, 2) for s in shapes]
        shapes = [(self.batch, h, n, self.size) for h, n in ((hq, lq), (hkv, self.length))]
        query, key = (torch.randn(s, generator=random).to(self.dtype) for s in shapes)
        # One piece of memory for both, which is also what the read rate is measured on.
        memory = torch.stack([key, torch.randn(shapes[1], generator=random).to(self.dtype)])
        return [query, *memory]

    def work(self) -> int:
        """Bytes of K and V for decoding, else useful operations."""
        if self.reads:
            return 2 * self.batch * self.heads[1] * self.length * self.size * self.dtype.itemsize
        pairs = self.length**2
        if self.causal:  # as everybody counts it, the diagonal halved
            pairs //= 2
        elif self.mask is not None:
            pairs = int(self.mask.materialize(self.length, self.length).sum())
        forward = attention_flops(self.batch, self.heads[0], pairs, self.size, self.size)
        # The backward pass has five products of the size of the forward pass's two.
        return forward * 7 // 2 if self.gradients else forward


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def ratio(goal: float) -> Goal:
    return Goal(ratio=goal)


def share(goal: float) -> Goal:
    return Goal(share=goal)


PREFILL = (
    Row("16x4096x64 full", (16, 16), 4096, 64, share(0.82), peers=True),
    Row("16x4096x64 causal", (16, 16), 4096, 64, share(0.82), causal=True, peers=True),
    Row("8x4096x128 causal", (8, 8), 4096, 128, share(0.82), causal=True, peers=True),
    Row("GQA 32/8x2048x128 causal", (32, 8), 2048, 128, share(0.82), causal=True),
    Row("8x32768x64 causal", (8, 8), 32768, 64, share(0.82), causal=True, slow=True),
    Row("batch 8 12x512x64", (12, 12), 512, 64, share(0.78), batch=8, peers=True),
    Row("batch 32 12x128x64", (12, 12), 128, 64, share(0.67), batch=32, peers=True),
    Row("window 256 16x4096x64", (16, 16), 4096, 64, ratio(18), window=256),
    Row("window 256 8x16384x64", (8, 8), 16384, 64, ratio(100), window=256, slow=True),
    Row("16 documents of 256, 16x64", (16, 16), 4096, 64, ratio(21.5), documents=256),
    Row("ALiBi causal 16x2048x64", (16, 16), 2048, 64, ratio(3), causal=True, alibi=True),
    Row("[B,L,H,D] 16x4096x64 causal", (16, 16), 4096, 64, share(0.82), causal=True,
        transposed=True),
    Row("bf16 16x4096x64 full", (16, 16), 4096, 64, ratio(2.3), dtype=BF16),
    Row("bf16 16x4096x64 causal", (16, 16), 4096, 64, ratio(2.3), causal=True, dtype=BF16),
    Row("bf16 8x4096x128 causal", (8, 8), 4096, 128, ratio(2.3), causal=True, dtype=BF16),
    Row("bf16 GQA 32/8x2048x128 causal", (32, 8), 2048, 128, share(0.68), causal=True, dtype=BF16),
    Row("bf16 batch 8 12x512x64", (12, 12), 512, 64, ratio(2.4), batch=8, dtype=BF16),
    Row("bf16 batch 32 12x128x64", (12, 12), 128, 64, ratio(2.5), batch=32, dtype=BF16),
    Row("bf16 window 256 16x4096x64", (16, 16), 4096, 64, ratio(28), window=256, dtype=BF16),
    Row("bf16 16 documents of 256, 16x64", (16, 16), 4096, 64, ratio(28), documents=256,
        dtype=BF16),
    Row("fp16 16x4096x64 causal", (16, 16), 4096, 64, ratio(3), causal=True, dtype=FP16),
)  # fmt: skip

TRAINING = (
    Row("train 16x2048x64 causal", (16, 16), 2048, 64, share(0.78), causal=True, gradients=True),
    Row("train bf16 16x2048x64 causal", (16, 16), 2048, 64, ratio(2.2), causal=True, dtype=BF16,
        gradients=True),
    Row("train dropout 16x2048x64 causal", (16, 16), 2048, 64, ratio(5), causal=True,
        gradients=True, dropout=0.1, slow=True),
    Row("train learned dense bias 16x2048x64 causal", (16, 16), 2048, 64, ratio(4), causal=True,
        gradients=True, learned_bias=True),
    Row("train 1x8192x64 causal", (1, 1), 8192, 64, ratio(2.5), causal=True, gradients=True),
    Row("train window 256 16x4096x64", (16, 16), 4096, 64, ratio(15), window=256, gradients=True,
        slow=True),
    Row("train 16 documents of 256, 16x64", (16, 16), 4096, 64, ratio(12), documents=256,
        gradients=True, slow=True),
)  # fmt: skip


NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


def decoding(
    name: str, heads: tuple[int, int], length: int, size: int, batch: int, *goals: Goal
) -> list[Row]:
    """One query over a cache of `length`, in all three types."""
    return [
        Row(f"decode {word} {name}", heads, length, size, goal, batch, dtype=dtype, queries=1,
            peers=heads[0] != heads[1] and dtype is FP32)
        for (dtype, word), goal in zip(NAMES.items(), goals, strict=True)
    ]  # fmt: skip


DECODING = (
    *decoding("GQA 32/8x16384x128", (32, 8), 16384, 128, 1, share(0.75), share(0.75), share(0.75)),
    *decoding("GQA 32/8x2048x128", (32, 8), 2048, 128, 1, ratio(6.5), ratio(45), Goal()),
    *decoding("batch 8 12x1024x64", (12, 12), 1024, 64, 8,
              Goal(ratio=1.8, share=0.75), Goal(ratio=11, share=0.75), Goal()),
)  # fmt: skip

ROWS = (*PREFILL, *TRAINING, *DECODING)
