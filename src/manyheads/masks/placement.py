"""Where a call's query rows stand among its keys: by query_start, or by a mask that places them.

Documents align every document's queries with its own keys; KeyLengths align the last query with
the last real key. One expression has at most one mask that places the rows.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from manyheads.errors import ArgumentError, ShapeError
from manyheads.masks.frame import DocumentTable, Frame
from manyheads.spec import Geometry, PerBatch, QueryPositions


class Placing(Protocol):
    """What a mask says that places the query rows; masks are equal when they place them alike."""

    _aligns: str | None

    def _document_table(self, geometry: Geometry) -> DocumentTable: ...

    def _query_start(self, geometry: Geometry) -> PerBatch: ...


PlacingT = TypeVar("PlacingT", bound=Placing)


def default_positions(geometry: Geometry) -> QueryPositions:
    """The rows from query_start on; by default the last query stands at the last key."""
    start = geometry.query_start
    if start is None:
        return QueryPositions(geometry.k_len - geometry.q_len)
    if isinstance(start, Tensor):
        if start.shape != (geometry.batch,):
            raise ShapeError(
                "query_start must be an int or an integer tensor [B]; got shape "
                f"{list(start.shape)} for batch size {geometry.batch}. "
                "Give one start per batch element."
            )
        return QueryPositions(start.to(geometry.device, torch.int32))
    return QueryPositions(start)


def aligned_frame(aligning: list[PlacingT], geometry: Geometry) -> Frame:
    """The frame where Documents or KeyLengths place the query rows."""
    documents = [mask for mask in aligning if mask._aligns == "documents"]
    start = geometry.query_start
    if documents:
        chosen = _only(documents, "Documents", "Use the same Documents throughout the expression.")
        if start is not None:
            raise ArgumentError(
                "query_start cannot be given together with Documents: every document aligns its "
                f"own queries with its own keys; got query_start={start!r}. "
                "Leave query_start out, or give k_lengths to say how long each document's keys are."
            )
        table = chosen._document_table(geometry)
        return Frame(geometry, QueryPositions(0, table.position), table)
    if start is None:
        lengths = _only(aligning, "KeyLengths", "Give query_start to place the queries.")
        return Frame(geometry, QueryPositions(lengths._query_start(geometry)))
    return Frame(geometry, default_positions(geometry))


def _only(masks: list[PlacingT], name: str, fix: str) -> PlacingT:
    first = masks[0]
    for other in masks[1:]:
        if torch.compiler.is_compiling() or first != other:
            raise ArgumentError(
                f"One {name} per expression may place the query rows; got {first!r} and "
                f"{other!r}. {fix}"
            )
    return first
