"""Projections computed by shorter ways: the same numbers, and the layer itself where it matters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_oracle
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from manyheads import MultiHeadAttention, projection
from manyheads._ops import CpuKernels
from manyheads.projection import project

HALF = (torch.bfloat16, torch.float16)
INPUTS, OUTPUTS = 719, 739
ROWS = 1423  # large enough for large pages


def layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias).to(dtype)


def rows(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, count, INPUTS).to(dtype)


@pytest.fixture
def row_products(monkeypatch) -> list[tuple[Any, ...]]:
    """The arguments of all calls of the operator for one row."""
    calls: list[tuple[Any, ...]] = []
    packet = torch.ops.manyheads.project_row
    real = packet.default
    monkeypatch.setattr(packet, "default", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(INPUTS, OUTPUTS), (768, 64), (1, 1), (17, 131)], ids=str)
def test_one_row_of_a_half_type_is_a_vector(dtype, bias, sizes, row_products):
    torch.manual_seed(0)
    linear = nn.Linear(*sizes, bias=bias).to(dtype)
    x = torch.randn(1, 1, sizes[0]).to(dtype)
    strided = x.expand(1, 2, -1).mT.contiguous().mT[:, :1]
    with torch.no_grad():
        actual, eager = project(linear, x), linear(x)
        assert len(row_products) == 1
        assert torch.equal(project(linear, strided), actual)
    exact = copy.deepcopy(linear).double()(x.double()).detach()
    assert actual.shape == eager.shape
    assert_close_to_oracle(actual[None], exact[None], eager[None], dtype)


def test_what_is_not_one_row_of_a_half_type_is_no_vector(row_products):
    columnwise = layer(torch.bfloat16)
    columnwise.weight = nn.Parameter(columnwise.weight.mT.contiguous().mT)
    without_inputs = layer(torch.bfloat16)
    without_inputs.weight = nn.Parameter(torch.empty(OUTPUTS, 0, dtype=torch.bfloat16))
    with torch.no_grad():
        for linear, x in (
            (layer(), rows(1)),
            (layer(torch.bfloat16), rows(2, torch.bfloat16)),
            (columnwise, rows(1, torch.bfloat16)),
            (without_inputs, torch.empty(1, 1, 0, dtype=torch.bfloat16)),
        ):
            assert torch.equal(project(linear, x), linear(x))
    assert not row_products


def test_one_row_gets_the_same_bits_on_any_number_of_threads(threads):
    linear, x = layer(torch.bfloat16), rows(1, torch.bfloat16)
    results = []
    with torch.no_grad():
        for count in (1, 2, 3):
            threads(count)
            results.append(project(linear, x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_operator_for_one_row(dtype):
    operator = torch.ops.manyheads.project_row.default
    weight, x, bias = (torch.randn(*sizes).to(dtype) for sizes in ((67, 131), (131,), (67,)))
    torch.library.opcheck(operator, (x, weight, bias))
    torch.library.opcheck(operator, (x, weight, None))
    exact = weight.double() @ x.double() + bias.double()
    assert_close_to_oracle(
        operator(x, weight, bias)[None, None, None], exact[None, None, None],
        torch.addmv(bias, weight, x)[None, None, None], dtype,
    )  # fmt: skip
    for wrong in (
        (x[1:], weight, bias), (x, weight, bias[1:]), (x, weight.mT.contiguous().mT, bias),
        (x.double(), weight, bias), (x, weight.double(), bias), (x[::2], weight[:, ::2], bias),
        (x, weight[0], bias), (x[None], weight, bias),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected"):
            operator(*wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [False, True])
def test_a_large_result_lies_in_large_pages(dtype, bias, strided, monkeypatch):
    linear, x = layer(dtype, bias), rows(2 * ROWS, dtype).view(2, ROWS, INPUTS)
    if strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    advised = []
    packet = torch.ops.manyheads.advise_large_pages
    real = packet.default
    monkeypatch.setattr(packet, "default", lambda t: advised.append(t.data_ptr()) or real(t))
    with torch.no_grad():
        # The layer rounds otherwise where it multiplies strided rows.
        actual, expected = project(linear, x), linear(x.contiguous())
        assert advised == [actual.data_ptr()]
        project(linear, rows(3, dtype))
    assert len(advised) == 1
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()


def step(linear: nn.Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.SGD([linear.weight], lr=0.5).step()
    linear.weight.grad = None


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "in place": lambda linear: linear.weight.mul_(3.0),
    "behind autograd's back": lambda linear: linear.weight.data.mul_(3.0),
    "load_state_dict": lambda linear: linear.load_state_dict(
        {name: -tensor for name, tensor in linear.state_dict().items()}
    ),
    "a new parameter": lambda linear: setattr(
        linear, "weight", nn.Parameter(torch.ones_like(linear.weight))
    ),
    "to another dtype": lambda linear: linear.to(torch.float16).weight.mul_(3.0),
    "an optimizer's step": step,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("count", [1, 2 * ROWS])
def test_a_changed_weight_is_seen_at_once(name, count):
    linear = layer(torch.bfloat16)
    with torch.no_grad():
        before = project(linear, rows(count, torch.bfloat16))
        CHANGES[name](linear)
        x = rows(count, linear.weight.dtype)
        actual, expected = project(linear, x), linear(x)
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)
    assert not torch.allclose(before.float(), expected.float(), atol=0.1)


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_hook(lambda module, args, out: 2.0 * out)
    return linear


def hooked_before(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    return linear


def replaced(linear: nn.Linear) -> nn.Module:
    own = linear.forward
    linear.forward = lambda x: 2.0 * own(x)  # type: ignore[method-assign]
    return linear


def louder(linear: nn.Linear) -> nn.Module:
    changed = Louder(INPUTS, OUTPUTS, dtype=linear.weight.dtype)
    changed.load_state_dict(linear.state_dict())
    return changed


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


def parametrized(linear: nn.Linear) -> nn.Module:
    linear.bias.data.mul_(2.0)
    nn.utils.parametrize.register_parametrization(linear, "weight", Twice())
    return linear


def without_weight(linear: nn.Linear) -> nn.Module:
    weight = 2.0 * linear.weight.detach()
    del linear.weight
    linear.weight = weight
    linear.bias.data.mul_(2.0)
    return linear


class Packed(Tensor):
    """As a quantised weight: it has its own way to be multiplied."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 2.0 * out if func is nn.functional.linear else out


