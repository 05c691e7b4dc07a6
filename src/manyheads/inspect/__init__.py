"""Looking at what heads attend to, in memory that does not grow with Lq * Lk."""

from .contributions import contributions
from .functional import measure
from .importance import head_importance
from .letters import token_texts
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
from .records import Record, Seen
from .report import BEHAVIOURS, Behaviour, HeadScores, Report, report
from .rollout import rollout
from .serving import Server, serve
from .steps import Step
from .tracing import Trace, trace, trace_attention

__all__ = [
    "BEHAVIOURS",
    "Behaviour",
    "Entropy",
    "FirstKeysMass",
    "HeadScores",
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
    "Report",
    "Seen",
    "Server",
    "Step",
    "Top",
    "TopKeys",
    "Trace",
    "WeightRows",
    "contributions",
    "head_importance",
    "measure",
    "observe",
    "report",
    "rollout",
    "serve",
    "token_texts",
    "trace",
    "trace_attention",
    "view",
]
