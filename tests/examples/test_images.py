import dataclasses
import typing

import images
import matplotlib.image
import numpy as np
import pytest
import torch
from checkpoints import CheckpointError
from digit_pictures import attention_maps, draw_attention, prepared
from images import fit, load, varied
from tolerance import assert_derived_close
from typer.testing import CliRunner
from vision_transformer import TASKS, VisionTransformer

TASK = dataclasses.replace(TASKS["digits"], epochs=2, held_out=97, layers=2)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.mark.parametrize("attention", ["manyheads", "sdpa"])
def test_it_learns(digits, attention, tmp_path):
    pictures, labels = (x[:400] for x in digits)
    task = dataclasses.replace(TASK, epochs=12)
    _, found = fit(task, pictures, labels, attention=attention, folder=tmp_path)
    assert found["accuracy"] > 0.4  # by chance: 0.1
    _, again = fit(task, pictures, labels, attention=attention, folder=tmp_path)
    assert again["accuracy"] == found["accuracy"]
    with pytest.raises(CheckpointError, match=r"of another run: it had {'data'"):
        fit(task, 1 - pictures, labels, attention=attention, folder=tmp_path)


def test_the_last_pictures_are_never_trained_on(digits):
    pictures, labels = (x[:300].clone() for x in digits)
    pictures[-97:] = torch.nan
    model, _ = fit(TASK, pictures, labels)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_attention_is_that_of_the_class_token():
    torch.manual_seed(2)
    model, pictures = VisionTransformer(TASK).eval(), torch.rand(3, 8, 8)
    weights, whole = attention_maps(model, pictures)
    kept = []
    last = model.stack.layers[-1].attend
    hook = last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(pictures)
    hook.remove()

    def heads(projection):
        return projection(kept[0]).unflatten(-1, (4, 16)).transpose(1, 2)

    scores = heads(last.q_proj)[:, :, :1] @ heads(last.k_proj).transpose(2, 3) / 4
    expected = scores.softmax(-1)[:, :, 0, 1:].detach()
    assert weights.shape == (3, 4, 4, 4) and whole.shape == (3, 4, 4)
    assert_derived_close(weights.flatten(2), expected)
    assert ((whole.sum((1, 2)) > 0) & (whole.sum((1, 2)) < 1)).all()


def test_drawing(tmp_path):
    file = tmp_path / "attention.png"
    draw_attention(VisionTransformer(TASK).eval(), torch.rand(2, 8, 8), file)
    assert matplotlib.image.imread(file).std() > 0.05


@pytest.mark.parametrize("dark", [True, False])
def test_your_picture_is_made_like_mnists(tmp_path, dark):
    page = np.zeros((90, 130), dtype=np.uint8)
    page[10:50, 100:110] = 255  # a tall stroke, far from the middle
    file = tmp_path / "one.png"
    matplotlib.image.imsave(file, page if dark else 255 - page, cmap="gray")
    digit = prepared(file)
    assert digit.shape == (28, 28) and digit.max() == 1
    rows, columns = (digit.sum(axis) > 0 for axis in (1, 0))
    assert rows.nonzero()[[0, -1], 0].tolist() == [4, 23]
    assert columns.nonzero()[[0, -1], 0].tolist() in ([11, 15], [12, 16])
    matplotlib.image.imsave(file, np.zeros((9, 9)), cmap="gray")
    with pytest.raises(ValueError, match="of one colour; expected a digit"):
        prepared(file)


def test_pictures_are_varied_around_themselves():
    picture = torch.zeros(500, 8, 8)
    picture[:, 3:5, 3:5] = 1
    changed = varied(picture, TASK)
    assert not torch.equal(changed[0], changed[1])
    assert changed.mean(0).argmax() in (27, 28, 35, 36)
    still = dataclasses.replace(TASK, turn=0.0, shift=0.0, zoom=0.0)
    torch.testing.assert_close(varied(picture, still), picture)


def test_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RUNS", tmp_path)
    monkeypatch.setitem(TASKS, "digits", TASK)
    command = CliRunner().invoke
    untrained = command(images.app, ["draw", str(tmp_path / "a.png"), "--name", "digits"])
    assert untrained.exit_code != 0 and "images.py train" in untrained.output
    unknown = command(images.app, ["train", "--name", "letters"])
    assert unknown.exit_code == 2 and "mnist" in unknown.output and "letters" in unknown.output
    assert set(typing.get_args(images.Name)) == set(TASKS)
    assert "held-out pictures right" in command(images.app, ["train", "--name", "digits"]).output
    drawn = command(images.app, ["draw", str(tmp_path / "a.png"), "--name", "digits"])
    assert drawn.exit_code == 0 and (tmp_path / "a.png").exists()
