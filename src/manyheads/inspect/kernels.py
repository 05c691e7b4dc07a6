"""Measures by our own kernels: what each asks of the statistics operator, and what it makes of it.

The operator measures all that one pass can, with the forward pass that finds each row's maximum and
sum: of most measures one each. A second heat map, say, is a second pass, which computes the scores
once more. `WeightRows` stays in PyTorch, being a few rows of the definition itself, and so does
`HeadSimilarity`, which compares heads that the kernel does not have side by side. So does whatever
a gradient is wanted of, and float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from manyheads.backends import native
from manyheads.inspect.measures import (
    Entropy,
    FirstKeysMass,
    HeatMap,
    LogSumExp,
    MaxLogit,
    MeanDistance,
    Measure,
    OffsetMass,
    Received,
    Top,
    TopKeys,
)
from manyheads.spec import AttentionCall
from manyheads.watching import Run

_KINDS = (
    *(LogSumExp, MaxLogit, Entropy, MeanDistance, FirstKeysMass, OffsetMass),
    *(TopKeys, Received, HeatMap),
)
#: As many masses of one kind as a pass takes; csrc/attention.h: kMaxMasses.
_MOST_MASSES = 8

_Scores: TypeAlias = tuple[Any, ...]


def answered_here(call: AttentionCall, asked: tuple[Measure, ...]) -> tuple[Measure, ...]:
    """Those of the measures that the kernels have, each once; none if they cannot take the call."""
    ours = tuple(dict.fromkeys(one for one in asked if type(one) in _KINDS))
    return ours if ours and native.can_measure(call) else ()


def measure(call: AttentionCall, asked: tuple[Measure, ...]) -> tuple[Any, ...]:
    """Answers to measures of `answered_here`; the call's value is not read."""
    return attend_and_measure(native.without_value(call), asked)[2]


def leaves_stats(run: Run, call: AttentionCall) -> bool:
    """Whether `attend_and_measure` gives the output that `run` would."""
    return run is native.run and native.leaves_stats(call)


def attend_and_measure(
    call: AttentionCall, asked: tuple[Measure, ...]
) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
    """(out, lse if the call needs it, answers to measures of `answered_here`)."""
    needs_lse = call.needs_lse or LogSumExp() in asked
    questions, taken = _next_pass([one for one in asked if one != LogSumExp()], call)
    answers: dict[Measure, Any] = {}
    if taken:
        out, lse, stats, scores, results = native.run_and_measure(
            call, needs_lse, questions.arguments()
        )
        answers = _sorted_out(questions, taken, call, results)
    else:
        out, lse, stats, scores = native.run_with_stats(call, needs_lse)
    return (
        out,
        lse if call.needs_lse else None,
        _answer(call, asked, lse, stats, scores, answers),
    )


@dataclass(slots=True)
class _Questions:
    """One pass's; the operator's last arguments, in its order."""

    entropy: bool = False
    max_logit: bool = False
    mean_distance: bool = False
    first_keys: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    top: int = 0
    received: tuple[int, ...] = ()  # from which row on
    heat_map: tuple[int, ...] = ()  # begin, end and cells of rows, then of keys

    def arguments(self) -> tuple[Any, ...]:
        """The operator's last ones."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def rows(self) -> list[Measure]:
        """The measures of rows, in the order of the operator's answers to them."""
        flags = (self.entropy, Entropy()), (self.max_logit, MaxLogit())
        asked = [one for flag, one in (*flags, (self.mean_distance, MeanDistance())) if flag]
        masses = [FirstKeysMass(n) for n in self.first_keys]
        return [*asked, *masses, *(OffsetMass(n) for n in self.offsets)]

    def take(self, one: Measure, call: AttentionCall) -> bool:
        """Add one more question; False if this pass has no room for it."""
        q_len, k_len = call.geometry.q_len, call.geometry.k_len
        match one:
            case Entropy():
                self.entropy = True
            case MaxLogit():
                self.max_logit = True
            case MeanDistance():
                self.mean_distance = True
            case FirstKeysMass(n) if len(self.first_keys) < _MOST_MASSES:
                self.first_keys += (n,)
            case OffsetMass(offset) if len(self.offsets) < _MOST_MASSES:
                self.offsets += (offset,)
            case TopKeys(k) if not self.top:
                self.top = min(k, k_len)
            case Received(last) if not self.received:
                self.received = (0 if last is None else max(0, q_len - last),)
            case HeatMap() if not self.heat_map:
                rows, keys = one.queries or (0, q_len), one.keys or (0, k_len)
                cells = min(one.rows, rows[1] - rows[0]), min(one.columns, keys[1] - keys[0])
                self.heat_map = (*rows, cells[0], *keys, cells[1])
            case _:
                return False
        return True


def _next_pass(left: list[Measure], call: AttentionCall) -> tuple[_Questions, list[Measure]]:
    """What one more pass is asked, and the measures that answers."""
    questions = _Questions()
    return questions, [one for one in left if questions.take(one, call)]


def _answer(
    call: AttentionCall,
    asked: tuple[Measure, ...],
    lse: Tensor,
    stats: Tensor,
    scores: _Scores,
    known: dict[Measure, Any],
) -> tuple[Any, ...]:
    """All answers: those known, and as many passes as the others take."""
    answers = {LogSumExp(): lse, **known}
    while left := [one for one in asked if one not in answers]:
        questions, taken = _next_pass(left, call)
        results = torch.ops.manyheads.attention_statistics.default(
            stats, *scores, *questions.arguments()
        )
        answers |= _sorted_out(questions, taken, call, results)
    return tuple(answers[one] for one in asked)


def _sorted_out(
    questions: _Questions, taken: list[Measure], call: AttentionCall, results: tuple[Tensor, ...]
) -> dict[Measure, Any]:
    """One pass's results by measure."""
    rows, *others = results
    answers: dict[Measure, Any] = dict(zip(questions.rows(), rows.unbind(), strict=True))
    return answers | {one: _finish(one, call, *others) for one in taken if one not in answers}


def _finish(
    one: Measure,
    call: AttentionCall,
    top_weights: Tensor,
    top_keys: Tensor,
    received: Tensor,
    heat_map: Tensor,
) -> Any:
    if isinstance(one, TopKeys):
        if not call.geometry.k_len:
            shape = (*call.query.shape[:3], one.k)
            return Top(received.new_zeros(shape), received.new_full(shape, -1, dtype=torch.int64))
        missing = one.k - top_keys.shape[-1]
        return Top(pad(top_weights, (0, missing)), pad(top_keys, (0, missing), value=-1))
    if isinstance(one, HeatMap):
        return one.finish((heat_map,), call)
    return received
