"""`head_importance()`: how much the loss would feel it if a head were turned down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor, nn

from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.module import MultiHeadAttention

Batch = TypeVar("Batch")


def head_importance(
    model: nn.Module, loss: Callable[[Batch], Tensor], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The mean over texts of |dL / dg_i|, with g_i = 1 a factor on head i's output.

    Michel, Levy and Neubig, 2019 ("Are Sixteen Heads Really Better than One?"), eq. 2: their
    xi_h is g_i, their I_h the result. It says what turning a head down a little would do, without
    trying; to compare layers they divide each layer's by its norm.

    The derivative is taken for each batch element by itself. Where `loss` is a mean over a batch,
    it is that much smaller, so give batches of one size, or a sum. Parameters and their gradients
    are not changed, and may be frozen.

    Args:
        model: one that holds `MultiHeadAttention` modules, or is one.
        loss: runs the model on a batch and returns a floating scalar.
        batches: what `loss` is called with, one after another.

    Returns:
        For each `MultiHeadAttention`, by its name in the model, [Hq] numbers of at least 0, float32
        (float64 for float64 inputs); zeros for one that the loss does not reach. Jagged batches
        count as one text.

    Raises:
        ArgumentError: no such module, no batches, or a loss that none of them reaches.
        ArgumentTypeError: `loss` returns something else than a floating scalar.

    >>> attention = MultiHeadAttention(8, num_heads=2)
    >>> texts = [torch.randn(3, 5, 8), torch.randn(3, 7, 8)]
    >>> head_importance(attention, lambda x: attention(x).square().mean(), texts)[""].shape
    torch.Size([2])
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention)
    }
    if not layers:
        raise ArgumentError(
            f"the {type(model).__name__} holds no manyheads.MultiHeadAttention; expected at least "
            "one: their heads are what is measured."
        )
    totals: dict[str, Tensor | float] = dict.fromkeys(layers, 0.0)
    texts = dict.fromkeys(layers, 0)
    batch_count = 0
    for batch in batches:
        batch_count += 1
        for name, gradient in _gate_gradients(layers, loss, batch):
            totals[name] = totals[name] + gradient.abs().sum(0)
            texts[name] += len(gradient)
    if not batch_count:
        raise ArgumentError(
            "head_importance got no batches; expected at least one: an iterator that was used up "
            "has none left."
        )
    return {
        name: torch.as_tensor(total).expand(layers[name].num_heads) / max(1, texts[name])
        for name, total in totals.items()
    }


def _gate_gradients(
    layers: dict[str, MultiHeadAttention], loss: Callable[[Batch], Tensor], batch: Batch
) -> list[tuple[str, Tensor]]:
    """(layer, dL / dg [B, Hq]) for the layers that ran."""
    with ExitStack() as hooks, torch.enable_grad():
        gates = {}
        for name, layer in layers.items():
            gates[name] = _Gates(layer.num_heads)
            hook = layer.out_proj.register_forward_pre_hook(gates[name])
            hooks.callback(hook.remove)
        value = loss(batch)
        used = [(name, gate) for name, found in gates.items() for gate in found.by_size.values()]
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentTypeError(
                f"the loss is {got}; expected a floating tensor of one number: reduce it with "
                ".sum() or .mean()."
            )
        if not used or not value.requires_grad:
            raise ArgumentError(
                "the loss does not depend on any attention of the model; expected it to run the "
                "model that was given, without detaching and outside of inference_mode."
            )
        found = torch.autograd.grad(value, [gate for _, gate in used], allow_unused=True)
    return [
        (name, torch.zeros_like(gate) if gradient is None else gradient)
        for (name, gate), gradient in zip(used, found, strict=True)
    ]


class _Gates:
    """Multiplies each head's output by a factor of 1, before `out_proj`."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        #: By batch size, so that a layer that runs several times for a text has one factor.
        self.by_size: dict[int, Tensor] = {}

    def __call__(self, out_proj: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = inputs
        batch = x.shape[0]
        if batch not in self.by_size:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            ones = torch.ones(batch, self.heads, dtype=wide, device=x.device)
            self.by_size[batch] = ones.requires_grad_()
        heads = x.reshape(*x.shape[:-1], self.heads, -1)
        gated = heads * self.by_size[batch][:, None, :, None]
        return (gated.flatten(-2).to(x.dtype), *others)
