"""What training code does around attention: autocast, checkpoints, compiled steps."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import manyheads as mh

B, L, E = 2, 37, 48


def make_module(dropout: float = 0.0) -> mh.MultiHeadAttention:
    torch.manual_seed(1)
    return mh.MultiHeadAttention(
        E, 6, num_kv_heads=2, mask=mh.Causal(), positions=mh.Rotary(8), dropout=dropout
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_what_pytorch_casts(dtype: torch.dtype) -> None:
    wide = [torch.randn(1, 3, 11, 8) for _ in range(3)]
    double = [x.double() for x in wide]
    mixed = [wide[0], wide[1].to(dtype), wide[2]]
    with torch.autocast("cpu", dtype):
        for inputs in (wide, double, mixed):
            ours = mh.attention(*inputs, query_start=0, mask=mh.Causal())
            assert ours.dtype == scaled_dot_product_attention(*inputs, is_causal=True).dtype
        assert mh.explain(*wide).spec.dtype == dtype
        assert mh.attention(*wide, return_lse=True)[1].dtype == torch.float32
    with torch.autocast("cpu", dtype, enabled=False):
        assert mh.attention(*wide).dtype == torch.float32


def test_autocast_casts_a_bias_of_another_half_type() -> None:
    x, bias = torch.randn(2, 3, 11, 8), torch.randn(3, 11, 11).half()
    with torch.autocast("cpu", torch.bfloat16):
        for given in (bias, mh.DenseBias(bias)):
            ours = mh.attention(x, x, x, attn_bias=given)
            assert torch.equal(ours, mh.attention(x, x, x, attn_bias=bias.bfloat16()))
    with pytest.raises(mh.ArgumentTypeError, match=r"dtype torch\.float16; expected"):
        mh.attention(x, x, x, attn_bias=bias)


def test_a_training_step_under_autocast() -> None:
    module, x = make_module(), torch.randn(B, L, E)
    with torch.autocast("cpu", torch.bfloat16):
        module(x).float().square().sum().backward()
    half = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert half[name].dtype == torch.float32
        error = (half[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 0.02 or parameter.grad.norm() < 1e-4, name  # keys' bias: zero by shifting


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(reentrant: bool) -> None:
    module, x = make_module(dropout=0.3), torch.randn(B, L, E, requires_grad=True)

    def checkpointed(y: torch.Tensor) -> torch.Tensor:
        return checkpoint(module, y, use_reentrant=reentrant)

    def backward(run) -> list[torch.Tensor]:
        torch.manual_seed(2)
        module.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        return [x.grad.clone(), *(p.grad.clone() for p in module.parameters())]

    assert all(map(torch.equal, backward(module), backward(checkpointed)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_training_step_of_any_length() -> None:
    module = make_module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 12, 33):
        x = torch.randn(B, length, E, requires_grad=True)
        expected = torch.autograd.grad(module(x).square().sum(), [x, module.k_proj.weight])
        found = torch.autograd.grad(compiled(x).square().sum(), [x, module.k_proj.weight])
        torch.testing.assert_close(found, expected)


# Tensors without values: shapes are inferred all the same, as by PyTorch's own attention.


def _masks(dense: torch.Tensor) -> list[mh.Mask | torch.Tensor]:
    every_other = mh.Predicate(lambda b, h, p, j: (p + j) % 2 == 0)
    lengths = torch.tensor([3, 5], device=dense.device)
    return [mh.Causal(), mh.Window(1, 1), mh.Documents([2, 3]), mh.KeyLengths(lengths), dense,
            mh.Causal() & mh.Dense(dense), every_other]  # fmt: skip


def _check_shapes(device: str, dtype: torch.dtype) -> None:
    made = {"device": device, "dtype": dtype}
    query = torch.randn(2, 6, 5, 8, **made)
    key, value = torch.randn(2, 3, 5, 8, **made), torch.randn(2, 3, 5, 11, **made)
    for mask in _masks(torch.ones(5, 5, dtype=torch.bool, device=device)):
        for backend in (None, "sdpa", "reference"):
            out = mh.attention(query, key, value, mask=mask, backend=backend)
            assert (out.shape, out.dtype, out.device.type) == ((2, 6, 5, 11), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shapes_of_meta_tensors(dtype: torch.dtype) -> None:
    _check_shapes("meta", dtype)
    module = mh.MultiHeadAttention(16, 4, device="meta", dtype=dtype, mask=mh.Causal())
    assert module(torch.empty(2, 5, 16, device="meta", dtype=dtype)).shape == (2, 5, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes_of_fake_tensors(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        _check_shapes("cpu", dtype)
    real, mask = torch.randn(2, 3, 5, 8, dtype=dtype), mh.Dense(torch.ones(5, 5).tril() > 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        mh.attention(real, real, real, mask=mask, backend="sdpa")
    causal = mh.attention(real, real, real, mask=mh.Causal(), backend="sdpa")
    torch.testing.assert_close(mh.attention(real, real, real, mask=mask, backend="sdpa"), causal)
