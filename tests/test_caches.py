"""KVCache: what goes in comes out, in order, through growing, cropping, reordering and copying."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from manyheads.caches import KVCache
from manyheads.errors import ArgumentError, ArgumentTypeError, DeviceError, ShapeError

B, H, D, DV = 2, 3, 5, 7


def rows(length, *, batch=B, seed=0, dtype=torch.float32):
    """Keys [B, H, length, D] and values [B, H, length, Dv]."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(batch, H, length, D, generator=generator).to(dtype)
    return key, torch.randn(batch, H, length, DV, generator=generator).to(dtype)


def filled(*lengths, **options):
    """A cache fed piece by piece, and all that was fed to it."""
    cache, pieces = KVCache(**options), [rows(n, seed=i) for i, n in enumerate(lengths)]
    for piece in pieces:
        cache.append(*piece)
    keys, values = zip(*pieces, strict=True)
    return cache, torch.cat(keys, 2), torch.cat(values, 2)


def assert_holds(cache, key, value):
    got_key, got_value = cache.view()
    assert cache.length == key.shape[2]
    assert torch.equal(got_key, key)
    assert torch.equal(got_value, value)


@pytest.mark.parametrize("capacity", [0, 1, 67, 500])
@pytest.mark.parametrize("lengths", [(3,), (0, 2), (61, 1, 1, 1, 1, 0, 131), (1,) * 200], ids=len)
def test_holds_everything_in_order(lengths, capacity):
    cache, key, value = filled(*lengths, capacity=capacity)
    assert_holds(cache, key, value)


def test_append_returns_everything_so_far_as_views():
    cache, key, value = filled(3)
    more = rows(2, seed=9)
    got_key, got_value = cache.append(*more)
    assert torch.equal(got_key, torch.cat([key, more[0]], 2))
    assert torch.equal(got_value, torch.cat([value, more[1]], 2))
    assert got_key.data_ptr() == cache.view()[0].data_ptr()
    assert got_key.stride(2) == D and got_value.stride(2) == DV, "a head's rows follow each other"


def test_earlier_views_keep_their_rows():
    cache, key, _ = filled(3)
    before, _ = cache.view()
    for seed in range(100):
        cache.append(*rows(1, seed=seed))
    assert torch.equal(before, key)


def test_growing_copies_each_row_a_few_times_at_most():
    cache, copied = KVCache(), 0
    for seed in range(2_000):
        before = cache.capacity
        cache.append(*rows(1, seed=seed))
        if cache.capacity != before:
            copied += cache.length
    assert copied < 2 * 2_000
    assert cache.capacity <= 2 * 2_000


def test_given_capacity_is_allocated_once():
    cache = KVCache(capacity=300)
    cache.append(*rows(1))
    memory = cache.view()[0].data_ptr()
    for seed in range(299):
        cache.append(*rows(1, seed=seed))
    assert (cache.length, cache.capacity) == (300, 300)
    assert cache.view()[0].data_ptr() == memory


def test_truncate():
    cache, key, value = filled(5, 6)
    cache.truncate(7)
    assert_holds(cache, key[:, :, :7], value[:, :, :7])
    more = rows(3, seed=9)
    cache.append(*more)
    expected = [torch.cat([x[:, :, :7], y], 2) for x, y in zip((key, value), more, strict=True)]
    assert_holds(cache, *expected)
    cache.truncate(0)
    assert cache.length == 0


def test_reset_keeps_the_memory():
    cache, _, _ = filled(5)
    memory = cache.view()[0].data_ptr()
    cache.reset()
    assert cache.length == 0
    key, value = rows(4, seed=9)
    cache.append(key, value)
    assert_holds(cache, key, value)
    assert cache.view()[0].data_ptr() == memory


