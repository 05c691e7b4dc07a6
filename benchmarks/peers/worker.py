"""One peer in its own environment and process: it takes requests on standard input, in JSON.

    python worker.py NAME THREADS

{"load": FOLDER, "causal": BOOL}: query.npy, key.npy and value.npy float32 [B, H, L, D] in FOLDER.
    Writes out.npy beside them; answers with the operator that is timed from then on, which is the
    fastest of those that the peer has for this.
{"time": COUNT}: answers with the seconds of one call, the mean of so many.

Nothing of manyheads is imported here: it is not installed in these environments.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Operator(NamedTuple):
    """run() computes; read() gives the result of the last run, [B, Hq, Lq, D]."""

    name: str
    run: Callable[[], Any]
    read: Callable[[], np.ndarray]


def onnxruntime_operators(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool, threads: int
) -> Iterator[Operator]:
    import onnxruntime
    from onnx import TensorProto, helper

    (batch, heads, rows, _), (_, kv_heads, length, _) = query.shape, key.shape

    def operator(
        name: str, domain: str, inputs: dict[str, np.ndarray], packed: bool, **attributes: int
    ) -> Operator:
        """The first output of one node; `packed`: it is [B, L, H * D]."""
        types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
        # Where a cache is given, outputs 1 and 2 are the same memory again.
        caches = [f"new_{n}" for n in ("past_key", "past_value") if n in inputs]
        node = helper.make_node(name, list(inputs), ["out", *caches], domain=domain, **attributes)
        graph = helper.make_graph(
            [node],
            name,
            [helper.make_tensor_value_info(n, types[str(x.dtype)], x.shape)
             for n, x in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output],
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Threads that wait for its next call would be in the way of ours.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        binding = session.io_binding()
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x) for n, x in inputs.items()}
        for n, x in values.items():
            binding.bind_ortvalue_input(n, x)
        binding.bind_output("out", "cpu")
        for n in caches:
            binding.bind_ortvalue_output(n, values[n.removeprefix("new_")])

        def read() -> np.ndarray:
            out = binding.get_outputs()[0].numpy()
            return out.reshape(batch, rows, heads, -1).swapaxes(1, 2) if packed else out

        return Operator(name, lambda: session.run_with_iobinding(binding), read)

    def pack(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)

    plain = {"query": query, "key": key, "value": value}
    yield operator("Attention", "", plain, False, is_causal=int(causal))
    together = {name: pack(x) for name, x in plain.items()}
    if heads == kv_heads:
        yield operator("MultiHeadAttention", "com.microsoft", together, True, num_heads=heads,
                       unidirectional=int(causal))  # fmt: skip
    if causal or rows == 1:  # this one is always causal, with a cache whose last rows are new
        together |= {
            "key": pack(key[:, :, length - rows :]),
            "value": pack(value[:, :, length - rows :]),
            "past_key": key.copy(),
            "past_value": value.copy(),
            "last": np.full(batch, length - 1, np.int32),
            "total": np.array([length], np.int32),
        }
        yield operator("GroupQueryAttention", "com.microsoft", together, True, num_heads=heads,
                       kv_num_heads=kv_heads)  # fmt: skip


def openvino_operators(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool, threads: int
) -> Iterator[Operator]:
    import openvino
    from openvino import opset13

    shape = query.shape
    if shape[1] != key.shape[1]:
        # The operator knows no groups. A single query may attend to all keys, so that the queries
        # of a group are rows of one head.
        assert shape[2] == 1, "groups of more than one query"
        query = query.reshape(shape[0], key.shape[1], -1, shape[3])
    parameters = [opset13.parameter(x.shape, np.float32) for x in (query, key, value)]
    node = opset13.scaled_dot_product_attention(*parameters, causal=causal)
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # otherwise bfloat16, where the processor has it
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    model = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", options)
    request = model.create_infer_request()
    for index, x in enumerate((query, key, value)):
        request.set_input_tensor(index, openvino.Tensor(x, shared_memory=True))
    yield Operator(
        "ScaledDotProductAttention",
        request.infer,
        lambda: request.get_output_tensor(0).data.reshape(shape),
    )


def zentorch_operators(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, causal: bool, threads: int
) -> Iterator[Operator]:
    import torch
    import zentorch  # noqa: F401

    torch.set_num_threads(threads)
    inputs = [torch.from_numpy(x) for x in (query, key, value)]
    # What it puts in the place of PyTorch's operator in a compiled model.
    attend = torch.ops.zentorch.zentorch_sdpa

    def run() -> torch.Tensor:
        return attend(*inputs, is_causal=causal)[0]

    yield Operator("zentorch_sdpa", run, lambda: run().numpy())


OPERATORS = {
    "onnxruntime": onnxruntime_operators,
    "openvino": openvino_operators,
    "zentorch": zentorch_operators,
}


def seconds_per_call(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


class Worker:
    def __init__(self, name: str, threads: int) -> None:
        self.operators, self.threads = OPERATORS[name], threads
        self.inputs: list[np.ndarray] = []  # kept, since operators read them in place
        self.chosen: Operator | None = None

    def load(self, folder: Path, causal: bool) -> dict[str, Any]:
        self.chosen, shortest = None, float("inf")
        self.inputs = [np.load(folder / f"{name}.npy") for name in ("query", "key", "value")]
        for operator in self.operators(*self.inputs, causal, self.threads):
            operator.run()
            seconds = min(seconds_per_call(operator.run, 1) for _ in range(3))
            if seconds < shortest:
                self.chosen, shortest = operator, seconds
        assert self.chosen is not None
        self.chosen.run()
        np.save(folder / "out.npy", self.chosen.read())
        return {"operator": self.chosen.name}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if "load" in request:
                return self.load(Path(request["load"]), request["causal"])
            assert self.chosen is not None
            return {"seconds": seconds_per_call(self.chosen.run, request["time"])}
        except Exception as error:  # whatever it is, the other side says so in the table
            return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    # Libraries may print; what they print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1], int(sys.argv[2]))
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
