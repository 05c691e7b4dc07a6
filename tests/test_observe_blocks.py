"""`observe`: several observers, threads, compiled models, errors in the model."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch
from test_observe import HEADS, MEMORY, B, E, L, Model, Own, hook_count
from torch import Tensor, nn

import manyheads as mh
from manyheads import watching


def test_observers_nest_on_one_model_and_on_a_part_of_it() -> None:
    model, x = Model(), torch.randn(B, L, E)
    with mh.observe(model, mh.Entropy()) as outer:
        model(x)
        with mh.observe(model.layers[1], mh.Received(), layers="own") as inner:
            model(x)
        model(x)
    assert outer.layers == ("layers.0.own", "layers.1.own") and len(outer) == 6
    assert inner.layers == ("own",) and len(inner) == 1
    assert inner.records[0].measures == (mh.Received(),) and mh.Received() not in outer.records[3]
    assert hook_count(model) == 0 and not watching.watchers()


def test_blocks_may_end_in_any_order() -> None:
    model, x = Model(), torch.randn(B, L, E)
    first, second = mh.observe(model, mh.Entropy()), mh.observe(model, mh.Entropy())
    one, two = first.__enter__(), second.__enter__()
    model(x)
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    model(x)
    second.__exit__(None, None, None)
    assert (len(one), len(two)) == (2, 4)
    assert hook_count(model) == 0 and not watching.watchers()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_threads_each_get_their_own_calls() -> None:
    """Of one shared model; steps of the two are forced to interleave."""
    model, turns, seen = Model(), threading.Barrier(2, timeout=60), {}

    def run(name: str, length: int) -> None:
        with mh.observe(model, mh.Entropy()) as records:
            for _ in range(3):
                turns.wait()
                model(torch.randn(1, length, E))
            turns.wait()
        seen[name] = records

    threads = [threading.Thread(target=run, args=(str(n), n)) for n in (5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in (5, 7):
        records = seen[str(n)].records
        assert len(records) == 6 and {record.query_length for record in records} == {n}
        assert [r.step for r in records if r.layer == "layers.0.own"] == [0, 1, 2]
    assert hook_count(model) == 0


@torch.no_grad()
@pytest.mark.parametrize("how", ["before", "inside", "in place", "a part"])
def test_compiled_models_are_observed(how: str) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = dict(backend="eager", fullgraph=True)
    model, x = Model(), torch.randn(B, L, E)
    expected, run = model(x), model
    if how == "before":
        run = torch.compile(model, **options)
        run(x)
    elif how == "in place":
        model.compile(**options)
        model(x)
    elif how == "a part":
        model.layers[0] = torch.compile(model.layers[0], **options)
        model(x)
    with mh.observe(run, mh.Entropy()) as seen:
        if how == "inside":
            run = torch.compile(model, **options)
        torch.testing.assert_close(run(x), expected)
    assert seen.layers == ("layers.0.own", "layers.1.own") and len(seen) == 2
    torch.testing.assert_close(run(x), expected)
    assert len(seen) == 2


@torch.no_grad()
def test_a_compiled_graph_holds_nothing_of_it() -> None:
    torch._dynamo.reset()
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    attend, x = mh.MultiHeadAttention(E, HEADS), torch.randn(B, L, E)
    compiled = torch.compile(attend, backend=keep, fullgraph=True)
    compiled(x)
    with mh.observe(compiled, mh.Entropy()) as seen:
        compiled(x)
    compiled(x)
    assert len(graphs) == 1 and len(seen) == 1


def test_an_error_in_the_model_leaves_nothing_behind() -> None:
    model, x = Model(), torch.randn(B, L, E)
    with pytest.raises(mh.ShapeError), mh.observe(model, mh.Entropy()) as seen:
        model(x, torch.randn(B, MEMORY, 8))  # the memory has 7 columns
    assert seen.layers == ("layers.0.own",)
    assert hook_count(model) == 0 and not watching.watchers()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    with mh.observe(model, mh.Entropy()) as seen:
        model(x)
    assert len(seen) == 2


@pytest.mark.parametrize("where", ["forward", "hook"])
def test_a_model_may_handle_errors_of_its_layers(where: str) -> None:
    def refuse(module: nn.Module, given: Any) -> None:
        raise ValueError

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError

    class Forgiving(Own):
        def __init__(self) -> None:
            super().__init__()
            self.broken = Broken()
            if where == "hook":  # which runs before the observer's
                self.broken.register_forward_pre_hook(refuse)

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(ValueError):
                self.broken(x)
            return super().forward(x)

    model = Forgiving()
    with mh.observe(model, mh.Entropy()) as seen:
        model(torch.randn(B, L, 7))
    assert seen.layers == ("Forgiving",)


def test_an_interrupt_leaves_no_module_running() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    x = torch.randn(B, 1, L, 5)
    model = nn.Sequential(Own(), Interrupted())
    with pytest.raises(KeyboardInterrupt), mh.observe(model, mh.Entropy()):
        model(x[:, 0])
    with mh.observe(model, mh.Entropy()) as seen:
        model[0](x[:, 0])
        mh.attention(x, x, x)
    assert len(seen) == 1


def test_an_observer_serves_one_block_after_another() -> None:
    model, x = Model(), torch.randn(B, L, E)
    observer = mh.observe(model, mh.Entropy())
    for _ in range(2):
        with observer as seen:
            model(x)
        assert len(seen) == 2
    with observer, pytest.raises(mh.ArgumentError, match="one block at a time"):
        observer.__enter__()
    assert hook_count(model) == 0


def test_nothing_need_run() -> None:
    with mh.observe(Model(), mh.Entropy()) as seen:
        pass
    assert len(seen) == 0 and seen.layers == ()


def test_two_models_at_once_each_see_their_own() -> None:
    one, other = Model(), nn.ModuleDict({"deep": Model()})
    x = torch.randn(B, L, E)
    with mh.observe(one, mh.Entropy()) as first, mh.observe(other, mh.Received()) as second:
        other["deep"](one(x))
        one(x)
    assert first.layers == ("layers.0.own", "layers.1.own") and len(first) == 4
    assert second.layers == ("deep.layers.0.own", "deep.layers.1.own") and len(second) == 2
    assert first.measures == (mh.Entropy(),) and second.measures == (mh.Received(),)
    assert hook_count(one) == hook_count(other) == 0


# PyTorch's forward mode loads its rules with torch.jit.script, which is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("asked", [mh.Entropy(), mh.HeadSimilarity()], ids=["kernels", "blocks"])
def test_forward_mode_does_not_reach_the_records(asked: mh.Measure) -> None:
    model, x, tangent = Model(), torch.randn(B, L, E), torch.randn(B, L, E)
    forward = torch.autograd.forward_ad
    with mh.observe(model, asked) as plain:
        model(x)
    with forward.dual_level(), mh.observe(model, asked) as seen:
        out = forward.unpack_dual(model(forward.make_dual(x, tangent)))
        assert out.tangent.abs().sum() > 0
        for record, expected in zip(seen, plain, strict=True):
            dual = forward.unpack_dual(record[asked])
            assert dual.tangent is None
            torch.testing.assert_close(dual.primal, expected[asked])


def test_dropout_is_drawn_as_without_an_observer() -> None:
    attend = mh.MultiHeadAttention(E, HEADS, dropout=0.5)
    x = torch.randn(B, L, E)
    with mh.observe(attend.eval(), mh.Entropy(), mh.HeadSimilarity()) as expected:
        attend(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            attend.train()
            torch.manual_seed(3)
            plain = attend(x)
            after = torch.get_rng_state()
            torch.manual_seed(3)
            with mh.observe(attend, mh.Entropy(), mh.HeadSimilarity()) as seen:
                assert torch.equal(attend(x), plain)
            assert torch.equal(torch.get_rng_state(), after)
        for one, other in zip(seen.records[0].answers, expected.records[0].answers, strict=True):
            torch.testing.assert_close(one, other)  # of the weights before dropout


def test_a_block_that_ends_in_another_context_has_ended() -> None:
    """As an async generator's may: the context it was entered in still has it as a watcher."""
    model, x = Model(), torch.randn(B, L, E)
    context, observer = contextvars.copy_context(), mh.observe(model, mh.Entropy())
    first = context.run(observer.__enter__)
    context.run(model, x)
    observer.__exit__(None, None, None)

    def again() -> int:
        with mh.observe(model, mh.Entropy()) as second:
            model(x)
        return len(second)

    assert context.run(again) == 2 == len(first)
    assert hook_count(model) == 0
