"""Multi-head attention for PyTorch: exact, fast on the CPU, and possible to look into."""

from .caches import KVCache
from .dispatch import Explanation
from .environment import Info, info
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendError,
    DeviceError,
    ManyHeadsError,
    MissingDependencyError,
    ShapeError,
    StrictError,
)
from .functional import attention, explain
from .masks import (
    Causal,
    Chunks,
    Dense,
    Documents,
    FirstKeys,
    KeyLengths,
    KeyRange,
    Mask,
    Predicate,
    QueryRows,
    Window,
)
from .module import MultiHeadAttention
from .positions import Alibi, DenseBias, RelativeBias
from .rotary import LinearScaling, Llama3Scaling, NTKScaling, Rotary, YarnScaling

__all__ = [
    "Alibi",
    "ArgumentError",
    "ArgumentTypeError",
    "BackendError",
    "Causal",
    "Chunks",
    "Dense",
    "DenseBias",
    "DeviceError",
    "Documents",
    "Explanation",
    "FirstKeys",
    "Info",
    "KVCache",
    "KeyLengths",
    "KeyRange",
    "LinearScaling",
    "Llama3Scaling",
    "ManyHeadsError",
    "Mask",
    "MissingDependencyError",
    "MultiHeadAttention",
    "NTKScaling",
    "Predicate",
    "QueryRows",
    "RelativeBias",
    "Rotary",
    "ShapeError",
    "StrictError",
    "Window",
    "YarnScaling",
    "attention",
    "explain",
    "info",
]