def packed(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))
    return linear


def packed_bias(linear: nn.Linear) -> nn.Module:
    linear.bias = nn.Parameter(linear.bias.detach().as_subclass(Packed))
    return linear


OWN_RULES = [
    hooked, hooked_before, replaced, louder, parametrized, without_weight, packed, packed_bias
]  # fmt: skip


@pytest.mark.parametrize("change", OWN_RULES)
@pytest.mark.parametrize("count", [1, 2 * ROWS])
def test_a_layer_that_is_more_than_its_weight_is_called(change, count):
    x = rows(count, torch.bfloat16)
    plain, changed = layer(torch.bfloat16), change(layer(torch.bfloat16))
    with torch.no_grad():
        assert torch.equal(project(changed, x), changed(x))
        assert not torch.allclose(changed(x).float(), plain(x).float(), atol=0.1)


def with_bias(*sizes: int) -> Callable[[nn.Linear], None]:
    return lambda linear: setattr(linear, "bias", nn.Parameter(torch.randn(sizes)))


def with_one_row(linear: nn.Linear) -> None:
    linear.weight, linear.bias = nn.Parameter(linear.weight[0].detach()), None


def with_sparse_weight(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().to_sparse())


EDITED = {
    "one bias": with_bias(),
    "a bias of one": with_bias(1),
    "a row of biases": with_bias(1, OUTPUTS),
    "a vector": with_one_row,
    "a sparse weight": with_sparse_weight,
}


@pytest.mark.parametrize("name", EDITED)
@pytest.mark.parametrize(("count", "dtype"), [(1, torch.bfloat16), (2 * ROWS, torch.float32)])
def test_a_layer_of_edited_parts_gives_what_it_gives(name, count, dtype, row_products):
    linear, x = layer(), rows(count, dtype)
    EDITED[name](linear)
    linear.to(dtype)
    with torch.no_grad():
        actual, expected = project(linear, x), linear(x)
    assert torch.equal(actual, expected)
    assert not row_products


