import sys

import numpy as np
import pytest
import read_text
import torch
from onnx import TensorProto, helper, numpy_helper
from pictures import read_picture
from PIL import Image, ImageOps
from read_text import draw, main, measures, pixels
from recogniser import AFTER, BEFORE, CHANNELS, HEADS, PAST, Recogniser

from manyheads.errors import ArgumentError

CLASSES = 11  # none, nine characters, a space
CHARACTERS = "abcdefghi"


def file_of_the_same_plan(path):
    """Random weights in an ONNX graph with the recogniser's names: a pooling for the network
    before the blocks, a linear layer for the head; the blocks are spelt out as in the real one."""
    nodes, random = [], np.random.default_rng(61)

    def constant(name, values):
        tensor = numpy_helper.from_array(np.asarray(values), name)
        nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def weight(name, *shape, middle=0.0):
        values = middle + random.normal(size=shape) / (shape[0] ** 0.5 if shape[1:] else 10)
        return constant(name, values.astype(np.float32))

    def op(kind, *inputs, name=None, **attributes):
        name = name or f"{kind}.{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def norm(x, number, eps, name=None):
        mean = op("ReduceMean", x, axes=[-1])
        centred = op("Sub", x, mean)
        variance = op("ReduceMean", op("Mul", centred, centred), axes=[-1])
        shift = constant(f"eps.{len(nodes)}", np.float32(eps))
        scaled = op("Div", centred, op("Sqrt", op("Add", variance, shift)))
        weighed = op("Mul", scaled, weight(f"layer_norm_{number}.w_0", CHANNELS, middle=1.0))
        return op("Add", weighed, weight(f"layer_norm_{number}.b_0", CHANNELS), name=name)

    def linear(x, number, inputs, outputs):
        product = op("MatMul", x, weight(f"linear_{number}.w_0", inputs, outputs))
        return op("Add", product, weight(f"linear_{number}.b_0", outputs))

    def block(x, first_norm, first):
        head = CHANNELS // HEADS
        split = constant(f"split.{first}", np.array([0, -1, 3, HEADS, head]))
        qkv = linear(norm(x, first_norm, 1e-5), first, CHANNELS, 3 * CHANNELS)
        qkv = op("Transpose", op("Reshape", qkv, split), perm=[2, 0, 3, 1, 4])
        q, k, v = (
            op("Gather", qkv, constant(f"part.{first}.{i}", np.int64(i)), axis=0) for i in range(3)
        )
        q = op("Mul", q, constant(f"scale.{first}", np.float32(head**-0.5)))
        scores = op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2]))
        out = op("MatMul", op("Softmax", scores, axis=3), v)
        joined = constant(f"joined.{first}", np.array([0, -1, CHANNELS]))
        out = op("Reshape", op("Transpose", out, perm=[0, 2, 1, 3]), joined)
        x = op("Add", x, linear(out, first + 1, CHANNELS, CHANNELS))
        inner = linear(norm(x, first_norm + 1, 1e-5), first + 2, CHANNELS, 2 * CHANNELS)
        inner = op("Mul", inner, op("Sigmoid", inner))
        return op("Add", x, linear(inner, first + 3, 2 * CHANNELS, CHANNELS))

    pooled = op("AveragePool", "x", name=PAST[0], kernel_shape=[48, 8], strides=[48, 8])
    columns = op("Transpose", op("Squeeze", pooled, axes=[2]), perm=[0, 2, 1])
    start = op("MatMul", columns, weight("lift", 3, CHANNELS), name=BEFORE)
    width = op("Cast", op("Shape", pooled), to=TensorProto.INT32)
    op("Identity", width, name=PAST[1])
    x = block(block(start, 43, 77), 45, 81)
    x = norm(x, 47, 1e-6, name=AFTER)
    short_cut = op("ReduceMean", PAST[0], axes=[0, 1, 2, 3], keepdims=0)
    widths = op("ReduceMean", op("Cast", PAST[1], to=TensorProto.FLOAT), axes=[0], keepdims=0)
    bias = op("Mul", short_cut, widths)
    logits = op("Add", linear(x, 85, CHANNELS, CLASSES), bias)
    op("Softmax", logits, axis=2, name="probabilities")
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, 48, None])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, None, CLASSES])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)
    helper.set_model_props(model, {"character": "\n".join(CHARACTERS)})
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    return Recogniser(file_of_the_same_plan(tmp_path_factory.mktemp("tiny") / "tiny.onnx"))


