"""Which of torch's operators a call reaches, and with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """by_name: each operator called, to the arguments of its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.by_name[func.name()] = args
        return func(*args, **(kwargs or {}))


def calls_of(run: Callable[[], Any]) -> dict[str, tuple[Any, ...]]:
    with Calls() as calls:
        run()
    return calls.by_name
