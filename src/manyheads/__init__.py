"""Multi-head attention for PyTorch: exact, fast on the CPU, and possible to look into."""

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
from .positions import Alibi, DenseBias, RelativeBias

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
    "KeyLengths",
    "KeyRange",
    "ManyHeadsError",
    "Mask",
    "MissingDependencyError",
    "Predicate",
    "QueryRows",
    "RelativeBias",
    "ShapeError",
    "StrictError",
    "Window",
    "attention",
    "explain",
    "info",
]
