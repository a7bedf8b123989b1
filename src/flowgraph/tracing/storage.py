"""The trace file: tensors and one JSON record in a safetensors container, with a required schema version.

Nothing is ever unpickled; a file is data, checked as it is read.
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
    """Write tensors and record atomically.

    Raises:
        OutputError: the path cannot be written.
        InvalidInputError: the record holds something that JSON cannot.
    """
    try:
        text = json.dumps(record | {"graph": _nulls(record.get("graph", {}))}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"record: must hold plain JSON values and finite numbers, got others ({error}); "
            "change the trace's provenance, or what else it was made with"
        ) from error
    metadata = {"format": FORMAT, "schema": str(SCHEMA), "record": text}
    copies = {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()
    }  # none may share memory
    with atomic_write(path) as temporary:
        try:
            save_file(copies, temporary, metadata)
        except SafetensorError as error:  # its own name for a full disk
            raise OutputError(
                f"path: must be writable, got {path}: {error}; make room, or choose another place"
            ) from error


def read_record(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_record` wrote.

    Raises:
        TraceFileError: missing, truncated, not a trace, or written by a newer version.
    """
    if Path(path).is_dir():
        raise TraceFileError(f"path: must be a trace file, got the folder {path}; give the .safetensors file inside it")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_schema(path, metadata)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        record = json.loads(metadata["record"])
        if isinstance(record, dict) and isinstance(record.get("graph"), dict):
            record["graph"] = {name: math.nan if fact is None else fact for name, fact in record["graph"].items()}
    except FileNotFoundError:
        raise TraceFileError(f"path: must be an existing trace file, got {path}; check the name") from None
    except (SafetensorError, OSError) as error:
        raise TraceFileError(
            f"path: must be a complete safetensors file, got {path} ({error}); "
            "it is truncated, or no trace (read_json reads the graph of a JSON export)"
        ) from error
    except (KeyError, json.JSONDecodeError) as error:
        raise TraceFileError(
            f"path: must hold a trace record, got {path} without a readable one; write it again"
        ) from error
    return tensors, record


def _nulls(facts: dict[str, Any]) -> dict[str, Any]:
    """Null for a loss that nobody knows (NaN), as of a graph that was read from an export."""
    return {name: None if isinstance(fact, float) and math.isnan(fact) else fact for name, fact in facts.items()}


def _check_schema(path: PathLike, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise TraceFileError(
            f"path: must be a file written by FlowTrace.save, got {path} without the format mark {FORMAT!r}"
        )
    version = metadata.get("schema", "")
    if not version.isdigit():
        raise TraceFileError(f"path: must state its schema version, got {version!r} in {path}; write it again")
    if int(version) != SCHEMA:
        newer = int(version) > SCHEMA
        raise TraceFileError(
            f"path: must have schema {SCHEMA}, got {version} in {path}; "
            + ("upgrade flowgraph-llm to read it" if newer else "trace it again with this version")
        )


def require_tensors(path: PathLike, tensors: dict[str, Tensor], expected: dict[str, tuple[torch.dtype, int]]) -> None:
    """Every expected tensor is there with its dtype and number of dimensions.

    Raises:
        TraceFileError: one is not.
    """
    for name, (dtype, ndim) in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.ndim != ndim:
            got = "none" if tensor is None else f"{tensor.dtype} with {tensor.ndim} dimensions"
            raise TraceFileError(
                f"path: tensor {name!r} must be {dtype} with {ndim} dimensions, got {got} in {path}; write it again"
            )