@pytest.mark.parametrize(
    "x", [rows(1, torch.bfloat16).to("meta"), rows(1, torch.bfloat16)[..., 1:]]
)
def test_what_the_layer_refuses_the_layer_refuses(x):
    linear = layer(torch.bfloat16)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as expected:
            linear(x)
        with pytest.raises(RuntimeError) as actual:
            project(linear, x)
    assert str(actual.value) == str(expected.value)


def test_a_global_hook_sees_every_layer():
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    attend = MultiHeadAttention(12, 3).eval()
    try:
        with torch.no_grad():
            attend(torch.randn(1, 5, 12))
    finally:
        handle.remove()
    assert seen == [attend.q_proj, attend.k_proj, attend.v_proj, attend.out_proj, attend]


@pytest.mark.parametrize("count", [1, 2 * ROWS])
def test_flops_are_counted(count):
    linear, x = layer(torch.bfloat16), rows(count, torch.bfloat16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        project(linear, x)
    assert counter.get_total_flops() == 2 * count * INPUTS * OUTPUTS


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 2 * ROWS])
@pytest.mark.parametrize(
    ("mode", "name"), [(Operators, "aten.addmm.default"), (Functions, "linear")]
)
def test_who_watches_sees_the_layer(count, mode, name):
    linear, x = layer(torch.bfloat16), rows(count, torch.bfloat16)
    with torch.no_grad(), mode() as watching:
        project(linear, x)
    assert name in watching.seen
    assert not any("project_row" in seen or "large_pages" in seen for seen in watching.seen)


# PyTorch's forward mode loads its rules with torch.jit.script, which is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("count", [1, 2 * ROWS])
def test_transforms_and_autocast(count):
    linear, x = layer(torch.bfloat16), rows(count, torch.bfloat16)
    with torch.no_grad():
        expected = linear(x)
        mapped = torch.func.vmap(lambda x: project(linear, x))(torch.stack([x, x]))
        with forward_ad.dual_level():
            dual = project(linear, forward_ad.make_dual(x, x))
            tangent = forward_ad.unpack_dual(dual).tangent
        wide = layer()
        with torch.autocast("cpu", torch.bfloat16):
            cast = project(wide, rows(count))
    torch.testing.assert_close(mapped[1], expected, rtol=2**-7, atol=2**-7)
    without_bias = nn.functional.linear(x, linear.weight)
    torch.testing.assert_close(tangent, without_bias, rtol=2**-7, atol=2**-7)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("count", [1, 2 * ROWS])
def test_gradients_flow_where_they_are_wanted(count):
    linear, x = layer(torch.bfloat16), rows(count, torch.bfloat16).requires_grad_()
    out = project(linear, x)
    out.sum().backward()
    assert linear.weight.grad is not None and x.grad is not None
    torch.testing.assert_close(
        linear.bias.grad.float(), torch.full((OUTPUTS,), float(count)), rtol=2**-7, atol=0.0
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_module_without_gradient_gives_what_it_gives_with_one(mode):
    torch.manual_seed(0)
    attend = MultiHeadAttention(768, 12).to(torch.bfloat16).eval()
    x = torch.randn(1, 2741, 768).to(torch.bfloat16)
    with_gradient = attend(x)
    assert with_gradient.requires_grad
    with mode():
        without = attend(x)
    assert without.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(without, with_gradient)


@pytest.mark.parametrize(("count", "dtype"), [(2 * ROWS, torch.float32), (1, torch.bfloat16)])
def test_without_the_library(count, dtype, monkeypatch):
    linear, x = layer(dtype), rows(count, dtype)
    monkeypatch.setattr(projection._ops, "LIBRARY_ERROR", "gone")
    monkeypatch.setattr(projection._ops, "_CPU_KERNELS", CpuKernels(None, (), None))
    for name in ("advise_large_pages", "project_row"):
        monkeypatch.setattr(getattr(torch.ops.manyheads, name), "default", None)
    with torch.no_grad():
        assert torch.equal(project(linear, x), linear(x))