@pytest.mark.parametrize("indices", [[1, 0], [1, 1], [0, 1, 1, 0, 1], [1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_reorder(indices, dtype):
    cache, key, value = filled(5, 6)
    cache.reorder(torch.tensor(indices, dtype=dtype))
    assert_holds(cache, key[indices], value[indices])
    more = rows(3, batch=len(indices), seed=9)
    cache.append(*more)
    assert_holds(
        cache, torch.cat([key[indices], more[0]], 2), torch.cat([value[indices], more[1]], 2)
    )


def torch_save_load(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), torch_save_load],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_independent(copied):
    cache, key, value = filled(5, 6)
    other = copied(cache)
    other.append(*rows(1, seed=9))
    other.view()[0].zero_()
    assert_holds(cache, key, value)
    assert other.length == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_is_kept(dtype):
    cache = KVCache()
    key, value = cache.append(*rows(3, dtype=dtype))
    assert key.dtype == value.dtype == dtype


def test_inference_mode_inside_and_outside():
    cache = KVCache()
    with torch.inference_mode():
        cache.append(*rows(3, seed=0))
        cache.reorder(torch.tensor([1, 0]))
    cache.append(*rows(1, seed=1))
    with torch.inference_mode():
        cache.append(*rows(100, seed=2))
    cache.append(*rows(1, seed=3))
    pieces = [rows(n, seed=i) for i, n in enumerate((3, 1, 100, 1))]
    pieces[0] = tuple(x.flip(0) for x in pieces[0])
    assert_holds(cache, *(torch.cat(side, 2) for side in zip(*pieces, strict=True)))


def test_gradients_are_refused_and_no_grad_is_not():
    key, value = rows(3)
    key.requires_grad_()
    with pytest.raises(ArgumentError, match=r"key that requires grad; expected none.*no_grad"):
        KVCache().append(key, value)
    with torch.no_grad():
        got, _ = KVCache().append(key, value)
    assert not got.requires_grad


def test_repr():
    cache, _, _ = filled(3)
    assert repr(KVCache()) == "KVCache(length=0)"
    assert repr(cache) == (
        "KVCache(length=3, capacity=64, batch=2, kv_heads=3, head_dim=5, value_dim=7, "
        "dtype=torch.float32)"
    )


KEY, VALUE = rows(3)
ERRORS = {
    "negative capacity": (lambda c: KVCache(-1), ArgumentError, "capacity=-1; expected 0 or more"),
    "capacity of a wrong type": (
        lambda c: KVCache(KEY), ArgumentTypeError, r"whole number; got shape \[2, 3, 3, 5\]",
    ),
    "a bool as capacity": (lambda c: KVCache(True), ArgumentTypeError, "whole number; got True"),
    "a word as length": (lambda c: c.truncate("a"), ArgumentTypeError, "whole number; got 'a'"),
    "a beam too far": (
        lambda c: c.reorder(torch.tensor([0, 2])), ArgumentError,
        r"from 0 to 2; expected each in 0\.\.1",
    ),
    "a beam before the first": (
        lambda c: c.reorder(torch.tensor([-1])), ArgumentError, "from -1 to -1; expected each",
    ),
    "nothing yet": (lambda c: KVCache().view(), ArgumentError, "expected an append"),
    "too short": (
        lambda c: c.truncate(5), ArgumentError, "length 4; expected a length from 0 to 4",
    ),
    "negative length": (lambda c: c.truncate(-1), ArgumentError, "expected a length from 0 to 4"),
    "list of beams": (
        lambda c: c.reorder([0, 1]), ArgumentTypeError, "indices of list; expected an int64",
    ),
    "float beams": (lambda c: c.reorder(torch.zeros(2)), ArgumentTypeError, "float32; expected"),
    "table of beams": (
        lambda c: c.reorder(torch.zeros(2, 1).long()), ShapeError, r"\[2, 1\]; expected one axis",
    ),
    "rank": (lambda c: c.append(KEY[0], VALUE[0]), ShapeError, r"\[3, 3, 5\]; expected \[B, Hkv"),
    "integer key": (lambda c: c.append(KEY.long(), VALUE), ArgumentTypeError, "int64; expected a"),
    "key and value dtypes": (
        lambda c: c.append(KEY, VALUE.half()), ArgumentTypeError, "of torch.float16; expected",
    ),
    "lengths": (
        lambda c: c.append(KEY, VALUE[:, :, :2]), ShapeError, r"expected the same batch, heads",
    ),
    "dtype": (
        lambda c: c.append(KEY.half(), VALUE.half()), ArgumentTypeError,
        "key of torch.float16; expected the cached key's torch.float32",
    ),
    "batch": (
        lambda c: c.append(KEY[:1], VALUE[:1]), ShapeError, r"\(1, 3, 5\); expected \(2, 3, 5\)",
    ),
    "heads": (lambda c: c.append(KEY[:, :2], VALUE[:, :2]), ShapeError, r"expected \(2, 3, 5\)"),
    "head size": (lambda c: c.append(KEY[..., :4], VALUE), ShapeError, r"\(2, 3, 4\); expected"),
    "value size": (lambda c: c.append(KEY, VALUE[..., :4]), ShapeError, r"expected \(2, 3, 7\)"),
    "device": (
        lambda c: c.append(KEY.to("meta"), VALUE.to("meta")), DeviceError, "on meta; expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    cache, key, value = filled(4)
    with pytest.raises(error, match=message):
        call(cache)
    assert_holds(cache, key, value)
