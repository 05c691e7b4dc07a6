"""Looking at what heads attend to, in memory that does not grow with Lq * Lk."""

from .functional import measure
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
from .page import Page, view

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
    "Page",
    "Received",
    "Top",
    "TopKeys",
    "WeightRows",
    "measure",
    "view",
]
