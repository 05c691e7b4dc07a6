"""Score biases: what they add, position by position, and how they add up."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

from manyheads.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError
from manyheads.positions import Alibi, DenseBias, RelativeBias, lower_bias
from manyheads.spec import BiasPlan, Geometry, QueryPositions

B, H, Q, K = 2, 3, 5, 11


def geometry(heads=H, q_len=Q, k_len=K, batch=B, device="cpu"):
    return Geometry(batch, heads, q_len, k_len, torch.device(device))


def added(bias, sizes=None, start=None, dtype=torch.float32):
    """[B, Hq, Lq, Lk]: what `bias` adds, its queries standing from `start` on."""
    sizes = sizes or geometry()
    start = sizes.k_len - sizes.q_len if start is None else start
    total = lower_bias(bias, sizes, dtype).materialize(sizes, QueryPositions(start))
    return total.expand(sizes.batch, sizes.q_heads, sizes.q_len, sizes.k_len)


def relative(heads=H, *, buckets=8, distance=16, bidirectional=True, seed=0):
    """A RelativeBias with small integers in its table, so that sums are exact."""
    bias = RelativeBias(
        heads, num_buckets=buckets, max_distance=distance, bidirectional=bidirectional
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        bias.table.copy_(torch.randint(-99, 99, bias.table.shape, generator=generator))
    return bias


def dense(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-99, 99, shape, generator=generator).float()


# --- ALiBi -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (16, [0.5 * h for h in range(1, 17)]),
        (3, [4, 8, 2]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
    ids=str,
)
def test_alibi_slopes_are_the_papers(heads, exponents):
    assert Alibi.paper_slopes(heads) == [2.0**-exponent for exponent in exponents]


def test_alibi_adds_minus_slope_times_distance():
    slopes = torch.tensor([0.5, 2.0, 0.0])
    expected = torch.tensor(
        [[[-m * abs(4 + row - key) for key in range(K)] for row in range(Q)] for m in slopes]
    )
    assert torch.equal(added(Alibi(slopes), start=4), expected.expand(B, H, Q, K))
    paper = torch.tensor(Alibi.paper_slopes(H))
    assert torch.equal(added(Alibi()), added(Alibi(paper)))


@pytest.mark.parametrize(
    ("query", "slopes", "plan"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_slopes_and_tables_are_added_in_full_precision(query, slopes, plan):
    assert lower_bias(Alibi(), geometry(), query).slopes.dtype == plan
    assert lower_bias(Alibi(torch.ones(H, dtype=slopes)), geometry(), query).slopes.dtype == plan
    bias = RelativeBias(H, dtype=slopes)
    assert lower_bias(bias, geometry(), query).distance_values.dtype == plan


def test_gradient_reaches_the_slopes():
    slopes = torch.tensor([0.5, 2.0, 0.25], requires_grad=True)
    added(Alibi(slopes), start=4).sum().backward()
    distances = sum(abs(4 + row - key) for row in range(Q) for key in range(K))
    assert torch.equal(slopes.grad, torch.full((H,), -float(B * distances)))


# --- T5's relative bias ------------------------------------------------------------------------

RELATIVE = [
    (8, 16, True),
    (8, 16, False),
    (32, 128, True),
    (32, 128, False),
    (6, 7, True),
    (5, 13, False),
]


def t5(bias, distance):
    """T5's own lookup for distances j - p, [Hq, ...]."""
    bucket = T5Attention._relative_position_bucket(
        distance,
        bidirectional=bias.bidirectional,
        num_buckets=bias.num_buckets,
        max_distance=bias.max_distance,
    )
    return nn.functional.embedding(bucket, bias.table).movedim(-1, 0)


@pytest.mark.parametrize(("buckets", "distance", "bidirectional"), RELATIVE)
@pytest.mark.parametrize("start", [0, 131, 300])
def test_relative_bias_is_t5s(buckets, distance, bidirectional, start):
    bias = relative(buckets=buckets, distance=distance, bidirectional=bidirectional)
    sizes = geometry(q_len=29, k_len=331)
    ahead = torch.arange(331) - (start + torch.arange(29))[:, None]
    assert torch.equal(added(bias, sizes, start), t5(bias, ahead).expand(B, H, 29, 331))


