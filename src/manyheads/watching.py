"""Who wants to see attention calls: nobody, unless something above looks inside.

`functional.attention` lets the watchers of the context (the thread or asyncio task) it runs in run
its call; `inspect` and `integrations` watch. Without a watcher that is the reading of one context
variable. A graph of torch.compile shows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from torch import Tensor

from manyheads.spec import AttentionCall

#: A backend's `run`: (out, lse) of a call.
Run: TypeAlias = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]
#: Gets a call as the backend will get it, and runs it: what it returns, or raises, the caller of
#: `attention` gets. The first watcher's `run` is the backend's, the next one's the first's.
Watcher: TypeAlias = Callable[[Run, AttentionCall], tuple[Tensor, Tensor | None]]

_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("manyheads_watchers", default=())

#: The watchers of this context.
watchers = _WATCHERS.get


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """For the time of the block, let `watcher` run the attention calls of this context."""
    _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:
        # Not the token's reset: blocks may end in another order than they began.
        _WATCHERS.set(tuple(other for other in _WATCHERS.get() if other is not watcher))


@contextmanager
def keeping() -> Iterator[list[AttentionCall]]:
    """A list that every attention call of this context is added to, for the time of the block."""
    calls: list[AttentionCall] = []

    def keep(run: Run, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        calls.append(call)
        return run(call)

    with watching(keep):
        yield calls
