"""Is one product with W^Q, W^K, W^V side by side faster than three?

docs/decisions/0003-separate-projections.md holds the answer.
Run it on a quiet machine:  taskset -c 1 python benchmarks/fused_projection.py
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from manyheads.benchmark import compare

#: name -> embed_dim, query columns, key (and value) columns
SIZES = {
    "128, 4 heads": (128, 128, 128),
    "576, 9/3 heads": (576, 576, 192),
    "768, 12 heads": (768, 768, 768),
    "2048, 32/8 heads": (2048, 2048, 512),
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | rows | three (µs) | one (µs) | one is faster by | spread | quiet |")
    print("|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for name, (embed, queries, keys) in SIZES.items():
            columns = [queries, keys, keys]
            weight, bias = torch.randn(sum(columns), embed), torch.randn(sum(columns))
            parts = list(zip(weight.split(columns), bias.split(columns), strict=True))
            for rows in (1, 16, 128, 1024):
                x = torch.randn(rows, embed)

                def one(x=x, weight=weight, bias=bias, columns=columns):
                    return linear(x, weight, bias).split(columns, -1)

                def three(x=x, parts=parts):
                    return tuple(linear(x, w, b) for w, b in parts)

                torch.testing.assert_close(one(), three(), rtol=1e-4, atol=1e-3)
                result = compare(one, three, pairs=9)
                low, high = result.spread
                quiet = {True: "yes", False: "no", None: "?"}[result.quiet]
                print(
                    f"| {name} | {rows} | {result.peer_seconds * 1e6:.0f} | "
                    f"{result.ours_seconds * 1e6:.0f} | {result.speedup:.2f}× | "
                    f"{low:.2f}–{high:.2f} | {quiet} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
