"""`observe()`: measure what the heads of a model do, while it runs.

Which layer an attention call belongs to is told by hooks on the model's modules, which are there
for the time of the block alone: the innermost module that is running. The call itself, with its
masks, biases and positions as the kernels get them, comes from `manyheads.watching`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyheads.errors import ArgumentError, ArgumentTypeError
from manyheads.inspect import layers as choosing
from manyheads.inspect.filled import filled_length
from manyheads.inspect.functional import attend_and_measure, measure_call
from manyheads.inspect.keeping import Kept
from manyheads.inspect.kernels import leaves_stats
from manyheads.inspect.layers import Layers
from manyheads.inspect.measures import Measure
from manyheads.inspect.records import Record, Seen
from manyheads.inspect.stance import uncompiled
from manyheads.parts import heads_at
from manyheads.spec import AttentionCall
from manyheads.watching import Run, watchers, watching


class _Running(NamedTuple):
    """A module that is running, and what it runs in."""

    module: nn.Module
    inside: _Running | None


_running: ContextVar[_Running | None] = ContextVar("manyheads_running", default=None)


def observe(
    model: nn.Module,
    *measures: Measure,
    layers: Layers | None = None,
    heads: int | Iterable[int] | None = None,
    keep_megabytes: float | None = None,
) -> Observer:
    """Measure attention inside the block, in every call of every chosen layer of the model.

    Layers are the modules that call `attention`: `MultiHeadAttention`, a module of your own, or
    the attention modules of a transformers model, which runs on manyheads for the time of the
    block. A layer's name is its path in the model (the model's class, where it is the model).
    Answers are exact, in memory that grows with Lq + Lk, detached, as `measure` documents them.

    Recorded are the calls of the thread (or asyncio task) that entered the block, and of tasks it
    starts; not those of other threads, nor those a backward pass makes again (checkpointing). Any
    number of observers may watch one model, in one thread or several: each gets its own records.
    What torch.compile compiled runs uncompiled while any block is open, in all threads.

    Args:
        model: a module that holds attention layers, or one itself.
        measures: what to measure, such as `Entropy(), TopKeys(8)`.
        layers: paths or globs ("model.layers.[0-3].*") of layers, or of modules around them; or a
            function that says of each path whether it is wanted. None: all.
        heads: the query heads to measure. None: all.
        keep_megabytes: keep the calls' queries and keys too, at most so many megabytes, so that
            `inspect.serve` can compute any of their weights again. None: keep none.

    Returns:
        A context manager that gives a `Seen`.

    Raises:
        ArgumentError: no measure; a model whose attention cannot be observed; layers that are not
            there. At the end of the block: the model ran, and nothing was recorded. In the model:
            a head that a layer does not have, a question that makes no sense for a call, or more
            queries and keys than may be kept.
        ArgumentTypeError: an argument of the wrong type.

    >>> import torch, manyheads as mh
    >>> attend = mh.MultiHeadAttention(16, 4, mask=mh.Causal())
    >>> with mh.observe(attend, mh.Entropy(), mh.TopKeys(3), heads=(0, 2)) as seen:
    ...     _ = attend(torch.randn(1, 5, 16))
    >>> record, = seen["MultiHeadAttention"]
    >>> record[mh.Entropy()].shape, record[mh.TopKeys(3)].keys.shape
    (torch.Size([1, 2, 5]), torch.Size([1, 2, 5, 3]))
    """
    return Observer(model, measures, layers, heads, keep_megabytes)


class Observer:
    """What `observe` returns: a context manager, for one block at a time."""

    def __init__(
        self,
        model: nn.Module,
        measures: tuple[Measure, ...],
        layers: Layers | None = None,
        heads: int | Iterable[int] | None = None,
        keep_megabytes: float | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(
                f"observe() got a {type(model).__name__} as model; expected a torch.nn.Module: "
                "give the model first, then the measures."
            )
        for one in measures:
            if not isinstance(one, Measure):
                raise ArgumentTypeError(
                    f"observe() got {one!r} as a measure; expected objects such as Entropy() or "
                    "TopKeys(8)."
                )
        if not measures:
            raise ArgumentError(
                "observe() got no measures; expected at least one, such as observe(model, "
                "Entropy(), TopKeys(8)): nothing is computed that was not asked for."
            )
        self.measures = tuple(one for n, one in enumerate(measures) if one not in measures[:n])
        self.paths = choosing.paths_of(model)
        self.models = choosing.transformers_models(self.paths)
        choosing.check_observable(self.paths, self.models)
        self.layers = layers
        self.wanted = choosing.chooser(layers, self.paths)
        self.heads = choosing.head_numbers(heads)
        if keep_megabytes is not None and not keep_megabytes > 0:
            raise ArgumentError(
                f"observe() got keep_megabytes={keep_megabytes}; expected a number above 0, or "
                "None to keep no queries and keys."
            )
        self.keep_megabytes = keep_megabytes
        self._block: _Block | None = None

    def __enter__(self) -> Seen:
        if self._block is not None:
            raise ArgumentError(
                "this observer is in use already; expected one block at a time: make another "
                "with observe()."
            )
        self._block = _Block(self)
        try:
            self._block.open()
        except BaseException:
            self._block = None
            raise
        return self._block.seen

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block, self._block = self._block, None
        assert block is not None
        block.close()
        if kind is None:
            block.check_something_was_seen()


class _Block:
    """One `with` block of an observer: its hooks, and what it has seen."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.seen = Seen()
        if observer.keep_megabytes is not None:
            self.seen.kept = Kept(int(observer.keep_megabytes * 1e6))
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._open = False
        self._ran_here = self._ran_elsewhere = self._called_outside = False
        self._passed_over: list[str] = []

    def open(self) -> None:
        """Switch transformers models, place the hooks, watch."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            if self.observer.models:
                from manyheads.integrations.huggingface_switch import on_manyheads

                stack.enter_context(on_manyheads(self.observer.models))
            # An interrupted forward pass (Ctrl-C) leaves its modules there.
            stack.callback(_running.set, _running.get())
            for module in self.observer.paths:
                if choosing.may_call_attention(module):
                    stack.callback(module.register_forward_pre_hook(self._before).remove)
                    after = module.register_forward_hook(_after, always_call=True)
                    stack.callback(after.remove)
            stack.enter_context(watching(self._watch))
            self._open = True
            stack.callback(self._end)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Undo all of it."""
        self._stack.close()

    def check_something_was_seen(self) -> None:
        """Raise ArgumentError if the model ran and left no record."""
        if len(self.seen):
            return
        if self._passed_over:
            raise ArgumentError(
                f"observe() recorded nothing: layers={self.observer.layers!r} chose none of the "
                f"layers that ran; expected some of {choosing.listed(self._passed_over)}."
            )
        if self._called_outside:
            raise ArgumentError(
                "observe() recorded nothing: attention was called, and no module of the model was "
                "running; expected model(...): call modules themselves, not their forward()."
            )
        if self._ran_here:
            raise ArgumentError(
                "observe() recorded nothing: the model ran, and none of its attention went "
                f"through manyheads; {choosing.what_can_be_observed(self.observer.paths)}"
            )
        if self._ran_elsewhere:
            raise ArgumentError(
                "observe() recorded nothing: the model ran in another thread; expected calls in "
                "the one that entered the block: open the block in the thread that runs the model."
            )

    def _end(self) -> None:
        # In case the context that is left is not the one that was entered and still watches.
        self._open = False

    def _before(self, module: nn.Module, inputs: Any) -> None:
        _running.set(_Running(module, _running.get()))
        if not self._ran_here:
            self._ran_here = self._watch in watchers()
            self._ran_elsewhere |= not self._ran_here

    def _layer(self) -> str | None:
        """The path of the innermost module that is running; None if none of this model is."""
        running = _running.get()
        while running is not None and running.module not in self.observer.paths:
            running = running.inside
        return None if running is None else self.observer.paths[running.module]

    def _watch(self, run: Run, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if not self._open or torch._C._current_graph_task_id() != -1:  # in a backward pass
            return run(call)
        layer = self._layer()
        if layer is None:
            self._called_outside = True
            return run(call)
        if not self.observer.wanted(layer):
            self._passed_over.append(layer)
            return run(call)
        if torch._C._are_functorch_transforms_active():
            raise ArgumentError(
                f"observe() cannot record layer {layer!r}: got a call inside a torch.func "
                "transform, whose tensors cannot be kept; expected plain ones: observe the model "
                "without vmap or grad around it."
            )
        heads, part = self._chosen_heads(call, layer)
        asked, geometry = self.observer.measures, call.geometry
        if part is call and leaves_stats(run, call):
            with _apart(geometry.device):
                out, lse, answers = attend_and_measure(run, call, asked)
        else:
            out, lse = run(call)
            with _apart(geometry.device):
                answers = measure_call(part, asked)
        with _apart(geometry.device):
            positions = call.positions.materialize(geometry)
            filled = filled_length(call, positions)
        with self._lock:
            step = len(self.seen[layer]) if layer in self.seen else 0
            if self.seen.kept is not None:
                with _apart(geometry.device):
                    self.seen.kept.add(layer, step, call)
            self.seen.append(
                Record(
                    layer, step, heads, geometry.q_len, geometry.k_len, positions, asked, answers,
                    filled,
                )
            )  # fmt: skip
        return out, lse

    def _chosen_heads(
        self, call: AttentionCall, layer: str
    ) -> tuple[tuple[int, ...], AttentionCall]:
        """(the heads to measure, the call of these heads)."""
        geometry, heads = call.geometry, self.observer.heads
        if heads is None:
            return tuple(range(geometry.q_heads)), call
        if max(heads) >= geometry.q_heads:
            raise ArgumentError(
                f"observe() got heads={heads}, and layer {layer!r} has {geometry.q_heads} heads; "
                f"expected numbers from 0 to {geometry.q_heads - 1}: choose others, or layers."
            )
        return heads, heads_at(call, torch.tensor(heads, device=geometry.device))


@contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """What the model runs under does not reach what is computed here."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autograd.forward_ad._set_fwd_grad_enabled(False),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def _after(module: nn.Module, inputs: Any, output: Any) -> None:
    running = _running.get()
    if running is not None and running.module is module:
        _running.set(running.inside)