@pytest.mark.parametrize("width", [320, 331, 1009])
def test_blocks_in_pytorch_are_those_of_the_file(recogniser, width):
    picture = np.random.default_rng(width).uniform(-1, 1, (1, 3, 48, width)).astype(np.float32)
    ours, columns = recogniser.parts(picture)
    whole, whole_columns = recogniser.whole(picture)
    assert columns.shape == (width // 8, CHANNELS) and ours.shape == (width // 8, CLASSES)
    assert np.abs(columns - whole_columns).max() < 1e-5 * np.abs(whole_columns).max()
    assert np.abs(ours - whole).max() < 1e-5


def test_repeats_become_one_and_blanks_none(recogniser):
    best = torch.tensor([0, 3, 3, 0, 3, 10, 10, 1, 0, 0, 10])
    probabilities = torch.nn.functional.one_hot(best, CLASSES).numpy()
    assert recogniser.decode(probabilities) == "cc a"


def test_pixels_are_scaled_turned_and_filled_up():
    picture = Image.new("RGB", (20, 24), (255, 0, 51))
    values = pixels(picture)
    assert values.shape == (1, 3, 48, 320)
    assert values[0, :, 7, 39].tolist() == pytest.approx([-0.6, -1, 1])  # blue first
    assert not values[..., 40:].any()
    assert pixels(draw("a line that is longer than that " * 2)).shape[3] > 320


def test_what_is_transparent_is_paper(tmp_path):
    picture = draw("a tool")
    ink = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    ink.putalpha(ImageOps.invert(picture.convert("L")))
    ink.save(tmp_path / "ink.png")
    read = pixels(read_picture(tmp_path / "ink.png"))
    np.testing.assert_allclose(read, pixels(picture), atol=2 / 127.5)  # rounded twice


def test_measures_and_pictures_of_yours(recogniser, tmp_path, monkeypatch, capsys):
    found = measures(recogniser)
    assert found["same_text"] and found["difference"] < 1e-5
    draw("some text").save(tmp_path / "line.png")
    monkeypatch.setattr(read_text, "fetch", lambda _: tmp_path / "tiny.onnx")
    file_of_the_same_plan(tmp_path / "tiny.onnx")
    monkeypatch.setattr(sys, "argv", ["read_text.py", str(tmp_path / "line.png")])
    main()
    assert "from ONNX Runtime" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["read_text.py", str(tmp_path / "tiny.onnx")])
    with pytest.raises(
        SystemExit, match=r"read_text: could not read .*tiny\.onnx: cannot identify"
    ):
        main()


@pytest.mark.parametrize("name", ["text", "cut", "missing", "damaged"])
def test_what_is_no_whole_picture_is_refused(tmp_path, name):
    file = tmp_path / "line.png"
    draw("some text").save(file)
    whole = file.read_bytes()
    data = {
        "text": b"no picture",
        "cut": whole[: len(whole) // 2],
        "damaged": whole[:60] + bytes(20) + whole[80:],
    }
    file.unlink() if name == "missing" else file.write_bytes(data[name])
    with pytest.raises(ArgumentError, match=r"could not read .*line\.png: .*Expected: a picture"):
        read_picture(file)


def test_sixteen_bits_are_scaled_not_cut(tmp_path):
    values = np.array([[0, 500, 40_000, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    read = np.asarray(read_picture(tmp_path / "grey.png"))[0, :, 0]
    np.testing.assert_allclose(read, values[0] / 257, atol=1)


@pytest.mark.parametrize("most", [30, 50])  # Pillow refuses twice its limit, and warns above it
def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, most):
    Image.new("L", (7, 11)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(ArgumentError, match=rf"large\.png: .*at most {most} pixels"):
        read_picture(tmp_path / "large.png")


def test_a_strip_is_no_line():
    assert pixels(Image.new("L", (100, 1))).shape == (1, 3, 48, 4800)
    with pytest.raises(ArgumentError, match="got a picture of 101 x 1 pixels; expected one line"):
        pixels(Image.new("L", (101, 1)))
