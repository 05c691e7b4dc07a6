"""`head_importance()`: how much the loss would feel it if a head were turned down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.gates import gating
from manyheads.inspect.layers import paths_of, transformers_models
from manyheads.inspect.stance import uncompiled
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
    are not changed, and may be frozen. What torch.compile compiled runs uncompiled meanwhile.

    Args:
        model: one that holds `MultiHeadAttention` modules, or is one; or a model of transformers,
            which runs on manyheads meanwhile.
        loss: runs the model on a batch and returns a floating scalar.
        batches: what `loss` is called with, one after another.

    Returns:
        For each attention layer, by its path in the model as `observe` names it, [Hq] numbers of
        at least 0, float32 (float64 for float64 inputs); zeros where the loss does not reach.
        Jagged batches count as one text. Layers of transformers that did not run are not there.

    Raises:
        ArgumentError: no such layers, no batches, or a loss that none of them reaches.
        ArgumentTypeError: `loss` returns something else than a floating scalar.

    >>> attention = MultiHeadAttention(8, num_heads=2)
    >>> texts = [torch.randn(3, 5, 8), torch.randn(3, 7, 8)]
    >>> scores = head_importance(attention, lambda x: attention(x).square().mean(), texts)
    >>> scores["MultiHeadAttention"].shape
    torch.Size([2])
    """
    layers = _Layers(model)
    totals: dict[str, Tensor] = {}
    texts: dict[str, int] = {}
    batch_count = 0
    for batch in batches:
        batch_count += 1
        for name, gradient in layers.gradients(loss, batch):
            sums = gradient.abs().sum(0)
            totals[name] = totals[name] + sums if name in totals else sums
            texts[name] = texts.get(name, 0) + len(gradient)
    if not batch_count:
        raise ArgumentError(
            "head_importance got no batches; expected at least one: an iterator that was used up "
            "has none left."
        )
    found = {name: total / texts[name] for name, total in totals.items()}
    unused = {name: torch.zeros(one.num_heads) for name, one in layers.ours.items()}
    return {
        name: (unused | found)[name] for name in layers.paths.values() if name in unused | found
    }


class _Layers:
    """The attention layers of a model, and the factors on their heads."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = paths_of(model)
        self.ours = {
            name: one for one, name in self.paths.items() if isinstance(one, MultiHeadAttention)
        }
        self.models = transformers_models(self.paths)
        if not self.ours and not self.models:
            raise ArgumentError(
                f"the {type(model).__name__} holds no manyheads.MultiHeadAttention and no model of "
                "transformers; expected at least one: their heads are what is measured."
            )

    def gradients(self, loss: Callable[[Batch], Tensor], batch: Batch) -> list[tuple[str, Tensor]]:
        """(layer, dL / dg [B, Hq]) for the layers that ran."""
        gates: dict[str, _Gates] = {}
        with ExitStack() as stack, torch.enable_grad(), uncompiled():
            for name, layer in self.ours.items():
                gates[name] = _Gates()
                hook = _split(gates[name], layer.num_heads)
                stack.callback(layer.out_proj.register_forward_pre_hook(hook).remove)
            if self.models:
                from manyheads.integrations.huggingface_switch import on_manyheads

                def gate(module: nn.Module, heads: Tensor) -> Tensor:
                    name = self.paths.get(module)
                    return heads if name is None else gates.setdefault(name, _Gates())(heads)

                stack.enter_context(on_manyheads(self.models))
                stack.enter_context(gating(gate))
            value = loss(batch)
            _check_loss(value)
            used = [(name, one) for name, of in gates.items() for one in of.by_size.values()]
            found: tuple[Tensor | None, ...] = ()
            if used and value.requires_grad:
                found = torch.autograd.grad(value, [one for _, one in used], allow_unused=True)
        if all(gradient is None for gradient in found):
            raise ArgumentError(
                "the loss does not depend on any attention of the model; expected it to run the "
                "model that was given, without detaching and outside of inference_mode."
            )
        return [
            (name, torch.zeros_like(gate) if gradient is None else gradient)
            for (name, gate), gradient in zip(used, found, strict=True)
        ]


class _Gates:
    """Multiplies each head's output [B, L, Hq, D] by a factor of 1."""

    def __init__(self) -> None:
        #: By batch size, so that a layer that runs several times for a text has one factor.
        self.by_size: dict[int, Tensor] = {}

    def __call__(self, heads: Tensor) -> Tensor:
        batch, _, count, _ = heads.shape
        if batch not in self.by_size:
            wide = torch.float64 if heads.dtype == torch.float64 else torch.float32
            ones = torch.ones(batch, count, dtype=wide, device=heads.device)
            self.by_size[batch] = ones.requires_grad_()
        return (heads * self.by_size[batch][:, None, :, None]).to(heads.dtype)


def _split(gates: _Gates, heads: int) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
    """The hook before a `MultiHeadAttention`'s out_proj."""

    def hook(out_proj: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = inputs
        return (gates(x.reshape(*x.shape[:-1], heads, -1)).flatten(-2), *others)

    return hook


def _check_loss(value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentTypeError(
            f"the loss is {got}; expected a floating tensor of one number: reduce it with "
            ".sum() or .mean()."
        )
