"""Every error manyheads raises on purpose, in one tree.

Each is also the standard exception a caller would expect, so code that knows nothing of manyheads
catches it all the same. A message says what was wrong, what was got, what was expected, and how to
mend it.
"""

from __future__ import annotations


class ManyHeadsError(Exception):
    """Base class of all errors raised by manyheads."""


class ArgumentError(ManyHeadsError, ValueError):
    """An argument has a value that cannot mean anything (a negative window, an unknown name)."""


class ShapeError(ArgumentError):
    """A tensor has the wrong rank, or two tensors' sizes do not fit each other."""


class ArgumentTypeError(ManyHeadsError, TypeError):
    """An argument is of the wrong Python type, or a tensor of the wrong dtype."""


class DeviceError(ArgumentError):
    """Tensors of one call live on different devices."""


class BackendError(ManyHeadsError, RuntimeError):
    """No backend, or not the one asked for by name, can run the call; the reasons are listed."""


class StrictError(BackendError):
    """`strict=True` was given and the call would have used memory that grows with Lq * Lk."""


class NotRecordedError(ManyHeadsError, KeyError):
    """A layer or measure was looked up that was not observed."""

    __str__ = Exception.__str__  # KeyError's would quote the message


class MissingDependencyError(ManyHeadsError, ImportError):
    """An optional package is needed for this feature and is not installed."""


class FetchError(ManyHeadsError, RuntimeError):
    """A model's files could not be fetched, or are not the ones that were expected."""
