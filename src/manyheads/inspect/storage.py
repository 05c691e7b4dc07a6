"""Records in a safetensors file: the tensors as they are, everything else as JSON beside them.

Tensor "3/positions" belongs to record 3, "3/1" is its answer to measure 1, "3/1/keys" one field of
an answer that has several. Measures are kept as their names and fields; only names of
`inspect.measures` are ever looked up, so that opening a file runs nothing of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from manyheads.errors import ArgumentError, ArgumentTypeError, MissingDependencyError
from manyheads.inspect import measures
from manyheads.inspect.measures import Measure

_FORMAT = "manyheads.Seen"
_VERSION = 1


def save(path: str | os.PathLike[str], records: Iterable[Any]) -> None:
    """Write `Record`s; the file appears whole or not at all, also where the power goes."""
    safetensors = _safetensors()
    tensors: dict[str, Tensor] = {}
    described = []
    asked: list[Measure] = []
    for number, record in enumerate(records):
        asked += [one for one in record.measures if one not in asked]
        tensors[f"{number}/positions"] = record.positions
        for which, answer in enumerate(record.answers):
            for name, tensor in _named(answer, record.measures[which]).items():
                tensors[f"{number}/{which}{name}"] = tensor
        described.append(
            {
                "layer": record.layer,
                "step": record.step,
                "heads": record.heads,
                "query_length": record.query_length,
                "key_length": record.key_length,
                "filled": record.filled,
                "measures": [asked.index(one) for one in record.measures],
                "answers": [_kind(answer) for answer in record.answers],
            }
        )
    metadata = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "measures": json.dumps([_describe(one) for one in asked], default=_refuse),
        "records": json.dumps(described),
    }
    # safetensors refuses tensors that share memory, as parts of one answer may.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch()  # raises where nothing can be written, and has the mode that files get here
        mode = partial.stat().st_mode
        safetensors.torch.save_file(copies, partial, metadata=metadata)
        partial.chmod(mode)
        _to_disk(partial)
        os.replace(partial, target)
        _to_disk(target.parent)  # its new name too
    except safetensors.SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's names, would outlast the machine."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The fields of each `Record` that `save` wrote."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ArgumentError(
                    f"{os.fspath(path)} is a safetensors file of something else (format: "
                    f"{metadata.get('format')!r}); expected one that Seen.save wrote."
                )
            if metadata.get("version") != str(_VERSION):
                raise ArgumentError(
                    f"{os.fspath(path)} has version {metadata.get('version')!r} of the format; "
                    f"expected {_VERSION}: read it with the manyheads that wrote it."
                )
            asked = [_restore(one) for one in json.loads(metadata["measures"])]
            records = json.loads(metadata["records"])
            return [_fields(n, one, asked, file.get_tensor) for n, one in enumerate(records)]
    except ArgumentError:
        raise
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError, AttributeError) as e:
        raise ArgumentError(
            f"{os.fspath(path)} cannot be read: {e}; expected a whole file that Seen.save wrote: "
            "save it again."
        ) from e


def _fields(number: int, described: Any, asked: list[Measure], tensor: Any) -> dict[str, Any]:
    answers = []
    for which, (kind, *names) in enumerate(described["answers"]):
        if names:
            made = getattr(measures, _known(kind, tuple))
            answers.append(made(**{name: tensor(f"{number}/{which}/{name}") for name in names}))
        else:
            answers.append(tensor(f"{number}/{which}"))
    return {
        **{key: described[key] for key in ("layer", "step", "query_length", "key_length")},
        "filled": described.get("filled"),  # files of before have none
        "heads": tuple(described["heads"]),
        "positions": tensor(f"{number}/positions"),
        "measures": tuple(asked[index] for index in described["measures"]),
        "answers": tuple(answers),
    }


def _named(answer: Any, measure: Measure) -> dict[str, Tensor]:
    """An answer's tensors, by what follows its number in their names."""
    if isinstance(answer, Tensor):
        return {"": answer}
    fields = getattr(type(answer), "_fields", None)
    if fields is not None and getattr(measures, type(answer).__name__, None) is type(answer):
        return {f"/{name}": getattr(answer, name) for name in fields}
    raise ArgumentTypeError(
        f"cannot save what {measure!r} answers: got {type(answer).__name__}; expected a tensor or "
        "one of manyheads' own tuples of tensors."
    )


def _kind(answer: Any) -> list[str]:
    return ["Tensor"] if isinstance(answer, Tensor) else [type(answer).__name__, *answer._fields]


def _describe(measure: Any) -> list[Any]:
    """[its class's name, its fields], as JSON can hold them."""
    kind = type(measure)
    if getattr(measures, kind.__name__, None) is not kind or not dataclasses.is_dataclass(measure):
        raise ArgumentTypeError(
            f"cannot save records of {measure!r}: got a measure of {kind.__module__}; expected "
            "manyheads' own, since a file cannot hold code. Leave it out of observe()."
        )
    return [kind.__name__, {f.name: getattr(measure, f.name) for f in dataclasses.fields(measure)}]


def _refuse(value: Any) -> Any:
    raise ArgumentTypeError(
        f"cannot save a measure that holds a {type(value).__name__}; expected numbers, texts and "
        "tuples of them. Leave it out of observe()."
    )


def _restore(described: Any) -> Measure:
    name, fields = described
    made = getattr(measures, _known(name, Measure))(
        **{key: _tuples(value) for key, value in fields.items()}
    )
    assert isinstance(made, Measure)
    return made


def _known(name: str, kind: type) -> str:
    """The name of a class in `inspect.measures`."""
    found = getattr(measures, name, None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ArgumentError(
            f"the file holds {name!r}, which this version of manyheads does not know; expected "
            "its own measures: read it with the manyheads that wrote it."
        )
    return name


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as missing:
        raise MissingDependencyError(
            "saving and loading what was seen needs safetensors, which is not installed. Install "
            "it with: pip install safetensors"
        ) from missing
    return safetensors