def test_gradient_reaches_the_table():
    bias, sizes = relative(), geometry(q_len=29, k_len=67)
    weight = dense(B, H, 29, 67, seed=1)  # integers: their sums are exact in any order
    (added(bias, sizes) * weight).sum().backward()
    got, bias.table.grad = bias.table.grad, None
    ahead = torch.arange(67) - (67 - 29 + torch.arange(29))[:, None]
    (t5(bias, ahead) * weight).sum().backward()
    assert got.abs().sum() > 0
    assert torch.equal(got, bias.table.grad)


def test_relative_bias_needs_memory_for_its_distances_only():
    plan = lower_bias(relative(distance=16), geometry(q_len=100_000, k_len=100_000), torch.float32)
    assert plan.distance_values.shape == (H, 2 * 16 + 1)
    assert plan.distance_offset == 16
    one_sided = relative(distance=16, bidirectional=False)
    assert lower_bias(one_sided, geometry(), torch.float32).distance_values.shape == (H, 16 + 1)


def test_relative_bias_survives_the_meta_device():
    expected = relative()
    with torch.device("meta"):
        built = RelativeBias(H, num_buckets=8, max_distance=16)
    built.load_state_dict(expected.state_dict(), assign=True)
    assert torch.equal(added(built), added(expected))


# --- dense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(Q, K), (1, K), (Q, 1), (H, Q, K), (H, 1, 1), (B, H, Q, K), (B, 1, 1, K), (1, 1, 1, 1)],
    ids=str,
)
def test_dense_bias_is_added_as_it_is(shape):
    tensor = dense(*shape)
    expected = torch.zeros(B, H, Q, K) + tensor
    assert torch.equal(added(tensor), expected)
    assert torch.equal(added(DenseBias(tensor)), expected)


def test_dense_bias_is_not_copied():
    tensor = dense(B, H, Q, K)
    assert lower_bias(tensor, geometry(), torch.float32).dense.data_ptr() == tensor.data_ptr()
    half = tensor.bfloat16()
    assert lower_bias(half, geometry(), torch.bfloat16).dense.data_ptr() == half.data_ptr()
    assert lower_bias(tensor, geometry(), torch.bfloat16).dense.dtype == torch.float32
    assert lower_bias(tensor, geometry(), torch.float64).dense.dtype == torch.float64


def test_no_bias():
    assert lower_bias(None, geometry(), torch.float32) == BiasPlan()


# --- sums --------------------------------------------------------------------------------------


def parts():
    return {
        "alibi": Alibi(torch.tensor([1.0, 2.0, 3.0])),
        "alibi of eighths": Alibi(torch.tensor([0.125, 0.25, 0.5])),
        "near": relative(distance=7, buckets=6, seed=1),
        "far": relative(distance=32, buckets=32, seed=2),
        "behind": relative(distance=8, bidirectional=False, seed=3),
        "dense": DenseBias(dense(Q, K, seed=4)),
        "dense per head": DenseBias(dense(H, 1, K, seed=5)),
    }


@pytest.mark.parametrize("left", parts())
@pytest.mark.parametrize("right", parts())
@pytest.mark.parametrize("start", [6, 40, -30])
def test_sums(left, right, start):
    a, b = parts()[left], parts()[right]
    assert torch.equal(added(a + b, start=start), added(a, start=start) + added(b, start=start))


def test_sum_of_everything():
    everything = parts()
    total, *rest = everything.values()
    for bias in rest:
        total = total + bias
    expected = sum(added(bias) for bias in everything.values())
    assert torch.equal(added(total), expected)
    assert lower_bias(total, geometry(), torch.float32).kinds == ("alibi", "relative", "dense")


# --- as modules --------------------------------------------------------------------------------


def test_parameters_inside_belong_to_the_model():
    bias = Alibi(nn.Parameter(torch.ones(H))) + relative() + DenseBias(dense(Q, K))
    model = nn.ModuleDict({"bias": bias})
    assert list(model.state_dict()) == ["bias.parts.0.slopes", "bias.parts.1.table"]
    expected = added(bias)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(added(copied["bias"]), expected)
    assert torch.equal(added(model.double()["bias"], dtype=torch.float64), expected.double())


