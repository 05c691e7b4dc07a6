"""Looking at what heads attend to, in memory that does not grow with Lq * Lk."""

from .functional import measure
from .importance import head_importance
from .measures import (
    Entropy,
    FirstKeysMass,
    HeadSimilarity,
    HeatMap,
    LogSumExp,
    MaxLogit,
    MeanDistance,
    Measure,
    OffsetMass,
    Received,
    Top,
    TopKeys,
    WeightRows,
)
from .steps import Step
from .tracing import Trace, trace, trace_attention

__all__ = [
    "Entropy",
    "FirstKeysMass",
    "HeadSimilarity",
    "HeatMap",
    "LogSumExp",
    "MaxLogit",
    "MeanDistance",
    "Measure",
    "OffsetMass",
    "Received",
    "Step",
    "Top",
    "TopKeys",
    "Trace",
    "WeightRows",
    "head_importance",
    "measure",
    "trace",
    "trace_attention",
]
