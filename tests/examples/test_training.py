import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from batches import Order
from checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from torch.nn import functional as F
from training import Settings, load_weights, train
from transformer import Config, Transformer

TEXTS = torch.randint(1, 17, (61, 11), generator=torch.Generator().manual_seed(7))
SETTINGS = Settings(steps=23, warmup=5, save_every=10, log_every=3, evaluate_every=9)
CHECKPOINT = "checkpoint.safetensors"


class Stop(Exception):
    pass


def make(dim=12):
    torch.manual_seed(1)
    return Transformer(17, Config(dim=dim, heads=2, dropout=0.1), decoder_layers=2)


def run(folder, stop_at=None, settings=SETTINGS, model=None, **options):
    """Train on the texts; `stop_at` is a step that never comes to its end, as in a crash."""
    model, steps = model or make(), iter(range(1000))

    def loss(rows):
        if next(steps) == stop_at:
            raise Stop
        texts = TEXTS[rows]
        return F.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())

    def evaluate():
        return {"noise": torch.rand(())}  # would change what comes after, if it could

    order = Order(len(TEXTS), 7, seed=3)
    log = train(model, order, loss, settings, folder, evaluate=evaluate, **options)
    return model, log


def without_time(log):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stopped_run_ends_bit_for_bit_where_the_other_does(tmp_path, bf16):
    settings = Settings(**{**vars(SETTINGS), "bf16": bf16})
    whole, log = run(tmp_path / "whole", settings=settings)
    with pytest.raises(Stop):
        run(tmp_path / "stopped", stop_at=14, settings=settings)
    tensors, state = load_checkpoint(tmp_path / "stopped" / CHECKPOINT)
    assert state["step"] == 10
    resumed, again = run(tmp_path / "stopped", settings=settings)
    assert without_time(again) == without_time(log)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    ended = [load_checkpoint(tmp_path / which / CHECKPOINT)[0] for which in ("whole", "stopped")]
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in tensors)


def test_the_log_is_a_table(tmp_path):
    _, log = run(tmp_path)
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12, 15, 18, 21, 23]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in log]
    assert [row["step"] for row in log if "noise" in row] == [9, 18, 23]
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_finished_run_is_not_run_again(tmp_path):
    first, log = run(tmp_path)
    second, again = run(tmp_path, stop_at=0)
    assert again == log
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    third = make()
    load_weights(tmp_path / CHECKPOINT, third)
    assert torch.equal(first.embedding.weight, third.embedding.weight)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path, damage):
    run(tmp_path)
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    content = {"cut": content[:-9], "flipped": content, "empty": b"", "text": b"no checkpoint"}[
        damage
    ]
    path.write_bytes(content)
    log = (tmp_path / "log.csv").read_bytes()
    for use in (lambda: run(tmp_path), lambda: load_weights(path, make())):
        with pytest.raises(CheckpointError, match=r"damaged.*Expected.*Nothing was overwritten"):
            use()
    assert path.read_bytes() == content
    assert (tmp_path / "log.csv").read_bytes() == log


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(CheckpointError, match=r"of another run.*resume=False"):
        run(tmp_path, settings=Settings(**{**vars(SETTINGS), "seed": 5}))
    with pytest.raises(CheckpointError, match="of another model"):
        run(tmp_path, model=make(dim=8))
    run(tmp_path, settings=Settings(**{**vars(SETTINGS), "seed": 5}), resume=False)


def test_other_data_of_as_many_rows_is_another_run(tmp_path):
    run(tmp_path, data="0123", beside={"tokens": b"old"})
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"it had {'data': '0123'}; expected {'data': '4567'"):
        run(tmp_path, data="4567", beside={"tokens": b"new"})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    (tmp_path / "tokens").unlink()
    run(tmp_path, data="0123", beside={"tokens": b"old"})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, state = load_checkpoint(path)
    assert state == {"step": 1} and torch.equal(tensors["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_ctrl_c_saves_and_exits(tmp_path):
    program = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "import os, signal, test_training\n"
        "advance = test_training.train.__globals__['_advance']\n"
        "def step(run, *rest):\n"
        "    if run.step == 12: os.kill(os.getpid(), signal.SIGINT)\n"
        "    advance(run, *rest)\n"
        "test_training.train.__globals__['_advance'] = step\n"
        f"test_training.run({str(tmp_path)!r})\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 130, ended.stderr
    assert "Stopped after step 13 of 23" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert load_checkpoint(tmp_path / CHECKPOINT)[1]["step"] == 13
    resumed, whole = run(tmp_path)[0], run(None)[0]
    assert torch.equal(resumed.embedding.weight, whole.embedding.weight)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_epoch_has_every_row_once_and_like_lengths_together():
    lengths = torch.randint(1, 100, (1003,)).tolist()
    for order in (Order(1003, 10, seed=1), Order(1003, 10, 1, lengths)):
        assert len(set(order.epoch(0).flatten().tolist())) == 1000
        assert not torch.equal(order.epoch(0), order.epoch(1))
        batches = order.batches(order.steps_per_epoch + 2)
        assert torch.equal(next(batches), order.epoch(1)[2])

    def spread(order):
        batches = torch.tensor(lengths)[order.epoch(0)]
        return float((batches.amax(1) - batches.amin(1)).double().mean())

    assert spread(Order(1003, 10, 1, lengths)) < 0.1 * spread(Order(1003, 10, 1))
    with pytest.raises(ValueError, match="smaller batch"):
        Order(5, 6)


def test_the_rate_warms_up_and_falls():
    settings = Settings(steps=100, warmup=10, learning_rate=2.0)
    rates = [settings.rate(step) for step in range(101)]
    assert rates[0] == 0.2 and rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert abs(rates[100] - 0.02) < 1e-12
