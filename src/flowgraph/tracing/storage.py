"""The trace file: tensors and one JSON record in a safetensors container, with a required schema version.

The file holds data alone: it is checked as it is read, and nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowgraph.errors import InvalidInputError, OutputError, TraceFileError
from flowgraph.files import PathLike, atomic_write

FORMAT = "flowgraph-trace"
SCHEMA = 1


def write_record(path: PathLike, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors and a record to one file, atomically.

    Args:
        path: the file.
        tensors: by name; on any device.
        record: plain JSON values. A NaN in ``record["graph"]`` marks a loss that is not known.

    Raises:
        OutputError: the path cannot be written.
        InvalidInputError: the record holds something that JSON cannot.
    """
    storable = {**record, "graph": _nan_to_null(record.get("graph", {}))}
    try:
        text = json.dumps(storable, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"record: must hold plain JSON values and finite numbers, got others ({error}); "
            "change the trace's provenance, or what else it was made with"
        ) from error
    metadata = {"format": FORMAT, "schema": str(SCHEMA), "record": text}

    # safetensors refuses tensors that share memory, so each is copied.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(copies, temporary, metadata)
        except SafetensorError as error:
            # safetensors raises its own error for a full disk.
            raise OutputError(
                f"path: must be writable, got {path}: {error}; free some space, or choose another place"
            ) from error


def read_record(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the record that :func:`write_record` wrote.

    Raises:
        TraceFileError: missing, truncated, not a trace, or written by a newer version.
    """
    if Path(path).is_dir():
        raise TraceFileError(f"path: must be a trace file, got the folder {path}; give the .safetensors file inside it")
    try:
        # The schema is checked before the tensors are read.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_schema(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        record = json.loads(metadata["record"])
    except FileNotFoundError:
        raise TraceFileError(f"path: must be an existing trace file, got {path}; check the name") from None
    except (SafetensorError, OSError) as error:
        raise TraceFileError(
            f"path: must be a complete safetensors file, got {path} ({error}); "
            "it is truncated or not a trace (read_json reads the graph of a JSON export)"
        ) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise TraceFileError(
            f"path: must hold a trace record, got {path} without a readable one; write it again"
        ) from error

    # JSON has no NaN; the graph writes it as null.
    if isinstance(record, dict) and isinstance(record.get("graph"), dict):
        record["graph"] = _null_to_nan(record["graph"])
    return tensors, record


def _nan_to_null(facts: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN, which JSON cannot hold, by null: a loss that is not known, as of a graph read from an export."""
    storable = {}
    for name, fact in facts.items():
        is_unknown = isinstance(fact, float) and math.isnan(fact)
        storable[name] = None if is_unknown else fact
    return storable


def _null_to_nan(facts: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`_nan_to_null`."""
    return {name: math.nan if fact is None else fact for name, fact in facts.items()}


def _check_schema(path: PathLike, metadata: dict[str, str]) -> None:
    """Refuse a file of another program or of another schema version."""
    # Other programs write safetensors files too, for example weights.
    if metadata.get("format") != FORMAT:
        raise TraceFileError(
            f"path: must be a file written by FlowTrace.save, got {path} without the format mark {FORMAT!r}; "
            "choose another file"
        )
    version = metadata.get("schema", "")
    if not version.isdigit():
        raise TraceFileError(f"path: must state its schema version, got {version!r} in {path}; write it again")
    if int(version) > SCHEMA:
        remedy = "upgrade flowgraph-llm to read it"
    else:
        remedy = "trace it again with this version"
    if int(version) != SCHEMA:
        raise TraceFileError(f"path: must have schema {SCHEMA}, got {version} in {path}; {remedy}")


def require_tensors(path: PathLike, tensors: dict[str, Tensor], expected: dict[str, tuple[torch.dtype, int]]) -> None:
    """Check that every expected tensor exists with its dtype and number of dimensions.

    Args:
        path: the file, for messages.
        tensors: what the file holds.
        expected: dtype and number of dimensions by name.

    Raises:
        TraceFileError: a tensor is missing or different.
    """
    for name, (dtype, ndim) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            got = "none"
        elif tensor.dtype != dtype or tensor.ndim != ndim:
            got = f"{tensor.dtype} with {tensor.ndim} dimensions"
        else:
            continue
        raise TraceFileError(
            f"path: tensor {name!r} must be {dtype} with {ndim} dimensions, got {got} in {path}; write it again"
        )
