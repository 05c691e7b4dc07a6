"""Choosing a backend: the first of an ordered list that does not refuse.

`select` chooses or raises, `explain` tells; both know every refusal's reasons. A backend asked for
by name never falls back to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

from manyheads.backends import native, reference, sdpa
from manyheads.errors import ArgumentError, BackendError, StrictError
from manyheads.spec import AttentionSpec

#: In order of preference.
BACKENDS: tuple[ModuleType, ...] = (native, sdpa, reference)


@dataclass(frozen=True)
class Explanation:
    """What would run a call, and why; `str()` makes a readable report of it.

    backend: the name of the backend, or None if there is none (the call would raise).
    plan: "full", "band", "intervals" or "dense", and plan_reason in words.
    memory: why memory would grow with Lq * Lk, or None if it would not.
    reason: why that backend, and what it runs on; None without one.
    refusals: (backend's name, its reasons) for each that was asked before and refused.
    spec: the call's shapes, dtypes and needs.
    """

    backend: str | None
    plan: str
    plan_reason: str
    memory: str | None
    refusals: tuple[tuple[str, tuple[str, ...]], ...]
    spec: AttentionSpec
    reason: str | None = None

    def __str__(self) -> str:
        backend = f"{self.backend} ({self.reason})" if self.backend else "none can run this call"
        lines = [
            f"backend: {backend}",
            f"mask plan: {self.plan} ({self.plan_reason})",
            f"memory: {self.memory or 'O(n) beyond inputs and outputs'}",
        ]
        lines += [f"not {name}: {'; '.join(reasons)}" for name, reasons in self.refusals]
        return "\n".join([*lines, f"inputs: {describe(self.spec)}"])


def select(spec: AttentionSpec, backend: str | None = None, strict: bool = False) -> ModuleType:
    """The backend module that is to run a call like `spec`.

    Raises ArgumentError for a name that is no backend's; BackendError if no candidate can run the
    call; StrictError if one could, had `strict` not ruled out memory that grows with Lq * Lk.
    """
    chosen, refusals, too_big = _choose(spec, backend, strict)
    if chosen is not None:
        return chosen
    asked = (
        f"backend={backend!r} cannot run this call" if backend else "no backend can run this call"
    )
    if too_big:
        asked = f"strict=True, and {asked} without memory that grows with Lq * Lk"
    reasons = "".join(f"\n  {name}: {'; '.join(why)}" for name, why in refusals)
    fix = "give strict=False" if too_big else "change what is named above"
    if backend is not None:
        fix += ", or leave `backend` out to let another one run"
    error = StrictError if too_big else BackendError
    raise error(
        f"{asked}: got {describe(spec)}; expected one that nothing refuses:{reasons}\n{fix}"
    )


@lru_cache(maxsize=1024)
def select_cached(fields: tuple[Any, ...], backend: str | None, strict: bool) -> ModuleType:
    """`select` for AttentionSpec(*fields): repeated calls skip the object and the questions."""
    return select(AttentionSpec(*fields), backend, strict)


def explain(
    spec: AttentionSpec,
    plan_reason: str,
    plan_memory: str | None = None,
    backend: str | None = None,
    strict: bool = False,
) -> Explanation:
    """As `select`, but reports instead of raising when nothing can run the call.

    plan_memory: why the mask plan itself takes memory that grows with Lq * Lk, if it does.
    """
    chosen, refusals, _ = _choose(spec, backend, strict)
    memory = plan_memory
    if chosen is not None:
        memory = chosen.memory_note(spec) or plan_memory
    name = None if chosen is None or (strict and plan_memory) else chosen.NAME
    reason = None if name is None else _reason(chosen, backend)
    return Explanation(name, spec.plan, plan_reason, memory, tuple(refusals), spec, reason)


def _reason(chosen: ModuleType | None, backend: str | None) -> str:
    """Why this one was chosen; a backend may add, with `about()`, what it runs on."""
    names = ", ".join(candidate.NAME for candidate in BACKENDS)
    why = "asked for" if backend else f"first of {names} that can run this call"
    about = getattr(chosen, "about", None)
    return f"{why}; {about()}" if about else why


def describe(spec: AttentionSpec) -> str:
    """One line: sizes, dtype, device, and the needs that are set."""
    flags = ("softcap", "sinks", "dropout", "needs_grad", "needs_lse", "transformed")
    needs = [*(f"{kind} bias" for kind in spec.bias), *(f for f in flags if getattr(spec, f))]
    return (
        f"B={spec.batch} Hq={spec.q_heads} Hkv={spec.kv_heads} Lq={spec.q_len} Lk={spec.k_len} "
        f"D={spec.head_dim} Dv={spec.value_dim} {str(spec.dtype).removeprefix('torch.')} on "
        f"{spec.device}, {spec.plan} mask" + "".join(f", {need}" for need in needs)
    )


def _choose(
    spec: AttentionSpec, backend: str | None, strict: bool
) -> tuple[ModuleType | None, list[tuple[str, tuple[str, ...]]], bool]:
    """(the chosen backend, the refusals before it, whether only `strict` ruled some out)."""
    candidates = BACKENDS
    if backend is not None:
        candidates = tuple(b for b in BACKENDS if backend == b.NAME)
        if not candidates:
            names = ", ".join(repr(b.NAME) for b in BACKENDS)
            raise ArgumentError(
                f"unknown backend: got {backend!r}; expected one of {names}, or None to let "
                "manyheads choose"
            )
    refusals: list[tuple[str, tuple[str, ...]]] = []
    too_big = False
    able: ModuleType | None = None  # but slower than another, should one be able too
    for candidate in candidates:
        reasons = candidate.why_not(spec)
        if not reasons:
            note = candidate.memory_note(spec)
            slower = getattr(candidate, "slower_here", lambda spec: None)(spec)
            if note is not None and (strict or able is not None):
                too_big = strict
                reasons = [note]
            elif slower is not None and backend is None:
                able = able or candidate
                reasons = [slower]
            else:
                return candidate, refusals, False
        refusals.append((candidate.NAME, tuple(reasons)))
    if able is not None:
        return able, [refusal for refusal in refusals if refusal[0] != able.NAME], False
    return None, refusals, too_big
