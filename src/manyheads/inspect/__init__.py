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
from .observe import Observer, observe
from .page import Page, view
from .picture import plot
from .records import Record, Seen

__all__ = [
    "Entropy",
    "FirstKeysMass",
    "HeadSimilarity",
    "HeatMap",
    "LogSumExp",
    "MaxLogit",
    "MeanDistance",
    "Measure",
    "Observer",
    "OffsetMass",
    "Page",
    "Received",
    "Record",
    "Seen",
    "Top",
    "TopKeys",
    "WeightRows",
    "measure",
    "observe",
    "plot",
    "view",
]
