"""Who wants to see attention calls: nobody, unless something above looks inside.

`functional.attention` shows each call that it has run to the watchers of the context (the thread or
asyncio task) it runs in; `inspect` and `integrations` watch. Without a watcher that is the reading
of one context variable. A graph of torch.compile shows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

from manyheads.spec import AttentionCall

#: Gets a call as the backend got it. What it raises, the caller of `attention` gets.
Watcher: TypeAlias = Callable[[AttentionCall], None]

_WATCHERS: ContextVar[tuple[Watcher, ...]] = ContextVar("manyheads_watchers", default=())

#: The watchers of this context.
watchers = _WATCHERS.get


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """For the time of the block, show `watcher` every attention call of this context."""
    _WATCHERS.set((*_WATCHERS.get(), watcher))
    try:
        yield
    finally:
        # Not the token's reset: blocks may end in another order than they began.
        _WATCHERS.set(tuple(other for other in _WATCHERS.get() if other is not watcher))
