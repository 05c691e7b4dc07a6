"""PP-OCRv4's text recogniser, its attention in PyTorch, the rest in ONNX Runtime.

SVTR: Scene Text Recognition with a Single Visual Model (Du et al., 2022) describes the blocks.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx.utils import Extractor
from torch import Tensor, nn

import manyheads as mh
from manyheads.demo_models import PackagedModel

RECOGNISER = PackagedModel(
    name="PP-OCRv4 recogniser",
    requirement="rapidocr-onnxruntime==1.4.4",
    sha256="971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
    member="rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
    megabytes=15,
    licence="Apache-2.0",
    member_sha256="48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
)

#: Names in the ONNX file: the columns [1, W, 120] before and after the blocks, ...
BEFORE, AFTER = "transpose_43.tmp_0", "p2o.Add.275"
#: ... what goes past them (a short cut, the width W), and the first weights of each block.
PAST = ("p2o.AveragePool.1", "shape_3.tmp_0_slice_1")
FIRST_NORM, FIRST_LINEAR = 43, 77

HEADS, CHANNELS = 8, 120


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): a pre-norm encoder block.

    weights: the arrays of the ONNX file by name; linear weights there are [inputs, outputs].
    """

    def __init__(self, weights: dict[str, Tensor], norm: int, linear: int) -> None:
        super().__init__()
        self.norm = layer_norm(weights, norm, eps=1e-5)
        self.attention = mh.MultiHeadAttention(CHANNELS, HEADS)
        qkv, bias = weights[f"linear_{linear}.w_0"].T, weights[f"linear_{linear}.b_0"]
        for name, weight_part, bias_part in zip(
            ("q_proj", "k_proj", "v_proj"), qkv.chunk(3), bias.chunk(3), strict=True
        ):
            fill(self.attention.get_submodule(name), weight_part, bias_part)
        out = weights[f"linear_{linear + 1}.w_0"].T
        fill(self.attention.out_proj, out, weights[f"linear_{linear + 1}.b_0"])
        self.mlp_norm = layer_norm(weights, norm + 1, eps=1e-5)
        layers = []
        for number in (linear + 2, linear + 3):
            weight, bias = weights[f"linear_{number}.w_0"].T, weights[f"linear_{number}.b_0"]
            layers.append(fill(nn.Linear(weight.shape[1], weight.shape[0]), weight, bias))
        self.mlp = nn.Sequential(layers[0], nn.SiLU(), layers[1])

    def forward(self, columns: Tensor) -> Tensor:
        """[1, W, 120] to the same."""
        columns = columns + self.attention(self.norm(columns))
        return columns + self.mlp(self.mlp_norm(columns))


def fill(module: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """Put these values into the module's parameters."""
    module.load_state_dict({"weight": weight, "bias": bias})
    return module


def layer_norm(weights: dict[str, Tensor], number: int, eps: float) -> nn.Module:
    """A layer norm over the channels with the file's weights."""
    names = (f"layer_norm_{number}.w_0", f"layer_norm_{number}.b_0")
    return fill(nn.LayerNorm(CHANNELS, eps=eps), *(weights[name] for name in names))


class Recogniser:
    """The model cut in three, and whole: `parts(picture)` and `whole(picture)` should agree."""

    def __init__(self, file: Path) -> None:
        model = onnx.load(file)
        self.characters = characters(model)
        weights = {
            node.output[0]: torch.from_numpy(onnx.numpy_helper.to_array(node.attribute[0].t).copy())
            for node in model.graph.node
            if node.op_type == "Constant"
        }
        self.blocks = nn.Sequential(
            Block(weights, FIRST_NORM, FIRST_LINEAR),
            Block(weights, FIRST_NORM + 2, FIRST_LINEAR + 4),
            layer_norm(weights, FIRST_NORM + 4, eps=1e-6),
        ).eval()
        cut = Extractor(onnx.shape_inference.infer_shapes(model))
        result = model.graph.output[0].name
        self._before = session(cut.extract_model(["x"], [BEFORE, *PAST]))
        self._after = session(cut.extract_model([AFTER, *PAST], [result]))
        self._middle = session(cut.extract_model(["x"], [AFTER]))
        self._whole = session(model)

    @torch.inference_mode()
    def parts(self, picture: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """(probabilities [W, 6625], columns after the blocks [W, 120]), by PyTorch in between.

        picture: [1, 3, 48, width], values from -1 to 1.
        """
        columns, *past = self._before.run(None, {"x": picture})
        columns = self.blocks(torch.from_numpy(columns)).numpy()
        given = dict(zip((AFTER, *PAST), (columns, *past), strict=True))
        return self._after.run(None, given)[0][0], columns[0]

    def whole(self, picture: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The same by ONNX Runtime alone."""
        given = {"x": picture}
        return self._whole.run(None, given)[0][0], self._middle.run(None, given)[0][0]

    def decode(self, probabilities: NDArray[Any]) -> str:
        """Greedy CTC (Graves et al., 2006): repeats of a column become one, blanks none."""
        best = [number for number, _ in groupby(probabilities.argmax(-1).tolist())]
        return "".join(self.characters[number] for number in best).strip()


def characters(model: onnx.ModelProto) -> list[str]:
    """What each class of the head stands for: nothing, the file's own list, a space."""
    listed = {entry.key: entry.value for entry in model.metadata_props}["character"]
    return ["", *listed.split("\n"), " "]


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, on as many threads as PyTorch uses."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model.SerializeToString(), options)
