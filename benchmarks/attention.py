"""Our attention against PyTorch's, on the shapes that the goals are stated for.

    python benchmarks/attention.py [--only NAME] [--pairs N] [--patience SECONDS] [--write]

Every row is checked for agreement, then timed pair by pair in one process; the machine's limit is
measured beside each of our samples: its multiply-add peak, or for decoding its rate of reading.
`--write` puts the table into benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import platform
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import manyheads as mh
from manyheads.benchmark import (
    Comparison,
    attention_flops,
    check_close,
    compare,
    fma_peak,
    peak_now,
    read_rate,
)


@dataclass(frozen=True)
class Row:
    """One shape. `goal` is a share of the limit if below 1, otherwise a ratio to PyTorch's time.

    queries: how many, the last ones; None for as many as keys. Few make it decoding, whose limit is
        the rate at which the machine reads memory of that size, not its multiply-adds.
    """

    name: str
    heads: tuple[int, int]
    length: int
    size: int
    goal: float
    batch: int = 1
    mask: mh.Mask | None = None
    bias: mh.Alibi | None = None
    transposed: bool = False  # [B, L, H, D] memory, as a projection leaves it
    dtype: torch.dtype = torch.float32
    queries: int | None = None
    gradients: bool = False  # forward and backward
    dropout: float = 0.0

    @property
    def reads(self) -> bool:
        return self.queries is not None

    def inputs(self) -> list[Tensor]:
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
        pairs = self.length * (self.queries or self.length)
        if self.reads:
            return 2 * self.batch * self.heads[1] * self.length * self.size * self.dtype.itemsize
        if isinstance(self.mask, mh.Causal):  # as everybody counts it, the diagonal halved
            pairs //= 2
        elif self.mask is not None:
            pairs = int(self.mask.materialize(self.length, self.length).sum())
        forward = attention_flops(self.batch, self.heads[0], pairs, self.size, self.size)
        return (
            forward * 7 // 2 if self.gradients else forward
        )  # five more products of the same size


def window(size: int) -> mh.Mask:
    return mh.Causal() & mh.Window(size - 1, 0)


BF16, FP16 = torch.bfloat16, torch.float16

ROWS = [
    Row("16x4096x64 full", (16, 16), 4096, 64, 0.82),
    Row("16x4096x64 causal", (16, 16), 4096, 64, 0.82, mask=mh.Causal()),
    Row("8x4096x128 causal", (8, 8), 4096, 128, 0.82, mask=mh.Causal()),
    Row("GQA 32/8x2048x128 causal", (32, 8), 2048, 128, 0.82, mask=mh.Causal()),
    Row("8x32768x64 causal", (8, 8), 32768, 64, 0.82, mask=mh.Causal()),
    Row("batch 8 12x512x64", (12, 12), 512, 64, 0.78, batch=8),
    Row("batch 32 12x128x64", (12, 12), 128, 64, 0.67, batch=32),
    Row("window 256 16x4096x64", (16, 16), 4096, 64, 18.0, mask=window(256)),
    Row("window 256 8x16384x64", (8, 8), 16384, 64, 100.0, mask=window(256)),
    Row("16 documents of 256, 16x64", (16, 16), 4096, 64, 21.5, mask=mh.Documents([256] * 16)),
    Row("ALiBi causal 16x2048x64", (16, 16), 2048, 64, 3.0, mask=mh.Causal(), bias=mh.Alibi()),
    Row("[B,L,H,D] 16x4096x64 causal", (16, 16), 4096, 64, 0.82, mask=mh.Causal(), transposed=True),
    Row("bf16 16x4096x64 full", (16, 16), 4096, 64, 2.3, dtype=BF16),
    Row("bf16 16x4096x64 causal", (16, 16), 4096, 64, 2.3, mask=mh.Causal(), dtype=BF16),
    Row("bf16 8x4096x128 causal", (8, 8), 4096, 128, 2.3, mask=mh.Causal(), dtype=BF16),
    Row("bf16 GQA 32/8x2048x128 causal", (32, 8), 2048, 128, 2.3, mask=mh.Causal(), dtype=BF16),
    Row("bf16 batch 8 12x512x64", (12, 12), 512, 64, 2.4, batch=8, dtype=BF16),
    Row("bf16 batch 32 12x128x64", (12, 12), 128, 64, 2.5, batch=32, dtype=BF16),
    Row("bf16 window 256 16x4096x64", (16, 16), 4096, 64, 28.0, mask=window(256), dtype=BF16),
    Row("bf16 16 documents of 256, 16x64", (16, 16), 4096, 64, 28.0,
        mask=mh.Documents([256] * 16), dtype=BF16),
    Row("fp16 16x4096x64 causal", (16, 16), 4096, 64, 3.0, mask=mh.Causal(), dtype=FP16),
    Row("train 16x2048x64 causal", (16, 16), 2048, 64, 0.78, mask=mh.Causal(), gradients=True),
    Row("train bf16 16x2048x64 causal", (16, 16), 2048, 64, 2.2, mask=mh.Causal(), dtype=BF16,
        gradients=True),
    Row("train dropout 16x2048x64 causal", (16, 16), 2048, 64, 5.0, mask=mh.Causal(),
        gradients=True, dropout=0.1),
    Row("train 1x8192x64 causal", (1, 1), 8192, 64, 2.5, mask=mh.Causal(), gradients=True),
    Row("train window 256 16x4096x64", (16, 16), 4096, 64, 15.0, mask=window(256), gradients=True),
    Row("train 16 documents of 256, 16x64", (16, 16), 4096, 64, 12.0,
        mask=mh.Documents([256] * 16), gradients=True),
    *(
        Row(f"decode {word} {name}", heads, length, size, 0.75, batch, queries=1, dtype=dtype)
        for name, heads, length, size, batch in (
            ("GQA 32/8x16384x128", (32, 8), 16384, 128, 1),
            ("GQA 32/8x2048x128", (32, 8), 2048, 128, 1),
            ("batch 8 12x1024x64", (12, 12), 1024, 64, 8),
        )
        for word, dtype in (("fp32", torch.float32), ("bf16", BF16), ("fp16", FP16))
    ),
]  # fmt: skip


def peer_mask(row: Row) -> Tensor | None:
    """What PyTorch needs where `is_causal` does not say it: a dense tensor."""
    if row.mask is None or (isinstance(row.mask, mh.Causal) and row.bias is None):
        return None
    allowed = row.mask.materialize(row.length, row.length)
    if row.bias is None:
        return allowed
    position = torch.arange(row.length)
    distance = (position[:, None] - position).abs()
    slopes = torch.tensor([2 ** (-8 * (h + 1) / row.heads[0]) for h in range(row.heads[0])])
    bias = -slopes[:, None, None] * distance
    return bias.masked_fill(~allowed, float("-inf"))


def time_row(row: Row, pairs: int, patience: float) -> Comparison:
    query, key, value = row.inputs()
    mask = peer_mask(row)
    causal = isinstance(row.mask, mh.Causal) and mask is None
    grouped = row.heads[0] != row.heads[1]
    tolerance = 1e-4 if row.dtype is torch.float32 else 0.05

    gradient = torch.randn_like(query)
    if row.gradients:
        leaves = [x.requires_grad_() for x in (query, key, value)]

    def whole(attend: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """The call itself, or with the gradients of all three inputs."""
        if not row.gradients:
            return lambda: (attend(),)
        return lambda: torch.autograd.grad(attend(), leaves, gradient)

    def check(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> None:
        if not row.dropout:  # each drops other weights
            for one, other in zip(ours, peer, strict=True):
                check_close(one, other, tolerance)

    return compare(
        whole(
            lambda: mh.attention(
                query, key, value, mask=row.mask, attn_bias=row.bias, backend="native",
                dropout_p=row.dropout,
            )
        ),
        whole(
            lambda: sdpa(
                query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=grouped,
                dropout_p=row.dropout,
            )
        ),
        pairs=pairs,
        check=check,
        limit=(lambda: read_rate(key, value)) if row.reads else peak_now,
        patience=patience,
    )  # fmt: skip


def causal_over_full(length: int, pairs: int, patience: float) -> Comparison:
    """Full attention as the peer of causal: 1 / speedup is the time ratio."""
    query, key, value = Row("", (16, 16), length, 64, 1.0).inputs()
    return compare(
        lambda: mh.attention(query, key, value, mask=mh.Causal()),
        lambda: mh.attention(query, key, value),
        pairs=pairs,
        check=lambda ours, peer: None,  # they differ by meaning
        limit=peak_now,
        patience=patience,
    )


def extra_memory(length: int) -> float:
    """MB that one causal call of 8 heads of 64 adds to the process beyond inputs and output."""
    # Filled in place: what is freed before would hide what the call takes.
    query, key, value = (torch.empty(1, 8, length, 64).normal_() for _ in range(3))
    small = [x[:, :, :64].contiguous() for x in (query, key, value)]
    mh.attention(*small, mask=mh.Causal())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = mh.attention(query, key, value, mask=mh.Causal())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) / 1024 - out.numel() * out.element_size() / 2**20


def quiet_word(result: Comparison) -> str:
    if result.disturbed is None:
        return "no"
    left_out = f", {result.disturbed} left out" if result.disturbed else ""
    others = "unknown" if result.others is None else f"{result.others:.2f} cores"
    return ("yes" if result.quiet else f"others {others}") + left_out


def measure(pairs: int, only: str, patience: float) -> tuple[list[list[str]], list[float]]:
    """The table's rows, and every peak measured beside their timings."""
    lines, peaks = [], []
    for row in (r for r in ROWS if only in r.name):
        result = time_row(row, pairs, patience)
        peaks += () if row.reads else result.limits
        share = result.share_of_limit(row.work())
        limit = "read rate" if row.reads else "peak"
        reached = share if row.goal < 1 else result.speedup
        low, high = result.spread
        lines.append(
            [
                row.name,
                f"{result.ours_seconds * 1e3:.2f}",
                f"{result.speedup:.2f}x ({low:.2f}-{high:.2f})",
                f"{share:.1%} of {limit}",
                f"{row.goal:.0%} of {limit}" if row.goal < 1 else f"{row.goal:g}x",
                "yes" if reached >= 0.97 * row.goal else "no",
                quiet_word(result),
            ]
        )
    for length, goal in ((4096, 0.56), (512, 0.65), (256, 0.70)):
        name = f"causal over full, 16x{length}x64"
        if only in name:
            result = causal_over_full(length, pairs, patience)
            peaks += result.limits
            ratio = 1 / result.speedup
            verdict = "yes" if ratio <= 1.03 * goal else "no"
            time_ms = f"{result.ours_seconds * 1e3:.2f}"
            cells = [name, time_ms, f"{ratio:.3f} of the time", "", f"<= {goal}"]
            lines.append([*cells, verdict, quiet_word(result)])
    return lines, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--patience",
        type=float,
        default=20.0,
        help="seconds to wait, per row, for pairs that no neighbour disturbs",
    )
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    # First, while the process is small: its peak memory only ever grows.
    memory = extra_memory(32768) if not arguments.only else None
    lines, peaks = measure(arguments.pairs, arguments.only, arguments.patience)
    if memory is not None:
        verdict = "yes" if memory < 64 else "no"
        lines.append(["memory beyond inputs and output, 8x32768x64", "", f"{memory:.1f} MB", "",
                      "< 64 MB", verdict, ""])  # fmt: skip
    header = ["shape", "ms", "PyTorch time / ours", "of the limit", "goal", "met", "quiet"]
    table = Table(*header, title="attention on the CPU")
    for line in lines:
        table.add_row(*line)
    Console(width=140).print(table)
    if arguments.write:
        write(header, lines, peaks)


def write(header: list[str], lines: list[list[str]], peaks: list[float]) -> None:
    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    about = (
        f"Measured by `make bench`: {cpu_name()}, {torch.get_num_threads()} threads, "
        f"{mh.info().isa} kernels, torch {torch.__version__}, FMA peak "
        f"{median(peaks) / 1e9:.0f} GFLOP/s (median of those measured beside each timing). Medians "
        "of interleaved pairs, range over pairs in brackets; within 3 % of a goal counts as met."
        "\n\n"
        "The limit of decoding is the rate at which all threads read K and V, of the same size and "
        "in the same state of the caches, for which nothing but reading is done. "
        "The peak is taken over one millisecond before and after each of our samples, at the clock "
        "the machine has under such load. On registers alone for 0.3 s, which draws less power, "
        f"the same loop reached {fma_peak(0.3) or float('nan'):.0f} GFLOP/s after this run."
    )
    body = "\n".join([row(header), row(["---"] * len(header)), *map(row, lines)])
    path = Path(__file__).parent / "RESULTS.md"
    path.write_text(f"# Measured speed\n\n{about}\n\n{body}\n")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