def test_compiles_whole():
    table = relative()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensor):
        return added(Alibi() + table + DenseBias(tensor))

    tensor = dense(Q, K)
    assert torch.equal(compiled(tensor), added(Alibi() + table + DenseBias(tensor)))


# --- errors ------------------------------------------------------------------------------------

ERRORS = {
    "slopes of two axes": (
        lambda: Alibi(torch.ones(H, 1)), ShapeError, r"\[3, 1\]; expected one number per query",
    ),
    "integer slopes": (
        lambda: Alibi(torch.ones(H).int()), ArgumentTypeError, "int32; expected a float dtype",
    ),
    "a list of slopes": (
        lambda: Alibi([0.5]), ArgumentTypeError, "got list; expected a float torch.Tensor",
    ),
    "slopes of other heads": (
        lambda: added(Alibi(torch.ones(7))), ShapeError, "7 slopes; expected one .* 3: give",
    ),
    "no heads": (lambda: Alibi.paper_slopes(0), ArgumentError, "expected at least 1 head"),
    "odd buckets": (
        lambda: RelativeBias(H, num_buckets=7), ArgumentError, "num_buckets=7; expected an even",
    ),
    "one bucket": (
        lambda: RelativeBias(H, num_buckets=1, bidirectional=False), ArgumentError, "at least 2",
    ),
    "short distance": (
        lambda: RelativeBias(H, max_distance=8), ArgumentError, "max_distance=8; expected more .*8",
    ),
    "heads' type": (lambda: RelativeBias("4"), ArgumentTypeError, "num_heads must .*got '4'"),
    "buckets' type": (
        lambda: RelativeBias(H, num_buckets=8.0), ArgumentTypeError, "num_buckets must .*got 8.0",
    ),
    "distance's type": (
        lambda: RelativeBias(H, max_distance="9"), ArgumentTypeError, "max_distance must .*got '9'",
    ),
    "table without heads": (lambda: RelativeBias(0), ArgumentError, "num_heads=0; expected"),
    "table of other heads": (lambda: added(relative(7)), ShapeError, "7 heads; the query has 3"),
    "bool bias": (
        lambda: added(torch.ones(Q, K).bool()), ArgumentTypeError, "bool tensor is a mask",
    ),
    "integer bias": (
        lambda: DenseBias(torch.ones(Q, K).int()), ArgumentTypeError, "int32; expected a float",
    ),
    "sparse": (
        lambda: added(dense(Q, K).to_sparse()), ArgumentTypeError, r"sparse_coo.*\.to_dense",
    ),
    "one axis": (lambda: DenseBias(torch.ones(K)), ShapeError, r"\[11\]; expected 2 to 4 axes"),
    "wrong keys": (
        lambda: added(dense(Q, 7)), ShapeError, r"\[5, 7\]; expected .* \[2, 3, 5, 11\]",
    ),
    "wrong heads": (lambda: added(dense(1, 2, Q, K)), ShapeError, r"\[1, 2, 5, 11\]; expected"),
    "wrong dtype": (
        lambda: added(dense(Q, K).double()), ArgumentTypeError, "float64; expected the query's",
    ),
    "half bias of a float query": (
        lambda: added(dense(Q, K).half()), ArgumentTypeError, "float16; expected the query's",
    ),
    "another device": (
        lambda: added(dense(Q, K).to("meta")), DeviceError, "on meta; expected the query's cpu",
    ),
    "slopes on another device": (
        lambda: added(Alibi(torch.ones(H, device="meta"))), DeviceError, "on meta; expected",
    ),
    "a number": (lambda: added(0.5), ArgumentTypeError, "attn_bias is a float; expected Alibi"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_bias_and_a_tensor_do_not_add_silently():
    for add in (lambda a, b: a + b, lambda a, b: b + a):
        with pytest.raises(ArgumentTypeError, match=r"got Tensor.*mh.DenseBias\(tensor\)"):
            add(Alibi(), torch.zeros(Q, K))
    with pytest.raises(ArgumentTypeError, match="got float beside"):
        Alibi() + 1.0
